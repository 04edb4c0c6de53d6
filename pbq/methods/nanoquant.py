"""NanoQuant (ICML 2026, arXiv 2602.06694): a weight is the product of two matrices of signs.

What the paper does: W ≈ s1 ∘ U Vᵀ ∘ s2, U [n, r] and V [k, r] of signs. They are found by ADMM
(alternating ridge regressions, each pulled towards signs times a rank-one magnitude) on the weight
with its columns scaled by sqrt E[x²] and its rows by sqrt E[g²]; then latent factors and scales
are trained block by block, and the scales end to end. Its code caps r at min(n, k), which leaves
bits unused above 1.4 where a matrix is far from square.

What we do: as many signs as the promised bits hold, r in eights and without a cap; the magnitude
that ADMM leaves on the r products is stored as well (as DBF does, 16 r bits). The metric is H: ADMM
sees its diagonal, and the outer signs are then rounded anew by the GPTQ loop of all methods, with
the inner factor's outputs in the place of a layer's inputs. Rows are not weighted: E[g²] would take
the gradients of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, largest, stored_budget, too_few_bits
from pbq.config import QuantConfig
from pbq.gptq import quantize_weight
from pbq.grid import Factors, Grid, QuantizedWeight, TierGrid, fit_planes, stored
from pbq.hessian import least_squares
from pbq.methods import refuse_options
from pbq.tune import STEP_TOKENS, BlockTuning, Distillation, Recipe
from pbq_kernels.layout import Tier, WeightLayout

# Ranks come in eights, so that no row of the outer factor is padded; the paper's code has 32.
STEP, PAPER_STEP = 8, 32
ITERATIONS = {"fast": 20, "default": 60, "best": 200}
PAPER_ITERATIONS = 400
PAPER_EPOCHS = 8
# Passes over the calibration rows for each block, and steps of distilling scales and norms.
EPOCHS = {"fast": 0.0, "default": 2.0, "best": 6.0}
STEPS = {"fast": 0, "default": 150, "best": 1000}
# Of the regressions in ADMM, relative to the diagonal of what they invert.
RIDGE = 3e-2
# How much of each E[x²] is replaced by their mean: the paper's figure, its code has 0.4.
SHRINK = 0.2
POWER_ITERATIONS = 5


@dataclass(frozen=True)
class NanoQuant:
    faithful: bool
    name: str = "nanoquant"
    summary: str = "two factors of signs in a row, of the rank that the bits hold"
    wants_gradients: bool = False

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        """What one layer's rank leaves over goes to the next."""
        name, most = max(layers.items(), key=lambda layer: _least_bits(*layer[1].shape))
        if _least_bits(*most.shape) > config.bits and not self.faithful:
            n, k = most.shape
            raise too_few_bits(f"{name} [{n}x{k}]", config.bits, _least_bits(n, k))
        plans, left = {}, 0.0
        for name, layer in layers.items():
            n, k = layer.shape
            left += stored_budget(config.bits, n * k)
            rank = _paper_rank(n, k, config.bits) if self.faithful else _rank(n, k, left)
            plans[name] = _plan(k, rank)
            left -= plans[name].layout(n).stored_bits
        return plans

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        return fit_planes(W, weight, 1)

    def recipe(self, config: QuantConfig) -> Recipe:
        if self.faithful:
            steps = math.ceil(PAPER_EPOCHS * config.segments * config.seqlen / STEP_TOKENS)
            return Recipe(
                feedback=False,
                sweeps=0,
                factors=PAPER_ITERATIONS,
                compensate=False,
                batch=1,
                block=BlockTuning(epochs=PAPER_EPOCHS, lr=1e-4, latent_lr=1e-4, norm_lr=0),
                distillation=Distillation(steps=steps, lr=1e-4, norm_lr=0),
            )
        # a sign of a factor turns a part of a whole row: the rate that a weight's own signs bear,
        # six times as high, makes blocks worse
        tuning = BlockTuning(epochs=EPOCHS[config.effort], lr=2e-3, norm_lr=2e-3, latent_lr=1e-2)
        return Recipe(
            factors=ITERATIONS[config.effort],
            hessian_tokens=16384 if config.effort == "fast" else 32768,
            batch=1,
            block=tuning,
            distillation=Distillation(steps=STEPS[config.effort]),
        )

    def factorize(
        self, plan: LayerPlan, W: Tensor, H: Tensor, recipe: Recipe, percdamp: float, name: str
    ) -> tuple[Factors, float]:
        size = _shrunk(H.diagonal()).sqrt()
        outer, inner = lb_admm(W * size, plan.rank, recipe.factors)
        signs, row, product = signs_and_magnitudes(outer)
        second = _inner(inner, product, size)
        F = second.dequantize()
        if recipe.feedback:
            first, _, damping = quantize_weight(
                least_squares(W, F, H, percdamp, name),
                F @ H @ F.T,
                (Tier(1, plan.rank),),
                torch.zeros(plan.rank, dtype=torch.uint8),
                self.fit,
                percdamp=percdamp,
                sweeps=recipe.sweeps,
                name=name,
            )
        else:
            first, damping = _one_plane(signs, row), 0.0
        first.grids[0].scale = _best_rows(first, W, H, F)
        return Factors(first, second), damping

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        """r signs and a scale of 16 bits for every row and every column."""
        sides = {name: rows[name] + len(plan.tier_of) for name, plan in plans.items()}
        stored_bits = sum((plan.rank + 16) * sides[name] for name, plan in plans.items())
        return stored_bits / sum(rows[name] * len(plan.tier_of) for name, plan in plans.items())


