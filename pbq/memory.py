"""How much memory a run takes, how much there is, and the refusal when that is less."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from pbq.calibrate import most_rows
from pbq.config import QuantConfig
from pbq.disk import size_text
from pbq.errors import ResourceError
from pbq.models import find_blocks, find_linears, weight_of
from pbq.own_text import sampling_bytes
from pbq.threads import AT_ONCE
from pbq.tune import STEP_TOKENS, Recipe

# Python, torch and transformers, measured on Linux with torch 2.13
_IMPORTS_BYTES = 530 * 2**20
# Of one block while it is quantized: codes, and the weights where latent ones would start. These
# three were fitted to blocks of 3 and 13 million weights, within 8 % of both.
_ROUNDING_BYTES_PER_WEIGHT = 10
# Of one linear that is being rounded, beside that: float32 copies of its weight
_LINEAR_BYTES_PER_WEIGHT = 28
# Of its inputs: second moments, their factors and inverses
_MOMENT_BYTES = 40
# and where compensation goes by what batches agree on, the sums that tell, and eigenvectors
_CHANCE_BYTES = 20
# Of one block while it is tuned: dense weights, gradients, Adam's two moments, activations
_TUNING_BYTES_PER_WEIGHT = 40
# Of the whole model while it is distilled: codes, the weights they make and their gradients; where
# codes move, latent weights, their gradients and Adam's two moments too; and of each linear's input
# and output in the model's dtype
_DISTILLING_BYTES_PER_WEIGHT = 8
_LATENT_BYTES_PER_WEIGHT = 16
_KEPT_PER_ACTIVATION = 1.5
# Hidden states on their way through the blocks go to the disk when they would take more than that
# part of the memory. There are five of each batch: before and behind a block, in two streams, and
# what its attention makes of one (remembering.py).
_SHARE_OF_STATES = 8
_STREAMS = 5


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak of the stages that take most, Python and its libraries included.

    blocks: quantizing block by block. whole: by stage, what needs the whole model at once. states:
    all hidden states of the calibration text, which are in `blocks` unless they go to the disk.
    imports: of these bytes, what Python and its libraries take.
    """

    blocks: int
    whole: Mapping[str, int]
    states: int
    imports: int = _IMPORTS_BYTES

    @property
    def peak(self) -> int:
        return max(self.blocks, *self.whole.values(), 0)


def needs(
    model: PreTrainedModel,
    config: QuantConfig,
    recipe: Recipe,
    *,
    gradients: bool,
    streams: bool,
    budget: int | None = None,
) -> Needs:
    """Estimate from shapes alone; the model may be on the meta device.

    gradients: the method wants those of the whole model. streams: its blocks can be loaded one by
    one. budget: bytes that there are, which decide where the hidden states go.
    """
    _, blocks = find_blocks(model)
    width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    dense = sum(p.numel() for p in model.parameters()) * width
    resident = dense - (sum(sizes) - max(sizes)) * width if streams else dense
    tokens = most_rows(config, recipe) * config.seqlen
    states = _state_bytes(model, len(blocks), tokens, width)
    kept = 0 if spills(states, budget) else states
    block = blocks[sizes.index(max(sizes))]
    working = _block_bytes(block, config, recipe, max(sizes), width)
    whole = {}
    base = _IMPORTS_BYTES + kept
    if "self" in config.calib.split("+"):
        sampling = sampling_bytes(model, config.segments, config.seqlen)
        whole["calibration"] = _IMPORTS_BYTES + dense + sampling
    if streams and gradients:
        whole["statistics"] = base + 2 * dense
    if config.preprocess:
        whole["preprocessing"] = base + 2 * dense + distilling_bytes(model, blocks, width)
    if recipe.distillation is not None:
        moving = recipe.moves_signs_at_the_end
        whole["distillation"] = base + dense + distilling_bytes(model, blocks, width, moving)
    return Needs(base + resident + working, whole, states)


def _state_bytes(model: PreTrainedModel, blocks: int, tokens: int, width: int) -> int:
    hidden = model.get_input_embeddings().weight.shape[1]
    # both streams enter the first block as one, and only the original's leaves the last
    return min(_STREAMS, blocks + 2) * tokens * int(hidden) * width


def _block_bytes(
    block: nn.Module, config: QuantConfig, recipe: Recipe, size: int, width: int
) -> int:
    """What quantizing one block takes beside its weights."""
    shapes = [weight_of(linear).shape for linear in find_linears(block).values()]
    n, k = max(shapes, key=math.prod)
    tokens = min(most_rows(config, recipe) * config.seqlen, recipe.hessian_tokens)
    widest = max(shape[1] for shape in shapes)
    # behind the attention, the norms and the gate, as the original model has them
    inputs = tokens * (3 * min(shape[1] for shape in shapes) + widest) * width
    rounding = (
        size * _ROUNDING_BYTES_PER_WEIGHT
        + n * k * _LINEAR_BYTES_PER_WEIGHT * min(AT_ONCE, torch.get_num_threads())
        + widest**2 * (_MOMENT_BYTES + (_CHANCE_BYTES if recipe.compensate_damp == 0 else 0))
        + inputs
    )
    tuning = size * _TUNING_BYTES_PER_WEIGHT if recipe.block is not None else 0
    return max(rounding, tuning)


