"""From a budget of stored bits to tiers: how many planes each input channel gets."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

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
    rank: of a product of two factors, of which the inner one has these tiers; see WeightLayout,
    as for scale_bits.
    """

    tiers: tuple[Tier, ...]
    tier_of: UInt8[Tensor, " k"]
    column_scale: bool = False
    overlay: int = 0
    overlay_bytes: int = 0
    rank: int = 0
    scale_bits: int = 16

    def layout(self, n: int) -> WeightLayout:
        return WeightLayout(
            n,
            len(self.tier_of),
            self.tiers,
            self.column_scale,
            self.overlay,
            self.overlay_bytes,
            self.rank,
            self.scale_bits,
        )


class PlanInput:
    """A layer as an allocator sees it: its shape, its statistics, and the weight for who must look.

    shape: (n, k). w_sq [k]: sum of squares of each column. W [n, k] may be read from the disk when
    it is asked for: ask layer after layer, in the order given, and never for its shape.
    sensitivity: nats that the model loses with this layer alone rounded at the promised bits, where
    that was measured (pbq.sensitivity). depth: share of the model's blocks that lie before its own.
    """

    sensitivity: float | None = None
    depth: float = 0.0

    def __init__(
        self,
        W: Float[Tensor, "n k"] | Callable[[], Tensor],
        stats: ChannelStats,
        shape: tuple[int, int] | None = None,
        w_sq: Float[Tensor, " k"] | None = None,
    ) -> None:
        """W: the weight, or what returns it; then shape and w_sq must be given."""
        self._W, self.stats = W, stats
        if isinstance(W, Tensor):
            self.shape = (W.shape[0], W.shape[1])
            self.w_sq = column_energy(W) if w_sq is None else w_sq
        else:
            assert shape is not None and w_sq is not None
            self.shape, self.w_sq = shape, w_sq

    @property
    def W(self) -> Tensor:
        return self._W if isinstance(self._W, Tensor) else self._W()


