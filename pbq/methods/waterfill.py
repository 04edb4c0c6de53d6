"""waterfill: tiers of 0 to 4 planes by reverse water-filling, everything trained end to end.

Each layer gets bits by what the model loses when it alone is rounded, each of its channels planes
by the damage avoided per stored bit, E[x²]·|w|². Tiers are trellis-coded (pbq_kernels/trellis.py),
on the levels that suit a Gaussian, and have one scale of a byte a row, found by alternating least
squares. The linears are rebuilt as for ptq161 (compensated GPTQ, coarse tier first, joint scales,
sweeps over the codes). Then scales and norms are trained against the original model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pbq.allocate import (
    DISTORTION,
    TRELLIS_DISTORTION,
    UNEVEN_DISTORTION,
    LayerPlan,
    PlanInput,
    bits_by_sensitivity,
    discounted,
    waterfill_each,
)
from pbq.config import QuantConfig
from pbq.grid import Grid, fit_planes, fit_symmetric, fit_trellis
from pbq.methods import refuse_options
from pbq.tune import BlockTuning, Distillation, Recipe
from pbq_kernels.cpu import BUILD
from pbq_kernels.layout import Tier
from pbq_kernels.paths import compiled
from pbq_kernels.trellis import WEIGHTS

log = logging.getLogger(__name__)

# Memory of the trellis of every tier: 256 states leave 4 % less of a Gaussian than 16, and 4096
# another 2 %, for ten times the time of a search.
MEMORY = {"fast": 10, "default": 12, "best": 12}
SCALE_BITS = 8
# Over the codes. The second and third take 1 to 5 % more of q_proj's and k_proj's error.
SWEEPS = 3
# Tokens behind each Hessian; segments of a given text, where it has as many; steps of distillation
HESSIAN_TOKENS = {"fast": 16384, "default": 163840, "best": 262144}
ROWS = {"fast": 0, "default": 172, "best": 264}
STEPS = {"fast": 30, "default": 150, "best": 1000}


@dataclass(frozen=True)
class Waterfill:
    """memory: of the trellises, 0 for none. uneven: their levels, where scales take a byte."""

    memory: int = MEMORY["default"]
    scale_bits: int = SCALE_BITS
    uneven: bool = True
    name: str = "waterfill"
    summary: str = "0 to 4 planes a channel by damage avoided per bit, distilled end to end"
    wants_gradients: bool = False

    @property
    def _uneven(self) -> bool:
        return self.uneven and self.scale_bits == 8

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        damage = {n: x.stats.x_sq * x.w_sq for n, x in layers.items()}
        rows = {n: x.shape[0] for n, x in layers.items()}
        kept = DISTORTION
        if self.memory:
            kept = UNEVEN_DISTORTION if self._uneven else TRELLIS_DISTORTION
        nats = {
            n: discounted(x.sensitivity, x.depth)
            for n, x in layers.items()
            if x.sensitivity is not None
        }
        if len(nats) < len(layers):
            return waterfill_each(damage, rows, config.bits, self.tiers, kept, self.scale_bits)
        weights = {n: x.shape[0] * x.shape[1] for n, x in layers.items()}
        bits = bits_by_sensitivity(nats, weights, config.bits, kept)
        return waterfill_each(damage, rows, bits, self.tiers, kept, self.scale_bits)

    def tiers(self, counts: list[int]) -> tuple[Tier, ...]:
        """So many columns at 0, 1, ... stored planes."""
        return tuple(
            Tier(p, count, tied=True, trellis=self.memory, uneven=self._uneven and p + 1 in WEIGHTS)
            if p and self.memory
            else Tier(p, count, tied=p > 1)
            for p, count in enumerate(counts)
            if count
        )

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        # the root: where one token, an attention sink, is most of H, the costs themselves leave few
        # columns to decide the scale of all
        weight = weight.sqrt()
        if tier.trellis:
            return fit_trellis(W, weight, tier)
        return (
            fit_symmetric(W, weight, tier.planes)
            if tier.tied
            else fit_planes(W, weight, tier.planes)
        )

    def recipe(self, config: QuantConfig) -> Recipe:
        # for who asks for it: least squares leaves it next to nothing to do, and at higher rates
        # it ends above where it started
        block = BlockTuning(epochs=0.0, lr=3e-4, norm_lr=3e-4)
        return Recipe(
            sweeps=SWEEPS,
            hessian_tokens=HESSIAN_TOKENS[config.effort],
            rows=ROWS[config.effort],
            compensate_damp=0.0,
            importance=True,
            sensitivity=True,
            token_noise=0.1,
            batch=1,  # the number of steps counts for more than the tokens of each
            block=block,
            distillation=Distillation(steps=STEPS[config.effort], lr=1.5e-3, norm_lr=1.5e-3),
        )

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        """No paper: the planes alone, as others would count them."""
        payload = sum(rows[n] * t.planes * t.columns for n, p in plans.items() for t in p.tiers)
        return payload / sum(rows[n] * len(plan.tier_of) for n, plan in plans.items())


def method(config: QuantConfig) -> Waterfill:
    refuse_options(config, "group_size", "faithful", "criterion", "salient_share")
    if compiled() is None:
        log.warning(
            "waterfill does without trellises, which its search needs a compiler for: %s", BUILD
        )
        return Waterfill(memory=0)
    return Waterfill(MEMORY[config.effort])
