"""BiLLM (Huang et al., ICML 2024, arXiv 2402.04291): salient columns binarized twice, a split rest.

What the paper does, in blocks of 128 columns: the columns of largest saliency, w² over a diagonal
of H⁻¹ summed up, are binarized twice (a sign, and the sign of what it leaves); the others fall into
a concentrated and a sparse part by their magnitude, each with a scale of its own. It counts one bit
a weight and one more in a salient column; the flag that says which part a weight is in and the
scales of every row and block are 1.5 bits more, 2 with the means of its code.

Both have four levels ±a±b, so both are two planes here: residual binarization by itself, the split
as sign·(a + b·flag) with flag ±1, whose second plane is sign·flag.

What we do: as many columns with two planes as the promised bits allow, by Hessian saliency, the
others plainly binary; the four levels by alternating least squares, which leaves less than either
search; feedback column by column. `faithful` is the paper's: two planes everywhere, as many salient
columns in each block of a layer as leave the least error, both searches, and blocks rounded at once
with the feedback of its code, which divides by the diagonal alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, most_columns, plan_each, tiers_of
from pbq.config import QuantConfig
from pbq.grid import Grid, fit_planes, stored, weighted_mean
from pbq.hessian import inverse_cholesky, saliency
from pbq.methods import Placement, at_best, refuse_options
from pbq.tune import Recipe
from pbq_kernels.layout import Tier, WeightLayout

BLOCK = 128
# Salient columns of a block, at most: the upper end of the paper's 3 to 30.
MOST_SALIENT = 30
# Its reported share, 7 to 13 %: what a plan expects before the weights have been searched.
EXPECTED_SALIENT = 13
BREAK_POINTS = 81


@dataclass(frozen=True)
class Billm:
    config: QuantConfig
    name: str = "billm"
    summary: str = "salient columns binarized twice, or the rest split by magnitude as well"
    wants_gradients: bool = False
    column_scale: bool = False

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        return plan_each(layers, self._least_bits, self._plan)

    def _least_bits(self, layer: PlanInput) -> float:
        n, k = layer.shape
        return WeightLayout(n, k, self._tiers(k, 0), self.column_scale).bits_per_weight

    def _plan(self, name: str, layer: PlanInput) -> LayerPlan:
        n, k = layer.shape
        score = layer.stats.x_sq * layer.w_sq
        if self.config.faithful:
            tiers, tier_of = _blocks(score, EXPECTED_SALIENT)
            return LayerPlan(tiers, tier_of, self.column_scale)
        c = most_columns(
            n,
            k,
            self.config.bits,
            lambda c: self._tiers(k, c),
            name,
            column_scale=self.column_scale,
        )
        tiers = self._tiers(k, c)
        return LayerPlan(tiers, tiers_of(score, c if len(tiers) == 2 else 0), self.column_scale)

    def _tiers(self, k: int, c: int) -> tuple[Tier, ...]:
        group_size = self.config.group_size
        tiers = Tier(1, k - c, group_size=group_size), Tier(2, c, group_size=group_size)
        return tuple(tier for tier in tiers if tier.columns)

    def place(self, plan: LayerPlan, W: Tensor, H: Tensor) -> Placement:
        U, _ = inverse_cholesky(H, self.config.percdamp)
        score = saliency(W, U, to_come=self.config.faithful).sum(0)
        if self.config.faithful:
            tiers, tier_of = _blocks(score, salient_columns(W, score))
            return Placement(tiers, tier_of.to(W.device))
        c = plan.tiers[1].columns if len(plan.tiers) == 2 else 0
        return Placement(plan.tiers, tiers_of(score, c).to(W.device))

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        if self.config.faithful:
            # the groups of salient columns are the small ones
            search = residual if tier.group_size <= MOST_SALIENT else bell_split
            return search(W, torch.ones_like(weight))
        return fit_planes(W, weight, tier.planes)

    def recipe(self, config: QuantConfig) -> Recipe:
        if config.faithful:
            return Recipe(sweeps=0, compensate=False, joint=True)
        return Recipe(distillation=at_best(config))

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        """2r + (1 - r), r the share of salient columns: neither flags nor scales."""
        salient = {
            name: sum(t.columns for t in p.tiers if t.planes == 2 and self._is_salient(t))
            for name, p in plans.items()
        }
        weights = sum(rows[name] * len(plan.tier_of) for name, plan in plans.items())
        return 1 + sum(rows[name] * count for name, count in salient.items()) / weights

    def _is_salient(self, tier: Tier) -> bool:
        return not self.config.faithful or 0 < tier.group_size <= MOST_SALIENT


def _blocks(score: Tensor, c: int) -> tuple[tuple[Tier, ...], Tensor]:
    """Two planes everywhere: tier 1 holds the c columns of highest score of every block of 128.

    Its groups are these c, and those of tier 0 the block's other columns.
    """
    tier_of = torch.cat([tiers_of(part, min(c, len(part))) for part in score.split(BLOCK)])
    salient = int(tier_of.sum())
    rest = Tier(2, len(score) - salient, group_size=BLOCK - c)
    if not rest.columns:
        return (Tier(2, salient, group_size=c),), torch.zeros_like(tier_of)
    return (rest, Tier(2, salient, group_size=c)), tier_of


def salient_columns(W: Tensor, score: Tensor) -> int:
    """The count of salient columns a block, 1 to 30, that leaves the least squared error.

    Salient ones binarized twice, the rest once (eq. 5), over the blocks of the layer together.
    """
    errors = torch.zeros(MOST_SALIENT, device=W.device)
    for part, ranks in zip(W.split(BLOCK, 1), score.split(BLOCK), strict=True):
        ordered = part[:, ranks.argsort(descending=True, stable=True)]
        size = ordered.shape[1]
        # what a plain sign leaves of the columns from c on: Σw² - (Σ|w|)² / count
        squares, sums = (x.flip(1).cumsum(1).flip(1) for x in (ordered**2, ordered.abs()))
        for c in range(1, MOST_SALIENT + 1):
            salient = ordered[:, :c]
            grid = residual(salient, salient.new_ones(salient.shape[1]))
            errors[c - 1] += (salient - grid.decode(grid.codes(salient))).pow(2).sum()
            if c < size:
                errors[c - 1] += (squares[:, c] - sums[:, c] ** 2 / (size - c)).sum()
    return 1 + int(errors.argmin())


def residual(W: Tensor, weight: Tensor) -> Grid:
    """alpha_o·sign(w), alpha_r·sign of what that leaves; each alpha a mean magnitude (eq. 6)."""
    return fit_planes(W, weight, 2, iterations=0)


def bell_split(W: Tensor, weight: Tensor) -> Grid:
    """±alpha_c where |w| is at most p, else ±alpha_s; p leaves the least squared error (eq. 8)."""
    share = weight / weight.sum()
    magnitude = W.abs()
    best, error = residual(W, weight), torch.inf
    ranks = torch.linspace(0.1, 0.9, BREAK_POINTS, device=W.device)
    for p in magnitude.flatten().float().quantile(ranks):
        concentrated = magnitude <= p
        alpha_c, alpha_s = (
            weighted_mean(magnitude, share * side) for side in (concentrated, ~concentrated)
        )
        lost = magnitude - torch.where(concentrated, alpha_c[:, None], alpha_s[:, None])
        found = float((lost**2 @ share).sum())
        if found < error:
            scale = torch.stack([(alpha_s - alpha_c) / 2, (alpha_s + alpha_c) / 2], 1)
            best, error = Grid(stored(scale), best.offset), found
    return best


def refuse_foreign(config: QuantConfig) -> None:
    """Raise UsageError on the options that neither this method nor arb-llm has."""
    refuse_options(config, "criterion", "salient_share")
    if config.faithful:
        refuse_options(config, "group_size")


def method(config: QuantConfig) -> Billm:
    refuse_foreign(config)
    return Billm(config)
