"""The packed layout: tiers of bit planes, row scales, optional overlay. In prose: docs/format.md.

    W_hat[:, tier] = offset[n, g] + sum_p scale[n, g, p] * sigma_p[n, columns of the tier]

with sigma in {-1, +1} stored as one bit each (1 is +1); a tier with a trellis has one sigma more
than stored bits (trellis.py). Columns are permuted so that a tier is contiguous; `tier[k]` names
the tier of each original column and the permutation is its stable sort. An optional
`column_scale[k]` multiplies the original columns, and an optional overlay replaces single entries.
A weight may also be the product of two such matrices. This module is the contract between the
quantizer and every kernel: tensors only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbq_kernels.scales import decoded_scales
from pbq_kernels.trellis import POLYNOMIALS, WEIGHTS, level_codes, plane_weights, stored_codes

FORMAT_VERSION = 1
MAX_PLANES = 8
# A shape beyond these is a damaged or hostile file, not a weight: refuse before allocating.
MAX_FEATURES = 2**24
MAX_TIERS = 64
# The tensors of a product's inner factor are stored under the names of a plain weight behind this.
INNER = "inner_"


class PackedFormatError(ValueError):
    """A packed tensor, or its description, is not what the format allows. Names the tensor."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype that the format demands of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Tier:
    """A run of columns that share a number of planes and a kind of grid.

    planes: bits stored per weight, 0 (pruned to the offset, or to zero) to 8.
    columns: how many columns of the weight belong to the tier.
    tied: the scale of plane p is `scale * 2**p`; one number is stored instead of `planes`.
    offset: a stored offset is added (asymmetric grids).
    group_size: columns per group of scales, counted in storage order; -1 is the whole row.
    trellis: memory of the trellis that makes one plane more of the stored ones; 0 is none.
    uneven: of a trellis: the scale of plane p is `scale * WEIGHTS[depth][p]` (trellis.py).
    """

    planes: int
    columns: int
    tied: bool = False
    offset: bool = False
    group_size: int = -1
    trellis: int = 0
    uneven: bool = False

    @property
    def depth(self) -> int:
        """Planes of its levels: those stored, and the one that a trellis adds."""
        return self.planes + bool(self.trellis)

    @property
    def weights(self) -> tuple[int, ...]:
        """Of a tied tier: what the stored scale is multiplied with for each plane."""
        return plane_weights(self.depth, self.uneven)

    def level_codes(self, stored: Tensor) -> Tensor:
        """Stored codes uint8 [n, columns] of all rows -> codes of the levels, a bit a plane."""
        planes = self.depth * self.uneven
        return level_codes(stored, self.trellis, planes) if self.trellis else stored

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Inverse of `level_codes`. Raises ValueError where a column is no path of the trellis."""
        planes = self.depth * self.uneven
        return stored_codes(codes, self.trellis, planes) if self.trellis else codes

    @property
    def groups(self) -> int:
        if self.columns == 0:
            return 0
        return 1 if self.group_size == -1 else math.ceil(self.columns / self.group_size)

    @property
    def scales(self) -> int:
        """Stored scale numbers per row."""
        per_group = min(self.planes, 1) if self.tied else self.planes
        return self.groups * per_group

    @property
    def offsets(self) -> int:
        """Stored offset numbers per row."""
        return self.groups if self.offset else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: all planes one after another, padded once to whole bytes."""
        return math.ceil(self.planes * self.columns / 8)

    def group_of_column(self, device: torch.device | None = None) -> Tensor:
        """int64 [columns]: the group each stored column belongs to."""
        size = self.columns if self.group_size == -1 else self.group_size
        return torch.arange(self.columns, device=device) // max(size, 1)


