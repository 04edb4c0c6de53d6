"""kill -9 at random moments of every stage; the same command afterwards gives the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trial import Trial, Watch, clear, contents, partial, wait

KILLED = -signal.SIGKILL
AIMS = ("calibrate", "reconstruct", "refine", "distil", "write")


@dataclass
class Kills:
    """tried: kills by the stage they fell into. survived: those after which OUT was as without."""

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tried": dict(self.tried),
            "survived": dict(self.survived),
            "runs": self.runs,
            "faults": self.faults,
        }


def try_kills(trial: Trial, whole: Path, tries: int, seed: int) -> Kills:
    """`tries` kills at least: chains of one in each stage, each going on behind the one before.

    whole: the OUT of a run that nobody interrupted. After every kill OUT must be absent or whole,
    and at the end of a chain, when a run may finish, it must hold the same bytes.
    """
    draw, found, expected = random.Random(seed), Kills(), contents(whole)
    spans = durations(trial, trial.folder / "timed")
    while sum(found.tried.values()) < tries:
        out = trial.folder / f"killed-{found.runs}"
        hit: Counter[str] = Counter()
        for aim in AIMS:
            stage = kill_in(trial, out, aim, spans[aim] * draw.random(), draw.randrange(3))
            found.runs += 1
            hit += Counter([stage] if stage else [])
            if out.exists() and contents(out) != expected:
                found.faults.append(f"killed in {stage}: OUT is neither absent nor whole")
            if stage is None:
                break
        code = trial.run(out) if not out.exists() or partial(out).exists() else 0
        # killed between the rename that makes OUT and the removal of the run: OUT is there
        complete = out.exists() and contents(out) == expected
        found.runs += 1
        found.tried += hit
        if complete and code in (0, 2) and not partial(out).exists():
            found.survived += hit
        else:
            found.faults.append(f"after kills in {dict(hit)}: exit {code}, OUT differs")
        clear(out)
    return found


def durations(trial: Trial, out: Path) -> dict[str, float]:
    """Seconds that each stage lasts when it is entered, the longest time."""
    watch = Watch()
    watch.reset()
    child = trial.start(out, sabotage=watch.install)
    longest: dict[str, float] = {}
    stage, entries, since = watch.read()
    for _ in trial.running(child, out):
        now, count, at = watch.read()
        if count != entries:
            longest[stage] = max(longest.get(stage, 0.0), at - since)
            stage, entries, since = now, count, at
    longest[stage] = time.monotonic() - since
    wait(child)
    clear(out)
    return {aim: longest.get(aim, 0.0) for aim in AIMS}


def kill_in(trial: Trial, out: Path, aim: str, delay: float, skip: int) -> str | None:
    """Kill a run `delay` seconds after it entered `aim`; the stage it was in, None if it ended.

    skip: entries of the stage that are let pass, where there are as many.
    """
    watch = Watch()
    watch.reset()
    child = trial.start(out, sabotage=watch.install)
    seen, last = 0, -1
    for _ in trial.running(child, out):
        stage, entries, _ = watch.read()
        late = stage == "write" and aim != "write"
        if stage == aim and entries != last:
            seen, last = seen + 1, entries
        if late or seen > (skip if aim in ("reconstruct", "refine") else 0):
            time.sleep(delay)
            break
    stage = watch.read()[0]
    os.kill(child, signal.SIGKILL)
    return stage if wait(child) == KILLED else None
