"""Quality at true stored bits on SmolLM2-135M-Instruct, under one protocol.

    python bench/bench_quality.py                            # the table of what was measured
    python bench/bench_quality.py ptq161                     # one row
    python bench/bench_quality.py ptq161 --seed 1 --set nsamples=32 --set effort=fast
    python bench/bench_quality.py waterfill --calib wiki.valid.txt+self --set nsamples=128

Protocol: calibrate on WikiText-2 validation (as many segments as the method takes; --calib to add
text that the model makes itself), perplexity on WikiText-2
test, 40 windows of 2048 tokens, bfloat16. The two files are looked for in $PBQ_DATA/wikitext2. A
second text (Python's reference manual, 10 windows) shows what happens off the calibration domain.
Rows go into bench/results/quality.json; run one a process, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
RESULTS = HERE / "results" / "quality.json"
PEERS = HERE / "results" / "peers.json"
LOAD = """
import json, re, sys, time
import pbq
from transformers import AutoModelForCausalLM
t = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
seconds = time.monotonic() - t
# not ru_maxrss: a child inherits its parent's across fork and exec
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({"seconds": seconds, "peak_bytes": int(peak[1]) * 1024}))
"""


def data_dir() -> Path:
    found = Path(os.environ.get("PBQ_DATA", HERE.parent.parent / "shared" / "data"))
    if not (found / "wikitext2" / "wiki.test.raw").exists():
        sys.exit(f"{found}/wikitext2/wiki.test.raw is missing: set PBQ_DATA to the data's folder")
    return found / "wikitext2"


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Quantize and score in this process; returns one row."""
    from demo_model import demo_model
    from quickstart import heldout_text

    from pbq.config import QuantConfig
    from pbq.console import Console
    from pbq.pipeline import quantize
    from pbq.scoring import score_models

    data, console = data_dir(), Console()
    options = dict(pair.split("=", 1) for pair in arguments.set)
    numbers = {
        k: json.loads(v) if v[0].isdigit() or v in ("true", "false") else v
        for k, v in options.items()
    }
    config = QuantConfig(
        **{
            "method": arguments.method,
            "seed": arguments.seed,
            "bits": arguments.bits,
            "calib": "+".join(
                part if part == "self" else str(data / part) for part in arguments.calib.split("+")
            ),
            **numbers,
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(arguments.out or Path(scratch) / "out")
        started, cpu = time.monotonic(), time.process_time()
        report = quantize(str(demo_model()), out, config, overwrite=True, observer=console)
        wall, cpu = time.monotonic() - started, time.process_time() - cpu
        common = {
            "window": 2048,
            "tasks": [],
            "data_dir": None,
            "limit": None,
            "num_fewshot": None,
            "batch_size": 1,
            "device": "auto",
            "trust_remote_code": False,
            "observer": console,
        }
        wiki = score_models([str(out)], texts=[data / "wiki.test.raw"], windows=40, **common)
        manual = heldout_text(Path(scratch))
        other = score_models([str(out)], texts=[manual], windows=10, **common)
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, str(out)], capture_output=True, text=True, check=True
        )
        return {
            "method": config.method,
            "config": {**config.to_dict(), "calib": Path(config.calib).name},
            "calibration": report.calibration,
            "stored_bits": report.bits,
            "paper_bits": report.paper_bits,
            "ppl_wikitext2_40w": wiki.models[0].perplexities[0].ppl,
            "ppl_python_manual_10w": other.models[0].perplexities[0].ppl,
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "stage_seconds": report.seconds,
            "peak_bytes": report.peak_bytes,
            "checkpoint_bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
            "load": json.loads(loaded.stdout),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }


def measured() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """All rows, by stored bits and perplexity, with the papers' public code among them."""
    table = Table(title="SmolLM2-135M-Instruct, WikiText-2 test; unquantized 20.58 (40 windows)")
    for column in ("method", "calibration", "seed"):
        table.add_column(column)
    for column in ("true bits", "perplexity", "windows", "second text", "seconds", "peak GiB"):
        table.add_column(column, justify="right")
    notes = [r["note"] for r in rows if "note" in r]
    found = [
        (
            r["stored_bits"],
            r["ppl_wikitext2_40w"],
            (
                _named(r, notes),
                f"{r['config']['calib']} {_segments(r)} x {r['config']['seqlen']}",
                str(r["config"]["seed"]),
                f"{r['stored_bits']:.3f}",
                f"{r['ppl_wikitext2_40w']:,.1f}",
                "40",
                f"{r['ppl_python_manual_10w']:,.1f}",
                f"{r['wall_seconds']:,.0f}",
                f"{r['peak_bytes'] / 2**30:.1f}",
            ),
        )
        for r in rows
    ]
    for p in json.loads(PEERS.read_text()):
        cells = (f"public code: {p['name']}", "", "", f"{p['stored_bits']:.3f}", f"{p['ppl']:,.1f}")
        found.append((p["stored_bits"], p["ppl"], (*cells, str(p["windows"]), "", "", "")))
    for _, _, cells in sorted(found):
        table.add_row(*cells)
    console = RichConsole()
    console.print(table)
    for i, note in enumerate(notes, 1):
        console.print(f"({i}) {note}")


def _segments(row: dict[str, Any]) -> int:
    """How many there were, which the method may have decided."""
    asked: int = row["config"]["nsamples"]
    if asked != -1:
        return asked
    found = re.search(r"(\d+) x \d+ tokens", row["calibration"])
    assert found is not None
    return int(found[1])


def _named(row: dict[str, Any], notes: list[str]) -> str:
    effort = row["config"]["effort"]
    number = f" ({notes.index(row['note']) + 1})" if "note" in row else ""
    return row["method"] + (f", {effort}" if effort != "default" else "") + number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", nargs="?", help="without one the table is printed")
    parser.add_argument("--bits", type=float, default=1.61)
    parser.add_argument("--calib", default="wiki.valid.txt", help="its files, or self")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--out", help="keep the checkpoint here")
    arguments = parser.parse_args()
    if arguments.method is None:
        show(measured())
        return
    row = measure(arguments)
    rows = measured()  # now: other runs may have ended meanwhile
    rows = [r for r in rows if r["config"] != row["config"]] + [row]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
