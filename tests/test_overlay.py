"""Salient entries beside the tiers: rounded in the same sweep, packed exactly, never made worse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbq.gptq import (
    coordinate_descent,
    processing_order,
    quantize_weight,
    reconstruct,
    reconstruct_naive,
    refit_scales,
)
from pbq.grid import Grid, Overlay, QuantizedWeight, TierGrid
from pbq.hessian import damp, inverse_cholesky, proxy_loss
from pbq.methods.pb_llm import two_levels
from pbq.pack import pack, unpack
from pbq_kernels import reference
from pbq_kernels.layout import Tier


def problem(n, k, share, seed=0):
    """(W [n, k], H [k, k], mask [n, k]): a few loud channels, salient entries anywhere."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5
    X = torch.randn(4 * k, k, generator=g) @ mix * torch.exp(torch.randn(k, generator=g))
    W = torch.randn(n, k, generator=g) * 0.05
    return W, X.T @ X / len(X), torch.rand(n, k, generator=g) < share


def fit(W, weight, tier, row):
    return two_levels(W, weight.expand(W.shape))


def binary(k):
    return (Tier(1, k, offset=True),), torch.zeros(k, dtype=torch.uint8)


def quantized(n, k, share, sweeps=0, column_scale=False):
    W, H, mask = problem(n, k, share)
    qw, _, damping = quantize_weight(W, H, *binary(k), fit, salient=mask, sweeps=sweeps)
    if column_scale:
        qw.column_scale = (torch.rand(k, generator=torch.Generator()) + 0.5).half().float()
    return W, damp(H, damping), qw


def row_losses(W, H, qw):
    E = (W - qw.dequantize()).double()
    return ((E @ H.double()) * E).sum(1)


def test_eight_bits_by_hand():
    """127 steps to the largest salient entry of the row, which is not the largest of all."""
    W = torch.tensor([[63.5, -0.2, 0.8, 300.0], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    overlay = Overlay.of(W, mask)
    assert overlay.scale[0] == 0.5
    # a tie at -0.4 steps is none: it rounds to 0
    assert overlay.value.tolist() == [[127, 0, 2, 0], [0] * 4]
    assert overlay.dequantize()[0].tolist() == [63.5, 0, 1, 0]


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.02, 0.1, 0.6, 1.0]),
    column_scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_packing_is_exact(n, k, share, column_scale, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=g) < share
    grid = TierGrid(torch.rand(n, 1, 1, generator=g).half().float(), None)
    scale = torch.rand(k, generator=g).half().float() if column_scale else None
    codes = torch.randint(2, (n, k), dtype=torch.uint8, generator=g)
    overlay = Overlay.of(torch.randn(n, k, generator=g), mask)
    tiers, tier_of = (Tier(1, k),), torch.zeros(k, dtype=torch.uint8)
    qw = QuantizedWeight(tiers, tier_of, codes, [grid], scale, overlay)
    pw = pack(qw)
    assert torch.equal(reference.dequantize(pw), qw.dequantize())
    assert pw.stored_bits == qw.layout().stored_bits
    back = unpack(pw)
    assert torch.equal(back.dequantize(), qw.dequantize())
    assert (back.overlay is None) == (not mask.any())
    if back.overlay is not None:
        assert torch.equal(back.overlay.mask, mask)
        assert torch.equal(back.overlay.value, overlay.value)
        assert torch.equal(back.overlay.scale, overlay.scale)


@pytest.mark.parametrize("block_size", [1, 16, 1000])
@pytest.mark.parametrize(("n", "k", "share"), [(3, 33, 0.1), (5, 96, 0.3), (2, 40, 1.0)])
def test_blocked_equals_naive(n, k, share, block_size):
    W, H, mask = problem(n, k, share)
    order, runs = processing_order(*binary(k), H.diagonal())
    U, _ = inverse_cholesky(H[order][:, order].double(), 0.01)

    def fit64(W, weight, tier, row):
        grid = fit(W.float(), weight.float(), tier, row)
        return Grid(grid.scale.double(), grid.offset.double())

    fast, slow = (Overlay.of(W, mask).columns(order) for _ in range(2))
    args = (W[:, order].double(), U.double(), binary(k)[0], runs, fit64)
    codes, _, _ = reconstruct(*args, block_size=block_size, overlay=fast)
    slow_codes, _ = reconstruct_naive(*args, overlay=slow)
    assert torch.equal(codes, slow_codes)
    assert torch.equal(fast.value, slow.value)
    assert not torch.equal(fast.value, Overlay.of(W, mask).columns(order).value)