@dataclass(frozen=True)
class WeightLayout:
    """Everything about one packed weight but its data: enough to allocate and to check its tensors.

    n, k: out_features and in_features. tiers: in storage order.
    overlay: number of overlay entries; overlay_bytes: length of their gap stream.
    rank: if not 0, W_hat is a product: an outer factor [n, rank] of one plane with a scale a row
    times an inner one [rank, k], which is what tiers and column_scale describe.
    scale_bits: 16, or 8 for the scales of scales.py.
    """

    n: int
    k: int
    tiers: tuple[Tier, ...]
    column_scale: bool = False
    overlay: int = 0
    overlay_bytes: int = 0
    rank: int = 0
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.scale_bits not in (8, 16):
            raise PackedFormatError(f"layout: scales of {self.scale_bits} bits; 8 or 16")
        if not (0 < self.n <= MAX_FEATURES and 0 < self.k <= MAX_FEATURES):
            raise PackedFormatError(f"layout: impossible shape n={self.n}, k={self.k}")
        if not 0 < len(self.tiers) <= MAX_TIERS:
            raise PackedFormatError(
                f"layout: {len(self.tiers)} tiers; 1 to {MAX_TIERS} are allowed"
            )
        for i, tier in enumerate(self.tiers):
            if not 0 <= tier.planes <= MAX_PLANES:
                raise PackedFormatError(
                    f"layout: tier {i} has {tier.planes} planes; 0 to {MAX_PLANES}"
                )
            if tier.columns < 0:
                raise PackedFormatError(f"layout: tier {i} has {tier.columns} columns")
            if tier.group_size != -1 and not 1 <= tier.group_size <= MAX_FEATURES:
                raise PackedFormatError(f"layout: tier {i} has group_size {tier.group_size}")
            if tier.trellis or tier.uneven:
                self._check_trellis(i, tier)
        if sum(tier.columns for tier in self.tiers) != self.k:
            raise PackedFormatError(
                f"layout: tiers hold {sum(t.columns for t in self.tiers)} columns, "
                f"the weight has {self.k}"
            )
        if not 0 <= self.rank <= MAX_FEATURES:
            raise PackedFormatError(f"layout: impossible rank {self.rank}")
        if self.rank and self.overlay:
            raise PackedFormatError("layout: a product of two factors has no overlay")
        if not 0 <= self.overlay <= self.n * self.k:
            raise PackedFormatError(f"layout: {self.overlay} overlay entries in {self.n}x{self.k}")
        # A gap of up to k columns costs at most k/15 + 1 nibbles: the stream's length is bounded.
        most = (self.overlay + self.n * (self.k // 15 + 1) + 1) // 2
        if not (self.overlay + 1) // 2 <= self.overlay_bytes <= (most if self.overlay else 0):
            raise PackedFormatError(f"layout: overlay_gap of {self.overlay_bytes} bytes")

    def _check_trellis(self, i: int, tier: Tier) -> None:
        if tier.trellis not in POLYNOMIALS:
            raise PackedFormatError(f"layout: tier {i} has a trellis of memory {tier.trellis}")
        if not (tier.tied and 0 < tier.planes < MAX_PLANES):
            raise PackedFormatError(
                f"layout: tier {i} has a trellis, which takes 1 to {MAX_PLANES - 1} tied planes"
            )
        if tier.uneven and (tier.depth not in WEIGHTS or self.scale_bits != 8):
            # scales of a byte alone stay exact in float16 when they are multiplied
            raise PackedFormatError(
                f"layout: tier {i} has uneven levels, which take 1 to {max(WEIGHTS) - 1} planes "
                "and scales of a byte"
            )

    @property
    def row_bytes(self) -> int:
        return sum(tier.row_bytes for tier in self.tiers)

    @property
    def has_trellis(self) -> bool:
        return any(tier.trellis for tier in self.tiers)

    @property
    def is_plain(self) -> bool:
        """Whether every backend takes it as it is."""
        return self.scale_bits == 16 and not self.has_trellis

    def plain(self) -> WeightLayout:
        """The layout of the same weight as every backend takes it: what a trellis makes is stored
        too, scales are float16, one a plane where levels are uneven.
        """
        tiers = (
            dataclasses.replace(
                t, planes=t.depth, trellis=0, tied=t.tied and not t.uneven, uneven=False
            )
            for t in self.tiers
        )
        return dataclasses.replace(self, tiers=tuple(tiers), scale_bits=16)

    def factors(self) -> tuple[WeightLayout, WeightLayout]:
        """Of a layout with a rank: those of the outer factor [n, rank] and the inner [rank, k]."""
        outer = WeightLayout(self.n, self.rank, (Tier(1, self.rank),))
        return outer, dataclasses.replace(self, n=self.rank, rank=0)

    def tensors(self) -> dict[str, TensorSpec]:
        """The stored tensors, by name. A tensor that would be empty is not stored."""
        if self.rank:
            outer, inner = self.factors()
            return outer.tensors() | {f"{INNER}{n}": spec for n, spec in inner.tensors().items()}
        scales = sum(tier.scales for tier in self.tiers)
        offsets = sum(tier.offsets for tier in self.tiers)
        # `weight` is always stored, even with no bytes in a row: its name makes a load without
        # pbq fail instead of leaving random weights.
        specs = {"weight": TensorSpec((self.n, self.row_bytes), torch.uint8)}
        if scales and self.scale_bits == 8:
            specs["scale"] = TensorSpec((self.n, scales), torch.uint8)
            specs["scale_exponent"] = TensorSpec((scales,), torch.int8)
        elif scales:
            specs["scale"] = TensorSpec((self.n, scales), torch.float16)
        if offsets:
            specs["offset"] = TensorSpec((self.n, offsets), torch.float16)
        if len(self.tiers) > 1:
            specs["tier"] = TensorSpec((self.k,), torch.uint8)
        if self.column_scale:
            specs["column_scale"] = TensorSpec((self.k,), torch.float16)
        if self.overlay:
            specs["overlay_count"] = TensorSpec((self.n,), torch.int32)
            specs["overlay_gap"] = TensorSpec((self.overlay_bytes,), torch.uint8)
            specs["overlay_value"] = TensorSpec((self.overlay,), torch.int8)
            specs["overlay_scale"] = TensorSpec((self.n,), torch.float16)
        return specs

    @property
    def stored_bits(self) -> int:
        """Bits on the disk of every tensor that replaces the weight, padding and masks included."""
        return 8 * sum(spec.nbytes for spec in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / (self.n * self.k)

    def check_rows(self) -> None:
        """Raise PackedFormatError unless a row can be read by itself, as an embedding's must be."""
        if self.rank or self.overlay or self.has_trellis:
            what = "a product of two factors" if self.rank else "an overlay"
            what = "a tier with a trellis" if self.has_trellis else what
            raise PackedFormatError(f"layout: the rows of {what} do not stand by themselves")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, defaults left out."""
        return {
            "n": self.n,
            "k": self.k,
            "tiers": [_without_defaults(tier) for tier in self.tiers],
            **{
                name: getattr(self, name)
                for name in ("column_scale", "overlay", "overlay_bytes", "rank")
                if getattr(self, name)
            },
            **({"scale_bits": self.scale_bits} if self.scale_bits != 16 else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightLayout:
        """Inverse of `to_dict`. Raises PackedFormatError on anything the format does not allow."""
        tiers = data.get("tiers") if isinstance(data, Mapping) else None
        if not isinstance(tiers, list) or len(tiers) > MAX_TIERS:
            raise PackedFormatError("layout: 'tiers' is not a list of at most 64 tiers")
        rest = {name: value for name, value in data.items() if name != "tiers"}
        built = tuple(_checked(Tier, tier, "tier") for tier in tiers)
        return _checked(cls, {**rest, "tiers": built}, "layout")


def _without_defaults(tier: Tier) -> dict[str, Any]:
    fields = dataclasses.fields(tier)
    return {f.name: getattr(tier, f.name) for f in fields if getattr(tier, f.name) != f.default}


def _checked(cls: type, data: Any, what: str) -> Any:
    """cls(**data) when every field is known and has exactly its declared scalar type."""
    if not isinstance(data, Mapping):
        raise PackedFormatError(f"{what}: expected an object, found {type(data).__name__}")
    kinds = {"int": int, "bool": bool, "tuple[Tier, ...]": tuple}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in data.items():
        if name not in fields:
            raise PackedFormatError(f"{what}: unknown field {name!r}")
        if type(value) is not kinds[str(fields[name].type)]:
            raise PackedFormatError(f"{what}: field {name!r} has type {type(value).__name__}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in data]
    if missing:
        raise PackedFormatError(f"{what}: missing field {missing[0]!r}")
    return cls(**data)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight [n, k] as it lies on the disk: a layout and exactly the tensors it calls for.

    weight uint8 [n, row_bytes]; scale float16 [n, tier.scales summed], per tier [groups, planes]
    row-major, or uint8 with scale_exponent int8 [tier.scales summed]; offset float16 [n,
    tier.offsets summed]; tier uint8 [k]; column_scale float16 [k]; overlay_count int32 [n],
    overlay_gap uint8, overlay_value int8, overlay_scale float16 [n]. Of a product these are the
    tensors of the outer factor, and `inner_` before those of the inner.
    """

    layout: WeightLayout
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_tensors(self.layout, self.tensors)

    @property
    def stored_bits(self) -> int:
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / (self.layout.n * self.layout.k)

    def factors(self) -> tuple[PackedWeight, PackedWeight]:
        """Of a product: the outer factor [n, rank] and the inner one [rank, k], plain weights."""
        outer, inner = split_factors(self.tensors)
        layouts = self.layout.factors()
        return PackedWeight(layouts[0], outer), PackedWeight(layouts[1], inner)

    def permutation(self) -> Tensor:
        """int64 [k]: original column of each stored column."""
        return permutation(self.layout, self.tensors)

    def to(self, device: torch.device | str) -> PackedWeight:
        return PackedWeight(self.layout, {n: t.to(device) for n, t in self.tensors.items()})

    def plain(self) -> PackedWeight:
        """The same weight in the form of `layout.plain()`, for a kernel."""
        if self.layout.is_plain:
            return self
        tensors, layout = dict(self.tensors), self.layout
        if layout.has_trellis:
            pairs = zip(layout.tiers, tier_codes(layout, tensors["weight"]), strict=True)
            rows = [pack_codes(codes, tier.depth) for tier, codes in pairs]
            tensors["weight"] = torch.cat(rows, 1).contiguous()
        if tensors.pop("scale_exponent", None) is not None:
            scales = expand_scales(layout, self.tensors)
            kinds = zip(scales, layout.plain().tiers, strict=True)
            kept = [(s[..., :1] if tier.tied else s).flatten(1) for s, tier in kinds]
            tensors["scale"] = torch.cat(kept, 1).half()
            if not torch.isfinite(tensors["scale"]).all():
                raise PackedFormatError("scale: a plane of uneven levels is too large for float16")
        return PackedWeight(layout.plain(), tensors)


def permutation(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> Tensor:
    """int64 [k]: original column of each stored column."""
    if "tier" not in tensors:
        return torch.arange(layout.k, device=tensors["weight"].device)
    return torch.argsort(tensors["tier"], stable=True)


def padding_is_zero(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the bits that fill the last byte of a tier's planes are zero, as from `pack_bits`.

    Nothing reads them, so files that have others there are valid.
    """
    if layout.rank:
        pairs = zip(layout.factors(), split_factors(tensors), strict=True)
        return all(padding_is_zero(factor, own) for factor, own in pairs)
    end = 0
    for tier in layout.tiers:
        end += tier.row_bytes
        used = tier.planes * tier.columns % 8
        if used and (tensors["weight"][:, end - 1] >> used).any():
            return False
    return True


def split_factors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a product's outer and inner factor, by the names they have in a plain weight."""
    outer = {name: tensor for name, tensor in tensors.items() if not name.startswith(INNER)}
    return outer, {n.removeprefix(INNER): t for n, t in tensors.items() if n.startswith(INNER)}


def check_tensors(
    layout: WeightLayout, tensors: Mapping[str, Tensor], name: str = "", *, values: bool = False
) -> None:
    """Raise PackedFormatError, naming the tensor, unless `tensors` are those of `layout`.

    With `values`, also that scales are finite, tiers add up and the overlay stays in the matrix.
    """
    prefix = f"{name}." if name else ""
    specs = layout.tensors()
    for key in specs.keys() - tensors.keys():
        raise PackedFormatError(f"{prefix}{key}: missing")
    for key in tensors.keys() - specs.keys():
        raise PackedFormatError(f"{prefix}{key}: not part of this layout")
    for key, spec in specs.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise PackedFormatError(
                f"{prefix}{key}: {tensor.dtype} {tuple(tensor.shape)}, "
                f"the layout says {spec.dtype} {spec.shape}"
            )
    if values:
        _check_values(layout, tensors, prefix)


def _check_values(layout: WeightLayout, tensors: Mapping[str, Tensor], prefix: str) -> None:
    if layout.rank:
        outer, inner = split_factors(tensors)
        _check_values(layout.factors()[0], outer, prefix)
        _check_values(layout.factors()[1], inner, f"{prefix}{INNER}")
        return
    for key in ("scale", "offset", "column_scale", "overlay_scale"):
        if key in tensors and not torch.isfinite(tensors[key]).all():
            raise PackedFormatError(f"{prefix}{key}: non-finite values")
    if "tier" in tensors:
        counts = torch.bincount(tensors["tier"].long(), minlength=len(layout.tiers)).tolist()
        if counts != [tier.columns for tier in layout.tiers]:
            raise PackedFormatError(
                f"{prefix}tier: column counts {counts} differ from the layout's"
            )
    if layout.overlay:
        try:
            overlay_positions(layout, tensors)
        except PackedFormatError as error:
            raise PackedFormatError(f"{prefix}{error}") from None


# --- bits ------------------------------------------------------------------------------------


def pack_bits(bits: Tensor) -> Tensor:
    """bool or {0,1} [n, b] -> uint8 [n, ceil(b/8)], linear order, least significant bit first."""
    n, b = bits.shape
    row_bytes = math.ceil(b / 8)
    padded = torch.zeros(n, row_bytes * 8, dtype=torch.uint8, device=bits.device)
    padded[:, :b] = bits
    powers = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
    # uint8 sums cannot overflow: the eight powers are distinct
    return (padded.view(n, row_bytes, 8) * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(data: Tensor, b: int) -> Tensor:
    """uint8 [n, ceil(b/8)] -> uint8 {0,1} [n, b]. Inverse of `pack_bits`; padding is dropped."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = (data[..., None] >> shifts) & 1
    return bits.flatten(-2)[:, :b]


def pack_codes(codes: Tensor, planes: int) -> Tensor:
    """uint8 codes [n, c] below 2**planes -> uint8 [n, ceil(planes*c/8)], plane after plane."""
    shifts = torch.arange(planes, dtype=torch.uint8, device=codes.device)
    bits = (codes[:, None, :] >> shifts[:, None]) & 1  # [n, planes, c]
    return pack_bits(bits.flatten(1))


def unpack_codes(data: Tensor, planes: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [n, columns]."""
    bits = unpack_bits(data, planes * columns).view(data.shape[0], planes, columns)
    shifts = torch.arange(planes, dtype=torch.uint8, device=data.device)
    return (bits << shifts[:, None]).sum(1, dtype=torch.uint8)


def tier_codes(layout: WeightLayout, weight: Tensor) -> list[Tensor]:
    """Codes of the levels uint8 [n, tier.columns] of each tier, from the stored `weight`.

    Of some rows only, as many as `weight` has, where these stand by themselves.
    """
    found, start = [], 0
    for tier in layout.tiers:
        data = weight[:, start : start + tier.row_bytes]
        start += tier.row_bytes
        codes = unpack_codes(data, tier.planes, tier.columns)
        found.append(tier.level_codes(codes))
    return found


def stored_planes(layout: WeightLayout, plain: Tensor) -> Tensor:
    """The "weight" of `layout` from all rows of that of `layout.plain()`."""
    pairs = zip(layout.tiers, tier_codes(layout.plain(), plain), strict=True)
    rows = [pack_codes(tier.stored_codes(codes), tier.planes) for tier, codes in pairs]
    return torch.cat(rows, 1).contiguous()


# --- overlay ---------------------------------------------------------------------------------

_SKIP = 15  # a nibble of 15 moves on by 15 columns and holds no entry


def encode_overlay(mask: Tensor) -> tuple[Tensor, Tensor]:
    """bool [n, k] -> (overlay_count int32 [n], overlay_gap uint8).

    Entries of a row, left to right, as the gap to the entry before; a gap is nibbles of 15 (skip
    15 columns) and a last one below 15, low nibble first. At 10 % salient weights this takes 0.5
    bits a weight where a bitmap takes 1 and the entropy is 0.47.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    before = torch.where(first, torch.full_like(columns, -1), columns.roll(1))
    gap = columns - before - 1
    skips = gap // _SKIP
    ends = torch.cumsum(skips + 1, 0)  # one past the nibble of each entry
    total = int(ends[-1]) if len(ends) else 0
    nibbles = torch.full((total + total % 2,), _SKIP, dtype=torch.uint8, device=mask.device)
    nibbles[ends - 1] = (gap % _SKIP).to(torch.uint8)
    return mask.sum(1, dtype=torch.int32), nibbles[0::2] | (nibbles[1::2] << 4)


def overlay_positions(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, columns) int64 [overlay] of the overlay entries. Raises PackedFormatError."""
    count, data = tensors["overlay_count"].long(), tensors["overlay_gap"]
    if int(count.min()) < 0 or int(count.sum()) != layout.overlay:
        raise PackedFormatError("overlay_count: does not add up to the number of entries")
    nibbles = torch.stack([data & 15, data >> 4], 1).flatten().long()
    ends = (nibbles != _SKIP).nonzero(as_tuple=True)[0]
    if len(ends) != layout.overlay:
        raise PackedFormatError("overlay_gap: holds another number of entries than overlay_count")
    # An entry takes its own column (+1) after the gap; a skip moves by 15.
    travelled = torch.cumsum(nibbles + (nibbles != _SKIP), 0)[ends]
    rows = torch.repeat_interleave(torch.arange(layout.n, device=data.device), count)
    row_end = torch.cumsum(count, 0)
    start = torch.where(row_end > count, travelled[(row_end - count - 1).clamp(min=0)], 0)
    columns = travelled - 1 - start[rows]
    if len(columns) and int(columns.max()) >= layout.k:
        raise PackedFormatError("overlay_gap: an entry lies outside the matrix")
    return rows, columns


def stored_scales(tensors: Mapping[str, Tensor]) -> Tensor:
    """The stored scales, float32 [n, S]: all of a weight that has some, or some of its rows."""
    scale = tensors["scale"]
    if "scale_exponent" in tensors:
        return decoded_scales(scale, tensors["scale_exponent"])
    return scale.float()


@functools.cache
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: no copy to a GPU may be recorded in a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def expand_scales(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Split the stored scales [n, S] into one float32 [n, groups, planes] per tier, ties resolved.

    Of some rows only, as many as "weight" has.
    """
    weight = tensors["weight"]
    scale = stored_scales(tensors) if "scale" in tensors else None
    out, start = [], 0
    for tier in layout.tiers:
        if not tier.scales or scale is None:
            out.append(weight.new_zeros(len(weight), tier.groups, tier.depth, dtype=torch.float32))
            continue
        part = scale[:, start : start + tier.scales].unflatten(1, (tier.groups, -1))
        start += tier.scales
        if tier.tied:
            part = part * _constant(tier.weights, part.dtype, part.device)
        out.append(part)
    return out


def expand_offsets(layout: WeightLayout, offset: Tensor | None) -> list[Tensor | None]:
    """Split stored `offset` [n, O] into one float32 [n, groups] per tier, or None without any."""
    out: list[Tensor | None] = []
    start = 0
    for tier in layout.tiers:
        if not tier.offsets or offset is None:
            out.append(None)
            continue
        out.append(offset[:, start : start + tier.offsets].float())
        start += tier.offsets
    return out
