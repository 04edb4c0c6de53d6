"""PTQ1.61 (Zhao et al., ACL 2025, arXiv 2502.13179): salient channels 4 bit, the rest binary.

What the paper does: the 20 % of input channels with the largest activation keep 4 bits
(asymmetric, per row); the rest is sign(W - mu) with learnable scales, tuned block by block against
the original block on original and on quantized inputs (MSE - log cosine). `faithful` is that, with
the true bits it stores.

What we do: as many 4-bit channels as the promised bits allow, chosen by the damage a channel would
do, E[x²]·(|w - bin(w)|² - |w - int4(w)|²); the 4-bit range from the salient columns only; GPTQ
feedback with the binary tier first, each linear aimed at the original output; no column scales
(the norms, which are not quantized, are tuned instead).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, most_columns, plan_each, tiers_of
from pbq.config import QuantConfig
from pbq.grid import Grid, fit_planes, fit_uniform, stored
from pbq.methods import at_best, refuse_criteria_but, refuse_options
from pbq.tune import BlockTuning, Recipe
from pbq_kernels.layout import Tier, WeightLayout

SALIENT_PLANES = 4
PAPER_SHARE = 0.2
# Compensation has met the block's output already: half an epoch lowers a block's loss by 0.3 % on
# held-out rows and the perplexity from 159.8 to 152.2, for 1.4 times the time. The default stays
# below ten minutes on two cores without it.
EPOCHS = {"fast": 0.0, "default": 0.0, "best": 4.0}


@dataclass(frozen=True)
class Ptq161:
    faithful: bool
    name: str = "ptq161"
    summary: str = "binary with 4-bit salient channels, scales tuned block by block"
    wants_gradients: bool = False

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        return plan_each(
            layers, self._least_bits, lambda name, layer: self._plan(name, layer, config)
        )

    def _least_bits(self, layer: PlanInput) -> float:
        n, k = layer.shape
        return WeightLayout(n, k, self._tiers(k, 0)).bits_per_weight

    def _plan(self, name: str, layer: PlanInput, config: QuantConfig) -> LayerPlan:
        n, k = layer.shape
        if self.faithful:
            c = int(PAPER_SHARE * k) + 1
        else:
            c = most_columns(n, k, config.bits, lambda c: self._tiers(k, c), name)
        score = _saliency(layer, "absmax" if self.faithful else config.criterion)
        tiers = self._tiers(k, c)
        # with every column salient the fine tier is the first and only one
        tier_of = tiers_of(score, c if len(tiers) == 2 else 0)
        return LayerPlan(tiers, tier_of, column_scale=self.faithful)

    def _tiers(self, k: int, c: int) -> tuple[Tier, ...]:
        binary = Tier(1, k - c, offset=self.faithful)
        fine = Tier(SALIENT_PLANES, c, tied=True, offset=True)
        return tuple(tier for tier in (binary, fine) if tier.columns)

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        if tier.planes == 1:
            return _paper_binary(W) if self.faithful else fit_planes(W, weight, 1)
        if self.faithful:
            # the code takes the range of the entire row, salient or not
            return fit_uniform(row, torch.ones_like(row[0]), tier.planes, search=False)
        return fit_uniform(W, weight, tier.planes)

    def recipe(self, config: QuantConfig) -> Recipe:
        if self.faithful:
            tuning = BlockTuning(
                epochs=20,
                loss="mse-nlc",
                dual=True,
                lr=5e-4,
                row_lr=1e-3,
                norm_lr=0,
                offsets=False,
                only_planes=1,
                constant=True,
            )
            return Recipe(feedback=False, sweeps=0, compensate=False, batch=1, block=tuning)
        epochs = EPOCHS[config.effort]
        return Recipe(
            hessian_tokens=16384 if config.effort == "fast" else 32768,
            block=BlockTuning(epochs=epochs),
            distillation=at_best(config),
        )

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        """0.8·1 + 0.2·4 and one mask bit a channel; two scales a row and one a column, divided by
        the number of *bits* as in appendix A."""
        payload = extra = 0.0
        for name, plan in plans.items():
            n, k = rows[name], len(plan.tier_of)
            payload += sum(n * t.planes * t.columns for t in plan.tiers)
            extra += k + 16 * (2 * n + k)
        weights = sum(rows[name] * len(plan.tier_of) for name, plan in plans.items())
        return payload / weights + extra / payload


def _paper_binary(W: Tensor) -> Grid:
    """mu ± mean |W| with mu the row mean; as coded, the mean is not of |W - mu|."""
    return Grid(stored(W.abs().mean(1, keepdim=True)), stored(W.mean(1)))


def _saliency(layer: PlanInput, criterion: str) -> Tensor:
    """Score of every channel [k]; higher stays at 4 bits."""
    if criterion == "absmax":
        return layer.stats.x_absmax
    if criterion == "mean-abs":
        return layer.stats.x_absmean
    W = layer.W.float()
    # int4 rounds with an error of step²/12 wherever the weight lies; a sign leaves |w| - mean |w|
    step = (W.amax(1).clamp(min=0) - W.amin(1).clamp(max=0)) / (2**SALIENT_PLANES - 1)
    lost = (W.abs() - W.abs().mean(1, keepdim=True)).pow(2).sum(0)
    return layer.stats.x_sq * (lost - step.pow(2).sum() / 12)


def method(config: QuantConfig) -> Ptq161:
    refuse_options(config, "group_size", "salient_share")
    refuse_criteria_but(config, "damage", "absmax", "mean-abs")
    return Ptq161(config.faithful)
