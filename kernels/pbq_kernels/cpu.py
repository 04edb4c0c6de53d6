"""The CPU backend: loads the compiled cpu.c by ctypes, repacks weights for it, multiplies.

docs/kernels.md, section "CPU", describes the repacked layout and the two modes.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbq_kernels.layout import (
    MAX_PLANES,
    PackedWeight,
    Tier,
    WeightLayout,
    check_tensors,
    overlay_positions,
    stored_scales,
)
from pbq_kernels.trellis import POLYNOMIALS

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("_cpu.so")
BUILD = "`python -m pbq_kernels.cpu_build` builds it where there is a C compiler"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MODES = {"exact": 0, "int8": 1}
_WORD = 32  # columns of one word of weights
_MOST_RUNS = 8  # of x's columns in rising order
# What `_nanoseconds` adds up, in 1e9 a second on one thread of a Zen 4 core (AVX2: Zen 3): lookups
# of one plane (multiplications), decoding (weights), torch's matrix products (multiplications),
# choosing columns of x and adding to its products (numbers), overlay entries (of a token, and of a
# decoded weight).
_RATES = {
    "avx512vnni": (135.0, 2.0),
    "avx512": (135.0, 2.0),
    "avx2": (48.0, 0.6),
    # Not measured: the instructions of a Cortex-A76, in proportion to its share of `_PRODUCT`.
    "neon": (50.0, 1.5),
    "portable": (10.0, 0.5),
}
# Tables of integers have fewer digits for x of 16 bits.
_SHORT = {"avx2": 1.2, "neon": 1.3}
# Planes that are looked up in the time of a weight held as a byte.
_BYTES = 2.0
_PRODUCT = {torch.float32: 40.0, torch.bfloat16: 95.0}
_GATHERED, _ADDED = 0.4, 1.0
_OVERLAY_LOOKUPS, _OVERLAY_DECODING = 1.1, 0.1
# The units of products.c, and what they make of bfloat16: decoding and products as above. AMX as
# measured on a Sapphire Rapids core; AVX512-BF16's product is torch's on Zen 4, its decoding a
# guess.
UNITS = ("none", "avx512bf16", "amx")
_UNIT_RATES = {"avx512bf16": (6.0, 90.0), "amx": (8.5, 480.0)}
# The same of floats.c, which AVX2 machines multiply any dtype with: Zen 3.
_FLOATS_RATES = 4.0, 41.0
# Either may pay from so many tokens on.
_LEAST_UNIT_TOKENS = 5
# Up to so many tokens, or multiplications (tokens times weights), all is looked up otherwise.
_MOST_LOOKUP_TOKENS = 31
_MOST_LOOKUPS = 2**27
# Numbers of tokens for which a weight remembers what to decode.
_MOST_CHOICES = 64
# Weights of a dense tile: 2 to 4 MB, which stays in the last-level cache.
_TILE_WEIGHTS = 2**20
# Below this many plane bits a second thread costs more than it does.
_BITS_PER_THREAD = 2**18
# int8 mode: 127 * 2**22 * 4 stays below 2**31, whatever the bits.
_MOST_INT8_COLUMNS = 2**22


class _Group(ctypes.Structure):
    """Mirrors Group in weight.h."""

    _fields_ = (
        ("bit", ctypes.c_int64),
        ("plane_bits", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "words", "first_word", "stream")),
        *((name, ctypes.c_int32) for name in ("stored", "planes", "tied", "bytes")),
        *((name, ctypes.c_int32) for name in ("scale", "offset", "path", "delay", "uneven")),
        ("factor", ctypes.c_float * MAX_PLANES),
    )


class _Weight(ctypes.Structure):
    """Mirrors Weight in weight.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("tile", "groups", "words")),
        *((name, ctypes.c_int32) for name in ("stream", "slots")),
        *((name, ctypes.c_int32) for name in ("variant", "trellises")),
        *((name, ctypes.c_void_p) for name in ("group", "data", "scale", "column", "column_scale")),
        *((f"overlay_{name}", ctypes.c_void_p) for name in ("start", "column", "delta", "value")),
        ("run_mask", ctypes.c_void_p),
        ("run_begin", ctypes.c_int64 * _MOST_RUNS),
        ("runs", ctypes.c_int32),
    )


