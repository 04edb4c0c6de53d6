"""Instructions that the Triton kernels issue per weight, counted in the SASS that ptxas makes.

Of weights of 1, 2 and 4 tied bits, and of those whose planes a trellis makes, by what these count.

Needs no GPU: `python bench/count_sass.py`. An H100 issues about 29.6e12 instructions a second (a
lane counts as one) and reads 24e12 1-bit weights at 3.0 TB/s, so that 1.2 instructions a weight are
free, and twice as many halve the speed. The numbers go to bench/results/sass.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from pbq_kernels import triton_aot
from pbq_kernels.triton_backend import CONFIGS, GROUP_CONFIGS, TRELLIS_CONFIGS, Config
from pbq_kernels.triton_layout import KINDS

TARGET = "sm_90"
# steps between two scales, and what that is for
FLUSHES = {0: "a scale a row", 4: "groups of 128", 2: "groups of 64"}
NAMES = [" + ".join(map(str, weights)) if weights else str(width) for width, weights in KINDS]


def count() -> Iterator[dict[str, Any]]:
    """One row for each tile and kind of scales, with offsets, bfloat16."""
    for flush, scales in FLUSHES.items():
        for tile in (GROUP_CONFIGS if flush else CONFIGS)["cuda"]:
            yield row(scales, tile, flush, 0)
    for tile in TRELLIS_CONFIGS["cuda"]:
        yield row("trellises", tile, 0, triton_aot.TRELLIS)


def row(scales: str, tile: Config, flush: int, trellis: int) -> dict[str, Any]:
    variant = triton_aot.matmul("bf16", tile, flush, offsets=True, trellis=trellis)
    compiled = triton_aot.compile_for(TARGET, variant)
    counted = triton_aot.instructions_per_weight(compiled, tile, trellis)
    return {
        "scales": scales,
        "tokens": tile.tokens,
        "rows": tile.rows,
        "warps": tile.warps,
        "stages": tile.stages,
        "instructions": {name: round(n, 2) for name, n in zip(NAMES, counted, strict=False)},
        "registers": compiled.registers,
        "spilled_bytes": compiled.spills,
        "shared_bytes": compiled.shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "sass.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    rows = []
    for found in count():
        rows.append(found)
        per_weight = ", ".join(f"{name}: {n:.2f}" for name, n in found["instructions"].items())
        print(
            f"{found['scales']}, {found['tokens']} tokens: {found['registers']} registers, "
            f"{found['spilled_bytes']} spilled, {found['shared_bytes']} shared\n    {per_weight}",
            flush=True,
        )
    made = {"target": TARGET, "triton": triton.__version__, "torch": torch.__version__}
    args.out.write_text(json.dumps({**made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
