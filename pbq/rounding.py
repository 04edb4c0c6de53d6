"""Embeddings and head rounded to nearest, when a checkpoint is written: `--embed-bits`.

Everything before that (blocks, distillation) sees them as they are. A head that is tied to the
embeddings is rounded with them, once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbq.embedding import check_packable
from pbq.errors import ModelError
from pbq.grid import QuantizedWeight, TierGrid, fit_uniform
from pbq.pack import pack
from pbq_kernels import PackedWeight, Tier, WeightLayout
from pbq_kernels.layout import MAX_PLANES

GROUP_SIZE = 64
# At 4 bits the columns of most energy keep 8, one in so many: errors in them cost most.
HEAVY_ONE_IN = 32
# Rows are rounded so many weights at a time: float32 copies and planes take some 50 bytes of each.
_WEIGHTS_AT_ONCE = 2**22


def vocabulary(model: PreTrainedModel) -> dict[str, nn.Embedding | nn.Linear]:
    """Embeddings by name, and the head if it has a weight of its own. Raises ModelError."""
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {names[embeddings]: check_packable(names[embeddings], embeddings)}
    if head is not None:
        tied = head.weight is embeddings.weight
        module = check_packable(names[head], head, tied=tied)
        if not tied:
            _check_untied(model, names[head])
            found[names[head]] = module
    return found


def _check_untied(model: PreTrainedModel, head: str) -> None:
    # any later tie_weights() would make half of the embeddings' tensors the head's
    if f"{head}.weight" in model.get_expanded_tied_weights_keys(all_submodels=True):
        raise ModelError(
            f"{head}: has a weight of its own, though the model's config says that it is tied; set "
            "tie_word_embeddings to false there, or leave --embed-bits out"
        )


def embedding_layout(module: nn.Embedding | nn.Linear, bits: int) -> WeightLayout:
    """Of a weight [n, k] at so many bits: equally spaced levels in groups of columns."""
    n, k = module.weight.shape
    heavy = math.ceil(k / HEAVY_ONE_IN) if bits < MAX_PLANES and k > 1 else 0
    tiers = (_tier(bits, k - heavy), *([_tier(MAX_PLANES, heavy)] if heavy else []))
    return WeightLayout(n, k, tiers)


def _tier(planes: int, columns: int) -> Tier:
    group_size = GROUP_SIZE if columns > GROUP_SIZE else -1
    return Tier(planes, columns, tied=True, offset=True, group_size=group_size)


@torch.no_grad()
def round_embeddings(model: PreTrainedModel, bits: int) -> dict[str, PackedWeight]:
    """Packed weights of `vocabulary`, by name. Raises ModelError."""
    return {
        name: round_weight(module.weight, embedding_layout(module, bits))
        for name, module in vocabulary(model).items()
    }


def round_weight(W: Tensor, layout: WeightLayout) -> PackedWeight:
    """W [n, k] on min-max grids with zero among their levels, some rows at a time.

    The columns of most energy are the last tier's.
    """
    parts = W.split(max(1, _WEIGHTS_AT_ONCE // layout.k))
    energy = torch.stack([rows.float().pow(2).sum(0) for rows in parts]).sum(0)
    order = energy.argsort(stable=True)
    tier_of = torch.empty(layout.k, dtype=torch.uint8, device=W.device)
    counts = torch.tensor([tier.columns for tier in layout.tiers], device=W.device)
    tier_of[order] = torch.arange(len(counts), device=W.device).byte().repeat_interleave(counts)
    packed = [pack(_rounded(rows.float(), layout.tiers, tier_of)).tensors for rows in parts]
    by_row = ("weight", "scale", "offset")
    tensors = {
        name: torch.cat([part[name] for part in packed]) if name in by_row else packed[0][name]
        for name in layout.tensors()
    }
    return PackedWeight(layout, tensors)


def _rounded(W: Tensor, tiers: tuple[Tier, ...], tier_of: Tensor) -> QuantizedWeight:
    codes = torch.empty_like(W, dtype=torch.uint8)
    grids = []
    for t, tier in enumerate(tiers):
        columns = (tier_of == t).nonzero(as_tuple=True)[0]
        groups = columns.split(len(columns) if tier.group_size == -1 else tier.group_size)
        found = []
        for group in groups:
            part = W[:, group]
            grid = fit_uniform(part, torch.ones_like(part[0]), tier.planes, search=False)
            codes[:, group] = grid.codes(part)
            found.append(grid)
        scale = torch.stack([grid.scale[:, :1] for grid in found], 1)
        grids.append(TierGrid(scale, torch.stack([grid.offset for grid in found], 1)))
    return QuantizedWeight(tiers, tier_of, codes, grids)
