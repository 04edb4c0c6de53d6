"""PB-LLM: its formulas on numbers done by hand, its bits by the paper and in truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbq import methods
from pbq.allocate import ChannelStats, LayerPlan, PlanInput
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.gptq import quantize_weight
from pbq.grid import QuantizedWeight
from pbq.methods.pb_llm import PbLlm, gap_bytes, mean_and_deviation, two_levels
from pbq.pack import pack
from pbq_kernels.layout import encode_overlay


def pb_llm(**options: object) -> PbLlm:
    config = QuantConfig(method="pb-llm", **options)  # type: ignore[arg-type]
    method = methods.get("pb-llm", config)
    assert isinstance(method, PbLlm)
    return method


def plan(method: PbLlm, n: int, k: int) -> LayerPlan:
    one = torch.ones(k)
    layer = PlanInput(torch.zeros(n, k), ChannelStats(one, one, one))
    return method.plan({"a": layer}, method.config)["a"]


def rebuilt(method: PbLlm, W: Tensor, H: Tensor) -> QuantizedWeight:
    placed = method.place(plan(method, *W.shape), W, H)
    recipe = method.recipe(method.config)
    qw, _, _ = quantize_weight(
        W,
        H,
        placed.tiers,
        placed.tier_of,
        method.fit,
        sweeps=recipe.sweeps,
        feedback=recipe.feedback,
        natural_order=recipe.natural_order,
        salient=placed.salient,
    )
    return qw


def test_faithful_on_an_example_done_by_hand() -> None:
    """A fifth of ten weights, by magnitude: 10 and -8. The others: 1 1 1 -1 -1 -1 3 -3.

    Their mean is 0 and their mean deviation 12 / 8 = 1.5; with the zeros that the paper's code
    counts at the salient places it would be 1.2.
    """
    W = torch.tensor([[1.0, 1, 10, 1, -1, -1, -8, -1, 3, -3]])
    method = pb_llm(faithful=True, criterion="magnitude", salient_share=0.21)
    qw = rebuilt(method, W, torch.eye(10))
    assert qw.overlay is not None
    assert qw.overlay.mask[0].nonzero()[:, 0].tolist() == [2, 6]
    step = float(torch.tensor(10 / 127).half())
    big, other = 127 * step, -102 * step
    expected = torch.tensor([[1.5, 1.5, big, 1.5, -1.5, -1.5, other, -1.5, 1.5, -1.5]])
    torch.testing.assert_close(qw.dequantize(), expected, rtol=0, atol=1e-6)


def test_the_mean_is_that_of_the_binary_entries() -> None:
    W = torch.tensor([[1.0, 2, 6, 100]])
    grid = mean_and_deviation(W, torch.tensor([[True, True, True, False]]))
    # mean 3, deviations 2, 1, 3
    assert (grid.offset.item(), grid.scale.item()) == (3, 2)
    # least squares: 1.5 and 6 leave .5, those would have left 4 + 1 + 1
    ours = two_levels(W, torch.tensor([[1.0, 1, 1, 0]]))
    assert ours.levels().tolist() == [[1.5, 6]]
    # and with the first weighing three times as much 1.25
    assert two_levels(W, torch.tensor([[3.0, 1, 1, 0]])).levels().tolist() == [[1.25, 6]]


def test_a_row_without_binary_entries_has_a_grid_nevertheless() -> None:
    W = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    for weight in (torch.zeros(2, 2), torch.ones(2, 2)):
        grid = two_levels(W, weight)
        assert torch.isfinite(grid.levels()).all()
        assert torch.isfinite(mean_and_deviation(W, weight > 0).levels()).all()


def test_each_criterion_takes_what_it_speaks_of() -> None:
    """The largest weight; the one fed most; the one between the levels, which a sign would lose."""
    W = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 0.0, 1.3]])
    H = torch.diag(torch.tensor([4.0, 1, 1, 1, 1, 1]))
    found = {c: pb_llm(criterion=c).saliency(W, H) for c in ("magnitude", "hessian", "damage")}
    assert {c: int(score.argmax()) for c, score in found.items()} == {
        "magnitude": 5,
        "hessian": 0,
        "damage": 4,
    }
    # without correlation U_jj⁻² and 1/[H⁻¹]_jj are both H_jj, with its damping
    damped = H.diagonal() + 0.01 * H.diagonal().mean()
    torch.testing.assert_close(found["hessian"], W**2 * damped)
    torch.testing.assert_close(pb_llm(faithful=True).saliency(W, H), W**2 * damped)


def test_the_papers_saliency_counts_only_the_columns_to_come() -> None:
    """U_jj⁻² of the last column is H_jj; of the first what all others leave of it."""
    H = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    W = torch.ones(1, 2)
    faithful = pb_llm(faithful=True, percdamp=1e-6).saliency(W, H)
    torch.testing.assert_close(faithful, torch.tensor([[0.36, 1.0]]), rtol=1e-4, atol=0)
    ours = pb_llm(criterion="hessian", percdamp=1e-6).saliency(W, H)
    torch.testing.assert_close(ours, torch.tensor([[0.36, 0.36]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("n", "k", "share"), [(64, 576, 0.1), (32, 1536, 0.01), (300, 96, 0.4)])
def test_positions_cost_what_was_expected(n: int, k: int, share: float) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(n, k, generator=g) < share
    entries = int(mask.sum())
    found = len(encode_overlay(mask)[1])
    assert gap_bytes(n, k, entries) == pytest.approx(found, rel=0.05)


def test_the_share_is_solved_from_the_bits_or_given() -> None:
    shares = {
        bits: plan(pb_llm(bits=bits), 576, 576).overlay / 576**2 for bits in (1.1, 1.61, 2.7, 8)
    }
    assert shares[1.1] == 0 and 0.02 < shares[1.61] < 0.04 and 0.1 < shares[2.7] < 0.14
    assert shares[8] < 0.6
    given = plan(pb_llm(bits=2.7, salient_share=0.05), 576, 576)
    assert given.overlay == round(0.05 * 576**2)
    with pytest.raises(UsageError, match=r"1\.05 bits cannot hold .* least is --bits 1\.056"):
        plan(pb_llm(bits=1.05), 576, 576)


def test_a_tenth_by_the_paper_and_in_truth() -> None:
    """ "1.7 bits": the positions are left out; with the bitmap it would be 2.7."""
    method = pb_llm(faithful=True)
    found = plan(method, 4096, 4096)
    assert found.overlay / 4096**2 == pytest.approx(0.1, abs=1e-6)
    assert method.paper_bits({"a": found}, {"a": 4096}) == pytest.approx(1.7, abs=1e-4)
    # .1 · 8 + 1 and half a bit of positions; scale, mean, count and overlay scale of each row
    assert found.layout(4096).bits_per_weight == pytest.approx(2.306 + 80 / 4096, abs=0.005)
    small = plan(method, 576, 576)
    assert small.layout(576).bits_per_weight == pytest.approx(2.44, abs=0.01)


def test_more_salient_entries_where_positions_are_cheap() -> None:
    """In a few columns their positions take fewer bits than at random: that buys entries."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 96, generator=g) / 20
    method = pb_llm(bits=2.5)
    even = rebuilt(method, W, torch.eye(96))
    loud = torch.ones(96)
    loud[40:60] = 100
    columns = rebuilt(method, W, torch.diag(loud))
    assert columns.overlay is not None and even.overlay is not None
    assert int(columns.overlay.mask.sum()) > int(even.overlay.mask.sum())
    for qw in (even, columns):
        assert 2.48 < pack(qw).bits_per_weight <= 2.5


def test_faithful_recipe_is_the_papers() -> None:
    recipe = pb_llm(faithful=True).recipe(QuantConfig(method="pb-llm", faithful=True))
    assert recipe.feedback and recipe.natural_order
    assert not recipe.compensate and recipe.sweeps == 0
    assert recipe.block is None and recipe.distillation is None


@pytest.mark.parametrize("criterion", ["absmax", "mean-abs"])
def test_a_criterion_of_another_method_is_refused(criterion: str) -> None:
    with pytest.raises(UsageError, match="pb-llm knows damage, hessian, magnitude"):
        pb_llm(criterion=criterion)
    with pytest.raises(UsageError, match="ptq161 knows damage, absmax, mean-abs"):
        methods.get("ptq161", QuantConfig(method="ptq161", criterion="hessian"))


def test_groups_have_levels_of_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(16, 64, generator=g)
    W[:, 32:] *= 10
    method = pb_llm(bits=6, group_size=32, salient_share=0.05)
    qw = rebuilt(method, W, torch.eye(64))
    scale = qw.grids[0].scale[..., 0]
    assert scale.shape == (16, 2) and (scale[:, 1] > 4 * scale[:, 0]).all()
