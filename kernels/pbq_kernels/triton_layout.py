"""The layout that the Triton kernels read, and repacking into it. In prose: docs/kernels.md, "GPU".

Tensors only: nothing here needs Triton or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pbq_kernels.layout import (
    PackedWeight,
    Tier,
    WeightLayout,
    check_tensors,
    overlay_positions,
    pack_codes,
    unpack_codes,
)
from pbq_kernels.reference import dequantize

# The kernels have these four as constants of the same names.
WORDS = 16
STEP = 32
ROWS = 64
FIELD = 9
SUM_STEPS = 4

MOST_OVERLAY = 0.2
_WIDTHS = (1, 2, 4)
_WHOLE_ROW = 2**30  # steps of a group: more than any row has
FLUSHES = (4, 2)  # a single step would spill registers
# Weights unpacked at once while repacking: 64 MB as int32.
_MOST_UNPACKED = 2**24


@dataclass(frozen=True)
class Overlay:
    """Entries that replace single weights, as what they add to the planes below them, by row."""

    start: Tensor  # int32 [n + 1]
    column: Tensor  # int16 or int32 [overlay]: of x
    delta: Tensor  # float16 [overlay], in units of its row's scale
    scale: Tensor  # float32 [n]: largest delta of the row
    position: Tensor  # int32 [k]: where a column of x lies in a dense row
    tile_start: tuple[int, ...]  # first entry of each tile of ROWS rows, and the end


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """A weight in the layout of triton_kernels.py.

    flush: steps between two scales, where there are groups of them; 0 for scales of whole rows.
    """

    layout: WeightLayout
    words: Tensor  # int32 [tiles, blocks, ROWS, WORDS]
    scales: Tensor  # float16 [tiles, slots, ROWS]: see `_scales`
    fields: Tensor  # int32 [1 + fields, FIELD]: see `_describe`
    column: Tensor  # int32 [steps * STEP]: of x, -1 at padding
    column_scale: Tensor | None  # float32 [steps * STEP], at most 1
    factor: float  # what that was divided by
    flush: int
    offsets: bool
    overlay: Overlay | None

    @property
    def n(self) -> int:
        return self.layout.n

    @property
    def k(self) -> int:
        return self.layout.k

    @property
    def blocks(self) -> int:
        return self.words.shape[1]

    @property
    def slots(self) -> int:
        return self.scales.shape[1]

    @property
    def steps(self) -> int:
        return len(self.column) // STEP

    @property
    def sum_steps(self) -> int:
        """Steps whose sum of x an offset needs; 0 where there are no offsets."""
        return (self.flush or SUM_STEPS) if self.offsets else 0


@dataclass(frozen=True)
class _Span:
    """A tier, what lies before it in storage order, and its place among the steps of x."""

    tier: Tier
    columns_before: int
    bytes_before: int
    scales_before: int
    offsets_before: int
    first_step: int
    first_slot: int

    @property
    def widths(self) -> list[int]:
        """Widths of the fields that the planes are cut into, low planes first."""
        if not self.tier.planes:
            # offsets alone get a plane, of scale zero, to carry them
            return [1] if self.tier.offsets else []
        if not self.tier.tied:
            return [1] * self.tier.planes
        fours, rest = divmod(self.tier.planes, 4)
        return [4] * fours + [width for width in (2, 1) if rest & width]

    @property
    def group_steps(self) -> int:
        """Steps of one group of scales."""
        if self.tier.groups == 1:
            return _WHOLE_ROW
        return math.ceil(self.tier.group_size / (FLUSHES[-1] * STEP)) * FLUSHES[-1]

    @property
    def steps(self) -> int:
        """Steps of the tier: whole groups in whole blocks of its narrowest field."""
        grouped = self.tier.groups * self.group_steps
        used = grouped if self.tier.groups > 1 else math.ceil(self.tier.columns / STEP)
        block = 16 // min(self.widths, default=4)
        return math.ceil(used / block) * block

    @property
    def groups(self) -> int:
        """Groups of scales that the steps reach into; those past the tier's own are of padding."""
        return math.ceil(self.steps / self.group_steps)

    @property
    def scale_slots(self) -> int:
        return self.groups * (min(self.tier.planes, 1) if self.tier.tied else self.tier.planes)

    @property
    def slots(self) -> int:
        return self.scale_slots + self.groups * self.tier.offset

    def position(self, device: torch.device) -> Tensor:
        """int64 [tier.columns]: place of each stored column in the tier's steps of x."""
        column = torch.arange(self.tier.columns, device=device)
        if self.tier.groups == 1:
            return column
        size = self.tier.group_size
        return column // size * (self.group_steps * STEP) + column % size


