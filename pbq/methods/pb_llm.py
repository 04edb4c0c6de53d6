"""PB-LLM (Shang et al., ICLR 2024, arXiv 2310.00034): salient weights at 8 bits, the rest binary.

What the paper does: a share of single weights, by magnitude or by w²/U_jj², keeps 8 bits; the
others are alpha·sign(w - mu) + mu, mean and mean deviation of the row; GPTQ rounds column by column
with both frozen. It counts 8r + (1 - r) bits, "1.7" at 10 %, and forgets where the salient weights
are: a bitmap would be a bit more. `faithful` is that recipe at 10 %.

What we do: as many salient weights as the promised bits allow with their positions (4 bits a gap),
chosen by the damage a sign would do, (w - bin(w))²/[H⁻¹]_jj; the two levels of a row where weighted
least squares puts them, over the non-salient weights; compensation and polishing as for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, largest, plan_each, too_few_bits
from pbq.config import QuantConfig
from pbq.grid import Grid, stored, weighted_mean
from pbq.hessian import inverse_cholesky, saliency
from pbq.methods import Placement, at_best, refuse_criteria_but
from pbq.tune import Recipe
from pbq_kernels.layout import Tier, WeightLayout, encode_overlay

PAPER_SHARE = 0.1
# Bytes of an entry's value; and of a row's count and scale, once it may have any
ENTRY_BYTES, ROW_BYTES = 1, 6


@dataclass(frozen=True)
class PbLlm:
    config: QuantConfig
    name: str = "pb-llm"
    summary: str = "binary with single salient weights at 8 bits"
    wants_gradients: bool = False

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        return plan_each(
            layers,
            lambda layer: self._least(*layer.shape),
            lambda name, layer: self._plan(name, *layer.shape),
        )

    def _tier(self, k: int) -> Tier:
        return Tier(1, k, offset=True, group_size=self.config.group_size)

    def _least(self, n: int, k: int) -> float:
        return WeightLayout(n, k, (self._tier(k),)).bits_per_weight

    def _plan(self, name: str, n: int, k: int) -> LayerPlan:
        tier, column_tiers = self._tier(k), torch.zeros(k, dtype=torch.uint8)
        entries = self._most_entries(n, k)
        if not self.config.faithful:
            spare = int((self.config.bits - self._least(n, k)) * n * k // 8)
            if spare < 0:
                raise too_few_bits(f"{name} [{n}x{k}]", self.config.bits, self._least(n, k))
            entries = min(entries, _affordable(n, k, spare - n * ROW_BYTES))
        return LayerPlan((tier,), column_tiers, False, entries, gap_bytes(n, k, entries))

    def _most_entries(self, n: int, k: int) -> int:
        share = self.config.salient_share
        if not self.config.faithful:
            return round((share or 1) * n * k)
        # the code: all that exceed the sorted saliency at int(low share · entries)
        return max(0, n * k - int((1 - (share or PAPER_SHARE)) * n * k) - 1)

    def place(self, plan: LayerPlan, W: Tensor, H: Tensor) -> Placement:
        order = self.saliency(W, H).flatten().argsort(descending=True, stable=True)
        entries = plan.overlay
        if not self.config.faithful:
            most = self._most_entries(*W.shape)
            nbytes = plan.overlay * ENTRY_BYTES + plan.overlay_bytes
            entries = _fitting(order, W.shape, nbytes, most)
        return Placement(plan.tiers, plan.tier_of.to(W.device), _first(order, entries, W.shape))

    def saliency(self, W: Tensor, H: Tensor) -> Tensor:
        """Score of every entry [n, k]; the highest keep 8 bits."""
        if self.config.criterion == "magnitude":
            return W.abs()
        lost = W
        if self.config.criterion == "damage" and not self.config.faithful:
            grid = two_levels(W, torch.ones_like(W))
            lost = W - grid.decode(grid.codes(W))
        U, _ = inverse_cholesky(H, self.config.percdamp)
        return saliency(lost, U, to_come=self.config.faithful)

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        weight = weight.expand(W.shape)
        return mean_and_deviation(W, weight > 0) if self.config.faithful else two_levels(W, weight)

    def recipe(self, config: QuantConfig) -> Recipe:
        if self.config.faithful:
            return Recipe(sweeps=0, compensate=False, natural_order=True)
        return Recipe(distillation=at_best(config))

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        """8r + (1 - r), the positions not counted."""
        weights = sum(rows[name] * len(plan.tier_of) for name, plan in plans.items())
        return 1 + 7 * sum(plan.overlay for plan in plans.values()) / weights


def mean_and_deviation(W: Tensor, on_grid: Tensor) -> Grid:
    """mu ± mean |w - mu| over the entries of `on_grid` (section 3.3 of the paper)."""
    count = on_grid.sum(1).clamp(min=1)
    mu = (W * on_grid).sum(1) / count
    alpha = ((W - mu[:, None]).abs() * on_grid).sum(1) / count
    return Grid(stored(alpha)[:, None], stored(mu))


def two_levels(W: Tensor, weight: Tensor, iterations: int = 8) -> Grid:
    """The two levels of every row with the least squared error under weight [n, c] (Lloyd)."""
    middle = weighted_mean(W, weight)
    for _ in range(iterations):
        above = middle[:, None] < W
        high, low = (weighted_mean(W, weight * side, middle) for side in (above, ~above))
        middle = (high + low) / 2
    return Grid(stored((high - low) / 2)[:, None], stored(middle))


def gap_bytes(n: int, k: int, entries: int) -> int:
    """Bytes of the positions of so many entries, expected if they are spread at random.

    A nibble an entry, and one for each 15 columns skipped: an entry s or more skips from the one
    before has 15s columns to its left, and none of them is an entry.
    """
    share = entries / (n * k)
    skips = sum((k - columns) * (1 - share) ** columns for columns in range(15, k, 15))
    return math.ceil((entries + n * share * skips) / 2)


def _affordable(n: int, k: int, nbytes: int) -> int:
    """Entries that are expected to take at most `nbytes`, values and positions."""
    return largest(n * k, lambda c: c * ENTRY_BYTES + gap_bytes(n, k, c) <= nbytes)


def _fitting(order: Tensor, shape: torch.Size, nbytes: int, most: int) -> int:
    """How many of the first entries of `order` take at most `nbytes`, values and positions."""

    def fits(entries: int) -> bool:
        positions = len(encode_overlay(_first(order, entries, shape))[1])
        return entries * ENTRY_BYTES + positions <= nbytes

    return largest(min(most, nbytes), fits)


def _first(order: Tensor, entries: int, shape: torch.Size) -> Tensor:
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[:entries]] = True
    return mask.view(shape)


def method(config: QuantConfig) -> PbLlm:
    refuse_criteria_but(config, "damage", "hessian", "magnitude")
    return PbLlm(config)
