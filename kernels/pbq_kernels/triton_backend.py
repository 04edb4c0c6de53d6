"""The Triton backend: which kernel runs for how many tokens, and with what tile.

Triton itself is imported when a weight is first prepared: `import pbq_kernels` works without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pbq_kernels import triton_layout
from pbq_kernels.layout import PackedWeight, WeightLayout
from pbq_kernels.triton_layout import ROWS, TritonWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MOST_FUSED_TOKENS = 64
FUSED = (torch.float16, torch.bfloat16)
# Steps of a gathering program, rows of a dequantizing one, entries and tokens of an overlay one.
GATHER_BLOCK = 16
DEQUANTIZE_ROWS = 32
OVERLAY_ENTRIES, OVERLAY_TOKENS = 128, 4
ADD_BLOCK = 512
# Weights that are dense at once: 64 MB in bfloat16.
_MOST_DENSE = 2**25
_PROGRAMS_PER_PROCESSOR = 6
_MOST_SPLITS = 8


@dataclass(frozen=True)
class Config:
    """Tile of `matmul_kernel`: rows by tokens, and how it is compiled.

    registers: that a thread may have; 0 leaves it to the compiler.
    """

    tokens: int
    rows: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles with."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# A config serves as many tokens as it has, the last one any number of them. AMD's matrix
# instructions have no 8 columns.
CONFIGS = {
    "cuda": (Config(8, 32, 2, 4), Config(16, 32, 2, 3, registers=128), Config(32, 64, 4, 2)),
    "hip": (Config(16, 32, 2, 2), Config(32, 64, 4, 2)),
}
# Where there are groups of scales. Left to itself, ptxas gives a thread so few registers that it
# spills some.
GROUP_CONFIGS = {
    "cuda": (
        Config(8, 32, 2, 4, registers=255),
        Config(16, 32, 2, 3, registers=255),
        CONFIGS["cuda"][2],
    ),
    "hip": CONFIGS["hip"],
}
# Words of a path are loaded into shared memory eight times, so fewer stages.
TRELLIS_CONFIGS = {
    "cuda": (Config(8, 32, 2, 3, registers=128), Config(16, 32, 2, 3), Config(32, 64, 4, 2)),
    "hip": CONFIGS["hip"],
}


def config(tokens: int, target: str, flush: int = 0, trellis: int = 0) -> Config:
    """The tile for so many tokens on a target of CONFIGS. flush, trellis: of the `TritonWeight`."""
    configs = (TRELLIS_CONFIGS if trellis else GROUP_CONFIGS if flush else CONFIGS)[target]
    return next((c for c in configs if tokens <= c.tokens), configs[-1])


def splits(rows: int, tokens: int, blocks: int, processors: int, tile: Config) -> int:
    """Programs that share a tile's blocks, so that there are enough for the processors."""
    tiles = math.ceil(rows / tile.rows) * math.ceil(tokens / tile.tokens)
    wanted = _PROGRAMS_PER_PROCESSOR * processors // tiles
    return max(1, min(wanted, blocks // 2, _MOST_SPLITS))


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("pbq_kernels.triton_kernels")


@functools.cache
def _triton_release() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.import_module("triton").__version__.split(".")[:2])


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted: as many splits as make sense
    return torch.cuda.get_device_properties(device).multi_processor_count


class TritonBackend:
    """The Triton kernels behind the `Backend` protocol; in the interpreter they serve the CPU."""

    name = "triton"

    def why_not(self, layout: WeightLayout, device: torch.device) -> str | None:
        if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
            return f"it runs on GPUs, the weight is on {device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: `pip install triton`"
        if device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):
                return f"it needs bfloat16 tensor cores (8.0), {device} has {capability}"
            if _triton_release() < (3, 5):
                return "it multiplies 8 tokens at once, which takes Triton 3.5 (torch 2.9) or later"
        return triton_layout.why_not(layout)

    def prepare(self, pw: PackedWeight) -> TritonWeight:
        reason = self.why_not(pw.layout, pw.tensors["weight"].device)
        if reason:
            raise ValueError(f"kernel backend {self.name!r} cannot be used here: {reason}")
        return triton_layout.repack(pw)

    def planes(self, prepared: TritonWeight) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"weight": functools.partial(triton_layout.stored_rows, prepared)}

    def matmul(self, x: Tensor, prepared: TritonWeight) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _Multiply.apply(x, prepared)
        return _multiply(x, prepared)


def _multiply(x: Tensor, weight: TritonWeight) -> Tensor:
    """x [*b, k] @ W_hat.T -> [*b, n]."""
    if x.device != weight.words.device or not x.is_floating_point():
        where = f"x is {x.dtype} on {x.device}"
        raise TypeError(f"{where}; needed: floating point on {weight.words.device}")
    if x.ndim == 0 or x.shape[-1] != weight.k:
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight has {weight.k} columns")
    flat = x.reshape(-1, weight.k).contiguous()
    few = len(flat) <= MOST_FUSED_TOKENS and x.dtype in FUSED
    with torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext():
        y = _fused(flat, weight) if few else _dense(flat, weight)
    return y.view(*x.shape[:-1], weight.n)


