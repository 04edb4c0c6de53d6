"""What can be learned of a model with one of its blocks in memory: statistics, perplexity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pbq.allocate import ChannelStats, PlanInput, column_energy
from pbq.calibrate import channel_stats, input_stats
from pbq.evaluate import Perplexity, TokenizedText, perplexity
from pbq.experts import borrowing
from pbq.loader import BlockLoader
from pbq.models import Call, find_linears, record_calls, run_block, run_tail, weight_of
from pbq.spill import HiddenStates, Spill

Progress = Callable[[int, int], None]


@torch.no_grad()
def through_block(block: nn.Module, hidden: HiddenStates, call: Call, spill: Spill) -> HiddenStates:
    """What the block makes of every batch of `hidden`, which stays as it is."""
    return spill.filled(hidden, lambda i: run_block(block, hidden[i], call))


class Layers:
    """The model's linears as a planner sees them; a weight is read when it is asked for."""

    def __init__(self, loader: BlockLoader) -> None:
        self._loader = loader
        self._held: int | None = None

    def close(self) -> None:
        """Drop the block that was asked for last."""
        if self._held is not None:
            self._loader.drop(self._held)
        self._held = None

    def inputs(
        self, ids: Tensor, *, gradients: bool, spill: Spill, progress: Progress
    ) -> dict[str, PlanInput]:
        """Statistics over ids [N, L] of every linear. Gradients take the whole model in memory."""
        if gradients:
            return self._with_gradients(ids, progress)
        loader, found = self._loader, dict[str, PlanInput]()
        recording = record_calls(
            loader.model, loader.blocks, ids.to(loader.device).split(1), spill.states()
        )
        hidden = recording.hidden
        for i, calls in enumerate(recording.calls):
            with loader.loaded(i) as block, borrowing(block):
                linears = find_linears(block)
                named = {f"{loader.name}.{i}.{name}": m for name, m in linears.items()}
                passed: list[HiddenStates] = []
                run = partial(self._run, block, hidden, calls[0], spill, passed)
                found |= self._block(i, named, input_stats(named, run, ids))
            hidden.close()
            hidden = passed[0]
            progress(i + 1, len(loader.blocks))
        hidden.close()
        return found

    def _run(
        self,
        block: nn.Module,
        hidden: HiddenStates,
        call: Call,
        spill: Spill,
        into: list[HiddenStates],
    ) -> None:
        into.append(through_block(block, hidden, call, spill))

    def _with_gradients(self, ids: Tensor, progress: Progress) -> dict[str, PlanInput]:
        found: dict[str, PlanInput] = {}
        with self._loader.whole() as model:
            linears = [
                {f"{self._loader.name}.{i}.{name}": m for name, m in find_linears(block).items()}
                for i, block in enumerate(self._loader.blocks)
            ]
            every = {name: m for block in linears for name, m in block.items()}
            stats = channel_stats(model, every, ids, gradients=True, progress=progress)
            for i, block in enumerate(linears):
                found |= self._block(i, block, stats)
        return found

    def _block(
        self, index: int, linears: dict[str, nn.Module], stats: dict[str, ChannelStats]
    ) -> dict[str, PlanInput]:
        found = {}
        for name, module in linears.items():
            W = weight_of(module)
            load = partial(self._weight, index, name)
            layer = PlanInput(load, stats[name], (W.shape[0], W.shape[1]), column_energy(W))
            layer.depth = index / len(self._loader.blocks)
            found[name] = layer
        return found

    def _weight(self, index: int, name: str) -> Tensor:
        """[n, k]; its block stays in memory until another one's weight is asked for."""
        if self._held != index:
            self.close()
            self._held = index
        self._loader.load(index)
        return weight_of(self._loader.model.get_submodule(name))


class ScoredText:
    """A text's windows on their way through the blocks, and its perplexity at the end."""

    def __init__(
        self, loader: BlockLoader, text: TokenizedText, window: int, windows: int, spill: Spill
    ) -> None:
        self._loader, self._text, self._window, self._spill = loader, text, window, spill
        ids = text.ids[: windows * window].view(windows, window)
        self._ids = ids.to(loader.device).split(1)
        recording = record_calls(loader.model, loader.blocks, self._ids, spill.states())
        self._hidden, self._calls = recording.hidden, recording.calls

    def through(self, index: int) -> None:
        """Run the next block, which must be loaded."""
        block, call = self._loader.blocks[index], self._calls[index][0]
        hidden = through_block(block, self._hidden, call, self._spill)
        self._hidden.close()
        self._hidden = hidden

    def perplexity(self, progress: Progress | None = None) -> Perplexity:
        """Behind the last block, as that of the whole model: evaluate.perplexity."""
        loader = self._loader

        def logits_of(i: int) -> Tensor:
            return run_tail(loader.model, loader.blocks, self._ids[i], self._hidden[i])[0]

        found = perplexity(
            loader.model,
            self._text,
            window=self._window,
            max_windows=len(self._ids),
            progress=progress,
            logits_of=logits_of,
        )
        self._hidden.close()
        return found
