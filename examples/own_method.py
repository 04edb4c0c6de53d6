"""A method of your own is one file: this one binarizes weights to plus or minus their row's mean.

pbq quantize MODEL OUT --method examples/own_method.py --bits 1.2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, tiers_of
from pbq.config import QuantConfig
from pbq.grid import Grid, stored
from pbq.tune import Recipe
from pbq_kernels.layout import Tier


@dataclass(frozen=True)
class SignTimesMean:
    """W ~ mean |w| of the row * sign(W) (Rastegari et al. 2016), with GPTQ feedback."""

    name: str = "sign-times-mean"
    summary: str = "one plane, one scale a row"
    wants_gradients: bool = False

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        """One tier of one plane for all columns; pbq refuses it if config.bits are too few."""
        widths = {name: layer.W.shape[1] for name, layer in layers.items()}
        scores = {name: layer.stats.x_sq for name, layer in layers.items()}
        return {n: LayerPlan((Tier(1, k),), tiers_of(scores[n], 0)) for n, k in widths.items()}

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        """Scales [n, planes] and offset [n], as they will be stored."""
        return Grid(stored(W.abs().mean(1, keepdim=True)), stored(0 * W.mean(1)))

    def recipe(self, config: QuantConfig) -> Recipe:
        """Every default: compensation, GPTQ, joint scales; no training."""
        return Recipe()

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        """As the paper counts: the signs alone."""
        return 1.0


def method(config: QuantConfig) -> SignTimesMean:
    """What pbq calls."""
    return SignTimesMean()
