"""The GPTQ loop against its slow twin, in float64 where the order of additions would matter."""

import numpy as np
import pytest
import torch

from pbq import gptq
from pbq.gptq import (
    MAX_JOINT_SCALES,
    Run,
    _round_block,
    coordinate_descent,
    processing_order,
    quantize_weight,
    reconstruct,
    reconstruct_naive,
    refit_scales,
)
from pbq.grid import Grid, QuantizedWeight, TierGrid, fit_planes, fit_uniform
from pbq.hessian import damp, inverse_cholesky, proxy_loss
from pbq_kernels.layout import Tier

SHAPES = [(1, 1), (3, 33), (33, 63), (5, 96)]
F64 = torch.float64


def problem(n, k, spread=1.5, seed=0, tokens=None):
    """(W [n, k], H [k, k]) with correlated channels of very different energy."""
    g = torch.Generator().manual_seed(seed)
    m = tokens or 4 * k + 16
    mix = torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5
    X = torch.randn(m, k, generator=g) @ mix * torch.exp(spread * torch.randn(k, generator=g))
    return torch.randn(n, k, generator=g) * 0.05, X.T @ X / m


def tiers_named(kind, k):
    """A mix of tiers over k columns; the last one takes what is left."""
    few = k // 5
    return {
        "one plane": (Tier(1, k),),
        "two planes": (Tier(2, k),),
        "fine and coarse": (Tier(4, few, tied=True, offset=True), Tier(1, k - few)),
        "pruned to an offset": (
            Tier(0, few, offset=True),
            Tier(1, k - 2 * few),
            Tier(3, few),
        ),
        "pruned to zero": (Tier(1, k - few), Tier(0, few)),
        "groups": (
            Tier(2, k - few, group_size=max(13, k // 9)),
            Tier(1, few, group_size=max(8, k // 20), offset=True),
        ),
        "many groups": (Tier(2, k, group_size=7),),
        "an empty tier": (Tier(1, k), Tier(4, 0, tied=True, offset=True)),
    }[kind]


KINDS = [
    "one plane",
    "two planes",
    "fine and coarse",
    "pruned to an offset",
    "pruned to zero",
    "groups",
    "an empty tier",
]


# one long row of blocks is enough: it is slow, and 128 columns end in the middle of its tiers
EVERY_CASE = [(n, k, kind) for n, k in SHAPES for kind in KINDS] + [(2, 577, "fine and coarse")]


def tier_columns(tiers, k, seed=0):
    tier_of = torch.repeat_interleave(torch.tensor([t.columns for t in tiers]))
    return tier_of[torch.randperm(k, generator=torch.Generator().manual_seed(seed))].to(torch.uint8)


def fit(W, weight, tier, row):
    if tier.planes == 0:
        offset = (W @ (weight / weight.sum())).half().float() if tier.offset else 0 * W[:, 0]
        return Grid(W.new_zeros(len(W), 0), offset)
    if tier.tied:
        return fit_uniform(W, weight, tier.planes)
    return fit_planes(W, weight, tier.planes)


def fit64(W, weight, tier, row):
    grid = fit(W.float(), weight.float(), tier, row)
    return Grid(grid.scale.double(), grid.offset.double())


def in_order(W, H, tiers, tier_of, percdamp=0.01):
    """(W, U, runs) in processing order, float64."""
    order, runs = processing_order(tiers, tier_of, H.diagonal() * W.pow(2).sum(0))
    H_damped = damp(H[order][:, order].double(), percdamp)
    U = torch.linalg.cholesky(torch.linalg.inv(H_damped), upper=True)
    return W[:, order].double(), U, runs


def group_grids(qw):
    """(tier, grid, columns) of every group."""
    for t, tier in enumerate(qw.tiers):
        size = tier.columns if tier.group_size == -1 else tier.group_size
        for group in range(tier.groups):
            columns = qw.columns(t)[group * size : (group + 1) * size]
            yield tier, qw.grids[t].grid(tier, group), columns


def row_losses(W, H, qw):
    E = (W - qw.dequantize()).double()
    return ((E @ H.double()) * E).sum(1)


# --- order ------------------------------------------------------------------------------------


def test_processing_order_by_hand():
    tiers = (Tier(4, 2), Tier(1, 2), Tier(0, 1), Tier(2, 2, group_size=1), Tier(3, 0))
    tier_of = torch.tensor([3, 1, 0, 2, 0, 1, 3], dtype=torch.uint8)
    importance = torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    order, runs = processing_order(tiers, tier_of, importance)
    # no planes, one plane by falling importance, two planes in storage order, four planes
    assert order.tolist() == [3, 1, 5, 0, 6, 2, 4]
    assert [(r.tier, r.group, r.columns) for r in runs] == [
        (2, 0, 1),
        (1, 0, 2),
        (3, 0, 1),
        (3, 1, 1),
        (0, 0, 2),
    ]


def test_important_columns_first_leave_less_than_last(monkeypatch):
    """What is rounded last has nothing left to make up for its error."""
    tiers = tiers_named("fine and coarse", 96)
    tier_of = tier_columns(tiers, 96)

    def left():
        problems = [problem(32, 96, seed=seed) for seed in range(3)]
        found = [(W, H, quantize_weight(W, H, tiers, tier_of, fit)[0]) for W, H in problems]
        return sum(proxy_loss(W, qw.dequantize(), H) for W, H, qw in found)

    first = left()
    monkeypatch.setattr(gptq, "processing_order", lambda t, of, x: processing_order(t, of, -x))
    assert first < 0.97 * left()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 33, 96])
def test_processing_order_is_a_permutation_that_the_runs_partition(kind, k):
    tiers = tiers_named(kind, k)
    tier_of = tier_columns(tiers, k)
    order, runs = processing_order(tiers, tier_of, torch.rand(k))
    assert sorted(order.tolist()) == list(range(k))
    assert sum(run.columns for run in runs) == k
    start = 0
    for run in runs:
        assert (tier_of[order[start : start + run.columns]] == run.tier).all()
        start += run.columns
    planes = [tiers[run.tier].planes for run in runs]
    assert planes == sorted(planes)


# --- the sweep --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 16, 128, 1000])
@pytest.mark.parametrize(("n", "k", "kind"), EVERY_CASE)
def test_blocked_equals_naive(n, k, kind, block_size):
    tiers = tiers_named(kind, k)
    W, U, runs = in_order(*problem(n, k), tiers, tier_columns(tiers, k))
    codes, grids, _ = reconstruct(W, U, tiers, runs, fit64, block_size=block_size)
    slow_codes, slow_grids = reconstruct_naive(W, U, tiers, runs, fit64)
    assert torch.equal(codes, slow_codes)
    for fast, slow in zip(grids, slow_grids, strict=True):
        assert torch.equal(fast.scale, slow.scale)
        assert torch.equal(fast.offset, slow.offset)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_blocks_lose_no_more_than_naive_ones(kind):
    """In float32 a rounding tie may fall either way: then the losses must agree."""
    W, H = problem(33, 96)
    tiers = tiers_named(kind, 96)
    tier_of = tier_columns(tiers, 96)
    losses = [
        proxy_loss(W, quantize_weight(W, H, tiers, tier_of, fit, block_size=b, sweeps=0)[0]
                   .dequantize(), H)
        for b in (1, 16, 1000)
    ]  # fmt: skip
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2)


def test_compensated_weights_are_those_that_were_rounded():
    W, H = problem(5, 96)
    tiers = tiers_named("fine and coarse", 96)
    tier_of = tier_columns(tiers, 96)
    qw, compensated, _ = quantize_weight(W, H, tiers, tier_of, fit, sweeps=0)
    for t, tier in enumerate(tiers):
        columns = qw.columns(t)
        grid = qw.grids[t].grid(tier, 0)
        assert torch.equal(grid.codes(compensated[:, columns]), qw.codes[:, columns])
    assert not torch.allclose(compensated, W)


def test_the_input_is_left_alone():
    W, H = problem(5, 33)
    W_before, H_before = W.clone(), H.clone()
    quantize_weight(W, H, (Tier(1, 33),), torch.zeros(33, dtype=torch.uint8), fit)
    assert torch.equal(W, W_before)
    assert torch.equal(H, H_before)


@pytest.mark.parametrize("kind", KINDS)
def test_identity_hessian_is_plain_rounding(kind):
    k = 96
    W, _ = problem(7, k)
    tiers = tiers_named(kind, k)
    tier_of = tier_columns(tiers, k)
    qw, compensated, _ = quantize_weight(W, torch.eye(k), tiers, tier_of, fit, sweeps=0)
    assert torch.equal(compensated, W)
    for tier, grid, columns in group_grids(qw):
        plain = fit(W[:, columns], torch.ones(len(columns)), tier, W)
        # columns reach `fit` in another order, so that sums may differ by an ulp of float16
        torch.testing.assert_close(grid.levels(), plain.levels(), rtol=2e-3, atol=1e-4)
        assert torch.equal(qw.codes[:, columns], grid.codes(W[:, columns]))


@pytest.mark.parametrize("b", [1, 2, 16, 61])
def test_the_error_of_a_block_is_a_triangular_solve(b):
    """Columns rounded jointly spread Err = (W - Q) U_BB⁻¹, W as it was before the block."""
    W, H = problem(9, b)
    U = torch.linalg.cholesky(torch.linalg.inv(damp(H.double(), 0.01)), upper=True)
    W = W.double()
    grid = Grid(torch.full((9, 2), 0.05, dtype=F64), torch.zeros(9, dtype=F64))
    W_B, codes = W.clone(), torch.zeros(9, b, dtype=torch.uint8)
    Err = _round_block(W_B, U, grid, codes)
    # the whole feedback inside the block: W_B = W - strictly upper part of Err U
    expected = torch.linalg.solve_triangular(U, W - grid.decode(codes), upper=True, left=False)
    torch.testing.assert_close(Err, expected, atol=1e-10 * float(expected.abs().max()), rtol=1e-9)
    assert torch.equal(grid.codes(W_B), codes)


def feedback_gain(seed):
    W, H = problem(16, 96, spread=0.5, seed=seed)
    tiers = tiers_named("fine and coarse", 96)
    tier_of = torch.ones(96, dtype=torch.uint8)
    tier_of[H.diagonal().topk(tiers[0].columns).indices] = 0
    with_feedback, _, _ = quantize_weight(W, H, tiers, tier_of, fit, sweeps=0)
    without, _, _ = quantize_weight(W, torch.diag(H.diagonal()), tiers, tier_of, fit, sweeps=0)
    return proxy_loss(W, with_feedback.dequantize(), H) / proxy_loss(W, without.dequantize(), H)


def test_feedback_lowers_the_loss():
    gains = [feedback_gain(seed) for seed in range(5)]
    assert max(gains) < 0.8
    assert np.mean(gains) < 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_every_column_is_rounded_on_its_own(kind):
    W, H = problem(9, 63)
    tiers = tiers_named(kind, 63)
    tier_of = tier_columns(tiers, 63)
    qw, compensated, _ = quantize_weight(W, H, tiers, tier_of, fit, sweeps=0, feedback=False)
    assert torch.equal(compensated, W)
    for _, grid, columns in group_grids(qw):
        assert torch.equal(qw.codes[:, columns], grid.codes(W[:, columns]))
    polished, _, _ = quantize_weight(W, H, tiers, tier_of, fit, sweeps=1, feedback=False)
    assert (row_losses(W, H, polished) <= row_losses(W, H, qw) * (1 + 1e-5)).all()


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
def test_polishing_without_feedback_does_not_depend_on_the_unit_of_the_inputs(factor):
    W, H = problem(9, 63)
    tiers = tiers_named("fine and coarse", 63)
    tier_of = tier_columns(tiers, 63)
    one, _, _ = quantize_weight(W, H, tiers, tier_of, fit, feedback=False)
    other, _, _ = quantize_weight(W, factor * H, tiers, tier_of, fit, feedback=False)
    assert torch.equal(one.dequantize(), other.dequantize())


def loss_in_order(W, H, tiers, tier_of, order, runs):
    U, _ = inverse_cholesky(H[order][:, order], 0.01)
    codes, grids, _ = reconstruct(W[:, order], U, tiers, runs, fit)
    parts = codes.split([run.columns for run in runs], 1)
    W_hat = torch.cat([g.decode(c) for g, c in zip(grids, parts, strict=True)], 1)
    return proxy_loss(W, W_hat[:, torch.argsort(order)], H)


@pytest.mark.parametrize("seed", range(4))
def test_coarse_first_is_at_least_as_good_as_fine_first(seed):
    """The precise columns come last and absorb what the coarse ones lost."""
    W, H = problem(24, 96, spread=0.5, seed=seed)
    tiers = (Tier(1, 77), Tier(4, 19, tied=True, offset=True))
    importance = H.diagonal() * W.pow(2).sum(0)
    tier_of = torch.zeros(96, dtype=torch.uint8)
    tier_of[importance.topk(19).indices] = 1
    order, runs = processing_order(tiers, tier_of, importance)
    assert [run.tier for run in runs] == [0, 1]
    coarse_first = loss_in_order(W, H, tiers, tier_of, order, runs)
    fine_order = torch.cat([order[77:], order[:77]])
    fine_first = loss_in_order(W, H, tiers, tier_of, fine_order, [Run(1, 0, 19), Run(0, 0, 77)])
    assert coarse_first < 0.85 * fine_first


# --- the whole weight -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sweeps", [0, 1])
def test_scaling_w_by_two_scales_the_result_by_two(kind, sweeps):
    W, H = problem(9, 63)
    tiers = tiers_named(kind, 63)
    tier_of = tier_columns(tiers, 63)
    one, _, _ = quantize_weight(W, H, tiers, tier_of, fit, sweeps=sweeps)
    two, _, _ = quantize_weight(2 * W, H, tiers, tier_of, fit, sweeps=sweeps)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(2 * one.dequantize(), two.dequantize())


def test_scaling_the_inputs_changes_nothing():
    W, H = problem(9, 63)
    tiers = tiers_named("fine and coarse", 63)
    tier_of = tier_columns(tiers, 63)
    one, _, _ = quantize_weight(W, H, tiers, tier_of, fit)
    four, _, _ = quantize_weight(W, 4 * H, tiers, tier_of, fit)
    assert torch.equal(one.dequantize(), four.dequantize())


def test_permuting_tokens_changes_nothing():
    g = torch.Generator().manual_seed(0)
    # integers up to 8 add up exactly in float32, so that the sums do not depend on the order
    X = torch.randint(-8, 9, (300, 33), generator=g).float()
    W, tiers = torch.randn(5, 33, generator=g), tiers_named("two planes", 33)
    tier_of = tier_columns(tiers, 33)
    shuffled = X[torch.randperm(300, generator=g)]
    one, _, _ = quantize_weight(W, X.T @ X / 300, tiers, tier_of, fit)
    two, _, _ = quantize_weight(W, shuffled.T @ shuffled / 300, tiers, tier_of, fit)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.dequantize(), two.dequantize())


