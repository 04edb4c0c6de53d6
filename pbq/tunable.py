"""Packed weights that can be trained: scales, offsets and, where they are to move, codes.

A weight is made from codes and numbers on every step; gradients go to the numbers and, straight
through the rounding, to latent weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pbq.grid import (
    Factors,
    Grid,
    Quantized,
    QuantizedWeight,
    TierGrid,
    codes_at,
    positions,
    stored,
    stored_scale,
)
from pbq.hessian import least_squares
from pbq_kernels import levels
from pbq_kernels.paths import compiled

# Of the regressions that latent factors start from: a rank above n or k needs some.
LATENT_DAMPING = 0.01


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam and what they apply to.

    lr: of scales, offsets and column scales, relative to their size. norm_lr: of the norms.
    latent_lr: of latent weights, 0 freezes the codes. row_lr: of one more factor a row, on scale
    and offset together, and of column scales (PTQ1.61's alpha_r1 and alpha_r2); at 0 there is no
    such factor and column scales take lr. offsets: whether these train. only_planes: the tiers with
    so many planes train, the others stay as they are. constant: no warm-up, no decay, as the papers
    do. analytic: scales of one-plane tiers do not train, they are the mean size of the latent
    weights around the offset, anew at every step (PB-LLM's optimal scale).
    """

    lr: float = 5e-3
    norm_lr: float = 3e-3
    latent_lr: float = 0.0
    row_lr: float = 0.0
    offsets: bool = True
    only_planes: int | None = None
    constant: bool = False
    analytic: bool = False


_FREE = Rates()


