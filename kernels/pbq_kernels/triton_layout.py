"""The layout that the Triton kernels read, and repacking into it. In prose: docs/kernels.md, "GPU".

Tensors only: nothing here needs Triton or a GPU.
"""

from __future__ import annotations

import dataclasses
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
    stored_scales,
    unpack_codes,
)
from pbq_kernels.reference import dequantize
from pbq_kernels.trellis import POLYNOMIALS, WEIGHTS, plane_weights

FIELD = 10
SUM_STEPS = 4

# Words of a block in each row. Fewer of them pad tiers to fewer columns, and cost instructions.
WORDS, TRELLIS_WORDS = 16, 8
ROWS = 64  # rows are padded to a multiple of it
LEAD = 16  # rows of zeros above the first, where there is a trellis: it looks at 12 at most

MOST_OVERLAY = 0.2
# Kinds of fields, in the order in which the kernels go through them: bits of a value, and what a
# sign of each plane counts that a trellis makes, if it does.
KINDS = (
    (1, ()),
    (2, ()),
    (4, ()),
    (1, plane_weights(2, False)),
    *((1, WEIGHTS[d]) for d in WEIGHTS),
)
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
    trellis: memory of the trellises, 0 where there are none.
    """

    layout: WeightLayout
    words: Tensor  # int32 [blocks, rows, WORDS or TRELLIS_WORDS]: see `_words`
    scales: Tensor  # float16 [slots, rows]: see `_scales`
    fields: Tensor  # int32 [1 + fields, FIELD]: see `_describe`
    column: Tensor  # int32 [steps * step_columns]: of x, -1 at padding
    column_scale: Tensor | None  # float32 [steps * step_columns], at most 1
    factor: float  # what that was divided by
    flush: int
    offsets: bool
    trellis: int
    overlay: Overlay | None

    @property
    def n(self) -> int:
        return self.layout.n

    @property
    def k(self) -> int:
        return self.layout.k

    @property
    def blocks(self) -> int:
        return len(self.words)

    @property
    def rows(self) -> int:
        """Rows of words and scales: `lead` of zeros, n, and as many that fill the last tile."""
        return self.scales.shape[1]

    @property
    def lead(self) -> int:
        return _lead(self.trellis)

    @property
    def filter(self) -> tuple[int, int]:
        """(h1, rows that plane 0 lies behind the path) of the trellis, 0 where there is none."""
        return taps(self.trellis)

    @property
    def steps(self) -> int:
        return len(self.column) // self.step_columns

    @property
    def step_columns(self) -> int:
        """Columns of a step, those of which one shift takes the values out of a block's words."""
        return 2 * self.words.shape[2]

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
    words: int  # of a block, in each row

    @property
    def step_columns(self) -> int:
        return 2 * self.words

    @property
    def kinds(self) -> list[tuple[int, tuple[int, ...]]]:
        """Of the fields that the planes are cut into, low planes first: members of KINDS."""
        tier = self.tier
        if not tier.planes:
            # offsets alone get a plane, of scale zero, to carry them
            return [KINDS[0]] if tier.offsets else []
        if not tier.tied:
            return [KINDS[0]] * tier.planes
        if tier.uneven:
            return [(1, tier.weights)]
        made = [KINDS[3]] if tier.trellis else []
        fours, rest = divmod(tier.planes - len(made), 4)
        return made + [KINDS[2]] * fours + [KINDS[kind] for kind in (1, 0) if rest & KINDS[kind][0]]

    @property
    def group_steps(self) -> int:
        """Steps of one group of scales."""
        if self.tier.groups == 1:
            return _WHOLE_ROW
        least = FLUSHES[-1] * self.step_columns
        return math.ceil(self.tier.group_size / least) * FLUSHES[-1]

    @property
    def steps(self) -> int:
        """Steps of the tier: whole groups in whole blocks of its narrowest field."""
        grouped = self.tier.groups * self.group_steps
        used = grouped if self.tier.groups > 1 else math.ceil(self.tier.columns / self.step_columns)
        block = 16 // min((width for width, _ in self.kinds), default=4)
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
        return column // size * (self.group_steps * self.step_columns) + column % size