def _plan(k: int, rank: int) -> LayerPlan:
    tier_of = torch.zeros(k, dtype=torch.uint8)
    return LayerPlan((Tier(1, k),), tier_of, column_scale=True, rank=rank)


def _layout(n: int, k: int, rank: int) -> WeightLayout:
    return _plan(k, rank).layout(n)


def _least_bits(n: int, k: int) -> float:
    return _layout(n, k, STEP).bits_per_weight


def _rank(n: int, k: int, budget: float) -> int:
    """The largest rank within so many stored bits; a sign is needed for every row and column."""
    most = int(budget / (STEP * (n + k)))
    return STEP * largest(most, lambda c: _layout(n, k, STEP * c).stored_bits <= budget)


def _paper_rank(n: int, k: int, bits: float) -> int:
    """As coded; at least one step."""
    rank = int((bits * n * k / (n + k) - 16) // PAPER_STEP) * PAPER_STEP
    return max(PAPER_STEP, min(rank, n, k))


def _shrunk(x_sq: Tensor) -> Tensor:
    """Importance of columns [k]; 1 where nothing is ever fed."""
    mean = x_sq.mean()
    return (1 - SHRINK) * x_sq + SHRINK * mean if mean > 0 else torch.ones_like(x_sq)


def lb_admm(W: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors [n, rank] and [rank, k] of W [n, k] whose signs and magnitudes are to be kept.

    Minimises |W - A B|² over A and B near signs times a rank-one magnitude: scaled ADMM, A and B in
    turn by ridge regression on the other's projection, pulled harder towards their own from step to
    step. As coded, but for the duals, which start at zero.
    """
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(len(W), rank, generator=generator).to(W.device)
    B = torch.randn(W.shape[1], rank, generator=generator).to(W.device)
    W = W / W.pow(2).mean().sqrt().clamp(min=1e-30)
    dual_A, dual_B = torch.zeros_like(A), torch.zeros_like(B)
    near_A, near_B = _projected(A), _projected(B)
    for step in range(iterations):
        pull = step / iterations
        A = _regressed(W, near_B, near_A - dual_A, pull)
        near_A = _projected(A + dual_A)
        dual_A += A - near_A
        B = _regressed(W.T, near_A, near_B - dual_B, pull)
        near_B = _projected(B + dual_B)
        dual_B += B - near_B
    return A + dual_A, (B + dual_B).T


def _regressed(W: Tensor, other: Tensor, towards: Tensor, pull: float) -> Tensor:
    """argmin over A [n, r] of |W - A Xᵀ|² + pull·|A - towards|² + RIDGE·|A|².

    X: `other` [k, r] with columns of length one.
    """
    X = other / other.norm(dim=0).clamp(min=1e-30)
    gram = X.T @ X
    gram.diagonal().add_(pull + RIDGE)
    L = torch.linalg.cholesky(gram)
    return torch.cholesky_solve((W @ X + pull * towards).T, L).T


def signs_and_magnitudes(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M [n, r] ≈ signs ∘ (row columnᵀ): ±1 [n, r], magnitudes row [n] and column [r] of |M|.

    The best rank-one magnitudes, by power iteration; row has length one.
    """
    size = M.abs()
    column = size.mean(0)
    row = column.new_zeros(len(M))
    for _ in range(POWER_ITERATIONS):
        row = size @ column
        row = row / row.norm().clamp(min=1e-30)
        column = size.T @ row
    return torch.where(M >= 0, 1.0, -1.0), row, column


def _projected(M: Tensor) -> Tensor:
    signs, row, column = signs_and_magnitudes(M)
    return signs * row[:, None] * column


def _one_plane(signs: Tensor, row: Tensor, column: Tensor | None = None) -> QuantizedWeight:
    """signs ∘ (row columnᵀ) as a weight, its numbers rounded to what is stored."""
    n, k = signs.shape
    return QuantizedWeight(
        (Tier(1, k),),
        torch.zeros(k, dtype=torch.uint8, device=signs.device),
        (signs > 0).to(torch.uint8),
        [TierGrid(stored(row).reshape(n, 1, 1), None)],
        None if column is None else stored(column),
    )


def _inner(M: Tensor, product: Tensor, size: Tensor) -> QuantizedWeight:
    """The inner factor [r, k] with the magnitudes of the r products, on the unscaled columns.

    All of the weight's magnitude is left to the outer factor; that of this one is such that what
    comes out of it is about as large as what goes in, which is what a 16-bit type can hold.
    """
    signs, row, column = signs_and_magnitudes(M)
    row, column = row * product, column / size
    row, column = (x / x.mean().clamp(min=1e-30) for x in (row, column))
    column = column.clamp(min=2.0**-10, max=2.0**10)
    return _one_plane(signs, row * 2.0 ** -round(math.log2(len(column)) / 2), column)


def _best_rows(outer: QuantizedWeight, W: Tensor, H: Tensor, F: Tensor) -> Tensor:
    """Scales [n, 1, 1] of the outer factor's rows by least squares in the metric H."""
    W_hat = outer.dequantize() @ F
    energy = ((W_hat @ H) * W_hat).sum(1)
    factor = ((W @ H) * W_hat).sum(1) / energy.clamp(min=1e-30)
    return stored(outer.grids[0].scale * factor.clamp(min=0)[:, None, None])


def method(config: QuantConfig) -> NanoQuant:
    refuse_options(config, "group_size", "criterion", "salient_share")
    return NanoQuant(config.faithful)
