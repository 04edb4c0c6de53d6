"""A weight as the product of two factors: its bytes, its products, its training, its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pbq.contents import describe, describe_layer
from pbq.grid import Factors
from pbq.hessian import least_squares
from pbq.linear import PackedLinear
from pbq.pack import pack, unpack
from pbq.tunable import Rates, TunableFactors
from pbq.tune import optimise
from pbq_kernels import BACKENDS, PackedWeight, Tier, WeightLayout, dequant_matmul, select
from pbq_kernels.layout import PackedFormatError, check_tensors, unpack_bits
from pbq_kernels.reference import dequantize

RandomPacked = Callable[..., PackedWeight]

SHAPES = [(1, 1, 1), (33, 63, 9), (7, 40, 65), (48, 84, 56)]


def halves(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float16)


def example() -> PackedWeight:
    """Outer: + - over + +, rows times 1 and .5. Inner: + + - over - + +, rows times 2 and 1."""
    layout = WeightLayout(2, 3, (Tier(1, 3),), column_scale=True, rank=2)
    return PackedWeight(
        layout,
        {
            "weight": torch.tensor([[0b01], [0b11]], dtype=torch.uint8),
            "scale": halves(1, 0.5)[:, None],
            "inner_weight": torch.tensor([[0b011], [0b110]], dtype=torch.uint8),
            "inner_scale": halves(2, 1)[:, None],
            "inner_column_scale": halves(1, 1, 4),
        },
    )


def test_a_product_by_hand() -> None:
    """The inner rows are 2 2 -8 and -1 1 4: their difference, and half of their sum."""
    pw = example()
    assert dequantize(pw).tolist() == [[3, 1, -12], [0.5, 1.5, -2]]
    assert pw.layout.to_dict() == {
        "n": 2,
        "k": 3,
        "tiers": [{"planes": 1, "columns": 3}],
        "column_scale": True,
        "rank": 2,
    }
    # a byte a row of either factor, 2 + 2 + 3 numbers
    assert pw.stored_bits == pw.layout.stored_bits == 8 * (2 + 2) + 16 * 7
    outer, inner = pw.factors()
    assert outer.stored_bits + inner.stored_bits == pw.stored_bits
    x = torch.tensor([[1.0, 2.0, 0.5]])
    assert dequant_matmul(x, pw, "reference").tolist() == [[-1, 2.5]]


def twin(pw: PackedWeight) -> Tensor:
    """In float64, one entry of one factor at a time: s1[i] Σ_l U[i, l] m[l] V[l, j] s2[j]."""
    n, k, rank = pw.layout.n, pw.layout.k, pw.layout.rank
    t = {name: tensor.double() for name, tensor in pw.tensors.items()}
    signs = [
        2 * unpack_bits(pw.tensors[name], count).double() - 1
        for name, count in (("weight", rank), ("inner_weight", k))
    ]
    W = torch.zeros(n, k, dtype=torch.float64)
    for i in range(n):
        for l in range(rank):  # noqa: E741
            product = t["scale"][i, 0] * signs[0][i, l] * t["inner_scale"][l, 0]
            W[i] += product * signs[1][l]
    return W * t.get("inner_column_scale", torch.ones(k))


@pytest.mark.parametrize(("n", "k", "rank"), SHAPES)
@pytest.mark.parametrize("column_scale", [False, True])
def test_what_it_means_in_float64(
    random_packed: RandomPacked, n: int, k: int, rank: int, column_scale: bool
) -> None:
    pw = random_packed(n, k, (Tier(1, k),), rank=rank, column_scale=column_scale)
    torch.testing.assert_close(dequantize(pw).double(), twin(pw), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "k", "rank"), SHAPES)
def test_packing_is_exact(random_packed: RandomPacked, n: int, k: int, rank: int) -> None:
    pw = random_packed(n, k, (Tier(1, k),), rank=rank, column_scale=True)
    qw = unpack(pw)
    assert isinstance(qw, Factors) and qw.layout() == pw.layout
    assert torch.equal(qw.dequantize(), dequantize(pw))
    again = pack(qw)
    assert again.layout == pw.layout
    assert all(torch.equal(again.tensors[name], t) for name, t in pw.tensors.items())
    assert WeightLayout.from_dict(pw.layout.to_dict()) == pw.layout


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "rank"), SHAPES)
def test_two_kernels_in_a_row(
    random_packed: RandomPacked, name: str, dtype: torch.dtype, n: int, k: int, rank: int
) -> None:
    """In between the numbers are rounded to x's dtype once more."""
    pw = random_packed(n, k, (Tier(1, k),), rank=rank, column_scale=True)
    assert select(pw.layout, torch.device("cpu"), name).name == name
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    outer, inner = (dequantize(part).double() for part in pw.factors())
    exact = x.double() @ inner.T @ outer.T
    size = (x.double().abs() @ inner.T.abs() @ outer.T.abs()).max()
    error = (dequant_matmul(x, pw, name).double() - exact).abs().max() / size
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["cpu", "cpu-int8", "triton"])
def test_one_kernel_alone_refuses_a_product(
    name: str, random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr("pbq_kernels.triton_backend.INTERPRETED", True)
    pw = random_packed(8, 40, (Tier(1, 40),), rank=16)
    with pytest.raises(ValueError, match="one factor at a time"):
        BACKENDS[name].prepare(pw)


def test_a_module_of_it(random_packed: RandomPacked) -> None:
    pw = random_packed(33, 63, (Tier(1, 63),), rank=9, column_scale=True)
    linear = PackedLinear.from_packed(pw)
    assert set(linear.state_dict()) == set(pw.tensors)
    x = torch.randn(2, 63, requires_grad=True)
    y = linear(x)
    torch.testing.assert_close(y, x @ dequantize(pw).T)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dequantize(pw).sum(0).expand(2, -1))
    cast = linear.bfloat16()
    assert all(torch.equal(cast.get_buffer(name), t) for name, t in pw.tensors.items())
    assert "rank=9" in repr(linear)


