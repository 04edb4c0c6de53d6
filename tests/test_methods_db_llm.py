"""DB-LLM: its two planes on numbers done by hand, what they leave, and how zero they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbq import methods
from pbq.allocate import ChannelStats, LayerPlan, PlanInput
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.gptq import quantize_weight
from pbq.grid import Grid
from pbq.methods.db_llm import DbLlm, dual, fit_dual, sparsity
from pbq.pack import pack
from pbq_kernels import Tier


def db_llm(**options: object) -> tuple[DbLlm, QuantConfig]:
    config = QuantConfig(method="db-llm", **options)  # type: ignore[arg-type]
    method = methods.get("db-llm", config)
    assert isinstance(method, DbLlm)
    return method, config


def plan(n: int, k: int, **options: object) -> LayerPlan:
    method, config = db_llm(**options)
    one = torch.ones(k)
    layer = PlanInput(torch.zeros(n, k), ChannelStats(one, one, one))
    return method.plan({"a": layer}, config)["a"]


def planes(grid: Grid, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha1, alpha2 [n] and b1, b2 of the paper from what is stored."""
    return 2 * grid.scale[:, 0], 2 * grid.scale[:, 1], codes & 1, codes >> 1


def test_faithful_on_an_example_done_by_hand() -> None:
    """max |w| = 2, so s = 1, alpha1 = 2 and alpha2 = -1. Boundaries at -.5, .5 and 1.5."""
    W = torch.tensor([[2.0, 1.4, 0.6, 0.4, -0.4, -0.6, -1.8]])
    method, _ = db_llm(faithful=True)
    grid = method.fit(W, torch.ones(7), Tier(2, 7, offset=True), W)
    codes = grid.codes(W)
    alpha1, alpha2, b1, b2 = planes(grid, codes)
    assert (alpha1.item(), alpha2.item()) == (2, -1)
    assert b1.tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    assert b2.tolist() == [[0, 1, 1, 0, 0, 1, 1]]
    assert grid.decode(codes).tolist() == [[2, 1, 1, 0, 0, -1, -1]]
    torch.testing.assert_close(grid.decode(codes), alpha1[:, None] * b1 + alpha2[:, None] * b2)


@pytest.mark.parametrize("seed", range(5))
def test_no_bit_is_no_weight(seed: int) -> None:
    """Whatever float16 makes of the two numbers: two products and no constant."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(6 * torch.rand(64, generator=g) - 6)
    grid = dual(size, -size * torch.rand(64, generator=g))
    levels = grid.levels()
    alpha1, alpha2 = (2 * grid.scale[:, p] for p in (0, 1))
    assert torch.equal(levels[:, 0], torch.zeros(64))
    assert torch.equal(levels[:, 1:], torch.stack([alpha1, alpha2, alpha1 + alpha2], 1))
    torch.testing.assert_close(alpha1, size, rtol=2e-3, atol=0)
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert torch.equal(grid.offset.half().float(), grid.offset)


def test_least_squares_finds_the_levels_of_a_weight_that_has_them() -> None:
    W = torch.tensor([[0.0, 3.0, -1.25, 1.75, 0.0, 3.0, -1.25]])
    grid = fit_dual(W, torch.ones(7))
    assert torch.equal(grid.decode(grid.codes(W)), W)
    mirrored = fit_dual(-W, torch.ones(7))
    assert torch.equal(mirrored.decode(mirrored.codes(-W)), -W)


def test_the_better_levels_leave_less_than_the_papers() -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 128, generator=g)
    weight = torch.rand(128, generator=g) + 0.1
    faithful, ours = db_llm(faithful=True)[0], db_llm()[0]
    lost = []
    for method in (faithful, ours):
        grid = method.fit(W, weight, Tier(2, 128, offset=True), W)
        lost.append((W - grid.decode(grid.codes(W))).pow(2) @ weight)
    assert (lost[1] <= lost[0]).all() and lost[1].mean() < 0.7 * lost[0].mean()


def test_groups_are_as_small_as_the_bits_allow() -> None:
    """Two scales and an offset a group: 48 / 512 = .09375 bits."""
    assert plan(64, 512, bits=2.1).tiers == (Tier(2, 512, offset=True),)
    assert plan(64, 512, bits=2.75).tiers[0].group_size == 64
    assert plan(64, 512, bits=2.4).tiers[0].group_size == 128
    assert plan(64, 512, bits=2.4, group_size=256).tiers[0].group_size == 256
    with pytest.raises(UsageError, match=r"2 bits cannot hold .* least is --bits 2\.094"):
        plan(64, 512, bits=2.0)


def test_faithful_bits_by_the_paper_and_in_truth() -> None:
    found = plan(64, 4096, faithful=True, bits=1.0)
    assert found.tiers[0].group_size == 64
    method, _ = db_llm(faithful=True)
    assert method.paper_bits({"a": found}, {"a": 64}) == 2
    # the paper's own two scales a group would be 2.5
    assert found.layout(64).bits_per_weight == 2 + 48 / 64


def test_zeros_of_the_planes_are_counted() -> None:
    W = torch.tensor([[2.0, 1.4, 0.6, 0.4, -0.4, -0.6, -1.8]])
    method, _ = db_llm(faithful=True)
    qw, _, _ = quantize_weight(
        W,
        torch.eye(7),
        (Tier(2, 7, offset=True),),
        torch.zeros(7, dtype=torch.uint8),
        method.fit,
        sweeps=0,
        feedback=False,
    )
    assert sparsity(pack(qw)) == [4, 3]
    assert method.notes({"a": pack(qw)}) == {"zeros in the two planes": "57.1%, 42.9%"}


def test_faithful_trains_signs_and_scales_with_weighted_tokens() -> None:
    method, config = db_llm(faithful=True)
    recipe = method.recipe(config)
    assert not recipe.feedback and not recipe.compensate and recipe.sweeps == 0
    assert recipe.distillation is not None
    assert recipe.distillation.gamma > 0 and recipe.distillation.latent_lr > 0
    assert recipe.distillation.norm_lr == 0
