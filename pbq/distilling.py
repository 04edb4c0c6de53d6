"""A packed model trained end to end towards the original one, as `quantize` ends and `finetune` is.

The original model lends its code: it is called with the weights that the packed ones make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pbq.bfloat16 import fast_products
from pbq.models import run_tail, weight_of
from pbq.pack import pack, unpack
from pbq.spill import HiddenStates
from pbq.tunable import tunable
from pbq.tune import (
    STEP_TOKENS,
    Distillation,
    Keep,
    Progress,
    Tuned,
    distill,
    held_out,
)
from pbq_kernels import PackedWeight


def distil_model(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    packed: Mapping[str, PackedWeight],
    norms: Mapping[str, Tensor],
    latent: Callable[[str], Tensor],
    rows: Sequence[Tensor],
    hidden: HiddenStates,
    fitted: int,
    settings: Distillation,
    seed: int,
    *,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> tuple[dict[str, PackedWeight], dict[str, Tensor], Tuned]:
    """The better weights and norm gains, and how they fared (tune.optimise).

    model: dense; what lies around its blocks is the original's, which the targets are made with.
    norms: where the gains start, by name. latent(name): where a linear's latent weight [n, k]
    starts; asked only if codes are to move. rows: ids [b, L], batches of one size; among the first
    `fitted` of them are the held-out ones. hidden: what the original's last block makes of the
    first batches [b, L, d], of as many as are known, or of none; what it makes of others is
    appended when their turn comes.
    """
    steps, unseen = steps_of(rows, held_out(fitted))
    places = {batch: batch for batch in range(len(hidden))}
    linears = {name: model.get_submodule(name) for name in packed}
    # single rows: a step may take them from several batches, which are all of one size
    size = len(rows[0])

    def taken(i: int) -> Tensor:
        return torch.cat([rows[j // size][j % size, None] for j in steps[i]])

    def original(j: int) -> Tensor:
        batch, row = divmod(j, size)
        if batch not in places:
            places[batch] = len(hidden)
            hidden.append(last_hidden(model, blocks, rows[batch]))
        return hidden[places[batch]][row, None]

    def student(W: Mapping[str, Tensor], gains: Mapping[str, Tensor], i: int) -> Tensor:
        called = Functional(model, linears, W, gains)
        logits: Tensor = called(taken(i), use_cache=False).logits
        return logits

    def teacher(i: int) -> Tensor:
        return run_tail(model, blocks, taken(i), torch.cat([original(j) for j in steps[i]]))

    weights = tunable(
        {name: unpack(pw) for name, pw in packed.items()},
        latent,
        settings,
        lambda name: weight_of(linears[name]).dtype,
    )
    found, gains, tuned = distill(
        student,
        teacher,
        weights,
        norms,
        len(steps),
        unseen,
        settings,
        seed,
        progress=progress,
        keep=keep,
    )
    return {name: pack(qw) for name, qw in found.items()}, gains, tuned


@torch.no_grad()
@fast_products()
def last_hidden(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> Tensor:
    """What the last block makes of ids [b, L]: [b, L, d]."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handle = blocks[-1].register_forward_hook(note)
    try:
        model.base_model(ids, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def steps_of(
    batches: Sequence[Tensor], judges: Collection[int]
) -> tuple[list[list[int]], list[int]]:
    """Rows taken together in a step of STEP_TOKENS tokens, and the indices of held-out steps.

    judges: the held-out batches.
    """
    judged = [i in judges for i, batch in enumerate(batches) for _ in batch]
    size = max(1, STEP_TOKENS // batches[0].shape[1])
    train, unseen = ([i for i, j in enumerate(judged) if j is which] for which in (False, True))
    steps = [part[i : i + size] for part in (train, unseen) for i in range(0, len(part), size)]
    return steps, list(range(math.ceil(len(train) / size), len(steps)))


class Functional:
    """A module called with other weights: the caller sees a module, autograd sees the weights."""

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor],
        gains: Mapping[str, Tensor],
    ) -> None:
        self._module = module
        self._parameters: dict[str, Tensor] = {}
        for name, W in weights.items():
            dtype = weight_of(linears[name]).dtype
            # Conv1D of gpt2 keeps its weight transposed
            oriented = W if isinstance(linears[name], nn.Linear) else W.T
            self._parameters[f"{name}.weight"] = oriented.to(dtype)
        for name, gain in gains.items():
            self._parameters[name] = gain.to(module.get_parameter(name).dtype)

    @fast_products()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._module, self._parameters, args, kwargs)