def test_rows_do_not_depend_on_each_other():
    W, H = problem(6, 63)
    tiers = tiers_named("fine and coarse", 63)
    tier_of = tier_columns(tiers, 63)
    W, U, runs = in_order(W, H, tiers, tier_of)
    codes, _, _ = reconstruct(W, U, tiers, runs, fit64)
    alone, _, _ = reconstruct(W[4:5], U, tiers, runs, fit64)
    assert torch.equal(codes[4:5], alone)


@pytest.mark.parametrize(("n", "k", "kind"), EVERY_CASE)
def test_polishing_lowers_the_loss_and_stays_storable(n, k, kind):
    W, H = problem(n, k)
    tiers = tiers_named(kind, k)
    tier_of = tier_columns(tiers, k)
    losses = []
    for sweeps in range(3):
        qw, _, damping = quantize_weight(W, H, tiers, tier_of, fit, sweeps=sweeps)
        H_damped = damp(H, damping)
        losses.append(float(row_losses(W, H_damped, qw).sum()))
        for grid in qw.grids:
            assert torch.equal(grid.scale.half().float(), grid.scale)
            assert grid.offset is None or torch.equal(grid.offset.half().float(), grid.offset)
        assert [tuple(g.scale.shape[1:]) for g in qw.grids] == [
            (t.groups, min(t.planes, 1) if t.tied else t.planes) for t in tiers
        ]
        assert int(qw.codes.max()) < 2 ** max(t.planes for t in tiers)
    assert losses[1] <= losses[0] * (1 + 1e-5)
    assert losses[2] <= losses[1] * (1 + 1e-5)


