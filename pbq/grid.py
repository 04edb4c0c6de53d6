"""Grids of levels, the codes on them, and a whole quantized weight before it is packed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor

from pbq_kernels.layout import Tier, WeightLayout, encode_overlay
from pbq_kernels.paths import nearest_path, nearest_paths_in_turn
from pbq_kernels.scales import byte_scales
from pbq_kernels.trellis import WEIGHTS


def stored(x: Tensor) -> Tensor:
    """Round to the float16 that the file will hold, so that error feedback sees what is stored."""
    return x.clamp(-65504, 65504).half().float()


def stored_scale(scale: Tensor, bits: int) -> Tensor:
    """Scales [n, ...] of all rows rounded to the 16 or 8 bits that the file will hold them in."""
    return stored(scale) if bits == 16 else byte_scales(scale)


@dataclass(frozen=True, eq=False)
class Grid:
    """The 2**planes levels of every row: level[c] = offset + sum_p scale[p] * (+1 if bit p of c).

    scale float32 [n, planes] (ties already multiplied out); offset float32 [n], zero if none.
    """

    scale: Float[Tensor, "n p"]
    offset: Float[Tensor, " n"]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Levels in rising order [n, 2**p], the midpoints between them, and the code of each."""
        levels, codes = self.levels().sort(dim=1)
        middle = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        return levels, middle, codes.to(torch.uint8)

    def levels(self) -> Float[Tensor, "n l"]:
        # plane after plane, as the packed reference adds them: a matmul may round differently
        planes = self.scale.shape[1]
        sigma = signs(planes, self.scale.device)
        levels = self.scale.new_zeros(len(self.scale), 2**planes)
        for p in range(planes):
            levels += self.scale[:, p : p + 1] * sigma[:, p]
        return levels + self.offset[:, None]

    def nearest(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(code uint8, level) nearest to every entry of w [n, c]; the lower of two equally near."""
        levels, middle, code = self._sorted
        if w.shape[1] == 1 or middle.shape[1] == 1:
            # the inner loop of GPTQ: comparing beats searching tenfold on so few entries
            rank = (w[:, :, None] > middle[:, None, :]).sum(-1)
        else:
            # several searches at once want rows in memory order
            rank = torch.searchsorted(middle, w.contiguous())
        return code.gather(1, rank), levels.gather(1, rank)

    def nearest_in_turn(
        self,
        columns: Float[Tensor, "c n"],
        A: Float[Tensor, "c c"],
        start: Float[Tensor, "c n"] | None = None,
        *,
        column_scale: Float[Tensor, " c"] | None = None,
        overlay: Overlay | None = None,
    ) -> tuple[UInt8[Tensor, "c n"], Float[Tensor, "c n"]]:
        """Codes and values of columns rounded one after the other, their errors made up for.

        columns[i] -= A[j, i] * (value[j] - start[j]) for all i behind j, in place: they are left as
        each was just before it was rounded. start: the columns themselves, as they are by then, if
        None. column_scale: what levels are multiplied with. overlay: entries [n, c] that take a
        value of its own instead, which it is given.
        """
        codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
        values = torch.empty_like(columns)
        for j, w in enumerate(columns):
            if column_scale is None:
                code, value = self.nearest(w[:, None])
            else:
                code, value = self.nearest((w / column_scale[j])[:, None])
                value = value * column_scale[j]
            if overlay is not None:
                value = overlay.columns(slice(j, j + 1)).rounded(w[:, None], value)
            codes[j], values[j] = code[:, 0], value[:, 0]
            columns[j + 1 :].addr_(
                A[j, j + 1 :], values[j] - (w if start is None else start[j]), alpha=-1
            )
        return codes, values

    def codes(self, w: Float[Tensor, "n c"]) -> UInt8[Tensor, "n c"]:
        """The nearest level's code of every entry."""
        return self.nearest(w)[0]

    def decode(self, codes: UInt8[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return self.levels().gather(1, codes.long())


@dataclass(frozen=True, eq=False)
class TrellisGrid(Grid):
    """Levels of which a column may only take a path: pbq_kernels/trellis.py.

    unit [n]: the scale that is stored; tier: where the planes' scales follow from it.
    """

    unit: Float[Tensor, " n"]
    tier: Tier

    @classmethod
    def of(cls, unit: Float[Tensor, " n"], tier: Tier, offset: Tensor | None = None) -> TrellisGrid:
        """The grid of a tier with a trellis, from the scale [n] and offset [n] that are stored."""
        offset = torch.zeros_like(unit) if offset is None else offset
        return cls(unit[:, None] * plane_weights(tier, unit.device), offset, unit, tier)

    def nearest(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(code uint8, level) of the path nearest to every column of w [n, c]."""
        x = (w - self.offset[:, None]).T
        codes = nearest_path(x, self.unit, self.tier.depth, self.tier.trellis, self.tier.uneven).T
        return codes, positions(self.tier, codes) * self.unit[:, None] + self.offset[:, None]

    def nearest_in_turn(
        self,
        columns: Tensor,
        A: Tensor,
        start: Tensor | None = None,
        *,
        column_scale: Tensor | None = None,
        overlay: Overlay | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All columns in one call: what torch does around a search takes longer than it does."""
        if overlay is not None or column_scale is not None:
            return super().nearest_in_turn(
                columns, A, start, column_scale=column_scale, overlay=overlay
            )
        columns -= self.offset
        codes = nearest_paths_in_turn(
            columns,
            A,
            None if start is None else start - self.offset,
            self.unit,
            self.tier.depth,
            self.tier.trellis,
            self.tier.uneven,
        )
        columns += self.offset
        return codes, positions(self.tier, codes) * self.unit + self.offset


def plane_weights(tier: Tier, device: torch.device | str = "cpu") -> Float[Tensor, " p"]:
    """Of a tied tier: what the stored scale is multiplied with for each plane."""
    return torch.tensor(tier.weights, dtype=torch.float32, device=device)


def positions(tier: Tier, codes: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Codes on the levels of a tied tier, in units of the stored scale."""
    if not tier.uneven:
        return codes.float().mul_(2).sub_(2**tier.depth - 1)
    return uneven_positions(tier.depth).to(codes.device)[codes.long()]


@cache
def uneven_positions(planes: int) -> Float[Tensor, " l"]:
    """The level of every code, in units of the stored scale: whole numbers."""
    return signs(planes) @ torch.tensor(WEIGHTS[planes], dtype=torch.float32)


def codes_at(tier: Tier, position: Int8[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Inverse of `positions` where levels are uneven."""
    levels, code = uneven_positions(tier.depth).sort()
    found = torch.searchsorted(levels.to(position.device), position.float().contiguous())
    return code.to(position.device, torch.uint8)[found]


def signs(planes: int, device: torch.device | str = "cpu") -> Float[Tensor, "l p"]:
    """+1 or -1 of every plane for every code, [2**planes, planes]; bit p of the code is plane p."""
    code = torch.arange(2**planes, device=device)
    return ((code[:, None] >> torch.arange(planes, device=device)) & 1).float() * 2 - 1


def _sigma(codes: UInt8[Tensor, "n c"], planes: int) -> Float[Tensor, "n p c"]:
    """+1 or -1 of every plane of every code."""
    plane = torch.arange(planes, dtype=torch.uint8, device=codes.device)
    return ((codes[:, None, :] >> plane[:, None]) & 1).float() * 2 - 1


@dataclass(eq=False)
class TierGrid:
    """The stored numbers of one tier: scale [n, groups, 1 or planes], offset [n, groups] if any."""

    scale: Float[Tensor, "n g s"]
    offset: Float[Tensor, "n g"] | None

    def grid(self, tier: Tier, group: int) -> Grid:
        """The grid of one group, ties multiplied out."""
        scale = self.scale[:, group]
        offset = scale.new_zeros(len(scale)) if self.offset is None else self.offset[:, group]
        if tier.trellis:
            return TrellisGrid.of(scale[:, 0], tier, offset)
        return Grid(scale * plane_weights(tier, scale.device) if tier.tied else scale, offset)


@dataclass(eq=False)
class Overlay:
    """Single entries at 8 bits, whatever the tier of their column: value · scale of the row.

    mask bool [n, k]: which. value int8 [n, k], -127 to 127, zero elsewhere. scale float32 [n],
    representable in float16.
    """

    mask: Bool[Tensor, "n k"]
    value: Int8[Tensor, "n k"]
    scale: Float[Tensor, " n"]

    @classmethod
    def of(cls, W: Float[Tensor, "n k"], mask: Bool[Tensor, "n k"]) -> Overlay:
        """The entries of `mask`, rounded on the scale that just holds the largest of each row."""
        # a row of zeros needs a scale to divide by
        scale = stored(((W * mask).abs().amax(1) / 127).clamp(min=2.0**-20))
        overlay = cls(mask, torch.zeros_like(mask, dtype=torch.int8), scale)
        overlay.value = torch.where(mask, overlay.codes(W), overlay.value)
        return overlay

    def codes(self, W: Float[Tensor, "n c"]) -> Int8[Tensor, "n c"]:
        """The nearest value of every entry of some columns."""
        return (W / self.scale[:, None]).round().clamp(-127, 127).to(torch.int8)

    def rounded(self, w: Float[Tensor, "n c"], value: Float[Tensor, "n c"]) -> Tensor:
        """`value` with the overlay's entries of w in it, whose new values are kept, in place."""
        self.value.copy_(torch.where(self.mask, self.codes(w), self.value))
        return torch.where(self.mask, self.dequantize().to(value.dtype), value)

    def dequantize(self) -> Float[Tensor, "n k"]:
        """The entries; zero elsewhere."""
        return self.value.float() * self.scale[:, None]

    def columns(self, chosen: Tensor | slice) -> Overlay:
        """The overlay of some columns, or of all in another order."""
        return Overlay(self.mask[:, chosen], self.value[:, chosen], self.scale)


@dataclass(eq=False)
class QuantizedWeight:
    """A weight [n, k] as codes on grids, columns in their original order.

    tiers: as in the layout. tier_of uint8 [k]. codes uint8 [n, k]. grids: one per tier.
    column_scale: float32 [k], representable in float16, or None. overlay: entries that are not on
    the grids; their codes mean nothing. scale_bits: 16 or 8, of the stored scales.
    """

    tiers: tuple[Tier, ...]
    tier_of: UInt8[Tensor, " k"]
    codes: UInt8[Tensor, "n k"]
    grids: list[TierGrid]
    column_scale: Float[Tensor, " k"] | None = None
    overlay: Overlay | None = None
    scale_bits: int = 16

    def layout(self) -> WeightLayout:
        n, k = self.codes.shape
        entries = gap = 0
        if self.overlay is not None:
            count, stream = encode_overlay(self.overlay.mask)
            entries, gap = int(count.sum()), len(stream)
        scaled = self.column_scale is not None
        return WeightLayout(n, k, self.tiers, scaled, entries, gap, scale_bits=self.scale_bits)

    def columns(self, tier: int) -> Tensor:
        """int64: the original columns of a tier, in storage order."""
        return (self.tier_of == tier).nonzero(as_tuple=True)[0]

    def dequantize(self) -> Float[Tensor, "n k"]:
        W_hat = torch.zeros(self.codes.shape, device=self.codes.device)
        for t, (tier, tier_grid) in enumerate(zip(self.tiers, self.grids, strict=True)):
            columns, group_of = self.columns(t), tier.group_of_column().to(self.codes.device)
            for group in range(tier.groups):
                chosen = columns[group_of == group]
                W_hat[:, chosen] = tier_grid.grid(tier, group).decode(self.codes[:, chosen])
        if self.column_scale is not None:
            W_hat = W_hat * self.column_scale
        if self.overlay is None:
            return W_hat
        return torch.where(self.overlay.mask, self.overlay.dequantize(), W_hat)


@dataclass(eq=False)
class Factors:
    """A weight [n, k] as outer @ inner: [n, rank] of one plane and no column scale, [rank, k]."""

    outer: QuantizedWeight
    inner: QuantizedWeight

    def layout(self) -> WeightLayout:
        n, rank = self.outer.codes.shape
        return replace(self.inner.layout(), n=n, rank=rank)

    def dequantize(self) -> Float[Tensor, "n k"]:
        return self.outer.dequantize() @ self.inner.dequantize()


Quantized: TypeAlias = QuantizedWeight | Factors


def fit_planes(
    W: Float[Tensor, "n c"], weight: Float[Tensor, " c"], planes: int, iterations: int = 8
) -> Grid:
    """Free plane scales by weighted alternating least squares: greedy residual start, then Lloyd.

    Minimises sum_c weight_c (W_nc - level(code_nc))**2 for each row (ARB-LLM, Li et al. 2024, 3.2).
    """
    n = len(W)
    share = weight / weight.sum()
    scale, residual = W.new_zeros(n, planes), W.clone()
    for p in reversed(range(planes)):
        scale[:, p] = residual.abs() @ share
        residual -= scale[:, p : p + 1] * torch.where(residual >= 0, 1.0, -1.0)
    zero = W.new_zeros(n)
    # one plane has its optimum in closed form: the mean of |W|
    for _ in range(iterations if planes > 1 else 0):
        sigma = _sigma(Grid(scale, zero).codes(W), planes)
        weighted = sigma * share
        A = weighted @ sigma.transpose(1, 2) + 1e-6 * torch.eye(planes, device=W.device)
        scale = torch.linalg.solve(A, (weighted @ W[..., None])[..., 0])
    return Grid(stored(scale), zero)


def fit_uniform(
    W: Float[Tensor, "n c"], weight: Float[Tensor, " c"], planes: int, *, search: bool = True
) -> Grid:
    """Equally spaced levels with an offset: asymmetric min-max that includes zero (PTQ1.61, 1b).

    With `search`, the range of each row is shrunk to the least weighted squared error (12 steps, to
    0.4), then step and offset are refined by least squares on the codes found.
    """
    steps = 2**planes - 1
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    best = _uniform(low, high, planes)
    if not search:
        return best
    share = weight / weight.sum()
    error = weighted_error(W, share, best)
    for step_down in range(12):
        shrink = 0.95 - 0.05 * step_down
        grid = _uniform(low * shrink, high * shrink, planes)
        e = weighted_error(W, share, grid)
        best, error = choose(e < error, grid, best), torch.minimum(e, error)
    for _ in range(4):
        position = (best.codes(W).float() * 2 - steps) / 2  # in steps from the middle
        mean_p, mean_w = position @ share, W @ share
        centred = position - mean_p[:, None]
        variance = (centred**2) @ share
        step = ((centred * (W - mean_w[:, None])) @ share) / variance.clamp(min=1e-20)
        step = torch.where(variance > 1e-12, step, best.scale[:, 0] * 2)
        grid = _from_step(step, mean_w - step * mean_p, planes)
        e = weighted_error(W, share, grid)
        best, error = choose(e < error, grid, best), torch.minimum(e, error)
    return best


def fit_symmetric(W: Float[Tensor, "n c"], weight: Float[Tensor, " c"], planes: int) -> Grid:
    """Equally spaced levels around zero, scale * (2 code - steps): one stored number a row.

    A Gaussian loses 1 % (2 planes) to 21 % (4 planes) more on them than on free plane scales
    (Max 1960, tables I and II), and saves planes - 1 numbers. The scale is searched in 11 steps,
    then refined by least squares on the codes found.
    """
    steps = 2**planes - 1
    share = weight / weight.sum()
    power = 2.0 ** torch.arange(planes, device=W.device)
    zero = W.new_zeros(len(W))

    def grid(scale: Tensor) -> Grid:
        return Grid(stored(scale.clamp(min=1e-7))[:, None] * power, zero)

    size = (W.pow(2) @ share).sqrt()
    # from levels all within one deviation to levels out to five of them
    tries = [grid(size * reach / steps) for reach in torch.linspace(1, 5, 11).tolist()]
    best, least = tries[0], weighted_error(W, share, tries[0])
    for candidate in tries[1:]:
        e = weighted_error(W, share, candidate)
        best, least = choose(e < least, candidate, best), torch.minimum(e, least)
    for _ in range(4):
        position = best.codes(W).float() * 2 - steps
        scale = ((position * W) @ share) / (position.pow(2) @ share)
        candidate = grid(scale)
        e = weighted_error(W, share, candidate)
        best, least = choose(e < least, candidate, best), torch.minimum(e, least)
    return best


# Best scale of a Gaussian on a trellis, in standard deviations, by planes of its levels: where they
# are evenly spaced, and where they are not.
_TRELLIS_SCALES = {2: 0.395, 3: 0.25, 4: 0.147, 5: 0.085}
_UNEVEN_SCALES = {2: 0.2464, 3: 0.0309, 4: 0.0275}


def fit_trellis(
    W: Float[Tensor, "n c"], weight: Float[Tensor, " c"], tier: Tier, iterations: int = 1
) -> Grid:
    """`fit_symmetric` for a tier with a trellis: a Gaussian's scale, then least squares by turns.

    Paths couple the rows of a column, so the scales of all rows are found together.
    """
    share = weight / weight.sum()

    def grid(scale: Tensor) -> TrellisGrid:
        return TrellisGrid.of(stored(scale.clamp(min=1e-7)), tier)

    start = (_UNEVEN_SCALES if tier.uneven else _TRELLIS_SCALES)[tier.depth]
    found = grid((W.pow(2) @ share).sqrt() * start)
    for _ in range(iterations):
        position = positions(tier, found.codes(W))
        found = grid(((position * W) @ share) / (position.pow(2) @ share))
    return found


def _uniform(low: Tensor, high: Tensor, planes: int) -> Grid:
    steps = 2**planes - 1
    step = ((high - low) / steps).clamp(min=1e-7)
    zero_point = torch.round(-low / step).clamp(0, steps)
    return _from_step(step, step * (steps / 2 - zero_point), planes)


def _from_step(step: Tensor, offset: Tensor, planes: int) -> Grid:
    half = stored(step / 2)
    return Grid(half[:, None] * 2.0 ** torch.arange(planes, device=step.device), stored(offset))


def weighted_mean(W: Tensor, weight: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
    """Of each row [n] of W [n, c]; `otherwise` where all its weights [n, c] are zero."""
    total = weight.sum(1)
    return torch.where(total > 0, (W * weight).sum(1) / total.clamp(min=1e-30), otherwise)


def weighted_error(W: Float[Tensor, "n c"], share: Float[Tensor, " c"], grid: Grid) -> Tensor:
    """Of each row [n]: sum_c share_c (W_nc - its nearest level)²."""
    return (W - grid.decode(grid.codes(W))).pow(2) @ share


def choose(first: Tensor, a: Grid, b: Grid) -> Grid:
    """Rows of `a` where `first` [n] holds, of `b` elsewhere."""
    scale = torch.where(first[:, None], a.scale, b.scale)
    return Grid(scale, torch.where(first, a.offset, b.offset))
