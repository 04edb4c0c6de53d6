"""ARB-LLM RC (Li et al., ICLR 2025, arXiv 2410.03129): signs scaled by rows and by columns.

What the paper does: BiLLM's structure, with W ≈ alpha_r alpha_cᵀ ∘ B found by alternating least
squares, 15 times, uncalibrated (eq. 13 to 15); two such pairs for salient columns; it counts 1.11
bits and stores 2.5. `faithful` is that on billm's faithful blocks, with one column scale for both
planes of a column, which is what the layout holds.

What we do: billm's tiers, and the same alternation weighted by E[x²] once for the whole layer,
one row scale a tier; then the loop of all methods on the weight without its column scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pbq.allocate import LayerPlan
from pbq.config import QuantConfig
from pbq.grid import stored
from pbq.methods import Placement
from pbq.methods.billm import Billm, refuse_foreign

ITERATIONS = 15


@dataclass(frozen=True)
class ArbLlm(Billm):
    name: str = "arb-llm"
    summary: str = "billm's tiers with a scale for every row and every column, RC"
    column_scale: bool = True

    def place(self, plan: LayerPlan, W: Tensor, H: Tensor) -> Placement:
        placed = super().place(plan, W, H)
        weight = torch.ones_like(W[0]) if self.config.faithful else H.diagonal()
        return replace(placed, column_scale=column_scales(W, weight, _groups(placed)))


def _groups(placed: Placement) -> Tensor:
    """int64 [k]: a number for the tier and group of each column."""
    group_of, first = torch.zeros_like(placed.tier_of, dtype=torch.int64), 0
    for t, tier in enumerate(placed.tiers):
        group_of[placed.tier_of == t] = first + tier.group_of_column().to(group_of.device)
        first += tier.groups
    return group_of


def column_scales(W: Tensor, weight: Tensor, group_of: Tensor) -> Tensor:
    """alpha_c [k], mean 1, of |W_ij| ≈ alpha_r[i, group of j]·alpha_c[j].

    With B = sign W first-order RC is that fit of magnitudes, by alternating least squares (eq. 14,
    15). weight [k] counts in those of the rows, and cancels in those of the columns.
    """
    magnitude, groups = W.abs(), int(group_of.max()) + 1
    column = torch.ones_like(weight)
    for _ in range(ITERATIONS):
        share = weight * column
        dots = magnitude.new_zeros(len(W), groups).index_add(1, group_of, magnitude * share)
        norms = magnitude.new_zeros(groups).index_add(0, group_of, share * column)
        row = (dots / norms.clamp(min=1e-30))[:, group_of]
        column = (magnitude * row).sum(0) / row.pow(2).sum(0).clamp(min=1e-30)
    # a column of zeros, or one never fed, may have any scale but zero
    column = torch.where(column > 0, column / column.mean().clamp(min=1e-30), 1.0)
    return stored(column.clamp(min=2.0**-10, max=2.0**10))


def method(config: QuantConfig) -> ArbLlm:
    refuse_foreign(config)
    return ArbLlm(config)
