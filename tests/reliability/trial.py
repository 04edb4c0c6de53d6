"""Runs of `pbq quantize` on a tiny model, each in a process of its own that may be killed.

A run is forked from a process that has imported everything and computed nothing, so that a hundred
of them take minutes; from there on it is what the console script does.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import re
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pbq import console, forecast, pipeline, report, tune, work
from pbq.cli import app

# The command imports it late; here it must be there before the first fork.
assert pipeline
# Seconds for a run of a second or two: one that hangs says where (its log), and is killed.
PATIENCE = 120.0
# What the stages of a run are called there, and here. "refine" is the tuning of a block.
STAGES = {
    "load the model": "load",
    "calibration text": "calibrate",
    "statistics": "calibrate",
    "sensitivities": "calibrate",
    "blocks": "reconstruct",
    "distillation": "distil",
    "write": "write",
}
NAMES = ["start", "load", "calibrate", "reconstruct", "refine", "distil", "write"]
# Everything a run can do: two tiers, more of the fine one where the model is sensitive, tuned
# blocks, latent weights, distillation.
METHOD = """
from pbq.allocate import LayerPlan, tiers_of
from pbq.methods import waterfill
from pbq.tune import BlockTuning, Distillation, Recipe
from pbq_kernels.layout import Tier

class Everything(waterfill.Waterfill):
    def plan(self, layers, config):
        nats = {name: layer.sensitivity or 0 for name, layer in layers.items()}
        middle = sorted(nats.values())[len(nats) // 2]
        return {n: self.split(x.stats.x_sq, nats[n] > middle) for n, x in layers.items()}

    def split(self, x_sq, sensitive):
        fine = len(x_sq) // (3 if sensitive else 4)
        tiers = (Tier(1, len(x_sq) - fine), Tier(4, fine, tied=True))
        return LayerPlan(tiers, tiers_of(x_sq, fine))

    def recipe(self, config):
        distillation = Distillation(steps=6, lr=2e-3, latent_lr=3e-3)
        block = BlockTuning(epochs=1)
        return Recipe(sensitivity=True, block=block, distillation=distillation)

def method(config):
    return Everything()
"""


class Watch:
    """Where a forked run is: its stage, how often it has entered one, and since when.

    The stage is written beside the one before it, and counted when it is there: struct fills what
    it writes with zeros first, and somebody may be reading.
    """

    _STAGE = struct.Struct("qd")

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8 + 2 * self._STAGE.size)
        self._entries = memoryview(self._shared)[:8].cast("q")

    def read(self) -> tuple[str, int, float]:
        entries = self._entries[0]
        stage, since = self._STAGE.unpack_from(self._shared, self._place(entries))
        return NAMES[stage], entries, since

    def enter(self, stage: str) -> None:
        self._write(self._entries[0] + 1, stage)

    def reset(self) -> None:
        self._write(0, NAMES[0])

    def _write(self, entries: int, stage: str) -> None:
        place = self._place(entries)
        self._STAGE.pack_into(self._shared, place, NAMES.index(stage), time.monotonic())
        self._entries[0] = entries

    def _place(self, entries: int) -> int:
        return 8 + entries % 2 * self._STAGE.size

    def install(self) -> None:
        """In the child: say which stage is on; none of this changes what is computed."""
        show, optimise = console.Console.stage, tune.optimise

        def stage(self_: Any, name: str, total: int | None) -> None:
            self.enter(STAGES[name])
            show(self_, name, total)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self.read()[0]
            if before == "reconstruct":
                self.enter("refine")
            found = optimise(*args, **kwargs)
            self.enter(before)
            return found

        console.Console.stage = stage  # type: ignore[method-assign]
        tune.optimise = watched


@dataclass
class Trial:
    """A tiny model, a text and a method in `folder`, and the runs made of them."""

    folder: Path

    @classmethod
    def prepare(cls, folder: Path, build: Callable[[Path], None]) -> Trial:
        """build: writes the model and its tokenizer into a directory."""
        build(folder / "model")
        (folder / "method.py").write_text(METHOD)
        words = [
            "a",
            "few",
            "words",
            "of",
            "which",
            "nobody",
            "will",
            "ask",
            "what",
            "they",
            "mean",
        ]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(words), (300,), generator=generator).tolist()
        (folder / "text.txt").write_text(" ".join(words[i] for i in drawn))
        return cls(folder)

    def command(self, out: Path, *options: str) -> list[str]:
        chosen = {"--method": self.folder / "method.py", "--calib": self.folder / "text.txt"}
        chosen |= {"--bits": 5, "--nsamples": 4, "--seqlen": 32, "--device": "cpu"}
        words = [str(word) for pair in chosen.items() for word in pair]
        return ["quantize", str(self.folder / "model"), str(out), *words, *options]

    def start(self, out: Path, *options: str, sabotage: Callable[[], object] = lambda: None) -> int:
        """Process id of a forked run, which keeps the state of its distillation at every step."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            log = os.open(self.log(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(PATIENCE - 5, exit=False)
            sys.argv = ["pbq", *self.command(out, *options)]
            work.KEEP_SECONDS = work.KEEP_SHARE = 0.0
            # these take longer than the run; both have tests of their own
            forecast.Speed.measure = lambda *given: forecast.Speed(1e10, 1e10)
            report.html_report.write_if_possible = lambda out: None
            sabotage()
            code = console.run_guarded(app)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def run(self, out: Path, *options: str, sabotage: Callable[[], object] = lambda: None) -> int:
        """Exit code of a run; -9 when it was killed. Raises TimeoutError when it hangs."""
        child = self.start(out, *options, sabotage=sabotage)
        for _ in self.running(child, out):
            pass
        return wait(child)

    def running(self, child: int, out: Path) -> Iterator[None]:
        """Again and again until the run has ended. Raises TimeoutError with its log if it hangs."""
        until = time.monotonic() + PATIENCE
        while not ended(child):
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                wait(child)
                raise TimeoutError(f"a run into {out} does not end:\n{self.log(out).read_text()}")
            yield
            time.sleep(0.0005)

    def log(self, out: Path) -> Path:
        """What the last run into `out` printed."""
        return self.folder / f"{out.name}.log"


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(child: int) -> bool:
    """Without reaping it: its exit code is still to be asked for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def clear(out: Path) -> None:
    for path in (out, partial(out)):
        shutil.rmtree(path, ignore_errors=True)


TIMES = ("seconds", "peak_bytes")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, Any]:
    """Every file of OUT, but for the seconds and the memory that report and card tell."""
    files: dict[str, Any] = {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()
    }
    files["report.json"] = without_times(json.loads(files["report.json"]))
    card = files["README.md"].decode()
    files["README.md"] = re.sub(r"\| (seconds|peak memory) \|.*", "", card)
    return files


def unlike(out: Path, expected: dict[str, Any]) -> list[str]:
    """Files of OUT that are not as expected; of report.json, what of it."""
    found = contents(out)
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if "report.json" in names:
        one, other = found.get("report.json", {}), expected.get("report.json", {})
        names += [f"{k}: {one.get(k)}" for k in sorted(one) if one[k] != other.get(k)]
    return names
