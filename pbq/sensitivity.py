"""How much a model suffers from each linear alone, measured: nats to the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbq import methods
from pbq.allocate import LayerPlan
from pbq.blocks import watch
from pbq.calibrate import evenly
from pbq.config import QuantConfig
from pbq.errors import NumericalError
from pbq.experts import find_experts
from pbq.hessian import Hessian, products_of
from pbq.importance import token_importance
from pbq.models import (
    Call,
    find_blocks,
    find_linears,
    record_calls,
    run_block,
    run_tail,
    set_weight,
    weight_of,
)
from pbq.threads import at_once
from pbq.tune import Recipe, forward_kl

# Calibration tokens behind each Hessian, and those on which the models are compared: the first of
# each of so many segments, by effort. There are hundreds of linears to compare.
HESSIAN_TOKENS = 4096
SEGMENTS, LENGTH = {"fast": 4, "default": 8, "best": 16}, 128
# Trellises of more memory than this leave all layers the same few percent less.
MEMORY = 8


@torch.no_grad()
def sensitivities(
    model: PreTrainedModel,
    ids: Tensor,
    method: methods.Method,
    recipe: Recipe,
    config: QuantConfig,
    plans: Mapping[str, LayerPlan],
    progress: Callable[[int, int], object],
) -> dict[str, float]:
    """For each linear of the blocks, the mean KL of the next token when it alone is rounded, nats.

    It is rounded as planned, neither compensated nor swept over, in the metric of its inputs in the
    original model; the KL is that of the original model's predictions to those of the model with
    it. The error of a layer's output would not tell what later layers make of it, and squared
    gradients of the loss, taken channel by channel, are misled by attention sinks. ids: calibration
    segments [N, L]. The whole model must be in memory; it is left as it was. Raises NumericalError
    naming the linear.
    """
    name, blocks = find_blocks(model)
    rows = _spread(ids, max(4, -(-HESSIAN_TOKENS // ids.shape[1]))).split(1)
    judged = _spread(ids, SEGMENTS[config.effort])[:, :LENGTH]
    fitted, compared = record_calls(model, blocks, rows), record_calls(model, blocks, [judged])
    inputs, hidden = list(fitted.hidden), compared.hidden[0]
    calls = [each[0] for each in compared.calls]
    run = partial(_logits, model, blocks, calls, judged)
    target, found = run(0, hidden), dict[str, float]()
    for i, (block, call) in enumerate(zip(blocks, (c[0] for c in fitted.calls), strict=True)):
        linears = find_linears(block)
        H, inputs = _hessians(block, linears, call, inputs, config.seed + i)
        given = [(f"{name}.{i}.{n}", weight_of(m), H[n]) for n, m in linears.items()]
        rounded = at_once(partial(_rounded, method, recipe, config, plans), given)
        for (linear, module), W_hat in zip(linears.items(), rounded, strict=True):
            full, kept = f"{name}.{i}.{linear}", weight_of(module).clone()
            set_weight(module, W_hat)
            found[full] = float(forward_kl(run(i, hidden), target))
            if not math.isfinite(found[full]):
                raise NumericalError(f"{full}: with it rounded the model predicts no finite logits")
            set_weight(module, kept)
        hidden = run_block(block, hidden, calls[i])
        progress(i + 1, len(blocks))
    return found


def where_known(recipe: Recipe, blocks: nn.ModuleList) -> Recipe:
    """`recipe` without sensitivities for a model of experts.

    There are thousands of those, and most see none of the few tokens they would be judged by.
    """
    experts = any(find_experts(block) for block in blocks)
    return replace(recipe, sensitivity=recipe.sensitivity and not experts)


def _rounded(
    method: methods.Method,
    recipe: Recipe,
    config: QuantConfig,
    plans: Mapping[str, LayerPlan],
    given: tuple[str, Tensor, Tensor],
) -> Tensor:
    """given: full name, weight [n, k], H. The rounded weight in the weight's dtype."""
    full, W, H = given
    recipe, plan = quicker(recipe, plans[full])
    qw, _, _ = methods.rebuild(method, recipe, config, plan, W.float(), H, full)
    return qw.dequantize().to(W.dtype)


def quicker(recipe: Recipe, plan: LayerPlan) -> tuple[Recipe, LayerPlan]:
    """How linears are rounded here: no sweeps, trellises of MEMORY at most.

    Either makes all errors larger alike, in a tenth of the time.
    """
    tiers = (replace(tier, trellis=min(tier.trellis, MEMORY)) for tier in plan.tiers)
    return replace(recipe, sweeps=0), replace(plan, tiers=tuple(tiers))


def _spread(ids: Tensor, count: int) -> Tensor:
    """That many rows of ids, or all, evenly spread."""
    return ids[evenly(len(ids), min(count, len(ids)))]


def _logits(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    calls: list[Call],
    ids: Tensor,
    start: int,
    hidden: Tensor,
) -> Tensor:
    """Of the whole model, from `hidden` before block `start` on."""
    for block, call in zip(blocks[start:], calls[start:], strict=True):
        hidden = run_block(block, hidden, call)
    return run_tail(model, blocks, ids, hidden)


def _hessians(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    call: Call,
    inputs: list[Tensor],
    seed: int,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """E[w x xᵀ] [k, k] of each linear's own inputs, w what a token counts (pbq.importance).

    And the block's outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {name: weight_of(linear) for name, linear in linears.items()}
    H = {name: Hessian(W.shape[1], W.device) for name, W in weights.items()}
    outputs = []
    for hidden in inputs:
        with watch(block, list(linears)) as seen:
            y, counts = token_importance(block, linears, call, hidden, generator)
        outputs.append(y)
        with products_of(hidden.dtype):
            for name, x in seen.items():
                H[name].update(x.float().flatten(0, -2) * counts[name].sqrt()[:, None])
    return {name: found.mean() for name, found in H.items()}, outputs
