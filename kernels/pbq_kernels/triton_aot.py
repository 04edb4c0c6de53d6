"""Compile the Triton kernels as they are launched, for GPUs that are not there, and look inside.

ptxas, cuobjdump and nvdisasm come with Triton. Not used when multiplying: for tests and benchmarks.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pbq_kernels import triton_kernels as kernels
from pbq_kernels.triton_backend import (
    ADD_BLOCK,
    CONFIGS,
    DEQUANTIZE_ROWS,
    GATHER_BLOCK,
    GROUP_CONFIGS,
    OVERLAY_ENTRIES,
    OVERLAY_TOKENS,
    TRELLIS_CONFIGS,
    Config,
)
from pbq_kernels.triton_layout import FLUSHES, KINDS, SUM_STEPS, block_words, taps

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may use. All of NVIDIA's GPUs since sm_80 have 99 KiB.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
TRELLIS = 12  # the memory that quantization chooses
_POINTERS = {
    "words": "*i32",
    "fields": "*i32",
    "scales": "*fp16",
    "sums": "*fp32",
    "parts": "*fp32",
}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one kind of launch."""

    label: str
    kernel: str
    types: Mapping[str, str]  # of every argument that is no constant
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What a variant needs on a target. spills: bytes of a thread's stack."""

    shared: int
    registers: int
    spills: int
    assembly: str


def variants(target: str) -> Iterator[Variant]:
    """Every kernel with whatever a launch on the target may ask for."""
    for dtype in ("fp16", "bf16"):
        for tile in CONFIGS[TARGETS[target].backend]:
            yield matmul(dtype, tile, 0, offsets=False)
            yield matmul(dtype, tile, 0, offsets=True)
            yield matmul(dtype, tile, 0, offsets=False, out=dtype)
        for tile in GROUP_CONFIGS[TARGETS[target].backend]:
            for flush in FLUSHES:
                yield matmul(dtype, tile, flush, offsets=False)
                yield matmul(dtype, tile, flush, offsets=True)
        for tile in TRELLIS_CONFIGS[TARGETS[target].backend]:
            yield matmul(dtype, tile, 0, offsets=False, trellis=TRELLIS)
            yield matmul(dtype, tile, 0, offsets=True, trellis=TRELLIS)
            yield matmul(dtype, tile, 0, offsets=False, trellis=TRELLIS, out=dtype)
        yield overlay(dtype, "i16")
        yield overlay(dtype, "i32")
    for dtype in ("fp16", "bf16", "fp32"):
        for flag in (False, True):
            for summed in (0, *FLUSHES):
                yield gather(dtype, summed, scaled=flag)
            yield gather(dtype, 0, scaled=flag, trellis=TRELLIS)
            yield gather(dtype, SUM_STEPS, scaled=flag, trellis=TRELLIS)
            yield dequantize(dtype, scaled=flag)
            yield dequantize(dtype, scaled=flag, trellis=TRELLIS)
        yield add(dtype)


def matmul(
    dtype: str, tile: Config, flush: int, *, offsets: bool, out: str = "fp32", trellis: int = 0
) -> Variant:
    groups = f"a scale every {flush} steps" if flush else "row scales"
    groups += ", offsets" * offsets + ", trellises" * bool(trellis)
    return Variant(
        f"matmul {dtype} to {out}, {tile.tokens} tokens, {groups}",
        "matmul_kernel",
        {
            **_pointers("sums words scales fields", x=dtype, y=out),
            **_integers("m n rows steps"),
            "factor": "fp32",
        },
        {
            **_form(trellis),
            **{
                "FLUSH": flush,
                "OFFSETS": offsets,
                "BN": tile.rows,
                "BM": tile.tokens,
                "WIDE": False,
            },
        },
        tile.options,
    )


def gather(dtype: str, summed: int, *, scaled: bool, trellis: int = 0) -> Variant:
    return Variant(
        f"gather {dtype}{', scaled' * scaled}, sums of {summed}{', trellises' * bool(trellis)}",
        "gather_kernel",
        {
            **_pointers("sums", x=dtype, column="i32", column_scale="fp32", out=dtype),
            **_integers("k steps"),
        },
        {
            **{"SCALED": scaled, "SUMMED": summed, "BLOCK": GATHER_BLOCK},
            "STEP": 2 * block_words(trellis),
        },
    )