def test_no_salient_entry_is_no_overlay():
    W, H, mask = problem(5, 63, 0.0)
    one, _, _ = quantize_weight(W, H, *binary(63), fit, salient=mask)
    other, _, _ = quantize_weight(W, H, *binary(63), fit)
    assert torch.equal(one.dequantize(), other.dequantize())
    assert pack(one).layout == pack(other).layout


def test_salient_entries_lower_the_loss():
    losses = []
    for share in (0.0, 0.1, 0.5, 1.0):
        W, H, qw = quantized(16, 63, share, sweeps=1)
        losses.append(proxy_loss(W, qw.dequantize(), H))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-3


@pytest.mark.parametrize("column_scale", [False, True])
def test_refitted_levels_are_the_best_for_their_signs(column_scale):
    W, H, qw = quantized(4, 33, 0.2, column_scale=column_scale)
    before = row_losses(W, H, qw)
    kept = qw.overlay.value.clone()
    refit_scales(W, H, qw)
    assert torch.equal(qw.overlay.value, kept)
    assert (row_losses(W, H, qw) <= before).all() and (row_losses(W, H, qw) < before).any()
    best = row_losses(W, H, qw)
    for number in (qw.grids[0].scale, qw.grids[0].offset):
        for factor in (0.99, 1.01):
            start = number.clone()
            number *= factor
            assert (row_losses(W, H, qw) >= best * (1 - 1e-4)).all()
            number.copy_(start)


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize(("n", "k", "share"), [(3, 33, 0.1), (5, 96, 0.5)])
def test_descent_never_raises_a_row_s_loss(n, k, share, column_scale):
    W, H, qw = quantized(n, k, share, column_scale=column_scale)
    before, values = row_losses(W, H, qw), qw.overlay.value.clone()
    coordinate_descent(W, H, qw)
    assert (row_losses(W, H, qw) <= before * (1 + 1e-6)).all()
    assert not torch.equal(qw.overlay.value, values)
    assert (qw.overlay.value[~qw.overlay.mask] == 0).all()


def test_descent_in_blocks_equals_one_column_at_a_time():
    found = []
    for block_size in (1, 16, 1000):
        W, H, qw = quantized(5, 63, 0.2)
        coordinate_descent(W, H, qw, block_size=block_size)
        found.append((qw.codes, qw.overlay.value))
    for codes, values in found[1:]:
        assert torch.equal(codes[~qw.overlay.mask], found[0][0][~qw.overlay.mask])
        assert torch.equal(values, found[0][1])


def test_descent_takes_the_best_of_all_values():
    W, H, qw = quantized(3, 20, 0.2)
    fast = QuantizedWeight(qw.tiers, qw.tier_of, qw.codes.clone(), qw.grids, None, qw.overlay)
    fast.overlay = qw.overlay.columns(torch.arange(20))
    coordinate_descent(W, H, fast)
    for column in range(20):
        tried = []
        options = [(c, v) for c in range(2) for v in range(-127, 128)]
        for code, value in options:
            qw.codes[:, column] = code
            qw.overlay.value[:, column] = value * qw.overlay.mask[:, column]
            tried.append(row_losses(W, H, qw))
        for row, which in enumerate(torch.stack(tried).argmin(0).tolist()):
            qw.codes[row, column] = options[which][0]
            qw.overlay.value[row, column] = options[which][1] * int(qw.overlay.mask[row, column])
    torch.testing.assert_close(fast.dequantize(), qw.dequantize(), rtol=0, atol=1e-6)