class LibraryError(RuntimeError):
    """The compiled kernels cannot be loaded. Says why and what to do."""


def load_library(path: Path) -> ctypes.CDLL:
    """The compiled C files, their functions declared. Raises LibraryError."""
    # not at import: `python -m pbq_kernels.cpu_build` must not find itself loaded already
    from pbq_kernels import cpu_build

    if not path.exists():
        raise LibraryError(f"the compiled CPU kernels are missing ({path}); {BUILD}")
    try:
        library = _open(path)
    except OSError as error:
        raise LibraryError(f"the compiled CPU kernels do not load: {error}; {BUILD}") from error
    library.pbq_source_hash.restype = ctypes.c_char_p
    if library.pbq_source_hash().decode() != cpu_build.source_hash():
        raise LibraryError(f"{path.name} was built from other sources; {BUILD}")
    _declare(library)
    return library


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))  # OpenMP from the runtime that torch made global
    except OSError:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # a torch that came without one
        return ctypes.CDLL(str(path))


def _declare(library: ctypes.CDLL) -> None:
    integer, wide, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.pbq_variant_name.restype = ctypes.c_char_p
    library.pbq_repack.argtypes = [pointer, pointer, pointer, integer]
    library.pbq_repack.restype = None
    library.pbq_unpack.argtypes = [pointer, pointer, wide, pointer, integer]
    library.pbq_decode.argtypes = [
        *(pointer, wide, wide, wide, integer, pointer, pointer, pointer, integer)
    ]
    library.pbq_decode.restype = None
    library.pbq_runs.argtypes = [pointer, wide, pointer, pointer]
    library.pbq_product_scratch.argtypes = [pointer, wide, integer]
    library.pbq_product_scratch.restype = wide
    library.pbq_product.argtypes = [*(pointer, integer, pointer, wide, pointer, pointer, integer)]
    library.pbq_product.restype = None
    library.pbq_floats_scratch.argtypes = [pointer, wide, integer]
    library.pbq_floats_scratch.restype = wide
    library.pbq_floats.argtypes = [
        *(pointer, pointer, integer, wide, pointer, integer, pointer, integer)
    ]
    library.pbq_floats.restype = None
    library.pbq_matmul.argtypes = [
        *(pointer, integer, pointer, integer, wide, pointer, integer, integer)
    ]
    library.pbq_trellis.argtypes = [
        *(pointer, pointer, wide, wide, integer, integer, integer, integer),
        *(pointer, pointer, integer),
    ]
    library.pbq_trellis_in_turn.argtypes = [
        *(pointer, pointer, pointer, pointer, wide, wide),
        *(integer, integer, integer, integer, pointer, pointer),
    ]
    library.pbq_divergence.argtypes = [
        *(pointer, pointer, wide, wide, ctypes.c_float, pointer, pointer, pointer, integer)
    ]
    library.pbq_divergence.restype = None
    library.pbq_attention_back.argtypes = [
        *(pointer, pointer, pointer, pointer, ctypes.c_float),
        *(pointer, pointer, pointer, integer),
    ]
    for function in (library.pbq_levels, library.pbq_levels_gradient):
        function.argtypes = [*(pointer, pointer, pointer, wide, wide, integer, pointer, integer)]
        function.restype = None


@functools.cache
def compiled() -> ctypes.CDLL | LibraryError:
    """The library, or why there is none; the latter is said once."""
    try:
        return load_library(LIBRARY)
    except LibraryError as error:
        log.warning("packed weights run by the slow reference on this CPU: %s", error)
        return error


def variants(library: ctypes.CDLL) -> list[str]:
    """Names of the kernel variants that this machine can run, fastest first."""
    names: list[str] = []
    while name := library.pbq_variant_name(len(names)):
        names.append(name.decode())
    return names


@dataclass(frozen=True)
class _Overlay:
    """Entries that replace single weights, as what they add to the planes below them, by row."""

    start: Tensor  # int64 [n + 1]
    column: Tensor  # int32 [overlay]
    delta: Tensor  # float32 [overlay]
    value: Tensor  # bfloat16 [overlay]: what they stand for


@dataclass(frozen=True, eq=False)
class _Part:
    """Some groups of a weight. `struct` points to `groups` and into the tensors of the weight."""

    struct: _Weight
    groups: Any
    columns: Tensor  # int64: of x, in stored order