@dataclass(frozen=True)
class _Field:
    """One plane, or 2 or 4 planes with tied scales: the tier's, from plane `low` on.

    index: its place among the tier's fields.
    """

    span: _Span
    index: int
    low: int
    width: int

    @property
    def blocks(self) -> int:
        return self.span.steps * self.width // 16


def why_not(layout: WeightLayout) -> str | None:
    """Why these kernels cannot serve the layout, or None."""
    if layout.rank:
        return "they multiply with one factor at a time"
    if not layout.is_plain:
        return "they take the plain form of trellises and of scales in a byte"
    for i, tier in enumerate(layout.tiers):
        least = FLUSHES[-1] * STEP
        if tier.groups > 1 and 2 * tier.group_size < least:
            return f"tier {i} has groups of {tier.group_size} columns, it would pad them to {least}"
    share = layout.overlay / (layout.n * layout.k)
    if share > MOST_OVERLAY:
        return f"an overlay of {share:.0%} of the weights is above its {MOST_OVERLAY:.0%}"
    return None


def repack(pw: PackedWeight) -> TritonWeight:
    """The stored planes as the kernels read them. Raises PackedFormatError on bad values."""
    layout, tensors = pw.layout, pw.tensors
    check_tensors(layout, tensors, values=True)
    spans = list(_spans(layout))
    fields = _fields(spans)
    column = _columns(pw, spans)
    factor, column_scale = 1.0, None
    if layout.column_scale:
        # at most 1: x times it does not overflow float16 where x does not
        largest = float(tensors["column_scale"].abs().max())
        factor = 2.0 ** math.ceil(math.log2(largest)) if largest else 1.0
        column_scale = tensors["column_scale"].float()[column.clamp(min=0).long()] / factor
    grouped = [span.group_steps for span in spans if span.tier.groups > 1]
    return TritonWeight(
        layout=layout,
        words=_words(pw, fields),
        scales=_scales(pw, spans),
        fields=_describe(fields).to(column.device),
        column=column,
        column_scale=column_scale,
        factor=factor,
        flush=next(f for f in FLUSHES if not any(g % f for g in grouped)) if grouped else 0,
        offsets=any(tier.offsets for tier in layout.tiers),
        overlay=_overlay(pw, column) if layout.overlay else None,
    )


def _spans(layout: WeightLayout) -> Iterator[_Span]:
    """The tiers that take part in a product, in storage order.

    Columns pruned to zero do not, unless an overlay may replace weights in them.
    """
    columns = row_bytes = scales = offsets = step = 0
    slot = 1  # slot 0 is zero
    for tier in layout.tiers:
        span = _Span(tier, columns, row_bytes, scales, offsets, step, slot)
        if tier.columns and (span.widths or layout.overlay):
            yield span
            step, slot = step + span.steps, slot + span.slots
        columns, row_bytes = columns + tier.columns, row_bytes + tier.row_bytes
        scales, offsets = scales + tier.scales, offsets + tier.offsets


def _fields(spans: list[_Span]) -> list[_Field]:
    """Every field, narrow ones first."""
    fields = []
    for span in spans:
        low = 0
        for index, width in enumerate(span.widths):
            fields.append(_Field(span, index, low, width))
            low += width
    return sorted(fields, key=lambda field: field.width)


