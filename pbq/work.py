"""A quantization run in progress: resumable step by step, and a checkpoint only when it is whole.

`Work` is a directory beside OUT that holds one checksummed file per finished step. A kill, a full
disk or Ctrl-C at any point leaves OUT as it was and the run ready to resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pbq import ranks
from pbq.disk import (
    CheckpointError,
    free_bytes,
    fsync,
    read_json,
    remove,
    replace_durably,
    size_text,
    tensor_bytes,
    writing,
)
from pbq.errors import UsageError

log = logging.getLogger(__name__)

_LOCK, _FINGERPRINT, _STAGING, _REPLACED = "lock", "fingerprint.json", "staging", "replaced"
# Holds the inode of what became OUT.
_DONE = "done"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# Between two states of a long training: so many seconds, and so many times what keeping one takes.
KEEP_SECONDS, KEEP_SHARE = 300.0, 30.0


class Work:
    """A run in progress: `OUT.partial` beside OUT, locked, holding one file per finished step.

    Open it with `Work.open`, use it as a context manager. OUT is not touched before `finish`.
    """

    def __init__(self, out: Path, lock: int, overwrite: bool) -> None:
        self.out = out
        self.path = _partial(out)
        self._lock: int | None = lock
        self._overwrite = overwrite

    @classmethod
    def open(
        cls,
        out: Path | str,
        fingerprint: Mapping[str, str],
        *,
        fresh: bool = False,
        overwrite: bool = False,
    ) -> Work:
        """Start the run for `out`, or resume the one whose fingerprint is equal to this one.

        fresh: discard an unfinished run instead of resuming it. overwrite: `out` may hold a pbq
        checkpoint; it stays until `finish` replaces it. Raises UsageError when the unfinished run
        differs, when another process holds it, or when `out` holds something else.
        """
        out = Path(out).resolve()
        if not out.name:
            raise UsageError(f"{out}: cannot be an output directory")
        work = cls(out, _lock(_partial(out)), overwrite)
        try:
            with writing(work.path):
                work._refuse_foreign()
                work._recover()
                if _is_spent(work.path, out):
                    work._empty()
                check_target(out, overwrite)
                work._claim(dict(fingerprint), fresh)
        except BaseException:
            work._leave_nothing_new()
            raise
        return work

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. What was saved stays, to be resumed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Drop the unfinished run: nobody will resume it."""
        self._drop()

    def names(self) -> list[str]:
        """Saved artefacts, sorted; whether one is intact is known only to `has` and `load`."""
        return sorted(p.name.removesuffix(".safetensors") for p in self.path.glob("*.safetensors"))

    def held_bytes(self, kind: str) -> int:
        """Of the saved artefacts whose names begin so: a resumed run has them on the disk."""
        return sum(file.stat().st_size for file in self.path.glob(f"{kind}*.safetensors"))

    def has(self, name: str) -> bool:
        """True when the artefact is there and intact; a damaged one is logged and is absent."""
        return self._read(name) is not None

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, meta) as saved. Raises KeyError where `has` is False."""
        found = self._read(name)
        if found is None:
            raise KeyError(name)
        return found

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Store an artefact so that it is either there whole or not at all, whatever happens.

        meta: anything JSON can hold. Raises ResourceError when the disk refuses; what was saved
        before stays.
        """
        path = self._artefact(name)
        temporary = path.with_name(path.name + ".tmp")
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        text = json.dumps(dict(meta))
        try:
            with writing(path, sum(t.nbytes for t in kept.values())):
                save_file(kept, temporary, {"meta": text, "sha256": _digest(kept, text)})
                replace_durably(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def forget(self, name: str) -> None:
        """Remove an artefact that nothing will ask for again."""
        with writing(self.path):
            remove(self._artefact(name))

    def finish(self, write: Callable[[Path], object]) -> None:
        """Let `write` fill a directory, make it OUT by one rename, and drop the unfinished run.

        An exception, Ctrl-C included, leaves OUT as it was and the run resumable.
        """
        staging = self.path / _STAGING
        try:
            with writing(staging):
                remove(staging)
                staging.mkdir()
                write(staging)
                self._settle(staging)
                self._commit(staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._drop()

    def _artefact(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name an artefact")
        return self.path / f"{name}.safetensors"

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._artefact(name)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s is damaged (%s); it will be computed again", path, error)
            return None
        text = metadata.get("meta", "")
        if metadata.get("sha256") != _digest(tensors, text):
            log.warning("%s is damaged (checksum differs); it will be computed again", path)
            return None
        return tensors, json.loads(text)

    def _recover(self) -> None:
        """Undo or complete a replacement of OUT that was killed between its renames."""
        aside = self.path / _REPLACED
        if not aside.exists():
            return
        if self.out.exists():
            log.warning("removing %s: an earlier run was killed after replacing it", aside)
            shutil.rmtree(aside)
        else:
            log.warning("putting %s back: an earlier run was killed while replacing it", self.out)
            os.rename(aside, self.out)

    def _claim(self, fingerprint: dict[str, str], fresh: bool) -> None:
        """Resume what is there if it is the same run; discard it if asked; else mark it as ours.

        What has saved nothing is no run to resume: another one takes its place.
        """
        file = self.path / _FINGERPRINT
        begun = {p.name for p in self.path.iterdir()} - {_LOCK, _FINGERPRINT, f"{_FINGERPRINT}.tmp"}
        if file.exists() and begun and not fresh:
            self._compare(file, fingerprint)
            self._sweep()
            return
        self._empty()
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(fingerprint, indent=1))
        replace_durably(temporary, file)

    def _refuse_foreign(self) -> None:
        """Raise UsageError when the directory is somebody else's: this one gets emptied."""
        held = {p.name for p in self.path.iterdir()}
        foreign = held - {_LOCK, f"{_FINGERPRINT}.tmp"}
        if foreign and _FINGERPRINT not in held:
            raise UsageError(
                f"{self.path} exists and is not an unfinished pbq run (it holds {min(foreign)}); "
                "remove it or choose another output directory"
            )

    def _compare(self, file: Path, fingerprint: dict[str, str]) -> None:
        try:
            stored = read_json(file)
        except CheckpointError as error:
            raise UsageError(f"{error}; --fresh discards the unfinished run") from None
        if stored == fingerprint:
            return
        raise UsageError(
            f"{self.path} holds an unfinished run that differs from this one:\n"
            + "\n".join(_differences(stored, fingerprint))
            + "\nrepeat its options to resume it; --fresh discards the unfinished run"
        )

    def _sweep(self) -> None:
        """Remove what a killed run left half written: it only takes space."""
        for path in self.path.iterdir():
            if path.name == _STAGING or path.suffix == ".tmp" or path.name.startswith(".tmp"):
                remove(path)

    def _empty(self) -> None:
        # the fingerprint goes last: without it the rest would look like somebody else's directory
        for path in self.path.iterdir():
            if path.name not in (_LOCK, _DONE, _FINGERPRINT):
                remove(path)
        for name in (_DONE, _FINGERPRINT):
            (self.path / name).unlink(missing_ok=True)

    def _leave_nothing_new(self) -> None:
        """After a refused `open`: remove the directory again if it holds nothing but the lock."""
        with contextlib.suppress(OSError):
            if {p.name for p in self.path.iterdir()} <= {_LOCK, f"{_FINGERPRINT}.tmp"}:
                shutil.rmtree(self.path)
        self.close()

    def _settle(self, staging: Path) -> None:
        """Every file readable as the umask says (safetensors writes 0600) and on the disk."""
        mode = os.stat(self.path / _LOCK).st_mode & 0o666
        for folder, _, files in os.walk(staging):
            for file in files:
                os.chmod(os.path.join(folder, file), mode)
                fsync(Path(folder, file))
            fsync(Path(folder))

    def _commit(self, staging: Path) -> None:
        """Two renames when something is replaced; `_recover` covers a kill after the first."""
        check_target(self.out, self._overwrite)
        aside = self.path / _REPLACED
        (self.path / _DONE).write_text(str(staging.stat().st_ino))
        if self.out.exists():
            os.rename(self.out, aside)
        try:
            os.rename(staging, self.out)
        except BaseException:
            if aside.exists() and not self.out.exists():
                os.rename(aside, self.out)
            raise
        fsync(self.out.parent)

    def _drop(self) -> None:
        """Remove the run, and what it replaced: failing here is only untidy."""
        try:
            self._empty()
            shutil.rmtree(self.path)
        except OSError as error:
            log.warning(
                "%s: what is left of its run in %s could not be removed: %s",
                self.out,
                self.path,
                error,
            )
        self.close()


class SharedWork(Work):
    """The unfinished run of several processes: rank 0 holds it, and all see what it holds."""

    def __init__(self, out: Path | str, open_work: Callable[[], Work]) -> None:
        """open_work: opens it, on rank 0 alone."""
        self.out = Path(out).resolve()
        self.path = _partial(self.out)
        self._own: Work | None = None
        ranks.first(lambda: self._open(open_work))

    def _open(self, open_work: Callable[[], Work]) -> None:
        self._own = open_work()

    def _held(self) -> Work:
        assert self._own is not None, "asked of a rank that holds no run"
        return self._own

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def discard(self) -> None:
        if self._own is not None:
            self._own.discard()

    def names(self) -> list[str]:
        return [] if self._own is None else self._own.names()

    def has(self, name: str) -> bool:
        return ranks.first(lambda: self._held().has(name))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return ranks.first(lambda: self._held().load(name))

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        ranks.first(lambda: self._held().save(name, tensors, meta))

    def forget(self, name: str) -> None:
        ranks.first(lambda: self._held().forget(name))

    def finish(self, write: Callable[[Path], object]) -> None:
        ranks.first(lambda: self._held().finish(write))


class Keeper:
    """Keeps the state of a long training as an artefact of `work`, now and then (tune.Keep).

    A state takes as much memory as the training itself. On a disk without room for one more than
    the last the training goes on unkept, with a warning: an interruption then starts it over.
    """

    def __init__(self, work: Work, name: str) -> None:
        self._work, self._name = work, name
        self._due = time.monotonic() + KEEP_SECONDS

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        try:
            return self._work.load(self._name)
        except KeyError:
            return None

    def offer(self, state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        started = time.monotonic()
        if started < self._due:
            return
        tensors, meta = state()
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if free_bytes(self._work.path) > needed:
            self._work.save(self._name, tensors, meta)
        else:
            log.warning("%s: no room to keep %s of training", self._work.path, size_text(needed))
        took = time.monotonic() - started
        self._due = started + took + max(KEEP_SECONDS, KEEP_SHARE * took)


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"  {key}: was {was.get(key, '(not set)')}, is now {now.get(key, '(not set)')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def drop_finished(out: Path) -> None:
    """Remove what a run left behind that was killed after it had made `out`."""
    out = out.resolve()
    if not out.name:  # "/": refused later
        return
    # UsageError: another process holds it, perhaps to remove it
    with contextlib.suppress(UsageError):
        if _is_spent(_partial(out), out):
            Work(out, _lock(_partial(out)), overwrite=False).discard()


def _is_spent(path: Path, out: Path) -> bool:
    """Has the run in `path` made `out`, or finished no step though there is an `out`?"""
    try:
        made = out.stat().st_ino
        held = {p.name for p in path.iterdir()}
        return held <= {_LOCK, _FINGERPRINT} or (path / _DONE).read_text() == str(made)
    except OSError:
        return False


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _lock(path: Path) -> int:
    """A descriptor that holds the only lock on the work directory `path`, created if need be."""
    file = path / _LOCK
    with writing(path):
        while True:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UsageError(f"{path} cannot be created: a file is in the way") from None
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _take(descriptor, path)
                # a run that finished just now may have removed the file that we locked
                if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise UsageError(
            f"{path} is in use by {holder}: wait for it, stop it, or choose another output"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def check_target(out: Path, overwrite: bool) -> None:
    """Raise UsageError unless `out` is absent, empty, or a pbq checkpoint that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; choose another output directory")
    if out.is_mount():
        raise UsageError(f"{out} is a mount point and cannot be renamed; choose a directory in it")
    if not any(out.iterdir()):
        return
    held, replaceable = _describe(out)
    if not replaceable:
        # never delete what pbq did not write: OUT may be a typo for a home directory
        raise UsageError(f"{out} holds {held}; choose another output directory or remove it")
    if not overwrite:
        raise UsageError(
            f"{out} holds {held}; --overwrite replaces it once the new one is complete"
        )


def _describe(out: Path) -> tuple[str, bool]:
    """(what the directory holds, in words; whether it is a pbq checkpoint)."""
    try:
        config = read_json(out / "config.json")
    except CheckpointError:
        names = sorted(p.name for p in out.iterdir())
        return f"{len(names)} files that are no checkpoint ({', '.join(names[:3])})", False
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else "unknown"
    if method == "pbq":
        return f"a pbq checkpoint ({quantization.get('method')})", True
    return f"a model that is not pbq's ({method or 'unquantized'})", False


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over an artefact: its meta text, then every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