def _form(trellis: int) -> dict[str, int]:
    h1, delay = taps(trellis)
    return {"H1": h1, "DELAY": delay, "WORDS": block_words(trellis)}


def dequantize(dtype: str, *, scaled: bool, trellis: int = 0) -> Variant:
    column_scale = "fp32" if scaled else dtype
    return Variant(
        f"dequantize to {dtype}{', scaled' * scaled}{', trellises' * bool(trellis)}",
        "dequantize_kernel",
        {
            **_pointers("words scales fields", column_scale=column_scale, out=dtype),
            **_integers("n rows steps"),
            "factor": "fp32",
        },
        {**_form(trellis), "SCALED": scaled, "BN": DEQUANTIZE_ROWS},
    )


def overlay(dtype: str, column: str) -> Variant:
    pointers = _pointers("", x=dtype, start="i32", column=column, delta="fp16", y="fp32")
    return Variant(
        f"overlay {dtype}, {column}",
        "overlay_kernel",
        {**pointers, "delta_scale_ptr": "*fp32", **_integers("m n k")},
        {"ENTRIES": OVERLAY_ENTRIES, "BM": OVERLAY_TOKENS},
        {"num_warps": 1},
    )


def add(dtype: str) -> Variant:
    types = {**_pointers("parts", y=dtype), **_integers("count parts")}
    return Variant(f"add to {dtype}", "add_kernel", types, {"BLOCK": ADD_BLOCK})


def _pointers(known: str, **others: str) -> dict[str, str]:
    known_types = {name: _POINTERS[name] for name in known.split()}
    given = {name: f"*{dtype}" for name, dtype in others.items()}
    return {f"{name}_ptr": dtype for name, dtype in {**known_types, **given}.items()}


def _integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def compile_for(target: str, variant: Variant) -> Compiled:
    """Compile without a GPU. Raises whatever Triton or ptxas raise."""
    function = getattr(kernels, variant.kernel)
    names = function.arg_names
    assert {*variant.types, *variant.constants} == {*names}, variant.label
    source = ASTSource(
        fn=function,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        # what torch allocates is aligned
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, dtype in variant.types.items()
            if dtype.startswith("*")
        },
    )
    options = {"enable_fp_fusion": True, **variant.options}
    built = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "hip":
        return _read_amd(built.asm["amdgcn"], built.metadata.shared)
    return _read_nvidia(built.asm["cubin"], built.metadata.shared)


def _read_amd(assembly: str, shared: int) -> Compiled:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, key
        return int(found[1])

    spills = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
    return Compiled(shared, number("vgpr_count"), spills, assembly)


def _read_nvidia(cubin: bytes, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(shared, registers, stack + local, assembly)


def _tool(name: str, *words: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *words], capture_output=True, text=True, check=True).stdout


def instructions_per_weight(compiled: Compiled, tile: Config, trellis: int = 0) -> list[float]:
    """Instructions that one thread issues for a weight in a field of each of KINDS, in SASS.

    Of the loop over the blocks of a field, everything in it counted; the kernel has one such loop
    for each kind, in this order, those that a trellis makes only where there is one. Raises
    ValueError when it finds another number of them.
    """
    kinds = sum(bool(trellis) or not weights for _, weights in KINDS)
    loops = _innermost_loops(compiled.assembly)
    multiplying = [n for n, body in loops if re.search(r"\b[HQ]G?MMA\.", body)]
    if len(multiplying) != kinds:
        raise ValueError(f"{len(multiplying)} loops with matrix products, expected {kinds}")
    words = tile.rows * block_words(trellis) / (32 * tile.warps)
    return [n / (words * 32 / width) for (width, _), n in zip(KINDS, multiplying, strict=False)]


def _innermost_loops(sass: str) -> list[tuple[int, str]]:
    """(instructions, text) from the target of each backward branch to it, if no other is inside."""
    text: list[str] = []
    places: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(text)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            text.append(found[1])
    loops = []
    for end, instruction in enumerate(text):
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if branch and places.get(branch[1], end + 1) <= end:
            loops.append((places[branch[1]], end + 1))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [(end - begin, "\n".join(text[begin:end])) for begin, end in sorted(inner)]