def test_dead_channels_keep_finite_numbers_and_cost_nothing():
    W, H = problem(7, 33)
    dead = torch.tensor([0, 13, 32])
    H[dead], H[:, dead] = 0, 0
    tiers = tiers_named("fine and coarse", 33)
    tier_of = tier_columns(tiers, 33)
    qw, compensated, damping = quantize_weight(W, H, tiers, tier_of, fit, sweeps=2)
    assert damping == 0.01
    assert torch.isfinite(qw.dequantize()).all()
    # nothing is fed back into a channel that carries no signal
    torch.testing.assert_close(compensated[:, dead], W[:, dead], rtol=0, atol=1e-6)
    alive = torch.ones(33, dtype=torch.bool)
    alive[dead] = False
    E = (W - qw.dequantize())[:, alive]
    H_alive = H[alive][:, alive]
    expected = float(((E @ H_alive) * E).sum() / ((W[:, alive] @ H_alive) * W[:, alive]).sum())
    assert proxy_loss(W, qw.dequantize(), H) == pytest.approx(expected, rel=1e-5)


def test_no_input_at_all_is_plain_rounding():
    W, _ = problem(3, 20)
    qw, _, _ = quantize_weight(
        W, torch.zeros(20, 20), (Tier(1, 20),), torch.zeros(20, dtype=torch.uint8), fit
    )
    assert torch.equal(qw.dequantize().sign(), W.sign())


