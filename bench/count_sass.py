"""Instructions that the Triton kernels issue per weight, counted in the SASS that ptxas makes.

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
from pbq_kernels.triton_backend import CONFIGS

TARGET = "sm_90"
# steps between two scales, and what that is for
FLUSHES = {0: "a scale a row", 4: "groups of 128", 2: "groups of 64"}


def count() -> Iterator[dict[str, Any]]:
    """One row for each tile and kind of scales, with offsets, bfloat16."""
    for flush, scales in FLUSHES.items():
        for tile in CONFIGS["cuda"]:
            compiled = triton_aot.compile_for(
                TARGET, triton_aot.matmul("bf16", tile, flush, offsets=True)
            )
            counted = triton_aot.instructions_per_weight(compiled, tile)
            yield {
                "scales": scales,
                "tokens": tile.tokens,
                "rows": tile.rows,
                "warps": tile.warps,
                "stages": tile.stages,
                "instructions": {str(width): round(n, 2) for width, n in counted.items()},
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
    print(f"{'scales':14} tokens   1 bit  2 tied  4 tied  registers  spilled  shared")
    for row in count():
        rows.append(row)
        per_weight = "".join(f"{n:8.2f}" for n in row["instructions"].values())
        print(
            f"{row['scales']:14} {row['tokens']:>6}{per_weight} {row['registers']:>10} "
            f"{row['spilled_bytes']:>8} {row['shared_bytes']:>7}",
            flush=True,
        )
    made = {"target": TARGET, "triton": triton.__version__, "torch": torch.__version__}
    args.out.write_text(json.dumps({**made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
