"""Everything that docs/reliability.md claims, tried at length: `make reliability`.

    python tests/reliability --kills 24 --refusals 40 --tears 15 --processes 6 \\
        --mutations 10000 --architectures --json FILE

The short form in tests/test_reliability.py is the same code with smaller numbers. The exit code is
1 when anything was lost; the JSON says what.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread: a process that has started a pool of them must not be forked.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from faults import try_refusals, try_tears  # noqa: E402
from kills import try_kills  # noqa: E402
from mutations import try_mutations  # noqa: E402
from processes import try_processes  # noqa: E402
from trial import Trial, contents  # noqa: E402

# What is done to runs of one tiny model.
RUNS: dict[str, Callable[..., Any]] = {
    "kills": try_kills,
    "refusals": try_refusals,
    "tears": try_tears,
    "processes": try_processes,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in (*RUNS, "mutations"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--architectures", nargs="*", metavar="NAME", help="all without a name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pbq-reliability-") as folder:
        found = _run(Path(folder), chosen)
    text = json.dumps({**_where(), "seed": chosen.seed, **found}, indent=1)
    if chosen.json:
        chosen.json.write_text(text + "\n")
    print(text)
    return int(any(part["faults"] for part in found.values()))


def _run(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if any(getattr(chosen, name) for name in RUNS):
        trial = Trial.prepare(folder, _write_model)
        whole, again = folder / "whole", folder / "again"
        for out in (whole, again):
            assert trial.run(out) == 0, trial.log(out).read_text()
        same = contents(whole) == contents(again)
        found["repeated"] = {"runs": 2, "faults": [] if same else ["two runs differ"]}
    for name, attempt in RUNS.items():
        if tries := getattr(chosen, name):
            found[name] = _timed(attempt, trial, whole, tries, chosen.seed)
    if chosen.mutations:
        import conftest

        conftest.write_packed(folder / "packed")
        found["mutations"] = _timed(
            try_mutations, folder / "packed", folder, chosen.mutations, chosen.seed
        )
    if chosen.architectures is not None:
        import architectures
        import conftest

        found["architectures"] = _timed(
            architectures.try_architectures,
            chosen.architectures or [*conftest.EXTRA, *conftest.EXTRA_MOE, *conftest.MORE],
            conftest.build_tiny_model,
            conftest.build_tiny_tokenizer(),
            folder / "architectures",
        )
        print(architectures.table(found["architectures"]["matrix"]), file=sys.stderr)
    return found


def _timed(attempt: Callable[..., Any], *args: Any) -> dict[str, Any]:
    started = time.monotonic()
    found: dict[str, Any] = attempt(*args).to_dict()
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def _write_model(path: Path) -> None:
    # late: it has shapes checked in whatever is imported after it
    import conftest

    conftest.build_tiny_model("llama").save_pretrained(path)
    conftest.build_tiny_tokenizer().save_pretrained(path)


def _where() -> dict[str, str]:
    return {
        "command": "make reliability",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
    }


if __name__ == "__main__":
    raise SystemExit(main())