def distilling_bytes(
    model: PreTrainedModel, blocks: nn.ModuleList, width: int, moving: bool = True
) -> int:
    """What training the whole model end to end takes beside its weights, codes moving or not."""
    shapes = [weight_of(linear).shape for linear in find_linears(blocks).values()]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    activations = _KEPT_PER_ACTIVATION * sum(n + k for n, k in shapes) + 3 * vocabulary
    weights = sum(n * k for n, k in shapes)
    each = _DISTILLING_BYTES_PER_WEIGHT + moving * _LATENT_BYTES_PER_WEIGHT
    return weights * each + round(STEP_TOKENS * activations * width)


def disk_bytes(
    model: PreTrainedModel,
    config: QuantConfig,
    recipe: Recipe,
    found: Needs,
    *,
    bits: float,
    budget: int,
) -> int:
    """What lies on the disk at the end: finished steps, and OUT beside them.

    Packed weights at `bits` twice, everything else once; bfloat16 latent weights until their signs
    have moved, hidden states that do not stay in memory, and what blocks start from if it is not
    their own.
    """
    _, blocks = find_blocks(model)
    weights = [weight_of(linear) for linear in find_linears(blocks).values()]
    count = sum(W.numel() for W in weights)
    dense = sum(W.numel() * W.element_size() for W in weights)
    around = whole_model_bytes(model) - dense
    latents = 2 * count if recipe.moves_signs_at_the_end else 0
    states = found.states if spills(found.states, budget) else 0
    start = dense if config.preprocess else 0
    return round(2 * count * bits / 8) + around + latents + states + start


_CONTROL_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def spills(state_bytes: int, budget: int | None) -> bool:
    """Do hidden states of so many bytes go to the disk?"""
    return budget is not None and state_bytes > budget // _SHARE_OF_STATES


def budget(gib: float | None, device: torch.device, processes: int = 1) -> int:
    """Bytes that this process may take, what it has already included; None: its share of the rest.

    processes: how many share the memory of this machine; of GPUs each has its own.
    """
    if gib is not None:
        return int(gib * 2**30)
    if device.type == "cuda":
        return _IMPORTS_BYTES + torch.cuda.mem_get_info(device)[0]
    info = psutil.Process().memory_info()
    # what it has of files is among what is free
    held = info.rss - getattr(info, "shared", 0)
    free = min(psutil.virtual_memory().available, _left_in_control_group())
    return held + free // processes


def _left_in_control_group() -> int:
    """Bytes until the limit that a container sets, or more than any machine has."""
    kinds = (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    left, groups = 2**62, _text(_OWN_GROUPS)
    for controller, limit, used, prefix in kinds:
        top = _CONTROL_GROUPS / controller
        own = top / _own_group(controller, groups)
        # the limits of the groups around a group hold for it, too
        for group in (own, *(p for p in own.parents if p.is_relative_to(top))):
            try:
                found = int((group / limit).read_text()) - int((group / used).read_text())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            # files that were read or written: used, and given up as soon as memory is asked for
            kept = rf"^{prefix}(?:in)?active_file (\d+)$"
            files = re.findall(kept, _text(group / "memory.stat"), re.MULTILINE)
            left = min(left, found + sum(map(int, files)))
    return left


def _own_group(controller: str, groups: str) -> str:
    """The group below the controller's root that /proc/self/cgroup names: "" if it is the root.

    Lines of it are "4:cpu,memory:/a/b", or "0::/a/b" of version 2, which has no controllers.
    """
    found = [line.split(":", 2) for line in groups.splitlines()]
    return next((path.strip("/") for _, of, path in found if controller in of.split(",")), "")


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def whole_model_bytes(model: nn.Module) -> int:
    """Of all parameters, on the meta device too."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


# By stage: what takes the memory, and what would take less.
_WAYS_OUT = {
    "blocks": ("its largest block", "use a machine with more"),
    "calibration": ("sampling text from the whole model", "give a text with --calib FILE"),
    "statistics": ("gradients of the whole model", "choose a --method without them"),
    "preprocessing": ("training LoRA on the whole model", "leave --preprocess out"),
    "distillation": (
        "distilling the whole model",
        "--distil-steps 0 works block by block in about {}",
    ),
}


def refuse(model: str, found: Needs, budget: int, config: QuantConfig) -> None:
    """Raise ResourceError for the first stage that will not fit, with the way out."""
    for stage, nbytes in {"blocks": found.blocks, **found.whole}.items():
        if nbytes <= budget:
            continue
        what, way_out = _WAYS_OUT[stage]
        raise ResourceError(
            f"{model}, --method {config.method}: {what} takes about {size_text(nbytes)} of memory, "
            f"{size_text(budget)} may be used; {way_out.format(size_text(found.blocks))}, "
            f"or overrule this estimate with --memory GIB"
        )