class TunableWeight(nn.Module):
    """A QuantizedWeight whose numbers, and with `latent` whose codes, can be trained.

    Codes of a weight with trellises stay as they are.

    Kept transposed, a tier being consecutive rows [c, n]: columns of W are rows here, so that
    putting them back in order copies whole rows. Scales train as factors around 1, which
    gives every row and plane the same relative step. rates: what trains and what follows from the
    rest. dtype: of the weight that comes out, the model's own.
    """

    def __init__(
        self,
        qw: QuantizedWeight,
        latent: Tensor | None = None,
        rates: Rates = _FREE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype, self.analytic = dtype, rates.analytic
        self.tiers, self.tier_of = qw.tiers, qw.tier_of
        self._scale_bits = qw.scale_bits
        self._trained = [rates.only_planes in (None, tier.planes) for tier in qw.tiers]
        order = torch.argsort(qw.tier_of, stable=True)
        self._order, self._inverse = order, torch.argsort(order)
        self._group_of = [t.group_of_column().to(order.device) for t in qw.tiers]
        self._scale0 = [g.scale.permute(1, 2, 0).contiguous() for g in qw.grids]  # [G, S, n]
        self._offset0 = [None if g.offset is None else g.offset.T.contiguous() for g in qw.grids]
        self.scale = nn.ParameterList([nn.Parameter(torch.ones_like(s)) for s in self._scale0])
        # an offset may be zero: it moves in units of the tier's largest scale instead
        self._unit = [s.abs().sum(1) for s in self._scale0]  # [G, n]
        self.offset = nn.ParameterList(
            [
                nn.Parameter(torch.zeros_like(u if o is not None else u[:0]))
                for o, u in zip(self._offset0, self._unit, strict=True)
            ]
        )
        # one more factor a row, on scale and offset together; trained where a recipe asks for it
        self.row = nn.Parameter(torch.ones(len(qw.codes), device=order.device))
        self._overlay = qw.overlay  # stays as it is
        self._column0 = qw.column_scale
        self.column: nn.Parameter | None = None
        if qw.column_scale is not None:
            self.column = nn.Parameter(torch.ones_like(qw.column_scale))
            trained = torch.tensor(self._trained, device=order.device)[qw.tier_of.long()]
            self.column.register_hook(lambda gradient: gradient * trained)
        # a latent weight that moves would change the path of many rows at once, for the worse
        if any(tier.trellis for tier in qw.tiers):
            latent = None
        fast = latent is None and dtype == torch.bfloat16
        self._whole = _whole_numbers(qw) if fast else None
        self._tier_of = qw.tier_of.to(torch.int32)
        # where weights are made of whole numbers, the codes as they were given, instead of `_codes`
        self._given = None if self._whole is None else qw.codes
        self._codes = self._parts(qw) if self._whole is None else []
        self.latent = nn.ParameterList()
        if latent is not None:
            start = (latent if qw.column_scale is None else latent / qw.column_scale)[:, order].T
            self.latent.extend(
                nn.Parameter(self._where_it_rounds(t, part).contiguous())
                for t, part in enumerate(start.split([t.columns for t in qw.tiers]))
            )

    def _parts(self, qw: QuantizedWeight) -> list[Tensor]:
        """Codes of each tier, uint8 [c, n]; of uneven levels, whose codes stay, int8 positions.

        So that no table is read on every step.
        """
        codes = qw.codes[:, self._order].T.split([t.columns for t in qw.tiers])
        return [
            positions(tier, part).to(torch.int8) if tier.uneven else part
            for tier, part in zip(qw.tiers, codes, strict=True)
        ]

    def _where_it_rounds(self, t: int, latent: Tensor) -> Tensor:
        """The latent weights, or the level itself where they would not round to the stored code."""
        with torch.no_grad():
            # a column scale of zero leaves no latent weight to start from
            same = (self._nearest(t, latent) == self._codes[t]) & latent.isfinite()
            return torch.where(same, latent, self.values(t, self._codes[t], *self._numbers(t)))

    def _numbers(self, t: int) -> tuple[Tensor, Tensor | None]:
        """Current scale [G, S, n] and offset [G, n] of a tier."""
        offset, row = self._offset0[t], self.row if self._trained[t] else torch.ones_like(self.row)
        moved = None if offset is None else (offset + self.offset[t] * self._unit[t]) * row
        if self.analytic and t < len(self.latent) and self.tiers[t].planes == 1:
            return self._mean_size(t, moved), moved
        return self._scale0[t] * self.scale[t] * row, moved

    @torch.no_grad()
    def _mean_size(self, t: int, offset: Tensor | None) -> Tensor:
        """Mean |latent - offset| of each group [G, 1, n], over the entries that are on the grid."""
        size = self.latent[t] if offset is None else self.latent[t] - self.per_column(t, offset)
        on_grid = torch.ones_like(size)
        if self._overlay is not None:
            on_grid -= self.split(self._overlay.mask)[t].float()
        total, count = (self.group_sums(t, x) for x in (size.abs() * on_grid, on_grid))
        return (total / count.clamp(min=1))[:, None]

    def per_column(self, t: int, numbers: Tensor) -> Tensor:
        """[G, ...] numbers of groups -> [c, ...], or [1, ...] where one group is all."""
        return numbers if self.tiers[t].groups == 1 else numbers[self._group_of[t]]

    def group_sums(self, t: int, x: Tensor) -> Tensor:
        """[c, n] -> [G, n]."""
        sums = x.new_zeros(self.tiers[t].groups, x.shape[1])
        return sums.index_add(0, self._group_of[t], x)

    def even(self, t: int) -> bool:
        """Are the tier's levels offset + scale * position, whatever the spacing of positions?"""
        return self.tiers[t].planes == 1 or (self.tiers[t].tied and self.tiers[t].planes > 1)

    def values(self, t: int, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Codes uint8 [c, n] -> weights float32 [c, n], on scale [G, S, n] and offset [G, n]."""
        scale = self.per_column(t, scale)
        if self.even(t):
            W = self.position(t, codes).mul_(scale[:, 0])
        else:
            W = torch.zeros(codes.shape, device=codes.device)
            for p in range(self.tiers[t].planes):
                W += torch.where(bit(codes, p), scale[:, p], -scale[:, p])
        return W if offset is None else W.add_(self.per_column(t, offset))

    def position(self, t: int, codes: Tensor) -> Tensor:
        """In units of the stored scale, from the middle: whole numbers, float32 [c, n]."""
        return codes.float() if self.tiers[t].uneven else positions(self.tiers[t], codes)

    @torch.no_grad()
    def _nearest(self, t: int, latent: Tensor) -> Tensor:
        """Nearest codes uint8 [c, n] of latent weights [c, n] on the current levels."""
        if self.even(t):
            return self._nearest_even(t, latent)
        codes = torch.zeros(latent.shape, dtype=torch.uint8, device=latent.device)
        for g in range(self.tiers[t].groups if self.tiers[t].planes else 0):
            rows = slice(None) if self.tiers[t].groups == 1 else self._group_of[t] == g
            level, code = self._grid(t, g).levels().sort(dim=1)
            middle = ((level[:, 1:] + level[:, :-1]) / 2).T
            rank = torch.zeros_like(codes[rows])
            for boundary in middle:
                rank += latent[rows] > boundary
            codes[rows] = code.T.gather(0, rank.long()).to(torch.uint8)
        return codes

    def _nearest_even(self, t: int, latent: Tensor) -> Tensor:
        scale, offset = self._numbers(t)
        half = self.per_column(t, scale)[:, 0]
        # levels that coincide all have the same value: which code is chosen does not matter
        step = torch.where(half == 0, 1.0, 2 * half)
        steps = 2 ** self.tiers[t].planes - 1
        x = latent / step if offset is None else (latent - self.per_column(t, offset)) / step
        return x.add_(steps / 2).round_().clamp_(0, steps).to(torch.uint8)

    def _grid(self, t: int, g: int) -> Grid:
        scale, offset = self._numbers(t)
        numbers = TierGrid(
            scale.permute(2, 0, 1).float(), None if offset is None else offset.T.float()
        )
        return numbers.grid(self.tiers[t], g)

    def forward(self) -> Tensor:
        """The weight [n, k] in `dtype`, differentiable in all that trains; computed in float32."""
        if self._whole is not None:
            W = _FromWholeNumbers.apply(self._whole, self._tier_of, self._row_scales())
            return self._finished(W)
        tiers = range(len(self.tiers))
        codes = [self._nearest(t, x) for t, x in enumerate(self.latent)] or self._codes
        scales, offsets = zip(*(self._numbers(t) for t in tiers), strict=True)
        return self._finished(_FromCodes.apply(self, codes, *scales, *offsets, *self.latent))

    def _row_scales(self) -> Tensor:
        """Of every tier, zero where it has none: [n, tiers]."""
        found = [self._numbers(t)[0][0] for t in range(len(self.tiers))]  # [S, n], S 0 or 1
        return torch.stack([s[0] if len(s) else torch.zeros_like(self.row) for s in found], 1)

    def _finished(self, W: Tensor) -> Tensor:
        """With the column scale and the overlay."""
        if self._column0 is not None and self.column is not None:
            W = W * (self._column0 * self.column).to(self.dtype)
        if self._overlay is None:
            return W
        return torch.where(self._overlay.mask, self._overlay.dequantize().to(self.dtype), W)

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Tiers [c, n] -> the weight [n, k]."""
        return torch.cat(list(parts)).index_select(0, self._inverse).T

    def split(self, W: Tensor) -> Sequence[Tensor]:
        """Inverse of `assemble`."""
        # a transposed copy first: picking rows of memory is many times faster than columns
        return W.T.contiguous().index_select(0, self._order).split([t.columns for t in self.tiers])

    @torch.no_grad()
    def freeze(self) -> QuantizedWeight:
        """What would be stored now: codes, and scales rounded as they are stored."""
        grids = []
        for t in range(len(self.tiers)):
            scale, offset = self._numbers(t)
            scale = stored_scale(scale.permute(2, 0, 1), self._scale_bits)
            grids.append(TierGrid(scale, None if offset is None else stored(offset.T)))
        codes = [self._nearest(t, x) for t, x in enumerate(self.latent)] or self._codes
        column = None
        if self._column0 is not None and self.column is not None:
            column = stored(self._column0 * self.column)
        return self._quantized(codes, grids, column)

    def start(self) -> QuantizedWeight:
        """The weight that was given."""
        grids = [
            TierGrid(scale.permute(2, 0, 1), None if offset is None else offset.T)
            for scale, offset in zip(self._scale0, self._offset0, strict=True)
        ]
        return self._quantized(self._codes, grids, self._column0)

    def _quantized(
        self, codes: Sequence[Tensor], grids: list[TierGrid], column: Tensor | None
    ) -> QuantizedWeight:
        codes_nk = self._given
        if codes_nk is None:
            parts = [
                codes_at(tier, part) if tier.uneven else part
                for tier, part in zip(self.tiers, codes, strict=True)
            ]
            codes_nk = torch.cat(parts)[self._inverse].T.contiguous()
        return QuantizedWeight(
            self.tiers, self.tier_of, codes_nk, grids, column, self._overlay, self._scale_bits
        )

    def groups(self, tuning: Rates) -> list[tuple[list[nn.Parameter], float]]:
        """(parameters, learning rate). A latent moves in units of its tier's mean scale."""
        chosen = [t for t, trained in enumerate(self._trained) if trained]
        small: list[nn.Parameter] = [self.scale[t] for t in chosen]
        small += [self.offset[t] for t in chosen if tuning.offsets]
        column = [] if self.column is None else [self.column]
        out = [([p for p in small if p.numel()], tuning.lr)]
        out += [([self.row], tuning.row_lr), (column, tuning.row_lr or tuning.lr)]
        for t in chosen if len(self.latent) else []:
            if self.latent[t].numel() and self.tiers[t].planes:
                size = float(self._scale0[t].abs().sum(1).mean())
                out.append(([self.latent[t]], tuning.latent_lr * size))
        return out


class TunableFactors(nn.Module):
    """A product whose two factors train; arguments as of TunableWeight, latent being [n, k].

    Latent factors start where least squares puts one while the other stays as it is.
    """

    def __init__(
        self,
        qw: Factors,
        latent: Tensor | None = None,
        rates: Rates = _FREE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        starts: tuple[Tensor | None, Tensor | None] = (None, None)
        if latent is not None:
            outer, inner = qw.outer.dequantize(), qw.inner.dequantize()
            starts = (
                least_squares(latent, inner, None, LATENT_DAMPING),
                least_squares(latent.T, outer.T, None, LATENT_DAMPING).T,
            )
        self.outer, self.inner = (
            TunableWeight(part, start, rates, dtype)
            for part, start in zip((qw.outer, qw.inner), starts, strict=True)
        )

    def forward(self) -> Tensor:
        """The weight [n, k], as of TunableWeight."""
        product: Tensor = self.outer() @ self.inner()
        return product

    def freeze(self) -> Factors:
        return Factors(self.outer.freeze(), self.inner.freeze())

    def start(self) -> Factors:
        return Factors(self.outer.start(), self.inner.start())

    def groups(self, tuning: Rates) -> list[tuple[list[nn.Parameter], float]]:
        return self.outer.groups(tuning) + self.inner.groups(tuning)


Tunable: TypeAlias = TunableWeight | TunableFactors


def tunable(
    weights: Mapping[str, Quantized],
    latent: Callable[[str], Tensor],
    rates: Rates,
    dtype: Callable[[str], torch.dtype],
) -> dict[str, Tunable]:
    """Weights as these rates train them. latent(name) [n, k]: asked only if codes are to move."""
    found: dict[str, Tunable] = {}
    for name, qw in weights.items():
        start = latent(name) if rates.latent_lr else None
        if isinstance(qw, Factors):
            found[name] = TunableFactors(qw, start, rates, dtype(name))
        else:
            found[name] = TunableWeight(qw, start, rates, dtype(name))
    return found


def bit(codes: Tensor, plane: int) -> Tensor:
    """Bool: is this plane +1."""
    return (codes & (1 << plane)).bool()


def _whole_numbers(qw: QuantizedWeight) -> Tensor | None:
    """Weights in units of their row's and tier's scale, int8 [n, k], for pbq_kernels.levels.

    None where weights are more than one number times that, or those kernels are not for them.
    """
    plain = all(
        tier.groups == 1
        and not tier.offset
        and (tier.planes <= 1 or tier.tied)
        and sum(tier.weights) <= 127
        for tier in qw.tiers
    )
    if not plain or compiled() is None or not qw.codes.is_cpu or len(qw.tiers) > levels.MOST_TIERS:
        return None
    whole = torch.zeros(qw.codes.shape, dtype=torch.int8)
    for t, tier in enumerate(qw.tiers):
        if tier.planes:
            columns = qw.columns(t)
            whole[:, columns] = positions(tier, qw.codes[:, columns]).to(torch.int8)
    return whole


class _FromWholeNumbers(torch.autograd.Function):
    """_FromCodes where a row has one scale a tier, by compiled kernels. Saves as much."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, tier_of: Tensor, scale: Tensor) -> Tensor:
        ctx.whole, ctx.tier_of, ctx.tiers = whole, tier_of, scale.shape[1]
        return levels.weights(whole, tier_of, scale.detach().contiguous())

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> Any:
        return None, None, levels.gradients(ctx.whole, ctx.tier_of, dW, ctx.tiers)


class _FromCodes(torch.autograd.Function):
    """Codes and numbers -> weight. Saves the codes alone, a byte a weight.

    Gradients: of a scale, the sum of ±dW over its columns; of an offset, the sum of dW; of a latent
    weight, dW itself (straight-through: Bengio et al. 2013).
    """

    @staticmethod
    def forward(ctx: Any, own: TunableWeight, codes: list[Tensor], *numbers: Any) -> Tensor:
        ctx.own, ctx.codes, ctx.count = own, codes, len(numbers) // len(codes)
        T = len(codes)
        parts = [own.values(t, codes[t], numbers[t], numbers[T + t]) for t in range(T)]
        parts = [part.to(own.dtype) for part in parts]
        return own.assemble(parts)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> Any:
        own, codes = ctx.own, ctx.codes
        parts = [part.float() for part in own.split(dW)]
        scales = [_scale_gradient(own, t, codes[t], parts[t]) for t in range(len(codes))]
        offsets = [
            _per_group(own, t, parts[t]) if tier.offset else None
            for t, tier in enumerate(own.tiers)
        ]
        latents = parts if ctx.count == 3 else []
        return (None, None, *scales, *offsets, *latents)


def _scale_gradient(own: TunableWeight, t: int, codes: Tensor, dW: Tensor) -> Tensor:
    """[G, S, n]."""
    planes = own.tiers[t].planes
    if not planes:
        return dW.new_zeros(own.tiers[t].groups, 0, dW.shape[1])
    if own.even(t):
        return _per_group(own, t, own.position(t, codes).mul_(dW))[:, None]
    signed = [_per_group(own, t, torch.where(bit(codes, p), dW, -dW)) for p in range(planes)]
    return torch.stack(signed, 1)


def _per_group(own: TunableWeight, t: int, x: Tensor) -> Tensor:
    """[c, n] summed over the columns of each group, [G, n]."""
    if own.tiers[t].groups == 1:
        return x.sum(0, keepdim=True)
    return own.group_sums(t, x)
