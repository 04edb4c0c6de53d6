"""glibc's allocator, told when to give memory back; nothing happens elsewhere."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# mallopt's parameters (malloc.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The most that the second can be: what is larger always comes from the system and goes back to it
_LARGEST_KEPT = 32 * 2**20


def give_back_memory() -> None:
    """Return freed memory to the system: glibc would keep most of a block's."""
    if trim := _function("malloc_trim"):
        trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """What is freed meanwhile is kept for the next who asks, and given back at the end.

    For loops that allocate and free the same gigabytes in every round: each page would be asked of
    the system and zeroed anew, a sixth of the time of a step of distillation.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        # where glibc's own adjustments, which setting either ends, would have taken it
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_KEPT)
        give_back_memory()


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