def test_zero_rows_and_constant_rows():
    W, H = problem(4, 63)
    W[0], W[1] = 0, 0.125
    tiers = tiers_named("one plane", 63)
    qw, _, _ = quantize_weight(W, H, tiers, torch.zeros(63, dtype=torch.uint8), fit)
    W_hat = qw.dequantize()
    assert torch.equal(W_hat[0], torch.zeros(63))
    torch.testing.assert_close(W_hat[1], W[1], rtol=2e-3, atol=0)


def test_one_weight():
    W, H = torch.tensor([[-0.3]]), torch.tensor([[2.0]])
    qw, _, _ = quantize_weight(W, H, (Tier(1, 1),), torch.zeros(1, dtype=torch.uint8), fit)
    assert qw.dequantize().item() == torch.tensor(-0.3).half().item()


# --- scales and codes afterwards --------------------------------------------------------------


def quantized(kind, n, k, column_scale=False, seed=0):
    W, H = problem(n, k, seed=seed)
    tiers = tiers_named(kind, k)
    qw, _, damping = quantize_weight(W, H, tiers, tier_columns(tiers, k), fit, sweeps=0)
    if column_scale:
        g = torch.Generator().manual_seed(seed)
        qw.column_scale = (torch.rand(k, generator=g) + 0.5).half().float()
    return W, damp(H, damping), qw


