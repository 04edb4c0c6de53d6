"""From a budget of stored bits to tiers: how many planes each input channel gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pbq.errors import UsageError
from pbq_kernels.layout import Tier, WeightLayout

# Columns by which the cost of a tier mix may lie off a straight line: padding and started groups.
_LONGEST_DIP = 128


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """What a layer's inputs and output gradients look like: small enough to keep for a whole model.

    x_sq, x_absmax, x_absmean [k]: mean square, largest and mean magnitude of each input channel.
    g_sq [n]: mean square of the loss gradient at each output, or None without a backward pass.
    """

    x_sq: Float[Tensor, " k"]
    x_absmax: Float[Tensor, " k"]
    x_absmean: Float[Tensor, " k"]
    g_sq: Float[Tensor, " n"] | None = None


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The tiers of one layer and the tier of each of its columns, uint8 [k].

    overlay, overlay_bytes: how many entries are expected in it, and the bytes of their positions.
    """

    tiers: tuple[Tier, ...]
    tier_of: UInt8[Tensor, " k"]
    column_scale: bool = False
    overlay: int = 0
    overlay_bytes: int = 0

    def layout(self, n: int) -> WeightLayout:
        k = len(self.tier_of)
        return WeightLayout(n, k, self.tiers, self.column_scale, self.overlay, self.overlay_bytes)


@dataclass(frozen=True, eq=False)
class PlanInput:
    """A layer as an allocator sees it: the weight [n, k] and its statistics."""

    W: Float[Tensor, "n k"]
    stats: ChannelStats


def most_columns(
    n: int,
    k: int,
    bits: float,
    tiers_for: Callable[[int], tuple[Tier, ...]],
    name: str = "layer",
    *,
    column_scale: bool = False,
) -> int:
    """The largest count c of fine columns with stored bits of `tiers_for(c)` at most `bits`.

    Raises UsageError naming the layer and the least bits that would do, rounded up.
    """

    def stored(c: int) -> float:
        return WeightLayout(n, k, tiers_for(c), column_scale).bits_per_weight

    if stored(0) > bits:
        raise UsageError(
            f"{name} [{n}x{k}]: {bits:g} bits cannot hold its signs and scales; "
            f"the least is --bits {math.ceil(1000 * stored(0)) / 1000:.3f}"
        )
    low, high = 0, k
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stored(middle) <= bits else (low, middle - 1)
    # Whole bytes and groups make the cost rise in steps with small dips, which the search above
    # may stop at; and without a coarse column the coarse scales are not stored.
    beyond = [k, *range(min(k, low + _LONGEST_DIP), low, -1)]
    return next((c for c in beyond if stored(c) <= bits), low)


def tiers_of(score: Float[Tensor, " k"], c: int) -> UInt8[Tensor, " k"]:
    """1 for the c columns of highest score, 0 for the rest; a tie goes to the earlier column."""
    tier_of = torch.zeros(len(score), dtype=torch.uint8)
    tier_of[torch.argsort(score, descending=True, stable=True)[:c].cpu()] = 1
    return tier_of


def stored_bits(plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
    """Stored bits per weight of a whole model under these plans."""
    layouts = [plan.layout(rows[name]) for name, plan in plans.items()]
    return sum(L.stored_bits for L in layouts) / sum(L.n * L.k for L in layouts)


# Relative squared error of a Gaussian on its best 2**p levels, p = 0 … 4 (Max 1960; measured on
# the weights of SmolLM2-135M within 10 %). More planes than that never pay below 3 bits.
DISTORTION = (1.0, 0.363, 0.1175, 0.0345, 0.0095)
# A level of so few columns costs more for its scales (16 bits a row and plane) than it gains.
LEAST_COLUMNS = 24


def waterfill(
    damage: Mapping[str, Float[Tensor, " k"]],
    rows: Mapping[str, int],
    bits: float,
    tiers_for: Callable[[list[int]], tuple[Tier, ...]],
) -> dict[str, LayerPlan]:
    """Planes per column by reverse water-filling over all layers under one budget of stored bits.

    damage [k]: loss if a column were dropped; p planes leave DISTORTION[p] of it. Every column
    takes the p with the least damage * DISTORTION[p] + price * n * p, and the price of a bit is
    searched until the stored bits, scales and tier bytes included, just fit. tiers_for(counts):
    tiers for so many columns at 0, 1, … planes. Raises UsageError naming the least bits.
    """

    def plans_at(price: float) -> dict[str, LayerPlan]:
        return {
            name: _layer_plan(_planes(d, price * rows[name]), tiers_for)
            for name, d in damage.items()
        }

    least = stored_bits(plans_at(math.inf), rows)
    if least > bits:
        raise UsageError(
            f"{bits:g} bits cannot hold the masks of this model; "
            f"the least is --bits {math.ceil(1000 * least) / 1000:.3f}"
        )
    high = max(float(d.max()) / rows[n] for n, d in damage.items()) + 1e-30
    # prices span as many decades as damages do, so the search halves their ratio, not their gap
    low, best = high * 1e-12, plans_at(high)
    for _ in range(60):
        price = math.sqrt(low * high)
        plans = plans_at(price)
        if stored_bits(plans, rows) <= bits:
            best, high = plans, price
        else:
            low = price
    return best


def _planes(damage: Tensor, price: float) -> Tensor:
    """int64 [k]: planes of each column at a price per plane."""
    planes = torch.arange(len(DISTORTION), device=damage.device)
    if math.isinf(price):
        return torch.zeros(len(damage), dtype=torch.int64, device=damage.device)
    left = torch.tensor(DISTORTION, dtype=torch.float64, device=damage.device)
    return (damage.double()[:, None] * left + price * planes).argmin(1)


def _layer_plan(planes: Tensor, tiers_for: Callable[[list[int]], tuple[Tier, ...]]) -> LayerPlan:
    """Tiers of a layer, without the levels too few columns asked for.

    These go to the next level below that is in use; the lowest goes to the next above, since no
    planes at all is another thing than few.
    """
    planes = planes.clone()
    for p in range(len(DISTORTION) - 1, 0, -1):
        others = planes[planes != p]
        if len(others) and 0 < len(planes) - len(others) < LEAST_COLUMNS:
            below = others[others < p]
            planes[planes == p] = below.max() if len(below) else others.min()
    counts = torch.bincount(planes, minlength=len(DISTORTION)).tolist()
    used = [p for p, count in enumerate(counts) if count]
    rank = torch.zeros(len(counts), dtype=torch.uint8, device=planes.device)
    rank[used] = torch.arange(len(used), dtype=torch.uint8, device=planes.device)
    return LayerPlan(tiers_for(counts), rank[planes].cpu())
