"""Tiers with a trellis and scales in a byte, from rounding to the file and back."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pbq.config import QuantConfig
from pbq.gptq import coordinate_descent, quantize_weight, refit_scales
from pbq.grid import Grid, QuantizedWeight, TierGrid, TrellisGrid, fit_symmetric, fit_trellis
from pbq.hessian import proxy_loss
from pbq.linear import PackedLinear
from pbq.methods import waterfill
from pbq.pack import pack, unpack
from pbq.tunable import Rates, TunableWeight
from pbq_kernels import paths, trellis
from pbq_kernels.layout import PackedFormatError, PackedWeight, Tier, check_tensors
from pbq_kernels.reference import dequantize

pytestmark = pytest.mark.skipif(paths.compiled() is None, reason="no compiled CPU kernels")

N, K = 96, 80


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(W [N, K], H [K, K]) with correlated channels of different energy."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + torch.randn(K, K, generator=g) / K**0.5
    X = torch.randn(400, K, generator=g) @ mix * torch.linspace(0.3, 2, K)
    return torch.randn(N, K, generator=g) * 0.05, X.T @ X / 400


def tiers(memory: int, uneven: bool = False) -> tuple[tuple[Tier, ...], Tensor]:
    if memory:
        kinds = tuple(
            Tier(p, c, tied=True, trellis=memory, uneven=uneven) for p, c in ((1, 48), (2, 24))
        )
    else:
        kinds = (Tier(1, 48), Tier(2, 24, tied=True))
    tier_of = torch.tensor([0] * 8 + [1] * 48 + [2] * 24, dtype=torch.uint8)
    return (Tier(0, 8), *kinds), tier_of


def fit(W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
    return fit_trellis(W, weight, tier) if tier.trellis else fit_symmetric(W, weight, tier.planes)


def quantized(
    memory: int, scale_bits: int, uneven: bool = False, **options: int
) -> tuple[QuantizedWeight, float]:
    W, H = problem()
    qw, _, _ = quantize_weight(W, H, *tiers(memory, uneven), fit, scale_bits=scale_bits, **options)
    return qw, float(proxy_loss(W, qw.dequantize(), H))


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("memory", sorted(trellis.POLYNOMIALS))
def test_a_trellis_leaves_less_error_at_the_same_bits(memory: int, scale_bits: int) -> None:
    (coded, error), (plain, plain_error) = (quantized(m, scale_bits) for m in (memory, 0))
    assert coded.layout().stored_bits == plain.layout().stored_bits
    assert error < 0.95 * plain_error


@pytest.mark.parametrize("memory", sorted(trellis.POLYNOMIALS))
def test_uneven_levels_leave_less_at_the_same_bits(memory: int) -> None:
    (uneven, error), (even, even_error) = (quantized(memory, 8, u) for u in (True, False))
    assert uneven.layout().stored_bits == even.layout().stored_bits
    # the levels are those for many states, and four make less of them
    assert error < (0.995 if memory > 2 else 1.0) * even_error


def test_more_memory_leaves_less() -> None:
    assert quantized(8, 16)[1] < quantized(2, 16)[1]


def test_scales_in_a_byte_cost_nearly_nothing() -> None:
    (byte, error), (half, half_error) = (quantized(4, bits) for bits in (8, 16))
    assert error < 1.01 * half_error
    # two scales a row, and an exponent for each of the two
    assert half.layout().stored_bits - byte.layout().stored_bits == 8 * (2 * N - 2)


@pytest.mark.parametrize("scale_bits, uneven", [(8, False), (16, False), (8, True)])
def test_to_the_file_and_back(scale_bits: int, uneven: bool) -> None:
    qw, _ = quantized(4, scale_bits, uneven)
    pw = pack(qw)
    check_tensors(pw.layout, pw.tensors, values=True)
    assert torch.equal(dequantize(pw), qw.dequantize())
    assert torch.equal(dequantize(pw.plain()), qw.dequantize())
    back = unpack(pw)
    assert isinstance(back, QuantizedWeight) and back.scale_bits == scale_bits
    assert torch.equal(back.codes, qw.codes)
    assert torch.equal(pack(back).tensors["weight"], pw.tensors["weight"])


def test_uneven_levels_need_scales_of_a_byte() -> None:
    qw, _ = quantized(4, 16, True)
    with pytest.raises(PackedFormatError, match="uneven levels, which take 1 to 3 planes"):
        pack(qw)


@pytest.mark.parametrize("uneven", [False, True])
def test_codes_that_are_no_path_and_scales_that_are_no_byte_are_not_packed(uneven: bool) -> None:
    qw, _ = quantized(4, 8, uneven)
    column = int(qw.columns(1)[5])
    qw.codes[40, column] ^= 1
    with pytest.raises(ValueError, match="no path"):
        pack(qw)
    qw.codes[40, column] ^= 1
    qw.grids[1].scale = qw.grids[1].scale * 1.001
    with pytest.raises(ValueError, match="byte"):
        pack(qw)


def test_descent_and_scales_never_raise_the_loss() -> None:
    W, H = problem()
    qw, loss = quantized(4, 16, sweeps=0)
    for step in (refit_scales, coordinate_descent, refit_scales, coordinate_descent):
        step(W, H, qw)
        now = float(proxy_loss(W, qw.dequantize(), H))
        assert now <= loss * (1 + 1e-5)
        loss = now
    pack(qw)  # every column is still a path


def test_fitted_scales_follow_the_rows() -> None:
    g = torch.Generator().manual_seed(0)
    size = torch.logspace(-3, 1, 60)
    W = torch.randn(60, 400, generator=g) * size[:, None]
    grid = fit_trellis(W, torch.ones(400), Tier(1, 400, tied=True, trellis=4))
    assert isinstance(grid, TrellisGrid)
    # .395 is a Gaussian's best half step. Rows whose neighbours are far larger have no say in the
    # path, and the last one, which none follows, has more of it: at most what plain levels have.
    torch.testing.assert_close(grid.scale[20:-1, 0], 0.395 * size[20:-1], rtol=0.15, atol=0)
    assert 0.395 * size[-1] <= grid.scale[-1, 0] <= 0.498 * size[-1]
    error = (grid.nearest(W)[1] - W).pow(2).sum() / W.pow(2).sum()
    assert error < 0.33


def test_a_token_that_is_most_of_the_hessian_does_not_decide_the_scales() -> None:
    """A token of 300 times the usual size, as an attention sink is."""
    (some, sorted_of), left = tiers(8), {"costs": 0.0, "their roots": 0.0}
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(800, K, generator=g) @ (torch.eye(K) + torch.randn(K, K, generator=g) / 9)
        X[0] += 300 * torch.randn(K, generator=g)
        W, H = torch.randn(N, K, generator=g) * 0.05, X.T @ X / 800
        tier_of = torch.empty_like(sorted_of)
        tier_of[torch.argsort(H.diagonal() * W.pow(2).sum(0))] = sorted_of
        for name, each in (("costs", fit), ("their roots", waterfill.Waterfill().fit)):
            left[name] += proxy_loss(
                W, quantize_weight(W, H, some, tier_of, each)[0].dequantize(), H
            )
    assert left["their roots"] < 0.97 * left["costs"]


@pytest.mark.parametrize("uneven", [False, True])
def test_training_moves_scales_and_no_codes(uneven: bool) -> None:
    qw, _ = quantized(4, 8, uneven)
    W, _ = problem()
    tunable = TunableWeight(qw, W, Rates(latent_lr=0.1))
    assert len(tunable.latent) == 0
    torch.testing.assert_close(tunable(), qw.dequantize())
    (tunable() - W).pow(2).sum().backward()
    with torch.no_grad():
        for scale in tunable.scale:
            if scale.numel():
                assert scale.grad is not None and scale.grad.abs().max() > 0
                scale *= 1.03
    frozen = tunable.freeze()
    assert torch.equal(frozen.codes, qw.codes) and frozen.scale_bits == 8
    assert torch.equal(dequantize(pack(frozen)), frozen.dequantize())
    assert torch.equal(tunable.start().dequantize(), qw.dequantize())


@pytest.mark.parametrize("scale_bits, uneven", [(16, False), (8, True)])
def test_gradients_of_scales_are_those_of_the_dense_weight(scale_bits: int, uneven: bool) -> None:
    qw, _ = quantized(4, scale_bits, uneven)
    tunable = TunableWeight(qw, None, Rates())
    dW = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    tunable().backward(dW)
    for t in (1, 2):
        part, step = tunable.scale[t], 1e-2
        with torch.no_grad():
            part[0, 0, 7] += step
            higher = (tunable() * dW).sum()
            part[0, 0, 7] -= 2 * step
            lower = (tunable() * dW).sum()
            part[0, 0, 7] += step
        assert part.grad is not None
        torch.testing.assert_close(
            part.grad[0, 0, 7], (higher - lower) / (2 * step), rtol=2e-2, atol=1e-4
        )


@pytest.mark.parametrize(
    "memory, scale_bits, uneven", [(0, 16, False), (4, 8, False), (4, 8, True)]
)
def test_compiled_training_steps_are_those_of_torch(
    memory: int, scale_bits: int, uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    qw, _ = quantized(memory, scale_bits, uneven)
    fast = TunableWeight(qw, None, Rates(), torch.bfloat16)
    monkeypatch.setattr("pbq.tunable.compiled", lambda: None)
    slow = TunableWeight(qw, None, Rates(), torch.bfloat16)
    assert fast._whole is not None and slow._whole is None
    dW = torch.randn(N, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    for own in (fast, slow):
        with torch.no_grad():
            own.row *= torch.linspace(0.9, 1.1, N)
        own().backward(dW)
    assert fast().dtype == torch.bfloat16 and torch.equal(fast(), slow())
    for a, b in zip(fast.scale, slow.scale, strict=True):
        if a.numel():
            assert a.grad is not None and b.grad is not None
            largest = float(b.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * largest)


def test_weights_of_more_than_a_scale_each_are_left_to_torch() -> None:
    qw, _ = quantized(4, 8)
    assert TunableWeight(qw, None, Rates(), torch.float32)._whole is None
    free = replace(qw, tiers=(*qw.tiers[:2], Tier(2, 24)), scale_bits=16)
    free.grids = [*qw.grids[:2], TierGrid(torch.ones(N, 1, 2), None)]
    assert TunableWeight(free, None, Rates(), torch.bfloat16)._whole is None


@pytest.mark.parametrize("uneven", [False, True])
def test_a_module_in_use_holds_the_planes_once(uneven: bool) -> None:
    """The stored planes are let go, and come back bit by bit, from the kernel's plain ones."""
    pw = pack(quantized(4, 8, uneven)[0])
    stored = {name: tensor.clone() for name, tensor in pw.tensors.items()}
    linear = PackedLinear.from_packed(pw)
    del pw
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    y = linear(x)
    assert not isinstance(linear._buffers.held("weight"), Tensor)
    expected = x @ dequantize(PackedWeight(linear.layout, stored)).T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in stored.items():
        assert torch.equal(linear.state_dict()[name], tensor)


def test_a_file_that_lies_about_its_trellis_is_refused() -> None:
    layout = pack(quantized(4, 8)[0]).layout.to_dict()
    layout["tiers"][1]["trellis"] = 5
    with pytest.raises(PackedFormatError, match="memory 5"):
        type(pack(quantized(4, 8)[0]).layout).from_dict(layout)


def test_waterfill_has_trellises_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = QuantConfig()
    coded = waterfill.method(config).tiers([1, 2, 0, 4, 0])
    assert [(t.planes, t.columns, t.trellis) for t in coded] == [(0, 1, 0), (1, 2, 12), (3, 4, 12)]
    assert [t.uneven for t in coded] == [False, True, True]
    assert not any(t.uneven for t in waterfill.Waterfill(scale_bits=16).tiers([1, 2, 0, 4, 0]))
    monkeypatch.setattr(waterfill, "compiled", lambda: None)
    with caplog.at_level(logging.WARNING):
        plain = waterfill.method(config).tiers([1, 2, 0, 4, 0])
    assert [(t.planes, t.trellis, t.tied) for t in plain] == [
        (0, 0, False),
        (1, 0, False),
        (3, 0, True),
    ]
    assert "does without trellises" in caplog.text
