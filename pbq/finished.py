"""What a run has finished: packed blocks and tuned norms, read from its files when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbq.calibrate import Calibration
from pbq.models import find_linears, set_weight
from pbq.pack import unpack
from pbq.work import Work
from pbq_kernels import PackedWeight, WeightLayout


def block_key(index: int) -> str:
    """The name of a finished block in the work directory."""
    return f"block-{index:05d}"


def kept_calibration(work: Work, make: Callable[[], Calibration]) -> Calibration:
    """The calibration text of a run: made once, then read from its work directory."""
    if not work.has("calibration"):
        made = make()
        tensors = {"ids": made.ids, "further": made.further}
        if made.noisy:
            tensors["clean"] = made.clean
        work.save("calibration", tensors, {"source": made.source})
    tensors, meta = work.load("calibration")
    ids = tensors["ids"]
    return Calibration(ids, meta["source"], tensors["further"], tensors.get("clean", ids))


class Finished(Mapping[str, PackedWeight]):
    """Every packed weight by the name of its linear, with one block in memory at a time."""

    def __init__(self, work: Work, blocks: str, count: int, device: torch.device) -> None:
        self._work, self._blocks, self._count, self._device = work, blocks, count, device
        self._last: tuple[int, _Block] | None = None
        self._distilled: dict[str, Tensor] | None = None

    def replace_by(self, distilled: dict[str, Tensor]) -> None:
        """Packed tensors and norms by full name: what distillation made of all blocks."""
        self._distilled, self._last = distilled, None

    def block(self, index: int) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
        """(packed weights, norm.NAME) of one block, by names within it."""
        found = self._block(index)
        return found.packed, found.norms

    def latent(self, name: str) -> Tensor:
        """float32 [n, k]: a linear's weight just before it was rounded, where it was kept."""
        index, linear = self._place(name)
        return self._block(index).latents[f"latent.{linear}"].float().to(self._device)

    def _block(self, index: int) -> _Block:
        if self._last is None or self._last[0] != index:
            self._last = index, self._read(index)
        return self._last[1]

    def _read(self, index: int) -> _Block:
        tensors, meta = self._work.load(block_key(index))
        latents = _starting("latent.", tensors)
        if self._distilled is not None:
            tensors = _below(self._distilled, f"{self._blocks}.{index}.")
        tensors = {n: t.to(self._device) for n, t in tensors.items() if n not in latents}
        return _Block(_packed(tensors, meta), _starting("norm.", tensors), latents)

    def _place(self, name: str) -> tuple[int, str]:
        """The block of a linear, and the linear's name within it."""
        index, _, linear = name.removeprefix(f"{self._blocks}.").partition(".")
        return int(index), linear

    def norms_around(self) -> dict[str, Tensor]:
        """norm.NAME of what distillation changed outside the blocks."""
        inside = f"norm.{self._blocks}."
        return {
            name: tensor
            for name, tensor in (self._distilled or {}).items()
            if name.startswith("norm.") and not name.startswith(inside)
        }

    def __getitem__(self, name: str) -> PackedWeight:
        index, linear = self._place(name)
        return self.block(index)[0][linear]

    def __iter__(self) -> Iterator[str]:
        for index in range(self._count):
            for linear in self.block(index)[0]:
                yield f"{self._blocks}.{index}.{linear}"

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class _Block:
    """One finished block: packed weights by linear, norm.NAME, latent.LINEAR."""

    packed: dict[str, PackedWeight]
    norms: dict[str, Tensor]
    latents: dict[str, Tensor]


def _starting(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What has the prefix, without it; it stands behind the "norm." of a norm."""
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    before = f"norm.{prefix}"
    norms = {n.removeprefix(before): t for n, t in tensors.items() if n.startswith(before)}
    return found | {f"norm.{name}": tensor for name, tensor in norms.items()}


def _packed(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, PackedWeight]:
    layouts = {n: WeightLayout.from_dict(found["layout"]) for n, found in meta["layers"].items()}
    return {
        name: PackedWeight(layout, {key: tensors[f"{name}.{key}"] for key in layout.tensors()})
        for name, layout in layouts.items()
    }


def flatten(packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """The tensors of packed weights by LINEAR.TENSOR, as a finished block is saved."""
    return {f"{n}.{key}": t for n, pw in packed.items() for key, t in pw.tensors.items()}


def restore(work: Work, key: str, block: nn.Module) -> dict[str, Any]:
    """Put the dense values of a finished block in place; what was said of it."""
    tensors, meta = work.load(key)
    device = next(block.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    packed = _packed(tensors, meta)
    for name, module in find_linears(block).items():
        set_weight(module, unpack(packed[name]).dequantize())
    copy_norms(block, tensors)
    return meta


def norms_of(module: nn.Module) -> dict[str, Tensor]:
    """Gains of the norms inside: they are stored anyway, so tuning them costs no bits."""
    return {
        f"{name}.weight": part.weight
        for name, part in module.named_modules()
        if "norm" in type(part).__name__.lower()
        and isinstance(getattr(part, "weight", None), nn.Parameter)
    }


@torch.no_grad()
def copy_norms(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the norms inside the values that `tensors` has for them as norm.NAME."""
    for name, parameter in norms_of(module).items():
        if f"norm.{name}" in tensors:
            parameter.copy_(tensors[f"norm.{name}"])