@dataclass(eq=False)
class CpuWeight:
    """A weight in the layout of cpu.c."""

    library: ctypes.CDLL
    variant: str
    n: int
    k: int
    bits: int  # plane bits that are looked up: n times the sum of planes over the columns
    whole: _Part
    data: Tensor  # int32 [tiles, stream, tile]
    scale: Tensor  # float16 [tiles, slots, tile]
    column: Tensor  # int32 [positions of x]
    column_scale: Tensor | None  # float32 [positions of x]
    run_mask: Tensor  # int32 [ceil(k / 32), _MOST_RUNS]
    unit: str  # of `UNITS`
    floats: bool  # many tokens are multiplied by floats.c
    overlay: _Overlay | None = None
    overlay_tokens: int = 2**62  # more are quicker decoded with the weight than looked up

    def __post_init__(self) -> None:
        self.address = ctypes.addressof(self.whole.struct)
        self._parts: dict[int, tuple[_Part | None, _Part | None]] = {}
        # what _least_dense_planes and _by_unit have found
        self.choices: dict[tuple[int, torch.dtype], int] = {}
        self.by_unit: dict[int, bool] = {}

    def stored_rows(self, rows: Tensor) -> Tensor:
        """The stored planes of rows int64 [r], uint8 [r, row_bytes]: undoes `repack`.

        Raises IndexError for a row that is not there, TypeError for other ids.
        """
        if not rows.is_cpu or rows.dtype != torch.int64:
            raise TypeError(f"rows are {rows.dtype} on {rows.device}; needed: int64 on cpu")
        row_bytes = self.whole.struct.row_bytes
        out = _empty(len(rows), row_bytes, dtype=torch.uint8)
        threads = min(torch.get_num_threads(), 1 + 8 * out.numel() // _BITS_PER_THREAD)
        rows = rows.contiguous()
        if self.library.pbq_unpack(
            self.address, rows.data_ptr(), len(rows), out.data_ptr(), threads
        ):
            raise IndexError(f"a row is not one of the {self.n} of the weight")
        return out

    def parts(self, planes: int) -> tuple[_Part | None, _Part | None]:
        """(groups of fewer planes, groups of at least so many); None for no groups."""
        if planes not in self._parts:
            groups = list(self.whole.groups)
            few = [g for g in groups if g.planes < planes]
            many = [g for g in groups if g.planes >= planes]
            self._parts[planes] = (self._part(few), self._part(many))
        return self._parts[planes]

    def _part(self, groups: Sequence[_Group]) -> _Part | None:
        if not groups or len(groups) == len(self.whole.groups):
            return self.whole if groups else None
        array = (_Group * len(groups))(*groups)
        struct = _Weight.from_buffer_copy(self.whole.struct)
        struct.group, struct.groups = ctypes.addressof(array), len(groups)
        positions = [self.column[g.first_word * _WORD :][: g.words * _WORD] for g in groups]
        columns = torch.cat(positions).long()
        return _Part(struct, array, columns[columns >= 0])


def repack(pw: PackedWeight, library: ctypes.CDLL, variant: int) -> CpuWeight:
    """The stored planes as cpu.c's `variant` reads them. Raises PackedFormatError on bad values."""
    layout, tensors = pw.layout, pw.tensors
    check_tensors(layout, tensors, values=True)
    name = variants(library)[variant]
    # as many rows as are multiplied at once, so that a tile is read from its begin to its end
    tile = 64 if name.startswith("avx512") and layout.n > 32 else 32
    groups = _groups(layout)
    array = (_Group * len(groups))(*groups)
    column, column_scale = _positions(pw, groups)
    scale = _tiled_scales(pw, tile)
    stream = groups[-1].stream + groups[-1].stored * groups[-1].words
    data = _empty(math.ceil(layout.n / tile), stream, tile, dtype=torch.int32)
    struct = _Weight(
        n=layout.n,
        k=layout.k,
        row_bytes=layout.row_bytes,
        tile=tile,
        groups=len(groups),
        words=len(column) // _WORD,
        stream=stream,
        slots=scale.shape[1],
        variant=variant,
        trellises=layout.has_trellis,
        group=ctypes.addressof(array),
        data=data.data_ptr(),
        scale=scale.data_ptr(),
        column=column.data_ptr(),
        column_scale=None if column_scale is None else column_scale.data_ptr(),
    )
    stored = tensors["weight"].contiguous()
    library.pbq_repack(
        ctypes.byref(struct), stored.data_ptr(), data.data_ptr(), torch.get_num_threads()
    )
    bits = layout.n * sum(tier.depth * tier.columns for tier in layout.tiers)
    whole = _Part(struct, array, pw.permutation())
    run_mask = _empty(math.ceil(layout.k / 32), _MOST_RUNS, dtype=torch.int32).zero_()
    struct.run_mask = run_mask.data_ptr()
    struct.runs = library.pbq_runs(
        *(whole.columns.data_ptr(), layout.k, run_mask.data_ptr()),
        ctypes.addressof(struct) + _Weight.run_begin.offset,
    )
    unit = UNITS[library.pbq_unit() if name.startswith("avx512") else 0]
    weight = CpuWeight(
        *(library, name, layout.n, layout.k, bits, whole, data, scale, column, column_scale),
        *(run_mask, unit, name == "avx2" and not layout.overlay),
    )
    if layout.overlay:
        _add_overlay(weight, pw)
    return weight


def _add_overlay(weight: CpuWeight, pw: PackedWeight) -> None:
    rows, columns = overlay_positions(pw.layout, pw.tensors)
    delta = pw.tensors["overlay_value"].float() * pw.tensors["overlay_scale"].float()[rows]
    value = delta.bfloat16()
    start = _empty(weight.n + 1, dtype=torch.int64).zero_()
    start[1:] = torch.cumsum(pw.tensors["overlay_count"], 0)
    for tile_rows, tile in _decoded_tiles(weight, weight.whole, torch.float32):
        entries = slice(int(start[tile_rows.start]), int(start[tile_rows.stop]))
        delta[entries] -= tile[rows[entries] - tile_rows.start, columns[entries]]
    overlay = _Overlay(start, columns.to(torch.int32), delta, value)
    weight.overlay = overlay
    decoding = weight.n * weight.k / _RATES[weight.variant][1] + len(delta) / _OVERLAY_DECODING
    weight.overlay_tokens = int(decoding * _OVERLAY_LOOKUPS / len(delta))
    struct = weight.whole.struct
    struct.overlay_start = overlay.start.data_ptr()
    struct.overlay_column = overlay.column.data_ptr()
    struct.overlay_delta = overlay.delta.data_ptr()
    struct.overlay_value = overlay.value.data_ptr()


def _groups(layout: WeightLayout) -> list[_Group]:
    """Every group of every tier, in storage order; a group begins at a word of its own."""
    groups: list[_Group] = []
    byte = word = stream = scale = 0
    offset = sum(tier.scales for tier in layout.tiers)  # slots of offsets follow those of scales
    for tier in layout.tiers:
        h1, h0 = POLYNOMIALS[tier.trellis] if tier.trellis else (0, 1)
        factors = tier.weights if tier.tied else (1,) * tier.depth
        for g in range(tier.groups):
            begin, columns = _group_span(tier, g)
            words = math.ceil(columns / _WORD)
            groups.append(
                _Group(
                    bit=8 * byte + begin,
                    plane_bits=tier.columns,
                    columns=columns,
                    words=words,
                    first_word=word,
                    stream=stream,
                    stored=tier.planes,
                    planes=tier.depth,
                    tied=tier.tied,
                    bytes=tier.tied and tier.planes == MAX_PLANES,
                    scale=scale,
                    offset=offset if tier.offset else -1,
                    path=h1,
                    delay=h0.bit_length() - 1,
                    uneven=tier.uneven,
                    factor=(ctypes.c_float * MAX_PLANES)(*factors),
                )
            )
            word += words
            stream += tier.planes * words
            scale += tier.scales // tier.groups
            offset += tier.offset
        byte += tier.row_bytes
    return groups


def _group_span(tier: Tier, g: int) -> tuple[int, int]:
    """(first column, number of columns) of group g, counted in the tier's storage order."""
    size = tier.columns if tier.group_size == -1 else tier.group_size
    return g * size, min(size, tier.columns - g * size)


def _positions(pw: PackedWeight, groups: Sequence[_Group]) -> tuple[Tensor, Tensor | None]:
    """(column int32, column_scale float32 or None) of each position of x; -1 and 0 at padding."""
    words = groups[-1].first_word + groups[-1].words
    position = torch.cat(
        [torch.arange(g.columns, device="cpu") + g.first_word * _WORD for g in groups]
    )
    column = _empty(words * _WORD, dtype=torch.int32).fill_(-1)
    column[position] = pw.permutation().to(torch.int32)
    if not pw.layout.column_scale:
        return column, None
    column_scale = _empty(words * _WORD, dtype=torch.float32).zero_()
    column_scale[position] = pw.tensors["column_scale"].float()[pw.permutation()]
    return column, column_scale


def _tiled_scales(pw: PackedWeight, tile: int) -> Tensor:
    """Scales, then offsets, float16 [tiles, slots, tile]; zero past the last row."""
    n = pw.layout.n
    parts = [stored_scales(pw.tensors).half()] if "scale" in pw.tensors else []
    parts += [pw.tensors["offset"]] if "offset" in pw.tensors else []
    slots = sum(part.shape[1] for part in parts)
    padded = _empty(math.ceil(n / tile) * tile, slots, dtype=torch.float16).zero_()
    if parts:
        padded[:n] = torch.cat(parts, 1)
    return padded.view(len(padded) // tile, tile, slots).transpose(1, 2).contiguous()


class CpuBackend:
    """cpu.c behind the `Backend` protocol.

    mode: "exact" sums in fp32; "int8" rounds x to int8 per token, tier and group of scales.
    variant: a name that `variants` gives, or None for the fastest of this machine.
    """

    def __init__(self, name: str, mode: str = "exact", variant: str | None = None) -> None:
        self.name = name
        self._mode = _MODES[mode]
        self._variant = variant

    def why_not(self, layout: WeightLayout, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, the weight is on {device}"
        if layout.rank:
            return "it multiplies with one factor at a time"
        if self._mode == _MODES["int8"] and layout.k > _MOST_INT8_COLUMNS:
            return f"its int8 sums could overflow above {_MOST_INT8_COLUMNS} columns"
        library = compiled()
        if isinstance(library, LibraryError):
            return str(library)
        if self._variant and self._variant not in variants(library):
            return f"this CPU does not run the {self._variant} variant"
        return None

    def prepare(self, pw: PackedWeight) -> CpuWeight:
        reason = self.why_not(pw.layout, pw.tensors["weight"].device)
        library = compiled()
        if reason or isinstance(library, LibraryError):
            raise ValueError(f"kernel backend {self.name!r} cannot be used here: {reason}")
        variant = variants(library).index(self._variant) if self._variant else 0
        return repack(pw, library, variant)

    def planes(self, prepared: CpuWeight) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"weight": prepared.stored_rows}

    def matmul(self, x: Tensor, prepared: CpuWeight) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _Multiply.apply(x, prepared, self._mode)
        return _multiply(x, prepared, self._mode)


def _check_input(x: Tensor, columns: int) -> None:
    if not x.is_cpu or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype} on {x.device}; needed: floating point on cpu")
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight has {columns} columns")


def _multiply(x: Tensor, weight: CpuWeight, mode: int) -> Tensor:
    """x [*b, k] @ W_hat.T -> [*b, n]. A small layer takes 10 us: every line here is measured."""
    n, k = weight.n, weight.k
    _check_input(x, k)
    m = x.numel() // k
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    if weight.floats:
        few = m < _LEAST_UNIT_TOKENS
    else:
        few = m <= _MOST_LOOKUP_TOKENS or m * n * k <= _MOST_LOOKUPS
    least = _LEAST_UNIT_TOKENS if mode == _MODES["exact"] else _MOST_LOOKUP_TOKENS + 1
    if m >= least and _by_unit(weight, m, x.dtype):
        _multiply_by_unit(x, weight, m, y)
    elif x.dtype in _DTYPES and ((few and m <= weight.overlay_tokens) or mode == _MODES["int8"]):
        _look_up(x, weight, weight.address, mode, m, y)
    else:
        _multiply_many(x.view(m, k), weight, y.view(m, n))
    return y


def _look_up(x: Tensor, weight: CpuWeight, address: int, mode: int, m: int, y: Tensor) -> None:
    """y = x @ W_hat.T over the groups at `address`."""
    threads = min(torch.get_num_threads(), 1 + m * weight.bits // _BITS_PER_THREAD)
    if weight.library.pbq_matmul(
        address, mode, x.data_ptr(), _DTYPES[x.dtype], m, y.data_ptr(), _DTYPES[y.dtype], threads
    ):
        raise MemoryError(f"no memory for the lookup tables of {weight.k} columns")


def _by_unit(weight: CpuWeight, m: int, dtype: torch.dtype) -> bool:
    """Is the CPU's unit for bfloat16 quicker than anything else?"""
    if weight.unit == "none" or dtype != torch.bfloat16:
        return False
    found = weight.by_unit.get(m)
    if found is None:
        if len(weight.by_unit) == _MOST_CHOICES:
            weight.by_unit.clear()  # another thread may be here, too
        decoding, product = _UNIT_RATES[weight.unit]
        takes = weight.n * weight.k * (1 / product + 1 / (decoding * m))
        if weight.overlay:
            takes += len(weight.overlay.delta) / (_OVERLAY_DECODING * m)
        other = _least_dense_planes(weight, m, dtype)
        weight.by_unit[m] = found = takes <= _nanoseconds(weight, other, m, dtype)
    return found


def _multiply_by_unit(x: Tensor, weight: CpuWeight, m: int, y: Tensor) -> None:
    """y = x @ W_hat.T by products.c."""
    threads = min(torch.get_num_threads(), 1 + m * weight.bits // _BITS_PER_THREAD)
    size = weight.library.pbq_product_scratch(weight.address, m, threads)
    weight.library.pbq_product(
        *(weight.address, UNITS.index(weight.unit), x.data_ptr(), m, y.data_ptr()),
        *(_scratch(size, torch.uint8).data_ptr(), threads),
    )


@functools.cache
def multiplies_bfloat16() -> bool:
    """Has this CPU instructions for bfloat16, or does torch take one number after the other?

    A torch without oneDNN, as for macOS, has not even the question.
    """
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def _multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """What torch multiplies matrices of that dtype as without taking number after number."""
    known = dtype not in (torch.bfloat16, torch.float16)
    return dtype if known or (dtype == torch.bfloat16 and multiplies_bfloat16()) else torch.float32


def _least_dense_planes(weight: CpuWeight, m: int, dtype: torch.dtype) -> int:
    """Groups of so many planes are decoded for a matrix product; lookups pay each plane."""
    if dtype not in _DTYPES:
        return 0
    found = weight.choices.get((m, dtype))
    if found is None:  # 30 us to find
        if len(weight.choices) == _MOST_CHOICES:
            weight.choices.clear()
        weight.choices[m, dtype] = found = min(
            {0, *(group.planes + 1 for group in weight.whole.groups)},
            key=lambda planes: _nanoseconds(weight, planes, m, dtype),
        )
    return found


def _nanoseconds(weight: CpuWeight, least: int, m: int, dtype: torch.dtype) -> float:
    """What one of m tokens takes when groups of at least `least` planes are decoded."""
    lookups, decoding = _RATES[weight.variant]
    if dtype != torch.float32:
        lookups *= _SHORT.get(weight.variant, 1.0)
    product = _PRODUCT[_multiplied_as(dtype)]
    if weight.floats:
        decoding, product = _FLOATS_RATES
    few, many = weight.parts(least)
    found = 0.0
    if few:
        planes = sum((_BYTES if g.bytes else g.planes) * g.columns for g in few.groups)
        found += weight.n * planes / lookups
    if many:
        found += weight.n * len(many.columns) * (1 / product + 1 / (decoding * m))
    if few and many and not weight.floats:
        found += len(many.columns) / _GATHERED + weight.n / _ADDED
    if weight.overlay:
        entries = len(weight.overlay.delta)
        found += entries / _OVERLAY_LOOKUPS if few else entries / (_OVERLAY_DECODING * m)
    return found


def _multiply_many(x: Tensor, weight: CpuWeight, y: Tensor) -> None:
    """y [m, n] = x [m, k] @ W_hat.T: groups of few planes by lookups, the others densely."""
    few, many = weight.parts(_least_dense_planes(weight, len(x), x.dtype))
    sums = None
    if few:
        # fp32 where the other groups are still to be added
        sums = torch.empty_like(y, dtype=torch.float32) if many else y
        _look_up(x, weight, ctypes.addressof(few.struct), _MODES["exact"], len(x), sums)
    if many and weight.floats and x.dtype in _DTYPES:
        product = y if sums is None else torch.empty_like(sums)
        _multiply_as_floats(x, weight, ctypes.addressof(many.struct), product)
        if sums is not None:
            torch.add(sums, product, out=y)
    elif many:
        if many is not weight.whole:
            x = x.index_select(1, many.columns)
        x = x.to(_multiplied_as(x.dtype))
        for rows, tile in _decoded_tiles(weight, many, x.dtype):
            if sums is None and len(tile) == weight.n and x.dtype == y.dtype:
                torch.mm(x, tile.T, out=y)
                continue
            product = torch.nn.functional.linear(x, tile)
            if sums is None:
                y[:, rows] = product
            else:
                torch.add(sums[:, rows], product, out=y[:, rows])


def _multiply_as_floats(x: Tensor, weight: CpuWeight, address: int, y: Tensor) -> None:
    """y [m, n] = x [m, k] @ W_hat.T over the groups at `address`, by floats.c."""
    m, library = len(x), weight.library
    threads = min(torch.get_num_threads(), 1 + m * weight.bits // _BITS_PER_THREAD)
    size = library.pbq_floats_scratch(address, m, threads)
    library.pbq_floats(
        *(address, x.data_ptr(), _DTYPES[x.dtype], m, y.data_ptr(), _DTYPES[y.dtype]),
        *(_scratch(size, torch.uint8).data_ptr(), threads),
    )


def _decoded_tiles(
    weight: CpuWeight, part: _Part, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, dense weight of those rows), tile after tile.

    The whole weight has x's columns and its overlay; a part of it has its own columns in stored
    order, and lookups add the overlay. One buffer is used again and again: a tile is valid until
    the next is asked for.
    """
    n, k = weight.n, len(part.columns)
    stored = dtype if dtype in _DTYPES else torch.float32
    rows = min(n, max(64, _TILE_WEIGHTS // k))
    buffer = _scratch(rows * k, stored).view(rows, k)
    address, code, threads = ctypes.addressof(part.struct), _DTYPES[stored], torch.get_num_threads()
    whole = part is weight.whole
    order = part.columns.data_ptr() if whole else None
    line = _empty(threads if whole else 0, k, dtype=stored)  # a row in stored order
    for begin in range(0, n, rows):
        tile = buffer[: n - begin]
        weight.library.pbq_decode(
            *(address, begin, len(tile), k, code, order, line.data_ptr(), tile.data_ptr(), threads)
        )
        if weight.overlay and whole:
            _overlay_tile(tile, weight.overlay, begin)
        yield slice(begin, begin + len(tile)), tile.to(dtype)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Where C writes, whatever torch's default device may be."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


_kept = threading.local()


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """So many numbers that stay valid until this thread asks again: new memory is slow to touch."""
    held: dict[torch.dtype, Tensor] = _kept.__dict__.setdefault("held", {})
    if dtype not in held or len(held[dtype]) < count:
        with torch.inference_mode(False):  # or nothing outside of it may change what is kept
            held[dtype] = _empty(count, dtype=dtype)
    return held[dtype][:count]


def _overlay_tile(tile: Tensor, overlay: _Overlay, begin: int) -> None:
    start = overlay.start[begin : begin + len(tile) + 1]
    entries = slice(int(start[0]), int(start[-1]))
    rows = torch.repeat_interleave(start.diff())
    tile[rows, overlay.column[entries].long()] += overlay.delta[entries].to(tile.dtype)


class _Multiply(torch.autograd.Function):
    """Gradient with respect to x only: grad @ W_hat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: CpuWeight, mode: int) -> Tensor:
        ctx.weight = weight
        return _multiply(x, weight, mode)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        weight: CpuWeight = ctx.weight
        flat = grad.reshape(-1, weight.n).to(_multiplied_as(grad.dtype))
        sums = torch.promote_types(grad.dtype, torch.float32)
        grad_x = flat.new_zeros(len(flat), weight.k, dtype=sums)
        for rows, tile in _decoded_tiles(weight, weight.whole, flat.dtype):
            grad_x += flat[:, rows] @ tile
        return grad_x.to(grad.dtype).view(*grad.shape[:-1], weight.k), None, None
