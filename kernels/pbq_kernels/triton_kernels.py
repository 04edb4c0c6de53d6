"""The Triton kernels. docs/kernels.md, section "GPU", describes the layout that they read.

Each also runs in Triton's interpreter (TRITON_INTERPRET=1), which has no bfloat16 arithmetic: WIDE
then asks for the one such operation in float32.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from pbq_kernels import triton_layout

# WORDS: of a block, in each row; one holds one bit of 32 columns, two of 16, or four of 8; see
# triton_layout. STEP: columns that one shift takes out of a block, two of each word.
FIELD = tl.constexpr(triton_layout.FIELD)  # numbers that describe a field
SUM_STEPS = tl.constexpr(triton_layout.SUM_STEPS)  # steps of one sum of x, where FLUSH is 0
# Columns of one product of matrices, with a trellis: smaller products compile more slowly.
TOGETHER = tl.constexpr(128)

_KINDS = tl.constexpr(len(triton_layout.KINDS))
_PLAIN = tl.constexpr(sum(not weights for _, weights in triton_layout.KINDS))
_WIDTHS = tl.constexpr([width for width, _ in triton_layout.KINDS])
_WEIGHTS = tl.constexpr([list(weights) for _, weights in triton_layout.KINDS])


def _minus(dtype: torch.dtype) -> list[list[int]]:
    """For each kind what a bit of 0 stands for, -1 or -weight, in both halves of an int32."""
    found = []
    for _, weights in triton_layout.KINDS:
        value = -torch.tensor(weights or [1], dtype=dtype)
        found.append(value.repeat_interleave(2).view(torch.int32).tolist())
    return found


_MINUS_FLOAT16 = tl.constexpr(_minus(torch.float16))
_MINUS_BFLOAT16 = tl.constexpr(_minus(torch.bfloat16))


@triton.jit
def _signed(
    words,
    first: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    minus: tl.constexpr,
    dtype: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Steps of int32 words [r, w] from `first` on, dtype [r, STEPS * 2 * w].

    Two at a time. One bit turns the sign of `minus`. More become the mantissa, but for its last
    place, of a number whose exponent makes that a one; what this adds is subtracted, which leaves
    the odd integers 2*code - (2**WIDTH - 1). All of it is exact: what is subtracted is odd, and
    where the last place is a two there is no such number.
    """
    step = first + tl.arange(0, STEPS)[None, :, None]
    if WIDTH == 1:
        pair = ((words[:, None, :] << (15 - step)) & -0x7FFF8000) ^ minus
    else:
        large: tl.constexpr = 0x64006400 if dtype == tl.float16 else 0x43004300
        # steps are known when this is compiled, and so is which of the two it is
        down = words[:, None, :] >> tl.maximum(WIDTH * step - 1, 0)
        field = tl.where(step == 0, words[:, None, :] << 1, down)
        pair = (field & (((1 << WIDTH) - 1) * 0x20002)) | large
    halves = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    values = halves.reshape(words.shape[0], STEPS * 2 * words.shape[1]).to(dtype, bitcast=True)
    if WIDTH > 1:
        excess = tl.full(
            values.shape, (1024 if dtype == tl.float16 else 128) + (1 << WIDTH) - 1, dtype
        )
        if WIDE:
            values = (values.to(tl.float32) - excess.to(tl.float32)).to(dtype)
        else:
            values = values - excess
    return values


@triton.jit
def _path(words, H1: tl.constexpr, DELAY: tl.constexpr, WORDS: tl.constexpr):
    """Pointers to words of a path -> the words of planes 0 and 1 that a trellis makes (trellis.py).

    Rows lie one after another; those above the first are zero. A row is read up to eight times, all
    but once from the first cache.
    """
    plane_0 = tl.load(words - DELAY * WORDS, cache_modifier=".ca")
    plane_1 = tl.load(words, cache_modifier=".ca")
    for i in tl.static_range(1, 13):
        if (H1 >> i) & 1:
            plane_1 ^= tl.load(words - i * WORDS, cache_modifier=".ca")
    return plane_0, plane_1


@triton.jit
def _signs_of_8(a, b, c):
    """Bits of the place of one of 8 unevenly spaced levels -> the signs of its planes.

    `sums` of trellis.py as Boolean functions: the negative of a level has the opposite signs.
    """
    flip = ~c
    a, b = a ^ flip, b ^ flip
    return (a | ~b) ^ flip, (b | ~a) ^ flip, (a | b) ^ flip


