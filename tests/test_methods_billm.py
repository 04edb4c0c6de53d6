"""BiLLM and ARB-LLM: their searches on numbers done by hand, their blocks, their bits in truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pbq import methods
from pbq.allocate import ChannelStats, LayerPlan, PlanInput
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.gptq import processing_order, quantize_weight, reconstruct_jointly
from pbq.grid import QuantizedWeight, fit_planes
from pbq.hessian import damp, inverse_cholesky, proxy_loss
from pbq.methods.arb_llm import _groups, column_scales
from pbq.methods.billm import Billm, bell_split, residual, salient_columns
from pbq.pack import pack, unpack
from pbq_kernels import Tier
from pbq_kernels.reference import dequantize


def method(name: str, **options: object) -> Billm:
    config = QuantConfig(method=name, **options)  # type: ignore[arg-type]
    found = methods.get(name, config)
    assert isinstance(found, Billm)
    return found


def plan(of: Billm, n: int, k: int) -> LayerPlan:
    one = torch.ones(k)
    layer = PlanInput(torch.zeros(n, k), ChannelStats(one, one, one))
    return of.plan({"a": layer}, of.config)["a"]


def rebuilt(of: Billm, W: Tensor, H: Tensor) -> QuantizedWeight:
    placed, recipe = of.place(plan(of, *W.shape), W, H), of.recipe(of.config)
    qw, _, _ = quantize_weight(
        W,
        H,
        placed.tiers,
        placed.tier_of,
        of.fit,
        sweeps=recipe.sweeps,
        feedback=recipe.feedback,
        joint=recipe.joint,
        column_scale=placed.column_scale,
    )
    return qw


def problem(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5
    X = torch.randn(4 * k, k, generator=g) @ mix * torch.exp(torch.randn(k, generator=g))
    return torch.randn(n, k, generator=g) * 0.05, X.T @ X / len(X)


def test_residual_binarization_by_hand() -> None:
    """Mean magnitude 3, what is left 2 1 -1 -2 by sign, mean magnitude 1.5: ±4.5 and ±1.5."""
    W = torch.tensor([[5.0, 4.0, -2.0, -1.0]])
    grid = residual(W, torch.ones(4))
    assert sorted(grid.levels()[0].tolist()) == [-4.5, -1.5, 1.5, 4.5]
    assert grid.decode(grid.codes(W)).tolist() == [[4.5, 4.5, -1.5, -1.5]]


def test_the_bell_shaped_split_by_hand() -> None:
    """Magnitudes 1 1 1 1 2 | 9 11 split there: means 1.2 and 10, and no other break is as good."""
    W = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0, 9.0, -11.0]])
    grid = bell_split(W, torch.ones(7))
    torch.testing.assert_close(
        grid.levels().sort(1).values, torch.tensor([[-10.0, -1.2, 1.2, 10.0]]), rtol=3e-3, atol=0
    )
    lost = (W - grid.decode(grid.codes(W))).pow(2).sum()
    # 4 · .2² + .8² and 1 + 1
    assert float(lost) == pytest.approx(2.8, rel=1e-2)


def test_alternating_least_squares_leaves_no_more_than_either_search() -> None:
    W, _ = problem(64, 128)
    one = torch.ones(128)
    grids = [fit_planes(W, one, 2), residual(W, one), bell_split(W, one)]
    ours, *papers = [float((W - g.decode(g.codes(W))).pow(2).sum()) for g in grids]
    assert ours < min(papers)


def test_as_many_salient_columns_as_leave_the_least_error() -> None:
    """Five loud columns of irregular magnitude in each block; all others are ±1."""
    g = torch.Generator().manual_seed(0)
    W = torch.randint(0, 2, (32, 200), generator=g).float() * 2 - 1
    loud = [3, 40, 77, 100, 127, 130, 140, 150, 160, 199]
    W[:, loud] = 20 * torch.randn(32, 10, generator=g)
    assert salient_columns(W, W.pow(2).sum(0)) == 5


def test_faithful_blocks_have_their_own_columns_and_scales() -> None:
    """k = 300: blocks of 128, 128 and 44, each with as many salient columns."""
    W, H = problem(24, 300)
    for name in ("billm", "arb-llm"):
        of = method(name, faithful=True)
        placed = of.place(plan(of, 24, 300), W, H)
        rest, salient = placed.tiers
        c = salient.group_size
        assert rest.group_size == 128 - c and (rest.planes, salient.planes) == (2, 2)
        counts = [int(part.sum()) for part in placed.tier_of.split(128)]
        assert counts == [c, c, c] and 1 <= c <= 30
        assert rest.groups == salient.groups == 3
        qw = rebuilt(of, W, H)
        pw = pack(qw)
        assert torch.equal(dequantize(pw), qw.dequantize())
        assert torch.equal(unpack(pw).dequantize(), qw.dequantize())
        assert proxy_loss(W, qw.dequantize(), H) < 0.4


def test_the_diagonal_feedback_by_hand() -> None:
    """Blocks of two: the third column gets (w - q)·U_j3/U_jj of the first two, nothing else."""
    W, H = problem(5, 3)
    U, _ = inverse_cholesky(H, 0.01)
    tiers, tier_of = (Tier(1, 3),), torch.zeros(3, dtype=torch.uint8)

    def fit(W: Tensor, weight: Tensor, tier: Tier, row: Tensor):
        return fit_planes(W, weight, 1)

    codes, runs, (grid,), compensated = reconstruct_jointly(W, U, tiers, tier_of, fit, block_size=2)
    assert [(run.tier, run.group, run.columns) for run in runs] == [(0, 0, 3)]
    first, second = ((W[:, j] - grid.decode(codes)[:, j]) / U[j, j] for j in (0, 1))
    expected = W[:, 2] - first * U[0, 2] - second * U[1, 2]
    torch.testing.assert_close(compensated[:, 2], expected)
    assert torch.equal(compensated[:, :2], W[:, :2])
    assert torch.equal(codes, grid.codes(compensated))


def test_the_triangular_feedback_leaves_less() -> None:
    """One column after another, as everywhere here, against blocks with the published formula."""
    gains = []
    for seed in range(4):
        W, H = problem(48, 256, seed)
        tiers, tier_of = (Tier(2, 256, group_size=128),), torch.zeros(256, dtype=torch.uint8)
        losses = {}
        for joint in (False, True):
            qw, _, _ = quantize_weight(
                W,
                H,
                tiers,
                tier_of,
                lambda W, weight, tier, row: fit_planes(W, weight, 2),
                sweeps=0,
                joint=joint,
            )
            losses[joint] = proxy_loss(W, qw.dequantize(), H)
        gains.append(losses[False] / losses[True])
    assert max(gains) < 0.9


def test_bits_by_the_paper_and_in_truth() -> None:
    of = method("billm", faithful=True)
    found = plan(of, 4096, 4096)
    assert of.paper_bits({"a": found}, {"a": 4096}) == pytest.approx(1.1, abs=0.01)
    # two planes, four scales a row and block of 128, a tier byte a column
    assert found.layout(4096).bits_per_weight == pytest.approx(2.5 + 8 / 4096, abs=0.003)
    arb = plan(method("arb-llm", faithful=True), 4096, 4096)
    assert arb.layout(4096).bits_per_weight - found.layout(4096).bits_per_weight == 16 / 4096


@pytest.mark.parametrize("name", ["billm", "arb-llm"])
def test_the_papers_blocks_have_no_other_group_size(name: str) -> None:
    assert method(name, group_size=32)
    with pytest.raises(UsageError, match=f"--group-size 32: {name} has no use for it"):
        method(name, group_size=32, faithful=True)


@pytest.mark.parametrize("name", ["billm", "arb-llm"])
def test_columns_with_two_planes_are_solved_from_the_bits(name: str) -> None:
    counts = {}
    for bits in (1.2, 1.61, 2.0, 8.0):
        of = method(name, bits=bits)
        found = plan(of, 576, 576)
        assert found.layout(576).bits_per_weight <= bits
        counts[bits] = sum(t.columns for t in found.tiers if t.planes == 2)
    assert 0 < counts[1.2] < counts[1.61] < counts[2.0] < counts[8.0] == 576


def test_salient_columns_are_those_of_the_hessian() -> None:
    """Of two columns as loud the one that the others can stand in for is not salient."""
    W, H = torch.ones(8, 40), torch.eye(40)
    W[:, 1::2] *= -1
    H[0, 0] = H[1, 1] = H[2, 2] = 4.0
    H[1, 2] = H[2, 1] = 3.9
    of = method("billm", bits=7.0)
    # one plane and two scales a row, 2 tier bytes: room for a single second plane
    small = LayerPlan((Tier(1, 39), Tier(2, 1)), torch.zeros(40, dtype=torch.uint8))
    assert of.place(small, W, H).tier_of.nonzero()[:, 0].tolist() == [0]


def column_error(W: Tensor, column: Tensor) -> float:
    """What the best row scales leave of |W| with these column scales."""
    row = (W.abs() * column).sum(1) / column.pow(2).sum()
    return float((W.abs() - row[:, None] * column).pow(2).sum())


def test_column_scales_by_hand() -> None:
    """|W| of rank one: rows 1, 2, 3 times columns 1, 4, .5, 2.5, whose mean is 2."""
    column = torch.tensor([1.0, 4.0, 0.5, 2.5])
    W = torch.outer(torch.tensor([1.0, -2.0, 3.0]), column * torch.tensor([1, -1, 1, -1]))
    one_group = torch.zeros(4, dtype=torch.int64)
    found = column_scales(W, torch.ones(4), one_group)
    assert found.tolist() == (column / 2).tolist()
    assert column_scales(W, torch.tensor([9.0, 1, 1, 5]), one_group).tolist() == found.tolist()
    # each group has row scales of its own: a factor between groups is not the columns'
    two = torch.tensor([0, 1, 0, 1])
    apart = column_scales(W, torch.ones(4), two)
    ratio = apart / column
    torch.testing.assert_close(ratio[:2], ratio[2:], rtol=2e-3, atol=0)


def test_column_scales_are_the_best_of_their_neighbours() -> None:
    W, _ = problem(16, 12)
    found = column_scales(W, torch.ones(12), torch.zeros(12, dtype=torch.int64))
    best = column_error(W, found)
    for j in range(12):
        for factor in (0.95, 1.05):
            other = found.clone()
            other[j] *= factor
            assert column_error(W, other) > best


@pytest.mark.parametrize("faithful", [False, True])
def test_column_scales_know_the_calibration_text_unless_faithful(faithful: bool) -> None:
    """Ours weighs columns by E[x²]; the paper's RC is of the weight alone."""
    W, H = problem(16, 40)
    of = method("arb-llm", faithful=faithful, bits=3.0)
    placed = of.place(plan(of, 16, 40), W, H)
    fed, alike = (
        column_scales(W, weight, _groups(placed)) for weight in (H.diagonal(), torch.ones(40))
    )
    assert not torch.equal(fed, alike)
    assert placed.column_scale is not None
    assert torch.equal(placed.column_scale, alike if faithful else fed)


