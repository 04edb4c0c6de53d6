"""Disks that fill up and files that lie: every such failure becomes one of pbq's errors.

`writing` and `check_space` speak for a disk that refuses (ResourceError); `reading` and `read_json`
for a checkpoint's file that is damaged or hostile (CheckpointError). Both name the file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pbq.errors import ModelError, PbqError, ResourceError
from pbq_kernels.layout import PackedFormatError

log = logging.getLogger(__name__)

# A description beyond this is damage, not a model: refuse before reading it into memory.
MAX_JSON_BYTES = 2**27
_REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOLCK,
}


class CheckpointError(ModelError, PackedFormatError):
    """A checkpoint that is damaged, incomplete or not pbq's. Names the tensor or the file."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes as safetensors stores them: C order, little endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> str:
    """First 16 hex digits of the SHA-256 of the tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:16]


def check_space(path: Path | str, needed_bytes: int) -> None:
    """Raise ResourceError unless the disk that will hold `path` has `needed_bytes` free."""
    free = free_bytes(Path(path))
    if free < needed_bytes:
        raise ResourceError(
            f"{path}: {size_text(needed_bytes)} needed, {size_text(free)} free on that disk; "
            "free some space or choose another place"
        )


def unused(path: Path) -> Path:
    """A name beside `path` that nothing has yet: what is made there is renamed when it is whole.

    Not one that anything else of pbq has, as an unfinished run's OUT.partial. What is left of a
    process that was killed is told, not removed.
    """
    left = rf"{re.escape(path.name)}\.\d+-\d+\.tmp"
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if re.fullmatch(left, other.name):
            log.warning("%s is there: if no other process is writing it, remove it", other)
    names = (path.with_name(f"{path.name}.{os.getpid()}-{i}.tmp") for i in itertools.count())
    return next(name for name in names if not name.exists())


def free_bytes(path: Path) -> int:
    """Free on the disk that holds `path`, or will."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size_text(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


@contextlib.contextmanager
def writing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn a refusing disk into a ResourceError: the file, what was needed and what is free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code not in _REFUSALS:
            raise
        at = getattr(error, "filename", None) or path
        needed = f"{size_text(needed_bytes)} needed, " if needed_bytes else ""
        raise ResourceError(
            f"{at}: {os.strerror(code)}; {needed}{size_text(free_bytes(path))} free on that disk"
        ) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's error number; safetensors keeps it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def fsync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(temporary: Path, path: Path) -> None:
    """Give a written temporary file its name; after this call a power cut cannot take it back."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a hostile file provokes in a reader becomes a CheckpointError naming the file."""
    try:
        yield
    except PbqError:
        raise
    except PackedFormatError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError."""
    with reading(path):
        if not path.is_file():  # reading a pipe would never end
            raise FileNotFoundError(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size_text(path.stat().st_size)} is too much for JSON")
        data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(data).__name__}")
    return data
