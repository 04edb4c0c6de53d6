"""waterfill with one budget of bits for the whole model, not the same for every layer.

    pbq quantize MODEL OUT --method bench/waterfill_model.py --effort fast --distil-steps 0 ...

A column is worth E[x²]·Σ_r E[g_r²] w_r², g the gradient of the loss (a diagonal Fisher), so that
layers compare and the sensitive ones get more bits. POWER=0.5 in the environment takes the square
root of what sets layers apart. docs/experiments.md has the figures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, waterfill
from pbq.config import QuantConfig
from pbq.methods.waterfill import Waterfill

POWER = float(os.environ.get("POWER", "1"))


@dataclass(frozen=True)
class WholeModel(Waterfill):
    wants_gradients: bool = True

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        damage = {name: _damage(layer) for name, layer in layers.items()}
        rows = {name: layer.shape[0] for name, layer in layers.items()}
        return waterfill(damage, rows, config.bits, self.tiers)


def _damage(layer: PlanInput) -> Tensor:
    """Of each column [k]."""
    x_sq, g_sq = layer.stats.x_sq, layer.stats.g_sq
    assert g_sq is not None
    fisher = x_sq * (g_sq[:, None] * layer.W.float().pow(2)).sum(0)
    sensitivity = fisher.sum() / (x_sq * layer.w_sq).sum()
    return fisher * sensitivity ** (POWER - 1)


def method(config: QuantConfig) -> WholeModel:
    return WholeModel()