def damaged(tensors: Mapping[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    changed = tensors[name].clone()
    changed.view(-1)[-1] = value
    return {**tensors, name: changed}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {n: x for n, x in t.items() if n != "inner_weight"}, "x.inner_weight: missing"),
        (lambda t: {n: x for n, x in t.items() if n != "scale"}, "x.scale: missing"),
        (lambda t: {**t, "column_scale": t["inner_column_scale"]}, "x.column_scale: not part"),
        (lambda t: {**t, "inner_inner_weight": t["weight"]}, "x.inner_inner_weight: not part"),
        (lambda t: {**t, "weight": t["inner_weight"]}, r"x.weight: .*\(9, 8\).*\(33, 2\)"),
        (lambda t: {**t, "inner_weight": t["inner_weight"][1:]}, r"x.inner_weight: .*\(8, 8\)"),
        (lambda t: {**t, "inner_scale": t["inner_scale"].float()}, "x.inner_scale: torch.float32"),
        (lambda t: damaged(t, "scale", torch.nan), "x.scale: non-finite"),
        (lambda t: damaged(t, "inner_scale", torch.inf), "x.inner_scale: non-finite"),
        (lambda t: damaged(t, "inner_column_scale", -torch.inf), "x.inner_column_scale: non-"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    random_packed: RandomPacked, change: Callable[[Mapping[str, Tensor]], Any], says: str
) -> None:
    pw = random_packed(33, 63, (Tier(1, 63),), rank=9, column_scale=True)
    check_tensors(pw.layout, pw.tensors, "x", values=True)
    with pytest.raises(PackedFormatError, match=says):
        check_tensors(pw.layout, change(pw.tensors), "x", values=True)


@pytest.mark.parametrize("rank", [1, 8, 10, 64])
def test_another_rank_than_the_tensors_have_is_refused(
    random_packed: RandomPacked, rank: int
) -> None:
    pw = random_packed(33, 63, (Tier(1, 63),), rank=9, column_scale=True)
    said = {**pw.layout.to_dict(), "rank": rank}
    with pytest.raises(PackedFormatError, match="the layout says"):
        PackedWeight(WeightLayout.from_dict(said), pw.tensors)


# Training


def tuned(pw: PackedWeight, target: Tensor | None) -> TunableFactors:
    qw = unpack(pw)
    assert isinstance(qw, Factors)
    return TunableFactors(qw, target)


def test_untrained_it_is_what_was_stored(random_packed: RandomPacked) -> None:
    pw = random_packed(33, 63, (Tier(1, 63),), rank=9, column_scale=True)
    for target in (None, torch.randn(33, 63)):
        weight = tuned(pw, target)
        torch.testing.assert_close(weight(), dequantize(pw))
        for state in (weight.start(), weight.freeze()):
            assert all(torch.equal(pack(state).tensors[n], t) for n, t in pw.tensors.items())


def test_training_moves_signs_and_scales_of_both_factors(random_packed: RandomPacked) -> None:
    pw = random_packed(24, 40, (Tier(1, 40),), rank=16, column_scale=True)
    target = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.05
    weight = tuned(pw, target)
    groups = weight.groups(Rates(lr=1e-2, latent_lr=3e-2))
    adam = torch.optim.Adam([{"params": p, "lr": lr} for p, lr in groups if p])
    before = (dequantize(pw) - target).pow(2).sum()
    for _ in range(60):
        adam.zero_grad()
        (weight() - target).pow(2).sum().backward()
        adam.step()
    after = pack(weight.freeze())
    assert after.layout == pw.layout
    assert (dequantize(after) - target).pow(2).sum() < 0.8 * before
    assert all(not torch.equal(after.tensors[name], t) for name, t in pw.tensors.items())


class Kept:
    """Hands out the state it was made with, and keeps that behind step `at`."""

    def __init__(self, at: int, state: Any = None) -> None:
        self.at, self.state, self.steps = at, state, 0

    def load(self) -> Any:
        return self.state

    def offer(self, state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        self.steps += 1
        if self.steps == self.at:
            tensors, meta = state()
            self.state = (
                {name: t.clone() for name, t in tensors.items()},
                json.loads(json.dumps(meta)),
            )


def test_a_training_goes_on_from_what_was_kept_to_the_same_bits(
    random_packed: RandomPacked,
) -> None:
    pw = random_packed(12, 20, (Tier(1, 20),), rank=8, column_scale=True)
    target = 0.05 * torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))

    def trained(keep: Kept) -> dict[str, Tensor]:
        found, _, _ = optimise(
            lambda i, W, gains: (W["a"] - target[i]).pow(2).sum(),
            {"a": tuned(pw, target.mean(0))},
            {},
            rows=3,
            unseen=[2],
            steps=lambda rows: 12,
            rates=Rates(latent_lr=5e-2),
            seed=0,
            keep=keep,
        )
        return dict(pack(found["a"]).tensors)

    first = Kept(7)
    whole = trained(first)
    second = Kept(0, first.state)
    resumed = trained(second)
    assert second.steps == 12 - 7
    assert all(torch.equal(resumed[name], t) for name, t in whole.items())
    assert not torch.equal(whole["inner_weight"], pw.tensors["inner_weight"])


