"""Several processes that quantize one model together, or one alone: it all reads the same.

`torchrun --nproc_per_node N -m pbq quantize …` starts N, of rank 0 to N-1. Every rank holds the
same hidden states and makes its share of them: a contiguous range of the batches. Statistics and
Hessians are summed over the ranks, the linears of a group are divided among them. Rank 0 alone
trains, reads and writes the unfinished run, and speaks; the others get what it has made.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pbq.errors import ResourceError, UsageError

T = TypeVar("T")
K = TypeVar("K")
# The others wait while rank 0 distils. A rank that dies is noticed by its closed connection.
_PATIENCE = timedelta(days=7)

# Whether there are others to ask: within `together`, but not in what one rank makes for all.
_company = False
# Where the ranks met. torchrun's outlives them all.
_store: dist.Store | None = None


class LostRank(ResourceError):
    """Another process of the run has ended."""

    def __init__(self) -> None:
        super().__init__(f"another of the {_started()} processes of this run has ended")


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def together(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for as long as this lasts.

    Inside, `cuda` means the GPU of this rank. Raises UsageError where it has none.
    """
    global _store
    if _started() == 1 or dist.is_initialized():
        with _asking(_started() > 1):
            yield
        return
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        if device not in ("auto", "cuda"):
            raise UsageError(f"--device {device}: of several processes each has its own GPU")
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    _store, rank, count = next(dist.rendezvous("env://"))
    # objects travel by gloo, tensors by what their device has
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        # torchrun ends the others so when one dies
        before = signal.signal(signal.SIGTERM, _told_to_end)
        with _asking(True):
            yield
        signal.signal(signal.SIGTERM, before)
    except _ToldToEnd:
        raise LostRank from None
    # not after a failure: that would wait for the others, who wait for what failed
    dist.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs are too few for process {local_rank + 1}: "
            "lower --nproc_per_node, or choose --device cpu"
        )
    torch.cuda.set_device(local_rank)


class _ToldToEnd(BaseException):
    """By torchrun. No Exception, of which a run survives some: a page that cannot be made."""


def _told_to_end(number: int, frame: Any) -> None:
    raise _ToldToEnd


@contextmanager
def _asking(others: bool) -> Iterator[None]:
    global _company
    before, _company = _company, others
    try:
        yield
    finally:
        _company = before


def rank() -> int:
    return dist.get_rank() if _company else 0


def count() -> int:
    return dist.get_world_size() if _company else 1


def on_this_machine() -> int:
    """How many of the ranks share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _company else 1


def is_speaker() -> bool:
    """Of the ranks that end for one reason, the first to ask tells it."""
    if _store is None:  # a refusal before they met is everyone's
        return os.environ.get("RANK", "0") == "0"
    try:
        return _store.add("told", 1) == 1
    except RuntimeError:  # without torchrun it ends with rank 0
        return True


@contextmanager
def _noticing_a_loss() -> Iterator[None]:
    try:
        yield
    # gloo raises a plain RuntimeError, nccl a DistBackendError, which is one
    except RuntimeError as error:
        raise LostRank from error


def mine(total: int) -> range:
    """The items of `total` that are this rank's to make, next to each other."""
    return range(total * rank() // count(), total * (rank() + 1) // count())


def owner(item: int, total: int) -> int:
    """The rank to which `item` is `mine`."""
    return ((item + 1) * count() - 1) // total


def sent_by(source: int, x: Tensor) -> Tensor:
    """`x` of the rank `source`, on every rank; elsewhere `x` says its shape, dtype and device."""
    x = x.contiguous() if rank() == source else torch.empty_like(x).contiguous()
    with _noticing_a_loss():
        dist.broadcast(x, source)
    return x


def sum_up(*parts: Tensor) -> None:
    """Make each the sum over the ranks: in float64, sums of float32 hardly depend on the order."""
    if count() > 1:
        for part in parts:
            assert part.dtype == torch.float64
            with _noticing_a_loss():
                dist.all_reduce(part)


def largest_of(part: Tensor) -> Tensor:
    """The largest over the ranks, number by number."""
    if count() > 1:
        with _noticing_a_loss():
            dist.all_reduce(part := part.clone(), dist.ReduceOp.MAX)
    return part


def made_by(source: int, make: Callable[[], T]) -> T:
    """What `make` returns on the rank `source`, on every rank; where it raises, all end."""
    if count() == 1:
        return make()
    box: list[Any] = [None]
    if rank() == source:
        with _asking(False):
            made = make()
        torch.save(made, buffer := io.BytesIO())
        box = [buffer.getvalue()]
    with _noticing_a_loss():
        dist.broadcast_object_list(box, source, device=torch.device("cpu"))
    if rank() == source:
        return made
    # from a process of this run, not from a file
    return torch.load(io.BytesIO(box[0]), map_location=_here, weights_only=False)


def _here(storage: Any, location: str) -> Any:
    """What was on a GPU comes to the GPU of this rank."""
    return storage if location == "cpu" else storage.cuda()


def first(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0."""
    return made_by(0, make)


def merged(own: dict[K, T]) -> dict[K, T]:
    """The items of all ranks, on every rank."""
    everyones: dict[K, T] = {}
    for source in range(count()):
        everyones |= made_by(source, lambda: own)
    return everyones
