"""NanoQuant: numbers by hand, matrices of signs found again, and what its bits buy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbq import methods
from pbq.allocate import ChannelStats, LayerPlan, PlanInput, stored_bits
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.grid import Factors
from pbq.hessian import proxy_loss
from pbq.methods.nanoquant import RIDGE, NanoQuant, _regressed, lb_admm, signs_and_magnitudes
from pbq.tune import Recipe
from pbq_kernels import Tier


def nanoquant(**options: object) -> tuple[NanoQuant, QuantConfig]:
    config = QuantConfig(method="nanoquant", **options)  # type: ignore[arg-type]
    method = methods.get("nanoquant", config)
    assert isinstance(method, NanoQuant)
    return method, config


def plans(shapes: dict[str, tuple[int, int]], **options: object) -> dict[str, LayerPlan]:
    method, config = nanoquant(**options)
    layers = {}
    for name, (n, k) in shapes.items():
        one = torch.ones(k)
        layers[name] = PlanInput(torch.zeros(1).expand(n, k), ChannelStats(one, one, one))
    return method.plan(layers, config)


def of_rank(k: int, rank: int) -> LayerPlan:
    return LayerPlan((Tier(1, k),), torch.zeros(k, dtype=torch.uint8), True, rank=rank)


def factors(W: Tensor, H: Tensor, rank: int, *, feedback: bool = True, steps: int = 60) -> Factors:
    recipe = Recipe(factors=steps, feedback=feedback)
    return nanoquant()[0].factorize(of_rank(W.shape[1], rank), W, H, recipe, 0.01, "a")[0]


def layer(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of correlated inputs, some of them loud."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(400, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)
    X = (X + 0.5 * torch.randn(400, k, generator=g)) * torch.exp(torch.randn(k, generator=g))
    return torch.randn(n, k, generator=g) / 20, X.T @ X / 400


def test_magnitudes_of_rank_one_by_hand() -> None:
    """Rows (3, -6) and (4, 8): sizes (.6, .8) of length one times (5, 10)."""
    signs, row, column = signs_and_magnitudes(torch.tensor([[3.0, -6.0], [4.0, 8.0]]))
    assert signs.tolist() == [[1, -1], [1, 1]]
    torch.testing.assert_close(row, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(column, torch.tensor([5.0, 10.0]))


def test_a_step_of_admm_by_hand() -> None:
    """One row, one column: X is 2 made 1, so (w + pull·towards) / (1 + pull + .03)."""
    found = _regressed(torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.47)
    assert RIDGE == 0.03
    assert found.item() == pytest.approx(3.47 / 1.5)


def test_a_step_of_admm_in_float64() -> None:
    """Its gradient is zero: 2 (A Xᵀ - W) X + 2 pull (A - towards) + 2 RIDGE A."""
    g = torch.Generator().manual_seed(0)
    W, other, towards = (torch.randn(*s, generator=g) for s in ((9, 33), (33, 40), (9, 40)))
    A = _regressed(W, other, towards, 0.3).double()
    X = other.double() / other.double().norm(dim=0)
    slope = (A @ X.T - W) @ X + 0.3 * (A - towards) + RIDGE * A
    assert slope.abs().max() < 1e-5
    assert torch.linalg.matrix_norm((A @ X.T - W) @ X) > 1


@pytest.mark.parametrize(("rank", "seed"), [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4)])
def test_a_product_of_signs_is_found_again(rank: int, seed: int) -> None:
    """Exactly, up to float16. Of rank two this depends on the start: it takes one matrix in two."""
    g = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=g).float() * 2 - 1

    rows, columns = (torch.exp2(torch.randint(-1, 2, (c,), generator=g).float()) for c in (16, 24))
    U, V = signs(16, rank), signs(rank, 24)
    W = rows[:, None] * (U @ V) * columns
    found = factors(W, torch.eye(24), rank)
    assert found.layout().rank == rank
    torch.testing.assert_close(found.dequantize(), W, rtol=2e-3, atol=2e-3 * float(W.abs().max()))
    # the same products, in some order, each with both of its signs turned or none
    u, v = (part.codes.float() * 2 - 1 for part in (found.outer, found.inner))
    assert torch.equal((U.T @ u).abs().amax(1), torch.full((rank,), 16.0))
    assert torch.equal((V @ v.T).abs().amax(1), torch.full((rank,), 24.0))


def test_a_rank_in_eights_by_hand() -> None:
    """64x64 at 2 bits: 8192 bits; 16·(64 + 64) for rows and columns, 64 + 64 + 16 a product: 42."""
    plan = plans({"a": (64, 64)}, bits=2.0)["a"]
    assert plan.rank == 40
    assert plan.layout(64).bits_per_weight == (40 * 144 + 2048) / 4096
    with pytest.raises(UsageError, match=r"0\.7 bits cannot hold .* least is --bits 0\.782"):
        plans({"a": (64, 64)}, bits=0.7)


def test_a_rank_above_either_side_is_no_waste() -> None:
    """At 3 bits an oblong matrix holds more products than it has rows."""
    plan = plans({"a": (32, 256)}, bits=3.0)["a"]
    assert plan.rank > 32
    W, H = layer(32, 256)
    full, capped = (proxy_loss(W, factors(W, H, rank).dequantize(), H) for rank in (plan.rank, 32))
    assert full < 0.7 * capped


def test_what_a_layer_leaves_over_goes_to_the_next() -> None:
    shapes = {str(i): (72, 200) for i in range(12)}
    found = plans(shapes, bits=1.5)
    total = stored_bits(found, dict.fromkeys(shapes, 72))
    assert len({plan.rank for plan in found.values()}) == 2
    # an eighth of what a step of rank costs one layer
    assert 1.5 - 8 * (72 + 200 + 16) / (72 * 200) / 8 < total <= 1.5


def test_rounding_the_outer_signs_with_feedback_lowers_the_loss() -> None:
    W, H = layer(48, 96)
    without, with_feedback = (
        proxy_loss(W, factors(W, H, 40, feedback=feedback).dequantize(), H)
        for feedback in (False, True)
    )
    assert with_feedback < 0.9 * without


def test_more_steps_of_admm_leave_less() -> None:
    W, H = layer(48, 96)
    losses = [proxy_loss(W, factors(W, H, 40, steps=steps).dequantize(), H) for steps in (0, 5, 80)]
    assert losses == sorted(losses, reverse=True) and losses[2] < 0.9 * losses[1]


def test_what_lies_between_the_factors_is_as_large_as_the_input() -> None:
    """In float16 it must not overflow where the input did not."""
    W, H = layer(48, 96)
    inner = factors(1e3 * W, H, 40).inner.dequantize()
    gain = (inner @ H @ inner.T).diagonal().mean() / H.diagonal().mean()
    assert 1 / 16 < gain < 16


def test_the_papers_rank_and_its_bits() -> None:
    """11008x4096: (2985.2 - 16) / 32 is 92 whole steps; 576x1536 at 1.61 is capped at 576."""
    found = plans({"a": (11008, 4096)}, bits=1.0, faithful=True)["a"]
    assert found.rank == 2944
    method, _ = nanoquant(faithful=True)
    said = method.paper_bits({"a": found}, {"a": 11008})
    assert said == (2944 + 16) * (11008 + 4096) / (11008 * 4096)
    # what is stored beside that: a number for every product
    assert found.layout(11008).bits_per_weight == said + 16 * 2944 / (11008 * 4096)
    assert plans({"a": (576, 1536)}, bits=1.61, faithful=True)["a"].rank == 576


def test_the_papers_recipe() -> None:
    method, config = nanoquant(faithful=True, nsamples=128, seqlen=2048)
    recipe = method.recipe(config)
    assert (recipe.feedback, recipe.compensate, recipe.factors) == (False, False, 400)
    assert recipe.block is not None and recipe.distillation is not None
    assert recipe.block.epochs == 8 and recipe.block.latent_lr > 0
    # scales only, eight times over the calibration text
    assert recipe.distillation.steps == 8 * 128 * 2 and recipe.distillation.latent_lr == 0


def test_our_recipe_trains_as_the_paper_does_but_for_a_fast_one() -> None:
    for effort in ("default", "best"):
        method, config = nanoquant(effort=effort)
        recipe = method.recipe(config)
        assert recipe.feedback and recipe.compensate
        assert recipe.block is not None and recipe.block.latent_lr > 0
        assert recipe.distillation is not None and recipe.distillation.latent_lr == 0
    method, config = nanoquant(effort="fast")
    recipe = methods.recipe_of(method, config)
    assert recipe.block is None and recipe.distillation is None


def test_factors_of_nothing_are_nothing() -> None:
    W = torch.zeros(9, 21)
    assert torch.equal(factors(W, torch.eye(21), 8).dequantize(), W)
    assert all(torch.isfinite(x).all() for x in lb_admm(W, 8, 3))