def column_energy(W: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Sum of squares of each column, in float32."""
    return W.float().pow(2).sum(0)


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
        raise too_few_bits(f"{name} [{n}x{k}]", bits, stored(0))
    low = largest(k, lambda c: stored(c) <= bits)
    # Whole bytes and groups make the cost rise in steps with small dips, which the search above
    # may stop at; and without a coarse column the coarse scales are not stored.
    beyond = [k, *range(min(k, low + _LONGEST_DIP), low, -1)]
    return next((c for c in beyond if stored(c) <= bits), low)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `most` that fits, by bisection; 0 is taken to fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def stored_budget(bits: float, weights: int) -> float:
    """Stored bits that so many weights may take; 1.16 * 25 is 29, whatever floating point says."""
    exact = bits * weights
    nearest = float(round(exact))
    # what is stored is judged by this quotient, and must not be above the promise by a rounding
    whole = math.isclose(exact, nearest, rel_tol=1e-12) and nearest / weights <= bits
    return nearest if whole else exact


def too_few_bits(
    what: str, bits: float, least: float, held: str = "its signs and scales"
) -> UsageError:
    """The refusal of a budget, with the least bits that would do, rounded up."""
    return UsageError(
        f"{what}: {bits:g} bits cannot hold {held}; "
        f"the least is --bits {math.ceil(1000 * least) / 1000:.3f}"
    )


def plan_each(
    layers: Mapping[str, PlanInput],
    least_bits: Callable[[PlanInput], float],
    plan: Callable[[str, PlanInput], LayerPlan],
) -> dict[str, LayerPlan]:
    """plan(name, layer) of every layer; the one that needs most bits is tried first.

    What the refusal of that one names will do for all.
    """
    first = max(layers, key=lambda name: least_bits(layers[name]))
    planned = plan(first, layers[first])  # refuses for all of them
    return {name: planned if name == first else plan(name, layer) for name, layer in layers.items()}


def tiers_of(score: Float[Tensor, " k"], c: int) -> UInt8[Tensor, " k"]:
    """1 for the c columns of highest score, 0 for the rest; a tie goes to the earlier column."""
    tier_of = torch.zeros(len(score), dtype=torch.uint8)
    tier_of[torch.argsort(score, descending=True, stable=True)[:c].cpu()] = 1
    return tier_of


def stored_bits(plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
    """Stored bits per weight of a whole model under these plans."""
    layouts = [plan.layout(rows[name]) for name, plan in plans.items()]
    return sum(L.stored_bits for L in layouts) / sum(L.n * L.k for L in layouts)


# Relative squared error of a Gaussian on its best 2**p equally spaced levels, p = 0 … 4 (Max 1960,
# table II). More planes than that never pay below 3 bits.
DISTORTION = (1.0, 0.3634, 0.1188, 0.03744, 0.01154)
# The same with a trellis of memory 8 (pbq_kernels/trellis.py), measured on 180,000 numbers.
TRELLIS_DISTORTION = (1.0, 0.2864, 0.0887, 0.0280, 0.00875)
# The same on uneven levels, where there are some.
UNEVEN_DISTORTION = (1.0, 0.2843, 0.0809, 0.0225, 0.00875)
# Least and most bits of a layer beside another, as shares of the promised ones.
SPREAD = 0.4, 2.0
# Depth at which nats would count nothing, below the first block, see `discounted`.
FULL_DISCOUNT = -0.13
# Planes of the tiers a layer may be made of: every set of plane counts.
_MIXES = [
    mix
    for size in range(1, len(DISTORTION) + 1)
    for mix in itertools.combinations(range(len(DISTORTION)), size)
]
# A tier's columns come in eights, so that no row of it is padded.
_STEP = 8


# Tiers for so many columns at 0, 1, ... planes.
TiersFor: TypeAlias = Callable[[list[int]], tuple[Tier, ...]]


@dataclass(frozen=True)
class _Choice:
    """Damage left, stored bits, and the tiers that do it: their planes and their columns."""

    left: float
    bits: int
    mix: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer sorted for water-filling: damage rising, its running sum from zero, and its shape."""

    n: int
    order: Tensor
    rising: list[float]
    summed: list[float]
    tiers_for: TiersFor
    kept: Sequence[float]
    scale_bits: int
    # a search over prices comes to the same columns again and again
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], _Choice] = field(default_factory=dict)

    @staticmethod
    def of(
        damage: Tensor, n: int, tiers_for: TiersFor, kept: Sequence[float], scale_bits: int
    ) -> _Layer:
        rising, order = damage.double().cpu().sort(stable=True)
        summed = [0.0, *rising.cumsum(0).tolist()]
        return _Layer(n, order, rising.tolist(), summed, tiers_for, kept, scale_bits)

    @property
    def k(self) -> int:
        return len(self.rising)

    def counts(self, mix: tuple[int, ...], price: float) -> tuple[int, ...]:
        """Columns of each plane count of `mix`, lowest first, when a stored bit costs `price`.

        A column takes p planes rather than the next lower q where damage * (D[q] - D[p]) is more
        than price * n * (p - q); D, `kept`, is convex, so a column's choice rises with its damage.
        """
        ends = []
        for low, high in itertools.pairwise(mix):
            saved = self.kept[low] - self.kept[high]
            threshold = price * self.n * (high - low) / saved
            above = self.k - bisect.bisect_left(self.rising, threshold)
            ends.append(max(0, self.k - math.ceil(above / _STEP) * _STEP))
        ends.append(self.k)
        return tuple(end - start for start, end in itertools.pairwise([0, *ends]))

    def tiers(self, mix: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Tier, ...]:
        of_planes = [0] * len(DISTORTION)
        for planes, count in zip(mix, counts, strict=True):
            of_planes[planes] = count
        return self.tiers_for(of_planes)

    def choice(self, mix: tuple[int, ...], price: float) -> _Choice:
        """The best of one mix at a price; some of its tiers may stay empty."""
        counts = self.counts(mix, price)
        if (mix, counts) not in self.known:
            self.known[mix, counts] = self._chosen(mix, counts)
        return self.known[mix, counts]

    def _chosen(self, mix: tuple[int, ...], counts: tuple[int, ...]) -> _Choice:
        ends = [0, *itertools.accumulate(counts)]
        left = sum(
            self.kept[p] * (self.summed[end] - self.summed[start])
            for p, start, end in zip(mix, ends, ends[1:], strict=False)
        )
        tiers = self.tiers(mix, counts)
        layout = WeightLayout(self.n, self.k, tiers, scale_bits=self.scale_bits)
        return _Choice(left, layout.stored_bits, mix, counts)

    def best(self, price: float) -> _Choice:
        """The mix that is worth most when a stored bit costs `price`."""
        found = [self.choice(mix, price) for mix in _MIXES]
        return min(found, key=lambda choice: choice.left + price * choice.bits)

    def within(self, budget: float) -> _Choice | None:
        """The mix that leaves least damage within `budget` stored bits, or None.

        A price common to all mixes would not do: where all columns are alike, none makes a second
        tier worth its scales, and half of the budget may lie idle.
        """
        found = []
        for mix in _MIXES:
            low, high = self.prices()
            for _ in range(28):
                price = math.sqrt(low * high)
                choice = self.choice(mix, price)
                if choice.bits <= budget:
                    found.append(choice)
                    high = price
                else:
                    low = price
        return min(found, key=lambda choice: (choice.left, choice.bits), default=None)

    def prices(self) -> tuple[float, float]:
        """Prices between which every change of planes lies, in damage per bit."""
        high = self.rising[-1] / self.n + 1e-30
        return high * 1e-12, high * 1e3

    def plan(self, choice: _Choice) -> LayerPlan:
        used = [count for count in choice.counts if count]
        tier_of = torch.empty_like(self.order, dtype=torch.uint8)
        tier_of[self.order] = torch.cat(
            [tier_of.new_full((count,), tier) for tier, count in enumerate(used)]
        )
        tiers = self.tiers(choice.mix, choice.counts)
        return LayerPlan(tiers, tier_of, scale_bits=self.scale_bits)