def test_inspecting_a_product(packed_with_everything: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    found = describe_layer(packed_with_everything, name)
    _, rows, title = found.grid()
    assert "48x48 as 48x21 times 21x48" in title
    assert [row[0] for row in rows][:3] == ["tier 0", "  scale of the outer factor", "tier 1"]
    outer = next(part for part in found.scales if part["what"] == "scale of the outer factor")
    assert outer["count"] == 48
    inner = sum(part["count"] for part in found.scales if "plane" in part["what"])
    assert inner == 21 * (1 + 2 + 1)  # tiers of 1, of 2 and of 4 tied planes
    row = next(r for r in describe(packed_with_everything).grid()[1] if "o_proj" in r[0])
    assert row[2] == "rank 21"


@pytest.mark.parametrize("metric", [False, True])
def test_least_squares_is_the_minimum(metric: bool) -> None:
    g = torch.Generator().manual_seed(0)
    W, basis = torch.randn(5, 21, generator=g), torch.randn(7, 21, generator=g)
    X = torch.randn(40, 21, generator=g)
    H = X.T @ X if metric else torch.eye(21)
    found = least_squares(W, basis, H if metric else None, 1e-6)
    exact = torch.linalg.solve((basis @ H @ basis.T).double(), (basis @ H @ W.T).double()).T
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4)