def _fused(x: Tensor, weight: TritonWeight) -> Tensor:
    """x [m, k] @ W_hat.T -> [m, n], decoding as it multiplies; float32 sums in a fixed order."""
    m, n = len(x), weight.n
    if not m or not weight.steps:
        return x.new_zeros(m, n)
    kernels = _kernels()
    tile = config(m, "hip" if torch.version.hip else "cuda", weight.flush, weight.trellis)
    parts = splits(n, m, weight.blocks, _processors(x.device), tile)
    gathered, sums = _gather(x, weight, scaled=True)
    overlay = weight.overlay
    total = parts + (overlay is not None)
    y = x.new_empty(m, n)
    partial = y if total == 1 else torch.empty(total, m, n, dtype=torch.float32, device=x.device)
    h1, delay = weight.filter
    grid = (math.ceil(n / tile.rows), parts, math.ceil(m / tile.tokens))
    kernels.matmul_kernel[grid](
        *(gathered, sums, weight.words[:, weight.lead :], weight.scales[:, weight.lead :]),
        *(weight.fields, partial, m, n, weight.rows, weight.steps, weight.factor),
        H1=h1,
        DELAY=delay,
        WORDS=weight.words.shape[2],
        FLUSH=weight.flush,
        OFFSETS=weight.offsets,
        BN=tile.rows,
        BM=tile.tokens,
        WIDE=INTERPRETED and x.dtype == torch.bfloat16,
        enable_fp_fusion=True,
        **tile.options,
    )
    if overlay is not None:
        kernels.overlay_kernel[(n, math.ceil(m / OVERLAY_TOKENS))](
            *(x, overlay.start, overlay.column, overlay.delta, overlay.scale, partial[-1]),
            *(m, n, weight.k),
            ENTRIES=OVERLAY_ENTRIES,
            BM=OVERLAY_TOKENS,
            num_warps=1,
            enable_fp_fusion=True,
        )
    if total > 1:
        kernels.add_kernel[(math.ceil(m * n / ADD_BLOCK),)](
            partial, y, m * n, total, BLOCK=ADD_BLOCK, enable_fp_fusion=True
        )
    return y


def _gather(x: Tensor, weight: TritonWeight, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """(x [m, columns] in stored order, zero at padding; its sums, float32, for offsets)."""
    m, steps = len(x), weight.steps
    gathered = x.new_empty(m, len(weight.column))
    summed = weight.sum_steps if scaled else 0
    sums = torch.empty(m, steps // (summed or steps), dtype=torch.float32, device=x.device)
    scaled = scaled and weight.column_scale is not None
    _kernels().gather_kernel[(m, math.ceil(steps / GATHER_BLOCK))](
        *(x, weight.column, weight.column_scale if scaled else sums, gathered, sums),
        *(weight.k, steps),
        SCALED=scaled,
        SUMMED=summed,
        STEP=weight.step_columns,
        BLOCK=GATHER_BLOCK,
        enable_fp_fusion=True,
    )
    return gathered, sums


def _dense(x: Tensor, weight: TritonWeight) -> Tensor:
    """x [m, k] @ W_hat.T -> [m, n] by torch, from dense rows in x's dtype."""
    if not len(x) or not weight.steps:
        return x.new_zeros(len(x), weight.n)
    gathered, _ = _gather(x, weight, scaled=False)
    with torch.autocast(x.device.type, enabled=False):  # the result has x's dtype, whatever asks
        parts = [
            torch.nn.functional.linear(gathered, rows) for rows in _dense_rows(weight, x.dtype)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _dense_rows(weight: TritonWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    """Dense rows [r, columns] of the weight in stored order, tile after tile."""
    columns = len(weight.column)
    rows = max(1, _MOST_DENSE // (columns * ROWS)) * ROWS
    stored = dtype if dtype in FUSED else torch.float32
    scaled = weight.column_scale is not None
    h1, delay = weight.filter
    for begin in range(0, weight.n, rows):
        n, first = min(rows, weight.n - begin), weight.lead + begin
        out = torch.empty(n, columns, dtype=stored, device=weight.words.device)
        _kernels().dequantize_kernel[(weight.steps, math.ceil(n / DEQUANTIZE_ROWS))](
            *(weight.words[:, first:], weight.scales[:, first:], weight.fields),
            *(weight.column_scale if scaled else out, out),
            *(n, weight.rows, weight.steps, weight.factor),
            H1=h1,
            DELAY=delay,
            WORDS=weight.words.shape[2],
            SCALED=scaled,
            BN=DEQUANTIZE_ROWS,
            enable_fp_fusion=True,
        )
        if weight.overlay is not None:
            _add_overlay(out, weight, begin // ROWS)
        yield out.to(dtype)


def _add_overlay(out: Tensor, weight: TritonWeight, tile: int) -> None:
    """Add the overlay to out [r, columns], the rows from a tile on. Waits for no GPU."""
    overlay = weight.overlay
    assert overlay is not None
    begin, end = tile * ROWS, tile * ROWS + len(out)
    entries = slice(overlay.tile_start[tile], overlay.tile_start[math.ceil(end / ROWS)])
    rows = torch.repeat_interleave(
        torch.arange(len(out), device=out.device),
        overlay.start[begin : end + 1].diff(),
        output_size=entries.stop - entries.start,
    )
    delta = overlay.delta[entries].float() * overlay.scale[begin:][rows]
    at = rows, overlay.position[overlay.column[entries].long()].long()
    out[at] = (out[at].float() + delta).to(out.dtype)


class _Multiply(torch.autograd.Function):
    """Gradient with respect to x only: grad @ W_hat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: TritonWeight) -> Tensor:
        ctx.weight = weight
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        weight: TritonWeight = ctx.weight
        flat = grad.reshape(-1, weight.n)
        columns = len(weight.column)
        stored = torch.zeros(len(flat), columns, dtype=torch.float32, device=grad.device)
        begin = 0
        for rows in _dense_rows(weight, grad.dtype):
            stored += flat[:, begin : begin + len(rows)] @ rows
            begin += len(rows)
        valid = weight.column >= 0
        grad_x = stored.new_zeros(len(flat), weight.k)
        grad_x[:, weight.column[valid].long()] = stored[:, valid]
        return grad_x.to(grad.dtype).view(*grad.shape[:-1], weight.k), None