def waterfill(
    damage: Mapping[str, Float[Tensor, " k"]],
    rows: Mapping[str, int],
    bits: float,
    tiers_for: TiersFor,
    kept: Sequence[float] = DISTORTION,
    scale_bits: int = 16,
) -> dict[str, LayerPlan]:
    """Planes per column by reverse water-filling over all layers under one budget of stored bits.

    damage [k]: loss if a column were dropped; p planes leave kept[p] of it. Each layer takes
    the tiers and each column the planes with the least damage left + price * stored bits, the
    bytes of scales and masks included, and the price of a bit is searched until all just fit.
    tiers_for(counts): tiers for so many columns at 0, 1, … planes. Raises UsageError naming the
    least bits.
    """
    layers = {
        name: _Layer.of(d, rows[name], tiers_for, kept, scale_bits) for name, d in damage.items()
    }
    budget = stored_budget(bits, sum(layer.n * layer.k for layer in layers.values()))
    prices = [layer.prices() for layer in layers.values()]
    # prices span as many decades as damages do, so the search halves their ratio, not their gap
    low, high = min(low for low, _ in prices), max(high for _, high in prices)
    best = {name: layer.best(high) for name, layer in layers.items()}
    _check_budget(sum(choice.bits for choice in best.values()), budget, bits)
    for _ in range(40):
        price = math.sqrt(low * high)
        found = {name: layer.best(price) for name, layer in layers.items()}
        if sum(choice.bits for choice in found.values()) <= budget:
            best, high = found, price
        else:
            low = price
    return {name: layer.plan(best[name]) for name, layer in layers.items()}


def waterfill_each(
    damage: Mapping[str, Float[Tensor, " k"]],
    rows: Mapping[str, int],
    bits: float | Mapping[str, float],
    tiers_for: TiersFor,
    kept: Sequence[float] = DISTORTION,
    scale_bits: int = 16,
) -> dict[str, LayerPlan]:
    """`waterfill` with given bits for each layer; what one leaves over goes to the next."""
    plans: dict[str, LayerPlan] = {}
    left = 0.0
    for name, d in damage.items():
        layer = _Layer.of(d, rows[name], tiers_for, kept, scale_bits)
        own = bits if isinstance(bits, int | float) else bits[name]
        left += stored_budget(own, layer.n * layer.k)
        choice = layer.within(left)
        if choice is None:
            _check_budget(layer.best(layer.prices()[1]).bits, left, own)
        assert choice is not None
        plans[name] = layer.plan(choice)
        left -= choice.bits
    return plans


def discounted(nats: float, depth: float) -> float:
    """What nats lost by a layer alone count in a reconstructed model, up to a common factor.

    Every block is aimed at the original output given its own inputs, so that it makes up for some
    of what the blocks before it lose, and the first have most behind them: docs/experiments.md.
    """
    return nats * math.sqrt(depth - FULL_DISCOUNT)


def fall(kept: Sequence[float]) -> float:
    """What one bit more a weight divides the damage by: `kept` (`waterfill`) at 1 to 3 planes."""
    return math.sqrt(kept[1] / kept[3])


def bits_by_sensitivity(
    nats: Mapping[str, float],
    weights: Mapping[str, int],
    bits: float,
    kept: Sequence[float] = DISTORTION,
) -> dict[str, float]:
    """Bits for each layer, `bits` a weight on average, that leave the least sum of nats.

    nats: lost by each layer alone at `bits`, of so many weights. A bit more for a layer divides its
    nats by f = `fall(kept)`, so equal returns ask for b = bits + log_f(nats / weights) + constant,
    cut to within SPREAD of `bits`: far from where nats were measured that law is a guess.
    """
    least, most = bits * SPREAD[0], bits * SPREAD[1]
    per_bit = math.log(fall(kept))
    rates = {n: math.log(max(v, 1e-12) / weights[n]) / per_bit for n, v in nats.items()}
    budget = bits * sum(weights[n] for n in nats)

    def shifted(by: float) -> dict[str, float]:
        return {n: min(most, max(least, rate + by)) for n, rate in rates.items()}

    low, high = least - max(rates.values()), most - min(rates.values())
    for _ in range(60):
        middle = (low + high) / 2
        if sum(b * weights[n] for n, b in shifted(middle).items()) <= budget:
            low = middle
        else:
            high = middle
    return shifted(low)


def _check_budget(least: int, budget: float, bits: float) -> None:
    if least > budget:
        raise UsageError(
            f"{bits:g} bits cannot hold the masks of this model; the least is --bits "
            f"{math.ceil(1000 * bits * least / budget) / 1000:.3f}"
        )
