"""DB-LLM (Chen et al., ACL Findings 2024, arXiv 2402.11960): two planes of zeros and ones.

What the paper does: a 2-bit grid of levels -2s … s is split into alpha1·b1 + alpha2·b2 with b in
{0, 1}, alpha1 = 2s and alpha2 = -s (Flexible Dual Binarization), so that most bits are zero; then
the scales of every group of 64 are trained on text sampled from the model, by distillation that
weighs ambiguous tokens more (Deviation-Aware Distillation). There is no public code; how much it
trains, and the exponent of that weight, are not known here. It counts 2 bits and stores 2.5.

In the layout's ±1 planes alpha·b is alpha/2·(±1) + alpha/2: the scales alpha1/2 and alpha2/2 and
the offset (alpha1 + alpha2)/2, a third number that costs 16 bits a group. It is free to move once
the scales are polished or trained: a constant beside the two planes.

What we do: groups as small as the promised bits allow, scales by weighted least squares from that
start, then compensation, GPTQ and polishing as for all. `faithful` starts from the paper's grid in
groups of 64, rounds without feedback, and trains scales and signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput
from pbq.config import QuantConfig
from pbq.grid import Grid, choose, stored, weighted_error
from pbq.methods import at_best, refuse_options
from pbq.methods.rtn import plan_uniform, plane_bits
from pbq.tune import Distillation, Recipe
from pbq_kernels.layout import PackedWeight, Tier, unpack_codes

PAPER_GROUP = 64
# Exponent of the teacher's entropy in the weight of a token; 0 would be plain distillation.
GAMMA = 0.5
FAITHFUL_STEPS = {"fast": 60, "default": 400, "best": 2000}
# Shares of the largest weight that the outermost level may have when least squares starts.
STARTS = (1.0, 0.8, 0.65, 0.5)


@dataclass(frozen=True)
class DbLlm:
    faithful: bool
    name: str = "db-llm"
    summary: str = "two planes of zeros and ones in groups, 2.1 bits and more"
    wants_gradients: bool = False

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        if not self.faithful:
            return plan_uniform(layers, config, _tier, most=2)
        size = PAPER_GROUP if config.group_size == -1 else config.group_size
        return {
            name: LayerPlan((_tier(2, k, size),), torch.zeros(k, dtype=torch.uint8))
            for name, layer in layers.items()
            for k in [layer.shape[1]]
        }

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        largest = W.abs().amax(1)
        return dual(largest, -largest / 2) if self.faithful else fit_dual(W, weight)

    def recipe(self, config: QuantConfig) -> Recipe:
        if self.faithful:
            steps = FAITHFUL_STEPS[config.effort]
            training = Distillation(steps=steps, latent_lr=1e-2, norm_lr=0, gamma=GAMMA)
            return Recipe(feedback=False, sweeps=0, compensate=False, distillation=training)
        return Recipe(distillation=at_best(config, gamma=GAMMA))

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        return plane_bits(plans, rows)

    def notes(self, packed: Mapping[str, PackedWeight]) -> dict[str, str]:
        zeros = [sparsity(pw) for pw in packed.values()]
        weights = sum(pw.layout.n * pw.layout.k for pw in packed.values())
        first, second = (sum(x[p] for x in zeros) / weights for p in (0, 1))
        return {"zeros in the two planes": f"{first:.1%}, {second:.1%}"}


def _tier(planes: int, k: int, group_size: int) -> Tier:
    return Tier(planes, k, offset=True, group_size=group_size)


def dual(alpha1: Tensor, alpha2: Tensor) -> Grid:
    """Levels 0, alpha1, alpha2, alpha1 + alpha2 [n] on two ±1 planes; both zero is exactly zero."""
    halves = torch.stack([alpha1, alpha2], 1) / 2
    # in units that hold the sum as well as both numbers in float16
    total = halves.abs().sum(1, keepdim=True).clamp(min=2.0**-14)
    unit = torch.exp2(total.log2().floor() - 10)
    scale = stored((halves / unit).round() * unit)
    return Grid(scale, stored(scale.sum(1)))


def fit_dual(W: Tensor, weight: Tensor, iterations: int = 8) -> Grid:
    """alpha1 and alpha2 of every row by weighted least squares, from the best of several starts.

    Minimises sum_c weight_c (w_c - alpha1·b1 - alpha2·b2)². Each start is the paper's grid, its
    long side towards the row's largest weight, for some share of it.
    """
    share = weight / weight.sum()
    largest = W.gather(1, W.abs().argmax(1, keepdim=True))[:, 0]
    best = _lloyd(W, share, dual(largest, -largest / 2), iterations)
    for part in STARTS[1:]:
        found = _lloyd(W, share, dual(part * largest, -part * largest / 2), iterations)
        better = weighted_error(W, share, found) < weighted_error(W, share, best)
        best = choose(better, found, best)
    return best


def _lloyd(W: Tensor, share: Tensor, grid: Grid, iterations: int) -> Grid:
    for _ in range(iterations):
        codes = grid.codes(W)
        b1, b2 = (codes & 1).float(), (codes >> 1).float()
        p11, p22, p12 = (x @ share for x in (b1, b2, b1 * b2))
        y1, y2 = (W * b1) @ share, (W * b2) @ share
        det = p11 * p22 - p12**2
        solved = det > 1e-6 * p11 * p22
        det = torch.where(solved, det, 1.0)
        alpha1, alpha2 = (p22 * y1 - p12 * y2) / det, (p11 * y2 - p12 * y1) / det
        kept = 2 * grid.scale  # where a plane is never used its number stays
        grid = dual(
            torch.where(solved, alpha1, kept[:, 0]), torch.where(solved, alpha2, kept[:, 1])
        )
    return grid


def sparsity(pw: PackedWeight) -> list[int]:
    """How many bits of each plane are zero."""
    (tier,) = pw.layout.tiers
    codes = unpack_codes(pw.tensors["weight"], tier.planes, tier.columns)
    return [int((codes >> p & 1).numel() - (codes >> p & 1).sum()) for p in range(tier.planes)]


def method(config: QuantConfig) -> DbLlm:
    refuse_options(config, "criterion", "salient_share")
    return DbLlm(config.faithful)