def _describe(fields: list[_Field]) -> Tensor:
    """int32 [1 + fields, FIELD]: where the fields of 1, 2 and 4 bits end; then, for each field,

    first block, blocks, first step of x, slot of its first scale, steps of a scale, factor of its
    scales, slot of its first offset, steps of an offset, width.
    """
    ends = [sum(field.width <= width for field in fields) for width in _WIDTHS]
    rows = [[*ends, *[0] * (FIELD - len(ends))]]
    nothing = (0, _WHOLE_ROW)
    block = 0
    for field in fields:
        span, tier = field.span, field.span.tier
        scale, offset = nothing, nothing
        if tier.planes:
            planes_before = 0 if tier.tied else field.index
            scale = (span.first_slot + planes_before * span.groups, span.group_steps)
        if tier.offset and field.index == 0:
            offset = (span.first_slot + span.scale_slots, span.group_steps)
        factor = 2**field.low if tier.tied else 1
        rows.append([block, field.blocks, span.first_step, *scale, factor, *offset, field.width])
        block += field.blocks
    return torch.tensor(rows, dtype=torch.int32)


def _columns(pw: PackedWeight, spans: list[_Span]) -> Tensor:
    """int32 [steps * STEP]: original column of each position, -1 at padding."""
    stored = pw.permutation().to(torch.int32)
    parts = [stored.new_full((0,), -1)]
    for span in spans:
        part = stored.new_full((span.steps * STEP,), -1)
        own = stored[span.columns_before : span.columns_before + span.tier.columns]
        part[span.position(stored.device)] = own
        parts.append(part)
    return torch.cat(parts)


def _scales(pw: PackedWeight, spans: list[_Span]) -> Tensor:
    """float16 [tiles, slots, ROWS]: a zero; then of each tier the scales, one plane's groups after
    another's, and the offsets. Groups of padding have zeros.
    """
    tensors, n = pw.tensors, pw.layout.n
    weight = tensors["weight"]
    parts = [torch.zeros(n, 1, dtype=torch.float16, device=weight.device)]
    for span in spans:
        tier = span.tier
        stored = []
        if tier.scales:
            scales = tensors["scale"][:, span.scales_before : span.scales_before + tier.scales]
            stored.append(scales.unflatten(1, (tier.groups, -1)).transpose(1, 2))
        if tier.offsets:
            offsets = tensors["offset"][:, span.offsets_before :]
            stored.append(offsets[:, None, : tier.offsets])
        padding = (0, span.groups - tier.groups)
        parts += [torch.nn.functional.pad(part, padding).flatten(1) for part in stored]
    return _tiled(torch.cat(parts, 1)).transpose(1, 2).contiguous()


