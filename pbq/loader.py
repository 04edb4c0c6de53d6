"""A model of which one decoder block at a time is in memory.

The weights come from the source's safetensors files through transformers' own loading, with its
renames, conversions and casts: it is only shown fewer tensors at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging

from pbq.errors import ModelError
from pbq.experts import as_fused
from pbq.heap import give_back_memory
from pbq.models import find_blocks, load_model, refusing
from pbq.sources import Source

# (what was loaded, offload index) of PreTrainedModel._load_pretrained_model
_Loaded = tuple[Any, Any]


class BlockLoader:
    """A causal LM whose decoder blocks are on the meta device unless they are asked for.

    Everything around the blocks (embeddings, final norm, head, buffers) is always there. A source
    that transformers can only read whole (GGUF, pickles) stays whole: its blocks are never dropped.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        """Raises what models.load_model does."""
        self._source, self.trust_remote_code = source, trust_remote_code
        self._reader: _Reader | None = None
        with self._leaving_blocks_out():
            self.model, self.tokenizer = load_model(source, dtype, device, trust_remote_code)
        self.model.requires_grad_(False)
        self.name, self.blocks = find_blocks(self.model)
        self.device = self.model.get_input_embeddings().weight.device
        self._loaded: set[int] = set()

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def streams(self) -> bool:
        """False where the whole model is in memory anyway."""
        return self._reader is not None

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """The block with its own weights, dropped at the end whatever has become of them."""
        try:
            yield self.load(index)
        finally:
            self.drop(index)

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all of its blocks. The caller has seen to it that memory allows it."""
        try:
            for index in range(len(self.blocks)):
                self.load(index)
            yield self.model
        finally:
            for index in range(len(self.blocks)):
                self.drop(index)

    def load(self, index: int) -> nn.Module:
        """The block, read unless it is there already. Raises ModelError."""
        block = self.blocks[index]
        if self._reader is not None and index not in self._loaded:
            what = f"{self.name}.{index} cannot be loaded"
            with refusing(self._source, what), as_fused(block):
                self._reader.read(f"{self.name}.{index}.")
            block.requires_grad_(False)
            self._loaded.add(index)
        return block

    def drop(self, index: int) -> None:
        """Give the block's memory back, with whatever has been done to it."""
        if self._reader is not None and index in self._loaded:
            to_meta(self.blocks[index])
            self._loaded.remove(index)
            give_back_memory()

    @contextmanager
    def _leaving_blocks_out(self) -> Iterator[None]:
        """While transformers builds and loads the model, show it what lies outside the blocks."""
        real = PreTrainedModel._load_pretrained_model

        def load(
            model: PreTrainedModel, tensors: Any, files: Any, config: Any, *rest: Any, **more: Any
        ) -> _Loaded:
            if tensors is not None or not all(str(f).endswith(".safetensors") for f in files or []):
                return real(model, tensors, files, config, *rest, **more)
            self._reader = _Reader(model, [Path(file) for file in files], config, real)
            return self._reader.read_outside(find_blocks(model)[0] + ".")

        PreTrainedModel._load_pretrained_model = staticmethod(load)
        try:
            yield
        finally:
            PreTrainedModel._load_pretrained_model = staticmethod(real)


class _Reader:
    """Reads some of a checkpoint's tensors into a model, as from_pretrained would all of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        files: list[Path],
        config: Any,
        load: Callable[..., _Loaded],
    ) -> None:
        self._model, self._config, self._load = model, config, load
        # stored name -> (file, the model's name for it, or for the first tensor made from it)
        self._stored: dict[str, tuple[Path, str]] = {}
        meta = model.state_dict()
        rename = _renaming(model, meta, config.weight_mapping or [])
        for file in files:
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    self._stored[name] = file, rename(name)

    def read_outside(self, blocks: str) -> _Loaded:
        """Everything that does not begin with `blocks`; tensors missing there are no fault here."""
        names = [
            name for name, (_, target) in self._stored.items() if not target.startswith(blocks)
        ]
        info, index = self._read(names)
        info.missing_keys = {name for name in info.missing_keys if not name.startswith(blocks)}
        return info, index

    def read(self, prefix: str) -> None:
        """Every tensor of the model that begins with `prefix`. Raises ModelError."""
        names = [name for name, (_, target) in self._stored.items() if target.startswith(prefix)]
        info, _ = self._read(names)
        missing = sorted(name for name in info.missing_keys if name.startswith(prefix))
        if missing:
            raise ModelError(f"{missing[0]} is missing from its files")
        if info.conversion_errors or info.mismatched_keys:
            wrong = [*info.conversion_errors, *(key[0] for key in info.mismatched_keys)]
            raise ModelError(f"{wrong[0]} has another shape in its files than in the model")

    def _read(self, names: list[str]) -> _Loaded:
        opened = {file: _open(file) for file in {self._stored[name][0] for name in names}}
        slices = {name: opened[self._stored[name][0]].get_slice(name) for name in names}
        with _no_progress_bar():
            return self._load(self._model, slices, None, self._config)


def _renaming(
    model: PreTrainedModel, meta: Mapping[str, Tensor], mapping: list[Any]
) -> Callable[[str], str]:
    """What transformers will call a stored tensor: its own rule, which it has no name for."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> str:
        target = rename_source_key(name, renamings, converters, prefix, meta)[0]
        if target not in meta and name in meta:
            target = rename_source_key(name, [], [], prefix, meta)[0]
        return str(target)

    return rename


def _open(file: Path) -> Any:
    """Open without a memory map where safetensors can: mapped pages would count as ours."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except TypeError:  # before safetensors 0.8
        return safe_open(file, framework="pt")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers would show one for every block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def to_meta(module: nn.Module) -> None:
    """Drop every tensor that a checkpoint holds; buffers that only the code makes stay."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = torch.empty_like(buffer, device="meta")