@dataclass(frozen=True)
class _Field:
    """One plane, or 2 or 4 planes with tied scales: the tier's stored ones, from plane `low` on.

    Or the path of a trellis and, where levels are uneven, all other planes, each with words of its
    own: the product then makes a plane more of them. index: its place among the tier's fields.
    """

    span: _Span
    index: int
    low: int
    kind: int

    @property
    def width(self) -> int:
        return KINDS[self.kind][0]

    @property
    def planes(self) -> int:
        """How many values of `width` bits a weight has here, in words of their own."""
        return max(1, len(KINDS[self.kind][1]) - 1)

    @property
    def plane_blocks(self) -> int:
        return self.span.steps * self.width // 16

    @property
    def blocks(self) -> int:
        return self.planes * self.plane_blocks

    @property
    def factor(self) -> int:
        """What the stored scale is multiplied with."""
        tier = self.span.tier
        if not tier.tied or KINDS[self.kind][1]:
            return 1
        return 2 ** (self.low + bool(tier.trellis))


def taps(trellis: int) -> tuple[int, int]:
    """(h1, rows that plane 0 lies behind the path) of a memory, (0, 0) where there is none."""
    h1, h0 = POLYNOMIALS.get(trellis, (0, 1))
    return h1, h0.bit_length() - 1


def block_words(trellis: int) -> int:
    """Words of a block in each row, with a trellis and without."""
    return TRELLIS_WORDS if trellis else WORDS


def why_not(layout: WeightLayout) -> str | None:
    """Why these kernels cannot serve the layout, or None."""
    if layout.rank:
        return "they multiply with one factor at a time"
    if layout.has_trellis:
        if len({tier.trellis for tier in layout.tiers if tier.trellis}) > 1:
            return "trellises of two memories in a weight: they take its plain form"
        if any(tier.groups > 1 for tier in layout.tiers):
            return "trellises beside groups of scales: they take its plain form"
    for i, tier in enumerate(layout.tiers):
        least = FLUSHES[-1] * 2 * WORDS
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
    trellis = max(tier.trellis for tier in layout.tiers)
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
        words=_words(pw, fields, _lead(trellis)),
        scales=_scales(pw, spans, _lead(trellis)),
        fields=_describe(fields).to(column.device),
        column=column,
        column_scale=column_scale,
        factor=factor,
        flush=next(f for f in FLUSHES if not any(g % f for g in grouped)) if grouped else 0,
        offsets=any(tier.offsets for tier in layout.tiers),
        trellis=trellis,
        overlay=_overlay(pw, column) if layout.overlay else None,
    )


def _spans(layout: WeightLayout) -> Iterator[_Span]:
    """The tiers that take part in a product, in storage order.

    Columns pruned to zero do not, unless an overlay may replace weights in them.
    """
    columns = row_bytes = scales = offsets = step = 0
    slot = 1  # slot 0 is zero
    words = block_words(layout.has_trellis)
    for tier in layout.tiers:
        span = _Span(tier, columns, row_bytes, scales, offsets, step, slot, words)
        if tier.columns and (span.kinds or layout.overlay):
            yield span
            step, slot = step + span.steps, slot + span.slots
        columns, row_bytes = columns + tier.columns, row_bytes + tier.row_bytes
        scales, offsets = scales + tier.scales, offsets + tier.offsets


def _fields(spans: list[_Span]) -> list[_Field]:
    """Every field, in the order of KINDS."""
    fields = []
    for span in spans:
        low = 0
        for index, kind in enumerate(span.kinds):
            fields.append(_Field(span, index, low, KINDS.index(kind)))
            low += fields[-1].width * fields[-1].planes
    return sorted(fields, key=lambda field: field.kind)


def _describe(fields: list[_Field]) -> Tensor:
    """int32 [1 + fields, FIELD]: where the fields of each of KINDS end; then, for each field,

    first block, blocks of a plane, first step of x, slot of its first scale, steps of a scale,
    factor of its scales, slot of its first offset, steps of an offset, width, kind.
    """
    ends = [sum(field.kind <= kind for field in fields) for kind in range(len(KINDS))]
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
        place = block, field.plane_blocks, span.first_step
        rows.append([*place, *scale, field.factor, *offset, field.width, field.kind])
        block += field.blocks
    return torch.tensor(rows, dtype=torch.int32)


def _columns(pw: PackedWeight, spans: list[_Span]) -> Tensor:
    """int32 [steps * step_columns]: original column of each position, -1 at padding."""
    stored = pw.permutation().to(torch.int32)
    parts = [stored.new_full((0,), -1)]
    for span in spans:
        part = stored.new_full((span.steps * span.step_columns,), -1)
        own = stored[span.columns_before : span.columns_before + span.tier.columns]
        part[span.position(stored.device)] = own
        parts.append(part)
    return torch.cat(parts)


