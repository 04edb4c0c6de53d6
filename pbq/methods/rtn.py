"""Round to nearest: the baseline that needs no data.

Equally spaced levels between the least and the largest weight of each group, zero among them
(asymmetric min-max). Groups are as small as --bits leaves room for, or of --group-size columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, plan_each, stored_budget, too_few_bits
from pbq.config import QuantConfig
from pbq.grid import Grid, fit_uniform
from pbq.methods import refuse_options
from pbq.tune import Recipe
from pbq_kernels.layout import MAX_PLANES, Tier, WeightLayout

# One bit between the extremes of a row is no model at all; who wants one has the other methods.
LEAST_PLANES = 2
LEAST_GROUP = 8


@dataclass(frozen=True)
class Rtn:
    name: str = "rtn"
    summary: str = "round to nearest on a uniform grid, 2 bits and more: the baseline without data"
    wants_gradients: bool = False
    search: bool = False  # of a range smaller than all weights take

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        return plan_uniform(layers, config, _uniform)

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        return fit_uniform(W, weight, tier.planes, search=self.search)

    def recipe(self, config: QuantConfig) -> Recipe:
        return Recipe(feedback=False, sweeps=0, compensate=False)

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        return plane_bits(plans, rows)


def plan_uniform(
    layers: Mapping[str, PlanInput],
    config: QuantConfig,
    tier: Callable[[int, int, int], Tier],
    most: int = MAX_PLANES,
) -> dict[str, LayerPlan]:
    """One tier a layer, tier(planes, k, group_size): most planes first, then smallest groups.

    Raises UsageError naming the least bits that all layers could do with.
    """

    def least(layer: PlanInput) -> float:
        return _least_bits(layer, config, tier)

    def plan(name: str, layer: PlanInput) -> LayerPlan:
        n, k = layer.shape
        chosen = _finest(n, k, config, tier, most)
        if chosen is None:
            held = f"{LEAST_PLANES} planes and their scales"
            raise too_few_bits(f"{name} [{n}x{k}]", config.bits, least(layer), held)
        return LayerPlan((chosen,), torch.zeros(k, dtype=torch.uint8))

    return plan_each(layers, least, plan)


def _finest(
    n: int, k: int, config: QuantConfig, tier: Callable[[int, int, int], Tier], most: int
) -> Tier | None:
    for planes in range(most, LEAST_PLANES - 1, -1):
        whole = tier(planes, k, config.group_size)
        spare = stored_budget(config.bits, n * k) - WeightLayout(n, k, (whole,)).stored_bits
        if spare < 0:
            continue
        if config.group_size != -1:
            return whole
        groups = 1 + int(spare // (16 * n * (whole.scales + whole.offsets)))
        size = max(math.ceil(k / groups), LEAST_GROUP)
        return whole if size >= k else tier(planes, k, size)
    return None


def _least_bits(
    layer: PlanInput, config: QuantConfig, tier: Callable[[int, int, int], Tier]
) -> float:
    n, k = layer.shape
    return WeightLayout(n, k, (tier(LEAST_PLANES, k, config.group_size),)).bits_per_weight


def _uniform(planes: int, k: int, group_size: int) -> Tier:
    return Tier(planes, k, tied=True, offset=True, group_size=group_size)


def plane_bits(plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
    """The planes alone, as papers count a "2-bit" model."""
    payload = sum(rows[n] * t.planes * t.columns for n, p in plans.items() for t in p.tiers)
    return payload / sum(rows[n] * len(plan.tier_of) for n, plan in plans.items())


def method(config: QuantConfig) -> Rtn:
    refuse_options(config, "faithful", "criterion", "salient_share")
    return Rtn()
