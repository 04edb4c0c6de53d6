"""Writing a checkpoint of a model that is never whole: shard by shard, as blocks become ready."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pbq.checkpoint import INDEX_FILE, SINGLE_FILE
from pbq.hf import saving_part


class ShardWriter:
    """save_pretrained in parts: a shard takes parts until it would hold more than `limit` bytes.

    What is written is what save_pretrained of the whole model would write, in shards cut at other
    places. The model must have been through `pbq.hf.install`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        limit: int,
        written: Callable[[str], object] = lambda part: None,
    ) -> None:
        """written: is called with each part once it is on the disk."""
        self._model, self._folder, self._limit, self._written = model, folder, limit, written
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._shards: list[Path] = []

    def add(self, part: str, tensors: dict[str, Tensor]) -> None:
        """A part of the model's state dict: it may be dropped when `written` is called."""
        held = sum(t.nbytes for tensors in self._parts.values() for t in tensors.values())
        if self._parts and held + sum(t.nbytes for t in tensors.values()) > self._limit:
            self._flush()
        self._parts[part] = tensors

    def finish(self) -> None:
        """Write the rest, and the index if there is more than one shard."""
        self._flush()
        if len(self._shards) == 1:
            self._shards[0].rename(self._folder / SINGLE_FILE)
            return
        weight_map, total = {}, 0
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            shard.rename(self._folder / name)
            for tensor, nbytes in _sizes(self._folder / name):
                weight_map[tensor] = name
                total += nbytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        tensors = {name: t for part in self._parts.values() for name, t in part.items()}
        with saving_part(self._model, tensors):
            self._model.save_pretrained(self._folder, max_shard_size="1000TB")
        shard = self._folder / f"part-{len(self._shards):05d}"
        (self._folder / SINGLE_FILE).rename(shard)
        self._shards.append(shard)
        done, self._parts = list(self._parts), {}
        del tensors
        for part in done:
            self._written(part)


def _sizes(file: Path) -> Iterator[tuple[str, int]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name).nbytes  # mapped, not read
