"""Stored tensors that a module lets go while the form that its backend made of them has their bits.

Whoever reads such a buffer, by whatever way, gets it back: rebuilt, bit by bit.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# A tensor that was rebuilt so often is read all the time, by a training step for example: it stays.
MOST_REBUILDS = 8


class Rebuilt:
    """Stands for a tensor that was let go. rows: int64 [r] -> these rows of it, from the form."""

    def __init__(self, tensor: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        self.rows = rows
        self._all = len(tensor), tensor.device
        self._rebuilds = 0
        self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        self._last, self._version = weakref.ref(tensor), _version(tensor)

    def tensor(self) -> Tensor:
        """The tensor: the one that was let go, where somebody still holds it."""
        tensor = self._last()
        if tensor is None:
            length, device = self._all
            # a tensor made in inference mode could not be written into outside of it
            with torch.inference_mode(False), torch.no_grad():
                tensor = self.rows(torch.arange(length, device=device))
            self._rebuilds += 1
            self._note(tensor)
        return tensor

    def is_like(self, tensor: object) -> bool:
        """Whether this is the tensor, and nobody has written into it since."""
        same = isinstance(tensor, Tensor) and tensor is self._last()
        return same and _version(tensor) == self._version

    def may_replace(self, tensor: object) -> bool:
        return self._rebuilds < MOST_REBUILDS and self.is_like(tensor)


def unmap_pages(tensor: Tensor) -> None:
    """Take the pages of a tensor in a mapped file out of this process's memory, until it is read.

    Checkpoints are mapped, and a mapping stays as long as any tensor of its file does. On Linux
    only, and only where every page is still the file's: no bit ever changes.
    """
    if sys.platform != "linux" or not tensor.is_cpu or tensor.untyped_storage().resizable():
        return  # torch's own memory, which it frees itself
    first = math.ceil(tensor.data_ptr() / mmap.PAGESIZE)
    pages = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    if pages > 0 and tensor.is_contiguous() and _are_of_files(first, pages):
        address, size = ctypes.c_void_p(first * mmap.PAGESIZE), pages * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _are_of_files(first: int, pages: int) -> bool:
    """Whether none of these pages is this process's own, as it would be after a write."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            entries = pagemap.read(8 * pages)
    except OSError:
        return False
    if len(entries) < 8 * pages:
        return False
    flags = torch.frombuffer(bytearray(entries), dtype=torch.int64)
    held, of_file = flags >> 62 & 3, flags >> 61 & 1  # 3: in memory, or swapped out
    return not bool(((held > 0) & (of_file == 0)).any())


def _version(tensor: Any) -> int | None:
    return None if tensor.is_inference() else tensor._version


class StoredTensors(dict[str, Any]):
    """The buffers of a module, by name: tensors or None. What was let go is back when it is read.

    lock: held while a tensor goes, comes back or is replaced.
    """

    def __init__(self, tensors: dict[str, Any] | None = None) -> None:
        super().__init__(tensors or {})
        self.lock = threading.RLock()

    def held(self, name: str) -> Any:
        """What is in memory: a tensor, None, or the Rebuilt that stands for a tensor."""
        return super().get(name)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows int64 [r] of a tensor, which is not brought back for them."""
        held = self.held(name)
        return held.rows(rows) if isinstance(held, Rebuilt) else held[rows]

    def let_go(self, name: str, rebuilt: Rebuilt) -> None:
        """Drop the tensor, unless it is no more the one that can be rebuilt."""
        with self.lock:
            held = self.held(name)
            if rebuilt.may_replace(held):
                super().__setitem__(name, rebuilt)
                unmap_pages(held)

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        return self._back(name) if isinstance(found, Rebuilt) else found

    def _back(self, name: str) -> Any:
        with self.lock:
            found = super().__getitem__(name)
            if isinstance(found, Rebuilt):
                found = found.tensor()
                super().__setitem__(name, found)
            return found

    def __setitem__(self, name: str, tensor: Any) -> None:
        with self.lock:
            super().__setitem__(name, tensor)

    # dict's own methods would not ask __getitem__; nor would dict(self), without an __iter__

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().__iter__()))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if super().__contains__(name) else default

    def items(self) -> Any:
        return dict(self).items()

    def values(self) -> Any:
        return dict(self).values()

    def pop(self, name: str, *default: Any) -> Any:
        found = dict(self).pop(name, *default)
        super().pop(name, None)
        return found

    def copy(self) -> dict[str, Any]:
        return StoredTensors(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