def _scales(pw: PackedWeight, spans: list[_Span], lead: int) -> Tensor:
    """float16 [slots, rows]: a zero; then of each tier the scales, one plane's groups after
    another's, and the offsets. Groups of padding have zeros.
    """
    tensors, n = pw.tensors, pw.layout.n
    weight = tensors["weight"]
    parts = [torch.zeros(n, 1, dtype=torch.float16, device=weight.device)]
    # exact: a byte says less than float16
    every = stored_scales(tensors).half() if "scale" in tensors else parts[0]
    for span in spans:
        tier = span.tier
        stored = []
        if tier.scales:
            scales = every[:, span.scales_before : span.scales_before + tier.scales]
            stored.append(scales.unflatten(1, (tier.groups, -1)).transpose(1, 2))
        if tier.offsets:
            offsets = tensors["offset"][:, span.offsets_before :]
            stored.append(offsets[:, None, : tier.offsets])
        padding = (0, span.groups - tier.groups)
        parts += [torch.nn.functional.pad(part, padding).flatten(1) for part in stored]
    scales = torch.nn.functional.pad(torch.cat(parts, 1).T, (lead, -n % ROWS))
    return scales.contiguous()


def _lead(trellis: int) -> int:
    return LEAD if trellis else 0


def _words(pw: PackedWeight, fields: list[_Field], lead: int) -> Tensor:
    """int32 [blocks, rows, words], the blocks of one field after those of the one before."""
    layout, weight = pw.layout, pw.tensors["weight"]
    rows = lead + layout.n + -layout.n % ROWS
    shape = sum(field.blocks for field in fields), rows, block_words(layout.has_trellis)
    words = torch.zeros(shape, dtype=torch.int32, device=weight.device)
    begin = lead
    for some in weight.split(max(1, _MOST_UNPACKED // layout.k)):
        block = 0
        for field in fields:
            for plane in range(field.planes):
                packed = _plane_words(some, field, plane).transpose(0, 1)
                words[block : block + len(packed), begin : begin + len(some)] = packed
                block += len(packed)
        begin += len(some)
    return words


def _plane_words(rows: Tensor, field: _Field, plane: int) -> Tensor:
    """uint8 [r, row_bytes] -> int32 [r, plane_blocks, words] of one plane of a field.

    Bit `width * j + 16 * h` of word t begins the value of column 2 * t + h of step j of a block.
    """
    span, width, blocks = field.span, field.width, field.plane_blocks
    tier = span.tier
    if not tier.planes:
        return torch.zeros(len(rows), blocks, span.words, dtype=torch.int32, device=rows.device)
    data = rows[:, span.bytes_before : span.bytes_before + tier.row_bytes]
    codes = unpack_codes(data, tier.planes, tier.columns) >> field.low + plane & (2**width - 1)
    padded = codes.new_zeros(len(rows), span.steps * span.step_columns)
    padded[:, span.position(rows.device)] = codes
    values = padded.view(len(rows), blocks, 16 // width, span.words, 2).to(torch.int32)
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
        words = weight.words[:, weight.lead + some].transpose(0, 1)
        codes = _span_codes(words, _fields(spans))
        tiers = [pack_codes(codes[span], span.tier.planes) for span in spans if span in codes]
        parts.append(torch.cat([words.new_empty(len(some), 0, dtype=torch.uint8), *tiers], 1))
    return torch.cat(parts)


def _span_codes(words: Tensor, fields: list[_Field]) -> dict[_Span, Tensor]:
    """int32 [r, blocks, words] -> stored codes uint8 [r, tier.columns] of each tier with planes."""
    codes: dict[_Span, Tensor] = {}
    block = 0
    for field in fields:
        span, width = field.span, field.width
        for plane in range(field.planes if span.tier.planes else 0):
            begin = block + plane * field.plane_blocks
            own = words[:, begin : begin + field.plane_blocks, None, :, None]
            values = own >> _shifts(width, words.device) & (2**width - 1)
            values = values.flatten(1)[:, span.position(words.device)]
            part = values.to(torch.uint8) << field.low + plane
            codes[span] = codes[span] | part if span in codes else part
        block += field.blocks
    return codes


def _overlay(pw: PackedWeight, column: Tensor) -> Overlay:
    layout, tensors = pw.layout, pw.tensors
    rows, columns = overlay_positions(layout, tensors)
    bare = {name: t for name, t in tensors.items() if not name.startswith("overlay_")}
    planes = dataclasses.replace(layout, overlay=0, overlay_bytes=0)
    below = dequantize(PackedWeight(planes, bare))
    delta = tensors["overlay_value"].float() * tensors["overlay_scale"].float()[rows]
    delta -= below[rows, columns]
    scale = torch.zeros(layout.n, dtype=torch.float32, device=delta.device)
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
