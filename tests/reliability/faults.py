"""Disks that refuse in the midst of a run, and artefacts that are torn between two runs.

A fault is a system call of pbq's on OUT or its unfinished run that fails with the error of a disk
that is full, broken or read-only, or a real limit on the size of files, which cuts a write short.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kills import kill_in
from trial import Trial, clear, contents, partial

import pbq.work

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)
AUDITED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod")
RESOURCES, DONE = 5, 0
CHAIN = 4


@dataclass
class Faults:
    """injected: by kind. recovered: those after which OUT was as without."""

    injected: Counter[str] = field(default_factory=Counter)
    recovered: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "injected": dict(self.injected),
            "recovered": dict(self.recovered),
            "faults": self.faults,
        }


class Failing:
    """In the child: the call number `at` that touches `out` fails; `count` of them is shared."""

    _FORMAT = struct.Struct("q")

    def __init__(self, out: Path, at: int, code: int) -> None:
        self._tree, self._at, self._code = str(out), at, code
        self._shared = mmap.mmap(-1, self._FORMAT.size)

    @property
    def count(self) -> int:
        return int(self._FORMAT.unpack_from(self._shared)[0])

    def install(self) -> None:
        sys.addaudithook(self._audit)
        for module, name in ((os, "fsync"), (os, "replace"), (pbq.work, "save_file")):
            setattr(module, name, self._wrapped(getattr(module, name)))

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event != "open" or (len(args) > 2 and args[2] & (os.O_WRONLY | os.O_RDWR))
        if event in AUDITED and writes:
            self._touch(args[0])

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = args[1] if isinstance(args[0], dict) else args[0]
            self._touch(os.readlink(f"/proc/self/fd/{first}") if type(first) is int else first)
            return real(*args, **kwargs)

        return call

    def _touch(self, path: Any) -> None:
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(self._tree):
            self._FORMAT.pack_into(self._shared, 0, self.count + 1)
            if self.count == self._at:
                raise OSError(self._code, os.strerror(self._code), str(path))


def try_refusals(trial: Trial, whole: Path, tries: int, seed: int) -> Faults:
    """Calls that fail and writes that are cut, spread over the run; then the run may finish.

    A run that was refused must say so in one line that starts with "pbq:", exit with 5, and leave
    OUT absent; where it came too late to matter OUT must be whole.
    """
    draw, found, expected = random.Random(seed), Faults(), contents(whole)
    counter = Failing(trial.folder / "counted", -1, 0)
    trial.run(trial.folder / "counted", sabotage=counter.install)
    largest = max(p.stat().st_size for p in (trial.folder / "counted").rglob("*"))
    clear(trial.folder / "counted")
    while sum(found.injected.values()) < tries:
        out = trial.folder / f"refused-{sum(found.injected.values())}"
        hit: Counter[str] = Counter()
        for _ in range(CHAIN):
            code = draw.choice(CODES)
            if draw.random() < 0.25:
                kind, limit = "EFBIG", int(largest * draw.random())
                exits = trial.run(out, sabotage=lambda limit=limit: _limit_files(limit))
                injected = exits != DONE
            else:
                kind = errno.errorcode[code]
                failing = Failing(out, draw.randrange(1, counter.count), code)
                exits = trial.run(out, sabotage=failing.install)
                injected = failing.count >= failing._at
            hit += Counter([kind] if injected else [])
            _judge(found, f"{kind} into {out.name}", trial, out, exits, expected)
            if out.exists():
                break
        if not out.exists():
            _finish(found, trial, out, hit, expected)
        else:
            found.recovered += hit
        found.injected += hit
        clear(out)
    return found


def _limit_files(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def _judge(
    found: Faults, what: str, trial: Trial, out: Path, exits: int, expected: dict[str, Any]
) -> None:
    said = trial.log(out).read_text()
    lines = [line for line in said.splitlines() if line.startswith("pbq: ")]
    if exits == RESOURCES and (len(lines) != 1 or "Traceback" in said or out.exists()):
        found.faults.append(f"{what}: {said[-500:]}")
    elif exits == DONE and contents(out) != expected:
        found.faults.append(f"{what}: exit 0, and OUT is not whole")
    elif exits not in (RESOURCES, DONE):
        found.faults.append(f"{what}: exit {exits}: {said[-500:]}")


def _finish(
    found: Faults, trial: Trial, out: Path, hit: Counter[str], expected: dict[str, Any]
) -> None:
    exits = trial.run(out)
    if exits == DONE and contents(out) == expected and not partial(out).exists():
        found.recovered += hit
    else:
        said = trial.log(out).read_text()
        found.faults.append(f"after {dict(hit)}: exit {exits}: {said[-500:]}")


def try_tears(trial: Trial, whole: Path, tries: int, seed: int) -> Faults:
    """Artefacts of an unfinished run cut, emptied, changed or unreadable: they are made again."""
    draw, found, expected = random.Random(seed), Faults(), contents(whole)
    unfinished = trial.folder / "unfinished"
    while kill_in(trial, unfinished, "write", 0.0, 0) != "write":
        clear(unfinished)
    artefacts = sorted(p.name for p in partial(unfinished).glob("*.safetensors"))
    for i in range(tries):
        out, name = trial.folder / f"torn-{i}", artefacts[i % len(artefacts)]
        shutil.copytree(partial(unfinished), partial(out))
        kind = draw.choice(list(TEARS))
        TEARS[kind](partial(out) / name, draw)
        hit = Counter([name.removesuffix(".safetensors")])
        found.injected += hit
        _finish(found, trial, out, hit, expected)
        clear(out)
    clear(unfinished)
    return found


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


TEARS: dict[str, Callable[[Path, random.Random], object]] = {
    "cut": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "emptied": lambda path, draw: os.truncate(path, 0),
    "flipped": _flip,
    "zeroed": lambda path, draw: path.write_bytes(bytes(path.stat().st_size)),
    "removed": lambda path, draw: path.unlink(),
}