def design(qw, row):
    """B [k, S] of one row, built number by number: dequantize with that number 1, others 0."""
    tiers, columns = qw.tiers, []
    zeros = [
        TierGrid(0 * g.scale[:1], None if g.offset is None else 0 * g.offset[:1]) for g in qw.grids
    ]
    slots = [(t, "scale", i) for t, g in enumerate(zeros) for i in range(g.scale.numel())]
    slots += [
        (t, "offset", i)
        for t, g in enumerate(zeros)
        if g.offset is not None
        for i in range(g.offset.numel())
    ]
    for t, which, i in slots:
        getattr(zeros[t], which).view(-1)[i] = 1.0
        unit = QuantizedWeight(tiers, qw.tier_of, qw.codes[row : row + 1], zeros, qw.column_scale)
        columns.append(unit.dequantize()[0].double())
        getattr(zeros[t], which).view(-1)[i] = 0.0
    return torch.stack(columns, 1).numpy()


def numbers(qw, row):
    parts = [g.scale[row].flatten() for g in qw.grids]
    parts += [g.offset[row] for g in qw.grids if g.offset is not None]
    return torch.cat(parts).double().numpy()


REFITTED = ["one plane", "two planes", "fine and coarse", "pruned to an offset", "an empty tier"]


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("kind", REFITTED)
@pytest.mark.parametrize(("n", "k"), [(3, 33), (4, 96), (2, 577)])
def test_refitted_scales_equal_lstsq_in_the_h_metric(n, k, kind, column_scale):
    W, H, qw = quantized(kind, n, k, column_scale)
    refit_scales(W, H, qw)
    root = np.linalg.cholesky(H.double().numpy()).T  # ‖root·e‖² = eᵀHe
    for row in range(n):
        A, y = root @ design(qw, row), root @ W[row].double().numpy()
        exact = np.linalg.lstsq(A, y, rcond=None)[0]
        best = np.sum((A @ exact - y) ** 2)
        found = np.sum((A @ numbers(qw, row) - y) ** 2)
        # what separates them is the ridge of 1e-5 and rounding to float16
        assert found <= best * (1 + 1e-3)
        if kind == "one plane":
            np.testing.assert_allclose(numbers(qw, row), exact, rtol=2**-10)


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize(("n", "k", "kind"), EVERY_CASE)
def test_refitting_never_raises_a_row_s_loss(n, k, kind, column_scale):
    W, H, qw = quantized(kind, n, k, column_scale)
    before = row_losses(W, H, qw)
    refit_scales(W, H, qw)
    energy = ((W @ H) * W).sum(1).double()
    assert (row_losses(W, H, qw) <= before + 1e-6 * energy).all()


