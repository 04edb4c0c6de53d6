"""The Triton kernels. docs/kernels.md, section "GPU", describes the layout that they read.

Each also runs in Triton's interpreter (TRITON_INTERPRET=1), which rounds no bfloat16 arithmetic:
WIDE then asks for the one such operation in float32.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

# A word holds one bit of 32 columns, two of 16, or four of 8; see triton_layout.
WORDS = tl.constexpr(16)  # words of a block, in each row
STEP = tl.constexpr(32)  # columns that one shift takes out of a block
ROWS = tl.constexpr(64)  # rows of a tile of words
FIELD = tl.constexpr(9)  # numbers that describe a field
SUM_STEPS = tl.constexpr(4)  # steps of one sum of x, where FLUSH is 0


@triton.jit
def _signed(words, j: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr, WIDE: tl.constexpr):
    """Step j of int32 words [r, WORDS] as odd integers 2*code - (2**WIDTH - 1), dtype [r, STEP].

    Two at a time. One bit turns the sign of -1. More become the mantissa of a number whose exponent
    makes the last place a one; what that adds is subtracted, exactly.
    """
    if WIDTH == 1:
        # 0xBC00 and 0xBF80 are -1; the constants are those of a signed integer
        minus_ones: tl.constexpr = -0x43FF4400 if dtype == tl.float16 else -0x407F4080
        pair = ((words << (15 - j)) & -0x7FFF8000) ^ minus_ones
    else:
        low: tl.constexpr = WIDTH * j - 1
        field = (words >> low) if low > 0 else (words << 1)
        large: tl.constexpr = 0x64006400 if dtype == tl.float16 else 0x43004300
        pair = (field & (((1 << WIDTH) - 1) * 0x20002)) | large
    halves = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    values = halves.reshape(words.shape[0], STEP).to(dtype, bitcast=True)
    if WIDTH > 1:
        excess: tl.constexpr = (1024 if dtype == tl.float16 else 128) + (1 << WIDTH) - 1
        if WIDE:
            values = (values.to(tl.float32) - excess).to(dtype)
        else:
            values = values - tl.full((words.shape[0], STEP), excess, dtype)
    return values


@triton.jit
def _add_fields(
    total,
    first,
    last,
    fields,
    words,
    scales,
    x,
    sums,
    is_token,
    WIDTH: tl.constexpr,
    FLUSH: tl.constexpr,
    OFFSETS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """total [BN, BM] += fields first..last, all WIDTH bits wide, times x; this split's blocks."""
    dtype: tl.constexpr = x.dtype.element_ty
    STEPS: tl.constexpr = 16 // WIDTH
    split, splits = tl.program_id(1), tl.num_programs(1)
    for f in range(first, last):
        field = fields + f * FIELD
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
            w = tl.load(words + (block + b) * (ROWS * WORDS))
            step = first_step + b * STEPS
            x_0 = x + step * STEP
            if FLUSH == 0:
                for j in tl.static_range(STEPS):
                    x_j = tl.load(x_0 + j * STEP, mask=is_token[None, :], other=0.0)
                    row_total = tl.dot(_signed(w, j, WIDTH, dtype, WIDE), x_j, row_total)
            else:
                for first_j in tl.static_range(0, STEPS, FLUSH):
                    part = tl.zeros((BN, BM), tl.float32)
                    for j in tl.static_range(first_j, first_j + FLUSH):
                        x_j = tl.load(x_0 + j * STEP, mask=is_token[None, :], other=0.0)
                        part = tl.dot(_signed(w, j, WIDTH, dtype, WIDE), x_j, part)
                    done = b * STEPS + first_j
                    s = tl.load(scales + (scale + done // scale_steps) * ROWS).to(tl.float32)
                    total += part * (s * factor)[:, None]
                    if OFFSETS:
                        o = tl.load(scales + (offset + done // offset_steps) * ROWS)
                        added = tl.load(sums + (step + first_j) // FLUSH, mask=is_token, other=0.0)
                        total += o.to(tl.float32)[:, None] * added[None, :]
        if FLUSH == 0:
            # loaded only now: registers are short in the loop above
            s = tl.load(scales + tl.load(field + 3) * ROWS).to(tl.float32)
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
                o = tl.load(scales + offset * ROWS).to(tl.float32)
                total += o[:, None] * tl.sum(row_sums, 1)[None, :]
    return total


@triton.jit(do_not_specialize=["m", "n", "blocks", "slots", "steps"])
def matmul_kernel(
    x_ptr,
    sums_ptr,
    words_ptr,
    scales_ptr,
    fields_ptr,
    y_ptr,
    m,
    n,
    blocks,
    slots,
    steps,
    factor,
    FLUSH: tl.constexpr,
    OFFSETS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y [splits, m, n] = x [m, steps * STEP] @ (fields of the words).T, times `factor`.

    Program (row tile, split, token tile). FLUSH: steps between two scales of a group; 0: a scale a
    row. OFFSETS: some field has offsets; sums is then what `gather_kernel` wrote for as many steps
    (SUM_STEPS, where FLUSH is 0).
    """
    tile = tl.program_id(0) * BN // ROWS
    row = tl.program_id(0) * BN % ROWS + tl.arange(0, BN)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    is_token = token < m
    words = words_ptr + tile.to(tl.int64) * blocks * (ROWS * WORDS)
    words += row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales = scales_ptr + tile.to(tl.int64) * slots * ROWS + row
    x = x_ptr + token[None, :].to(tl.int64) * (steps * STEP) + tl.arange(0, STEP)[:, None]
    sums = sums_ptr + token.to(tl.int64) * (steps // (FLUSH if FLUSH > 0 else SUM_STEPS))
    fields = fields_ptr + FIELD
    ones, twos, fours = tl.load(fields_ptr), tl.load(fields_ptr + 1), tl.load(fields_ptr + 2)
    total = tl.zeros((BN, BM), tl.float32)
    total = _add_fields(
        total, 0, ones, fields, words, scales, x, sums, is_token,
        WIDTH=1, FLUSH=FLUSH, OFFSETS=OFFSETS, BN=BN, BM=BM, WIDE=WIDE,
    )  # fmt: skip
    total = _add_fields(
        total, ones, twos, fields, words, scales, x, sums, is_token,
        WIDTH=2, FLUSH=FLUSH, OFFSETS=OFFSETS, BN=BN, BM=BM, WIDE=WIDE,
    )  # fmt: skip
    total = _add_fields(
        total, twos, fours, fields, words, scales, x, sums, is_token,
        WIDTH=4, FLUSH=FLUSH, OFFSETS=OFFSETS, BN=BN, BM=BM, WIDE=WIDE,
    )  # fmt: skip
    out_row = tl.program_id(0) * BN + tl.arange(0, BN)
    y = y_ptr + (tl.program_id(1).to(tl.int64) * m + token[None, :]) * n + out_row[:, None]
    is_inside = is_token[None, :] & (out_row < n)[:, None]
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


@triton.jit(do_not_specialize=["n", "blocks", "slots", "steps"])
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    fields_ptr,
    column_scale_ptr,
    out_ptr,
    n,
    blocks,
    slots,
    steps,
    factor,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
):
    """out [n, steps * STEP] = the weight in stored order. Program (step, row tile)."""
    step, tile = tl.program_id(0), tl.program_id(1) * BN // ROWS
    row = tl.program_id(1) * BN % ROWS + tl.arange(0, BN)
    words = words_ptr + tile.to(tl.int64) * blocks * (ROWS * WORDS)
    words += row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales = scales_ptr + tile.to(tl.int64) * slots * ROWS + row
    total = tl.zeros((BN, STEP), tl.float32)
    for f in range(tl.load(fields_ptr + 2)):
        field = fields_ptr + (f + 1) * FIELD
        width = tl.load(field + 8)
        i = step - tl.load(field + 2)  # of the field's steps
        if (i >= 0) & (i * width < tl.load(field + 1) * 16):
            block = tl.load(field) + i * width // 16
            shift = i * width % 16
            w = tl.load(words + block * (ROWS * WORDS))
            most = (1 << width) - 1
            code = tl.join((w >> shift) & most, (w >> (shift + 16)) & most).reshape(BN, STEP)
            s = tl.load(scales + (tl.load(field + 3) + i // tl.load(field + 4)) * ROWS)
            o = tl.load(scales + (tl.load(field + 6) + i // tl.load(field + 7)) * ROWS)
            s = s.to(tl.float32) * tl.load(field + 5).to(tl.float32)
            total += (2 * code - most).to(tl.float32) * s[:, None] + o.to(tl.float32)[:, None]
    position = step * STEP + tl.arange(0, STEP)
    if SCALED:
        total *= tl.load(column_scale_ptr + position)[None, :] * factor
    out_row = tl.program_id(1) * BN + tl.arange(0, BN)
    out = out_ptr + out_row[:, None].to(tl.int64) * (steps * STEP) + position[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(out_row < n)[:, None])


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
