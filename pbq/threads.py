"""Several linears rounded at once: a search for paths (pbq_kernels.paths) keeps one thread busy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")
# Each takes memory of its own (memory.py).
AT_ONCE = 2


def at_once(make: Callable[[K], T], items: Sequence[K]) -> list[T]:
    """make(item) of each, without gradients, AT_ONCE of them at a time on a share of the threads.

    In this thread alone where there is one item, or one thread. What raises first is raised here,
    once those that have begun have ended.
    """
    threads = torch.get_num_threads()
    workers = min(AT_ONCE, threads, len(items))
    if workers < 2:
        return [torch.no_grad()(make)(item) for item in items]
    # a setting of each thread, which new ones take from the last that was set
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(torch.no_grad()(make), items))
    finally:
        torch.set_num_threads(threads)