def _tiled(rows: Tensor) -> Tensor:
    """[n, ...] -> [tiles, ROWS, ...], zero past the last row."""
    padded = rows.new_zeros(math.ceil(len(rows) / ROWS) * ROWS, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded.unflatten(0, (-1, ROWS))


def _words(pw: PackedWeight, fields: list[_Field]) -> Tensor:
    """int32 [tiles, blocks, ROWS, WORDS], the blocks of one field after those of the one before."""
    layout, weight = pw.layout, pw.tensors["weight"]
    blocks = sum(field.blocks for field in fields)
    tiles = math.ceil(layout.n / ROWS)
    words = torch.zeros(tiles, blocks, ROWS, WORDS, dtype=torch.int32, device=weight.device)
    tiles_at_once = max(1, _MOST_UNPACKED // (layout.k * ROWS))
    for first in range(0, tiles, tiles_at_once):
        chunk = words[first : first + tiles_at_once]
        rows = weight[first * ROWS : (first + tiles_at_once) * ROWS]
        block = 0
        for field in fields:
            packed = _tiled(_field_words(rows, field))
            chunk[:, block : block + field.blocks] = packed.transpose(1, 2)
            block += field.blocks
    return words


def _field_words(rows: Tensor, field: _Field) -> Tensor:
    """uint8 [r, row_bytes] -> int32 [r, blocks, WORDS] of one field.

    Bit `width * j + 16 * h` of word t begins the value of column j * STEP + 2 * t + h of a block.
    """
    span, width = field.span, field.width
    tier = span.tier
    if not tier.planes:
        return torch.zeros(len(rows), field.blocks, WORDS, dtype=torch.int32, device=rows.device)
    data = rows[:, span.bytes_before : span.bytes_before + tier.row_bytes]
    codes = unpack_codes(data, tier.planes, tier.columns) >> field.low & (2**width - 1)
    padded = codes.new_zeros(len(rows), span.steps * STEP)
    padded[:, span.position(rows.device)] = codes
    values = padded.view(len(rows), field.blocks, 16 // width, WORDS, 2).to(torch.int32)
    # the values lie in distinct bits, and the sum wraps into the sign
    return (values << _shifts(width, rows.device)).sum((2, 4), dtype=torch.int32)


def _shifts(width: int, device: torch.device) -> Tensor:
    """int32 [16 // width, 1, 2]: where in a word the values of a field begin."""
    step = torch.arange(16 // width, dtype=torch.int32, device=device)
    half = torch.arange(2, dtype=torch.int32, device=device)
    return width * step[:, None, None] + 16 * half


def stored_rows(weight: TritonWeight, rows: Tensor) -> Tensor:
    """The stored planes of rows int64 [r], uint8 [r, row_bytes]: undoes `repack`.

    Waits for no GPU, so that a CUDA graph may record it.
    """
    spans = list(_spans(weight.layout))
    parts = []
    for some in rows.split(max(1, _MOST_UNPACKED // weight.layout.k)):
        words = weight.words[some // ROWS, :, some % ROWS]
        codes = _span_codes(words, _fields(spans))
        tiers = [pack_codes(codes[span], span.tier.planes) for span in spans if span in codes]
        parts.append(torch.cat([words.new_empty(len(some), 0, dtype=torch.uint8), *tiers], 1))
    return torch.cat(parts)


def _span_codes(words: Tensor, fields: list[_Field]) -> dict[_Span, Tensor]:
    """int32 [r, blocks, WORDS] -> uint8 [r, tier.columns] of each tier that has planes."""
    codes: dict[_Span, Tensor] = {}
    block = 0
    for field in fields:
        span, width = field.span, field.width
        if span.tier.planes:
            own = words[:, block : block + field.blocks, None, :, None]
            values = own >> _shifts(width, words.device) & (2**width - 1)
            part = values.flatten(1)[:, span.position(words.device)].to(torch.uint8) << field.low
            codes[span] = codes[span] | part if span in codes else part
        block += field.blocks
    return codes


def _overlay(pw: PackedWeight, column: Tensor) -> Overlay:
    layout, tensors = pw.layout, pw.tensors
    rows, columns = overlay_positions(layout, tensors)
    bare = {name: t for name, t in tensors.items() if not name.startswith("overlay_")}
    planes = WeightLayout(layout.n, layout.k, layout.tiers, layout.column_scale)
    below = dequantize(PackedWeight(planes, bare))
    delta = tensors["overlay_value"].float() * tensors["overlay_scale"].float()[rows]
    delta -= below[rows, columns]
    scale = torch.zeros(layout.n, device=delta.device)
    scale.scatter_reduce_(0, rows, delta.abs(), "amax")
    start = torch.zeros(layout.n + 1, dtype=torch.int32, device=delta.device)
    start[1:] = torch.cumsum(tensors["overlay_count"], 0)
    position = torch.empty(layout.k, dtype=torch.int32, device=delta.device)
    used = (column >= 0).nonzero()[:, 0]
    position[column[used].long()] = used.to(torch.int32)
    return Overlay(
        start=start,
        column=columns.to(torch.int16 if layout.k <= 2**15 else torch.int32),
        delta=(delta / scale.clamp(min=torch.finfo(torch.float32).tiny)[rows]).half(),
        scale=scale,
        position=position,
        tile_start=(*start[:-1:ROWS].tolist(), layout.overlay),
    )