@triton.jit
def _signs_of_16(a, b, c, d):
    """The same for 16 levels."""
    flip = ~d
    a, b, c = a ^ flip, b ^ flip, c ^ flip
    a_c = a ^ c
    plane_0 = ((a & b) | (c & ~b)) ^ flip
    return plane_0, (~(a ^ b) | a_c) ^ flip, (b | ~a_c) ^ flip, (c | (a ^ b)) ^ flip


@triton.jit
def _planes(
    words,
    plane,
    MADE: tl.constexpr,
    H1: tl.constexpr,
    DELAY: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Pointers to words of a field -> a tuple of words; MADE planes by a trellis, or what is there.

    plane: how far it is from the words of one stored plane to those of the next.
    """
    if MADE == 0:
        return (tl.load(words),)
    else:
        a, b = _path(words, H1, DELAY, WORDS)
        if MADE == 2:
            return a, b
        elif MADE == 3:
            return _signs_of_8(a, b, tl.load(words + plane))
        else:
            return _signs_of_16(a, b, tl.load(words + plane), tl.load(words + 2 * plane))


@triton.jit
def _add_fields(
    total,
    fields,
    words,
    rows,
    scales,
    x,
    sums,
    is_token,
    KIND: tl.constexpr,
    H1: tl.constexpr,
    DELAY: tl.constexpr,
    WORDS: tl.constexpr,
    FLUSH: tl.constexpr,
    OFFSETS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """total [BN, BM] += the fields of one kind times x; this split's blocks."""
    dtype: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = _WIDTHS[KIND]
    STEPS: tl.constexpr = 16 // WIDTH
    MADE: tl.constexpr = len(_WEIGHTS[KIND])
    MINUS: tl.constexpr = (_MINUS_FLOAT16 if dtype == tl.float16 else _MINUS_BFLOAT16)[KIND]
    STEP: tl.constexpr = 2 * WORDS
    J: tl.constexpr = min(TOGETHER // STEP, STEPS) if H1 > 0 else 1
    SUM: tl.constexpr = FLUSH if FLUSH > 0 else J
    split, splits = tl.program_id(1), tl.num_programs(1)
    block_words = rows.to(tl.int64) * WORDS
    x += tl.arange(0, J * STEP)[:, None]
    first = tl.load(fields + KIND - 1) if KIND > 0 else 0
    for f in range(first, tl.load(fields + KIND)):
        field = fields + (f + 1) * FIELD
        block, blocks = tl.load(field), tl.load(field + 1)
        first_step = tl.load(field + 2)
        if FLUSH > 0:
            scale, scale_steps = tl.load(field + 3), tl.load(field + 4)
            factor = tl.load(field + 5).to(tl.float32)
            offset, offset_steps = tl.load(field + 6), tl.load(field + 7)
        # the blocks of all fields are dealt out one after another: no split gets two more
        begin = (split + splits - block % splits) % splits
        row_total = tl.zeros((BN, BM), tl.float32)
        for b in range(begin, blocks, splits):
            at = words + (block + b) * block_words
            planes = _planes(at, blocks * block_words, MADE, H1, DELAY, WORDS)
            step = first_step + b * STEPS
            x_0 = x + step * STEP
            for first_j in tl.static_range(0, STEPS, SUM):
                if FLUSH > 0:
                    row_total = tl.zeros((BN, BM), tl.float32)
                for j in tl.static_range(first_j, first_j + SUM, J):
                    x_j = tl.load(x_0 + j * STEP, mask=is_token[None, :], other=0.0)
                    for p in tl.static_range(MADE if MADE > 0 else 1):
                        w = _signed(planes[p], j, J, WIDTH, MINUS[p], dtype, WIDE)
                        row_total = tl.dot(w, x_j, row_total)
                if FLUSH > 0:
                    done = b * STEPS + first_j
                    s = tl.load(scales + (scale + done // scale_steps) * rows).to(tl.float32)
                    total += row_total * (s * factor)[:, None]
                    if OFFSETS:
                        o = tl.load(scales + (offset + done // offset_steps) * rows)
                        added = tl.load(sums + (step + first_j) // FLUSH, mask=is_token, other=0.0)
                        total += o.to(tl.float32)[:, None] * added[None, :]
        if FLUSH == 0:
            # loaded only now: registers are short in the loop above
            s = tl.load(scales + tl.load(field + 3) * rows).to(tl.float32)
            total += row_total * (s * tl.load(field + 5).to(tl.float32))[:, None]
            if OFFSETS:
                offset = tl.load(field + 6)
                # slot 0 is zero: there is no offset; else the first split adds it
                last_sum = tl.where((offset > 0) & (split == 0), blocks * STEPS // SUM_STEPS, 0)
                row_sums = tl.zeros((BM, 16), tl.float32)
                for i in range(0, last_sum, 16):
                    place = i + tl.arange(0, 16)[None, :]
                    is_sum = is_token[:, None] & (place < last_sum)
                    every = sums[:, None] + first_step // SUM_STEPS + place
                    row_sums += tl.load(every, mask=is_sum, other=0.0)
                o = tl.load(scales + offset * rows).to(tl.float32)
                total += o[:, None] * tl.sum(row_sums, 1)[None, :]
    return total


@triton.jit(do_not_specialize=["m", "n", "rows", "steps"])
def matmul_kernel(
    x_ptr,
    sums_ptr,
    words_ptr,
    scales_ptr,
    fields_ptr,
    y_ptr,
    m,
    n,
    rows,
    steps,
    factor,
    H1: tl.constexpr,
    DELAY: tl.constexpr,
    WORDS: tl.constexpr,
    FLUSH: tl.constexpr,
    OFFSETS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y [splits, m, n] = x [m, steps * STEP] @ (fields of the words).T, times `factor`.

    Program (row tile, split, token tile). rows: of words and scales, with those above the first, to
    which their pointers point. H1, DELAY: of the trellis; H1 is 0 where there is none. FLUSH: steps
    between two scales of a group; 0: a scale a row, as with a trellis. OFFSETS: some field has
    offsets; sums is then what `gather_kernel` wrote for as many steps (SUM_STEPS if FLUSH is 0).
    """
    STEP: tl.constexpr = 2 * WORDS
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    is_token = token < m
    words = words_ptr + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales = scales_ptr + row
    x = x_ptr + token[None, :].to(tl.int64) * (steps * STEP)
    sums = sums_ptr + token.to(tl.int64) * (steps // (FLUSH if FLUSH > 0 else SUM_STEPS))
    total = tl.zeros((BN, BM), tl.float32)
    for kind in tl.static_range(_KINDS if H1 > 0 else _PLAIN):
        total = _add_fields(
            total, fields_ptr, words, rows, scales, x, sums, is_token, kind,
            H1, DELAY, WORDS, FLUSH, OFFSETS, BN, BM, WIDE,
        )  # fmt: skip
    y = y_ptr + (tl.program_id(1).to(tl.int64) * m + token[None, :]) * n + row[:, None]
    is_inside = is_token[None, :] & (row < n)[:, None]
    tl.store(y, (total * factor).to(y_ptr.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["k", "steps"])
def gather_kernel(
    x_ptr,
    column_ptr,
    column_scale_ptr,
    out_ptr,
    sums_ptr,
    k,
    steps,
    SCALED: tl.constexpr,
    SUMMED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [m, steps * STEP] = x [m, k] at `column`, 0 where that is -1.

    Program (token, BLOCK steps). SCALED: x is multiplied by column_scale [steps * STEP] first.
    SUMMED: sums [m, steps / SUMMED] of as many steps of out are written too, if it is not 0.
    """
    token = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_step = step < steps
    position = step[:, None] * STEP + tl.arange(0, STEP)[None, :]
    column = tl.load(column_ptr + position, mask=is_step[:, None], other=-1)
    x = tl.load(x_ptr + token * k + column, mask=column >= 0, other=0.0)
    if SCALED:
        scale = tl.load(column_scale_ptr + position, mask=is_step[:, None], other=0.0)
        x = (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
    tl.store(out_ptr + token * (steps * STEP) + position, x, mask=is_step[:, None])
    if SUMMED > 0:
        SUMS: tl.constexpr = BLOCK // SUMMED
        added = tl.sum(x.to(tl.float32).reshape(SUMS, SUMMED * STEP), 1)
        place = tl.program_id(1) * SUMS + tl.arange(0, SUMS)
        sums = steps // SUMMED
        tl.store(sums_ptr + token * sums + place, added, mask=place < sums)


@triton.jit(do_not_specialize=["n", "rows", "steps"])
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    fields_ptr,
    column_scale_ptr,
    out_ptr,
    n,
    rows,
    steps,
    factor,
    H1: tl.constexpr,
    DELAY: tl.constexpr,
    WORDS: tl.constexpr,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
):
    """out [n, steps * STEP] = n rows of the weight in stored order. Program (step, row tile).

    The pointers to words and scales are to the first of these rows; rows, H1, DELAY: as above.
    """
    STEP: tl.constexpr = 2 * WORDS
    step = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    words = words_ptr + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales = scales_ptr + row
    block_words = rows.to(tl.int64) * WORDS
    total = tl.zeros((BN, STEP), tl.float32)
    for f in range(tl.load(fields_ptr + (_KINDS if H1 > 0 else _PLAIN) - 1)):
        field = fields_ptr + (f + 1) * FIELD
        blocks, width = tl.load(field + 1), tl.load(field + 8)
        i = step - tl.load(field + 2)  # of the field's steps
        if (i >= 0) & (i * width < blocks * 16):
            at = words + (tl.load(field) + i * width // 16) * block_words
            shift = i * width % 16
            if H1 > 0:
                kind = tl.load(field + 9)
                value = tl.zeros((BN, STEP), tl.int32)
                if kind < _PLAIN:
                    value = _odd(tl.load(at), shift, width)
                for k in tl.static_range(_PLAIN, _KINDS):
                    if kind == k:
                        planes = _planes(
                            at, blocks * block_words, len(_WEIGHTS[k]), H1, DELAY, WORDS
                        )
                        for p in tl.static_range(len(_WEIGHTS[k])):
                            value += _odd(planes[p], shift, 1) * _WEIGHTS[k][p]
            else:
                value = _odd(tl.load(at), shift, width)
            s = tl.load(scales + (tl.load(field + 3) + i // tl.load(field + 4)) * rows)
            o = tl.load(scales + (tl.load(field + 6) + i // tl.load(field + 7)) * rows)
            s = s.to(tl.float32) * tl.load(field + 5).to(tl.float32)
            total += value.to(tl.float32) * s[:, None] + o.to(tl.float32)[:, None]
    position = step * STEP + tl.arange(0, STEP)
    if SCALED:
        total *= tl.load(column_scale_ptr + position)[None, :] * factor
    out = out_ptr + row[:, None].to(tl.int64) * (steps * STEP) + position[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < n)[:, None])


@triton.jit
def _odd(words, shift, width):
    """int32 words [r, w] -> the values of `width` bits at `shift` as odd integers [r, 2 * w]."""
    most = (1 << width) - 1
    code = tl.join((words >> shift) & most, (words >> (shift + 16)) & most)
    return 2 * code.reshape(words.shape[0], 2 * words.shape[1]) - most


@triton.jit(do_not_specialize=["m", "n", "k"])
def overlay_kernel(
    x_ptr,
    start_ptr,
    column_ptr,
    delta_ptr,
    delta_scale_ptr,
    y_ptr,
    m,
    n,
    k,
    ENTRIES: tl.constexpr,
    BM: tl.constexpr,
):
    """y [m, n] = x [m, k] @ D.T, D a row's entries times its scale. Program (row, token tile)."""
    row = tl.program_id(0)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    x = x_ptr + token[:, None].to(tl.int64) * k
    total = tl.zeros((BM, ENTRIES), tl.float32)
    end = tl.load(start_ptr + row + 1)
    for first in range(tl.load(start_ptr + row), end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        column = tl.load(column_ptr + entry, mask=entry < end, other=0).to(tl.int32)
        delta = tl.load(delta_ptr + entry, mask=entry < end, other=0.0).to(tl.float32)
        is_inside = (token < m)[:, None] & (entry < end)[None, :]
        values = tl.load(x + column[None, :], mask=is_inside, other=0.0)
        total += values.to(tl.float32) * delta[None, :]
    y = tl.sum(total, 1) * tl.load(delta_scale_ptr + row)
    tl.store(y_ptr + token.to(tl.int64) * n + row, y, mask=token < m)


@triton.jit(do_not_specialize=["count", "parts"])
def add_kernel(parts_ptr, y_ptr, count, parts, BLOCK: tl.constexpr):
    """y [count] = the sum of `parts` float32 rows of `count`, first to last."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = parts_ptr + i
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(part, mask=i < count, other=0.0)
        part += count
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < count)
