"""Several processes that make one OUT: one is killed, all end, and any number goes on."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trial import PATIENCE, Trial, clear, contents, ended, unlike, wait

RESOURCE = 5
# Seconds until torchrun sees that a process is gone.
NOTICE = 0.1


@dataclass
class Processes:
    """tried: runs of so many processes of which one was killed. recovered: that were resumed."""

    tried: Counter[int] = field(default_factory=Counter)
    recovered: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tried": dict(self.tried),
            "recovered": dict(self.recovered),
            "faults": self.faults,
        }


def try_processes(trial: Trial, whole: Path, tries: int, seed: int) -> Processes:
    """whole: the OUT that one process made. So many runs of two or three lose one at random.

    The others are told to end, as torchrun does; all must, one line must say why, and OUT be absent
    or whole. The same command, with another number of processes, must then make the bytes of one.
    """
    draw, found, expected = random.Random(seed), Processes(), contents(whole)
    for i in range(tries):
        out, count = trial.folder / f"together-{i}", 2 + i % 2
        started = time.monotonic()
        codes = finish(start(trial, out, count))
        span = time.monotonic() - started
        if codes != [0] * count or contents(out) != expected:
            found.faults.append(f"{count} processes: exits {codes}, or other bytes than one's")
        clear(out)
        children = start(trial, out, count)
        victim = draw.randrange(count)
        time.sleep(span * draw.random())
        os.kill(children[victim], signal.SIGKILL)
        time.sleep(NOTICE)
        for child in children:
            if not ended(child):
                os.kill(child, signal.SIGTERM)
        codes = finish(children)
        found.tried[count] += 1
        fault = _fault(trial, out, codes, victim)
        if out.exists() and (differ := unlike(out, expected)):
            fault = f"OUT is neither absent nor whole: {differ} (exits {codes})"
        if not out.exists() and finish(start(trial, out, 5 - count)) != [0] * (5 - count):
            fault = f"{5 - count} processes do not resume"
        if differ := unlike(out, expected):
            fault = fault or f"OUT differs after resuming: {differ}"
        if fault:
            found.faults.append(f"process {victim} of {count} killed: {fault}")
        else:
            found.recovered[count] += 1
        clear(out)
    return found


def _fault(trial: Trial, out: Path, codes: list[int], victim: int) -> str | None:
    """What the processes beside the victim did wrong, if anything."""
    others = [code for rank, code in enumerate(codes) if rank != victim]
    if -signal.SIGTERM in others:  # before they met
        return None
    if any(code not in (0, RESOURCE) for code in others):
        return f"exits {codes}"
    logs = [log(trial, out, rank).read_text() for rank in range(len(codes)) if rank != victim]
    told = sum(text.count("has ended") for text in logs)
    # without torchrun, what would tell the others who has spoken ends with the first of them
    least, most = int(RESOURCE in others), len(others) if victim == 0 else 1
    return None if least <= told <= most else f"told {told} times"


def start(trial: Trial, out: Path, count: int) -> list[int]:
    """Process ids of `count` ranks that make `out` together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        own = os.open(log(trial, out, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(own, 1)
        os.dup2(own, 2)

    return [trial.start(out, sabotage=lambda rank=rank: join(rank)) for rank in range(count)]  # type: ignore[misc]


def log(trial: Trial, out: Path, rank: int) -> Path:
    return trial.folder / f"{out.name}.{rank}.log"


def finish(children: list[int]) -> list[int]:
    """Exit codes, in order. Raises TimeoutError when some do not end."""
    until = time.monotonic() + PATIENCE
    while not all(ended(child) for child in children):
        if time.monotonic() > until:
            for child in children:
                os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"some of {len(children)} processes do not end")
        time.sleep(0.001)
    return [wait(child) for child in children]
