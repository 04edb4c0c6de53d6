"""Hidden states of a calibration set: in memory, or in a file when they are many."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from pbq import ranks
from pbq.disk import tensor_bytes, writing


class HiddenStates(Sequence[Tensor]):
    """Tensors in the order in which they were appended; with a file, none is kept in memory.

    An item is then read anew, and in the page cache of the system while that has room: a memory map
    would count as memory of this process.
    """

    def __init__(self, file: Path | None = None) -> None:
        """file: an empty one, removed by `close`."""
        self._file = file
        self._kept: list[Tensor] = []
        # shape, dtype, device and offset of each tensor of the file
        self._places: list[tuple[torch.Size, torch.dtype, torch.device, int]] = []
        self._end = 0

    def append(self, x: Tensor) -> None:
        """Raises ResourceError when the disk refuses."""
        if self._file is None:
            self._kept.append(x)
            return
        with writing(self._file, x.nbytes), open(self._file, "ab") as file:
            file.write(tensor_bytes(x))
        self._places.append((x.shape, x.dtype, x.device, self._end))
        self._end += x.nbytes

    def __len__(self) -> int:
        return len(self._kept) + len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._file is None:
            return self._kept[index]
        shape, dtype, device, offset = self._places[index]
        count = shape.numel() * dtype.itemsize
        data = np.fromfile(self._file, np.uint8, count, offset=offset)
        return torch.from_numpy(data).view(dtype).view(shape).to(device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Forget the tensors and remove the file."""
        self._kept.clear()
        self._places.clear()
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class Spill:
    """Makes HiddenStates: in memory, or in files of `folder` where one is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def states(self) -> HiddenStates:
        if self._folder is None:
            return HiddenStates()
        # the suffix of what a resumed run sweeps away
        with writing(self._folder):
            descriptor, name = tempfile.mkstemp(".tmp", "hidden-", self._folder)
        os.close(descriptor)
        return HiddenStates(Path(name))

    def filled(self, like: Sequence[Tensor], make: Callable[[int], Tensor]) -> HiddenStates:
        """make(i) for every i of `like`, shaped as its tensors, each made on one of the ranks."""
        own, total = self.states(), len(like)
        for i in ranks.mine(total):
            own.append(make(i))
        if ranks.count() == 1 or total == 0:
            return own
        states, first, shape = self.states(), ranks.mine(total).start, like[0]
        for i in range(total):
            mine = ranks.owner(i, total) == ranks.rank()
            states.append(ranks.sent_by(ranks.owner(i, total), own[i - first] if mine else shape))
        own.close()
        return states