def test_a_refit_that_rounding_would_spoil_is_not_taken():
    """Weights near float16's least number 2**-24: of all storable pairs the best must survive."""
    W, H, qw = quantized("two planes", 8, 33)
    ulp = 2.0**-24
    W = W * (3 * ulp / W.abs().mean())
    pairs = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)) * ulp
    losses = []
    for pair in pairs:
        qw.grids[0].scale = pair.expand(8, 1, 2).clone()
        losses.append(row_losses(W, H, qw))
    best, which = torch.stack(losses).min(0)
    qw.grids[0].scale = pairs[which][:, None]
    refit_scales(W, H, qw)
    assert (row_losses(W, H, qw) <= best * (1 + 1e-6)).all()


def test_hundreds_of_groups_keep_their_fit():
    W, H, qw = quantized("many groups", 3, 96)
    assert sum(t.scales + t.offsets for t in qw.tiers) > MAX_JOINT_SCALES
    before = qw.dequantize()
    refit_scales(W, H, qw)
    assert torch.equal(qw.dequantize(), before)


def test_a_tied_tier_without_planes_is_no_obstacle():
    W, H = problem(4, 20)
    tiers = (Tier(0, 5, tied=True, offset=True), Tier(1, 15))
    qw, _, _ = quantize_weight(W, H, tiers, tier_columns(tiers, 20), fit)
    assert qw.grids[0].scale.shape == (4, 1, 0)
    assert torch.isfinite(qw.dequantize()).all()


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize(("n", "k", "kind"), EVERY_CASE)
def test_descent_never_raises_a_row_s_loss(n, k, kind, column_scale):
    W, H, qw = quantized(kind, n, k, column_scale)
    before = row_losses(W, H, qw)
    coordinate_descent(W, H, qw)
    energy = ((W @ H) * W).sum(1).double()
    assert (row_losses(W, H, qw) <= before + 1e-6 * energy).all()


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_descent_in_blocks_equals_one_column_at_a_time(kind, column_scale):
    W, H, qw = quantized(kind, 5, 63, column_scale)
    start = qw.codes.clone()
    found = []
    for block_size in (1, 16, 1000):
        qw.codes = start.clone()
        coordinate_descent(W, H, qw, block_size=block_size)
        found.append(qw.codes.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def naive_descent(W, H, qw):
    """Each code in turn set to the level of least loss, all levels tried, in float64."""
    W, H = W.double(), H.double()
    for t in [t for t, tier in enumerate(qw.tiers) if tier.planes]:
        for column in qw.columns(t).tolist():
            tried = []
            for code in range(2 ** qw.tiers[t].planes):
                qw.codes[:, column] = code
                E = W - qw.dequantize().double()
                tried.append(((E @ H) * E).sum(1))
            qw.codes[:, column] = torch.stack(tried).argmin(0).to(torch.uint8)


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("kind", ["two planes", "fine and coarse", "groups"])
def test_descent_equals_trying_every_level(kind, column_scale):
    W, H, qw = quantized(kind, 4, 33, column_scale)
    start = qw.codes.clone()
    coordinate_descent(W, H, qw)
    fast, qw.codes = qw.dequantize(), start
    naive_descent(W, H, qw)
    assert torch.equal(fast, qw.dequantize())


def test_descent_leaves_what_has_no_best_code():
    """Neither a channel that is never fed nor one multiplied by zero."""
    W, H, qw = quantized("two planes", 4, 33, column_scale=True)
    H[3], H[:, 3] = 0, 0
    qw.column_scale[7] = 0
    before = qw.codes.clone()
    coordinate_descent(W, H, qw)
    assert torch.equal(qw.codes[:, [3, 7]], before[:, [3, 7]])
    assert not torch.equal(qw.codes, before)


# --- devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_made_on_the_weight_s_device(kind, monkeypatch):
    """A factory call without a device would land on `meta` here and fail to mix with the rest."""
    group_of_column = Tier.group_of_column

    def on_cpu(tier):  # whose result is moved by every caller
        with torch.device("cpu"):
            return group_of_column(tier)

    monkeypatch.setattr(Tier, "group_of_column", on_cpu)
    W, H = problem(4, 33)
    tiers = tiers_named(kind, 33)
    tier_of = tier_columns(tiers, 33)
    expected = quantize_weight(W, H, tiers, tier_of, fit)[0].dequantize()
    with torch.device("meta"):
        qw, _, _ = quantize_weight(W, H, tiers, tier_of, fit)
        W_hat = qw.dequantize()
    assert torch.equal(W_hat, expected)


def test_a_tied_tier_refuses_a_grid_that_is_not():
    W, H = drawn_for_ties()
    with pytest.raises(ValueError, match="tier 0 ties its planes"):
        quantize_weight(
            W,
            H,
            (Tier(2, 24, tied=True),),
            torch.zeros(24, dtype=torch.uint8),
            lambda W, weight, tier, row: fit_planes(W, weight, tier.planes),
        )


def drawn_for_ties():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(200, 24, generator=g)
    return torch.randn(8, 24, generator=g), X.T @ X / 200