@pytest.mark.parametrize("sweeps", [0, 1])
def test_a_column_scale_comes_off_before_the_sweep(sweeps: int) -> None:
    """Powers of two: the weight and the metric rescale exactly, and so must the result."""
    W, H = problem(12, 40)
    scale = torch.exp2(torch.arange(40).remainder(5).float() - 2)
    tiers, tier_of = (Tier(2, 40),), torch.zeros(40, dtype=torch.uint8)

    def fit(W: Tensor, weight: Tensor, tier: Tier, row: Tensor):
        return fit_planes(W, weight, 2)

    def run(W: Tensor, H: Tensor, scale: Tensor | None = None) -> QuantizedWeight:
        return quantize_weight(
            W, H, tiers, tier_of, fit, sweeps=sweeps, percdamp=1e-6, column_scale=scale
        )[0]

    qw = run(W * scale, H / scale[:, None] / scale, scale)
    plain = run(W, H)
    assert qw.column_scale is not None and torch.equal(qw.column_scale, scale)
    if sweeps == 0:
        assert torch.equal(qw.codes, plain.codes)
        assert torch.equal(qw.dequantize(), plain.dequantize() * scale)
    metric = damp(H / scale[:, None] / scale, 1e-6)
    bare = run(W * scale, H / scale[:, None] / scale)
    assert proxy_loss(W * scale, qw.dequantize(), metric) < proxy_loss(
        W * scale, bare.dequantize(), metric
    )


def test_no_run_is_left_out_of_the_joint_loop() -> None:
    W, H = problem(6, 70)
    tiers = (Tier(1, 40, group_size=16), Tier(2, 30))
    tier_of = (torch.arange(70) % 7 > 3).to(torch.uint8)
    U, _ = inverse_cholesky(H, 0.01)
    fit: Callable[..., object] = lambda W, weight, tier, row: fit_planes(W, weight, tier.planes)  # noqa: E731
    _, runs, grids, _ = reconstruct_jointly(W, U, tiers, tier_of, fit, block_size=32)
    _, expected = processing_order(tiers, tier_of, H.diagonal())
    assert [(r.tier, r.group, r.columns) for r in runs] == [
        (r.tier, r.group, r.columns) for r in expected
    ]
    assert len(grids) == len(runs)
