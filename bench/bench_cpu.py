"""The CPU kernels against torch's bf16 linear, in one run: `python bench/bench_cpu.py`.

Correctness first: every weight is compared with the reference before it is timed. A measurement is
one round of baseline and kernels, one after another; the table shows medians over the rounds and
the ratio bf16 / kernel. `cold` multiplies with copies that together exceed the last-level cache
several times; `warm` with one weight. The raw numbers go to bench/results/cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbq_kernels import BACKENDS, PackedWeight, Tier, WeightLayout
from pbq_kernels.cpu import LIBRARY, UNITS, load_library, variants
from pbq_kernels.layout import pack_bits
from pbq_kernels.reference import dequantize
from pbq_kernels.scales import encoded_scales

SHAPES = ((576, 1536), (2048, 2048), (4096, 4096), (4096, 11008))
TOKENS = (1, 64)
# Share of the columns with so many planes.
MIXES = {
    "1 bit": {1: 1.0},
    "1.61 bits, 1+4": {1: 0.82, 4: 0.18},
    "1.6 bits, 0-4": {0: 0.09, 1: 0.48, 2: 0.24, 3: 0.12, 4: 0.07},
    "trellises, 0-4": {0: 0.09, 1: 0.48, 2: 0.24, 3: 0.12, 4: 0.07},
}
BACKEND_NAMES = ("cpu", "cpu-int8")
COLD_BYTES = 128 * 2**20
MOST_ERROR = {"cpu": 1e-5, "cpu-int8": 0.03}


def tier(planes: int, columns: int, mix: str) -> Tier:
    """With trellises: as the default method makes them."""
    if not planes or not mix.startswith("trellises"):
        return Tier(planes, columns)
    return Tier(planes, columns, tied=True, trellis=12, uneven=planes < 4)


def packed_weight(n: int, k: int, mix: str, scale: float = 1.0) -> PackedWeight:
    """Random bits in tiers of the mix's shares, columns shuffled; scales of about scale / 14."""
    generator = torch.Generator().manual_seed(n + k)
    columns = {planes: round(share * k) for planes, share in MIXES[mix].items()}
    columns[1] += k - sum(columns.values())
    tiers = tuple(tier(planes, count, mix) for planes, count in columns.items())
    layout = WeightLayout(n, k, tiers, scale_bits=8 if any(t.uneven for t in tiers) else 16)
    owner = torch.repeat_interleave(torch.tensor(list(columns.values())))
    planes = [
        torch.randint(2, (n, t.planes * t.columns), dtype=torch.uint8, generator=generator)
        for t in tiers
    ]
    drawn = {
        "weight": torch.cat([pack_bits(bits) for bits in planes], 1),
        "scale": scale
        * (0.02 + torch.rand(n, sum(t.scales for t in tiers), generator=generator) / 10),
        "tier": owner[torch.randperm(k, generator=generator)].byte(),
    }
    if layout.scale_bits == 8:
        drawn["scale"], drawn["scale_exponent"] = encoded_scales(drawn["scale"])
    else:
        drawn["scale"] = drawn["scale"].half()
    return PackedWeight(layout, {name: drawn[name] for name in layout.tensors()})


def check(pw: PackedWeight) -> dict[str, float]:
    """Relative error of each backend at m=2. Raises AssertionError where one is wrong."""
    x = torch.randn(2, pw.layout.k, generator=torch.Generator().manual_seed(0))
    expected = x @ dequantize(pw).T
    errors = {}
    for name in BACKEND_NAMES:
        y = BACKENDS[name].matmul(x, BACKENDS[name].prepare(pw))
        errors[name] = float((y - expected).norm() / expected.norm())
        assert errors[name] < MOST_ERROR[name], (name, errors[name])
    return errors


def seconds(call: Callable[[], object], least: float) -> float:
    """Mean seconds of a call, over as many calls as take about `least` seconds."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < least:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def multiplications(x: Tensor, weights: list[Any], name: str) -> Callable[[], object]:
    """A call multiplies with the next of the weights, round and round."""
    following = itertools.cycle(weights)
    if name == "bf16":
        return lambda: torch.nn.functional.linear(x, next(following))
    backend = BACKENDS[name]
    return lambda: backend.matmul(x, next(following))


def measure(
    n: int, k: int, mix: str, tokens: tuple[int, ...], threads: list[int], rounds: int, least: float
) -> Iterator[dict[str, Any]]:
    """One row for each number of tokens, of threads, warm or cold, and backend."""
    pw = packed_weight(n, k, mix)
    errors = check(pw)
    dense = torch.randn(n, k, dtype=torch.bfloat16)
    sizes = {"bf16": dense.nbytes, **dict.fromkeys(BACKEND_NAMES, pw.stored_bits // 8)}
    for state, m, count in itertools.product(("warm", "cold"), tokens, threads):
        if state == "cold" and m > 1:
            continue  # a weight read once for many tokens is hardly ever what limits
        torch.set_num_threads(count)
        copies = {
            name: 1 if state == "warm" else COLD_BYTES // size + 1 for name, size in sizes.items()
        }
        x = torch.randn(m, k, dtype=torch.bfloat16)
        calls = {
            name: multiplications(x, [dense.clone() for _ in range(copies[name])], name)
            if name == "bf16"
            else multiplications(x, [BACKENDS[name].prepare(pw) for _ in range(copies[name])], name)
            for name in sizes
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            seconds(call, least)
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds(call, least))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name in BACKEND_NAMES:
            yield {
                "n": n,
                "k": k,
                "mix": mix,
                "stored_bits": round(pw.bits_per_weight, 3),
                "m": m,
                "threads": count,
                "weights": state,
                "backend": name,
                "us": round(1e6 * medians[name], 1),
                "bf16_us": round(1e6 * medians["bf16"], 1),
                "ratio": round(medians["bf16"] / medians[name], 2),
                "least_us": round(1e6 * min(times[name]), 1),
                "least_bf16_us": round(1e6 * min(times["bf16"]), 1),
                "relative_error": float(f"{errors[name]:.2g}"),
            }


def machine(note: str) -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    library = load_library(LIBRARY)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "variant": variants(library)[0],
        "unit": UNITS[library.pbq_unit()],
        "torch": torch.__version__,
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=7, help="a median is taken over these")
    parser.add_argument("--least", type=float, default=0.01, help="seconds of one timing")
    parser.add_argument(
        "--shape", nargs="+", action="extend", help="NxK instead of the four of the docs"
    )
    parser.add_argument("--mix", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--note", default="", help="kept in the file: what else the machine did")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    args = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape] if args.shape else SHAPES
    rows = []
    print(f"{'weight':>11} {'mix':14} {'m':>4} thr weights  backend        us   bf16 us  ratio")
    for (n, k), mix in itertools.product(shapes, args.mix):
        for row in measure(n, k, mix, tuple(args.tokens), args.threads, args.rounds, args.least):
            rows.append(row)
            print(
                f"{n:>5}x{k:<5} {mix:14} {row['m']:>4} {row['threads']:>3} {row['weights']:7} "
                f"{row['backend']:8} {row['us']:>9} {row['bf16_us']:>9} {row['ratio']:>6}x",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(args.note), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
