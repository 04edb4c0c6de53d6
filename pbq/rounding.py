"""Embeddings and head rounded to nearest, when a checkpoint is written: `--embed-bits`.

Everything before that (blocks, distillation) sees them as they are. A head that is tied to the
embeddings is rounded with them, once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbq.embedding import check_packable
from pbq.grid import QuantizedWeight, TierGrid, fit_uniform
from pbq.pack import pack
from pbq_kernels import PackedWeight, Tier, WeightLayout

GROUP_SIZE = 32
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
            found[names[head]] = module
    return found


def embedding_layout(module: nn.Embedding | nn.Linear, bits: int) -> WeightLayout:
    """Of a weight [n, k] at so many bits: equally spaced levels in groups of columns."""
    n, k = module.weight.shape
    group_size = GROUP_SIZE if k > GROUP_SIZE else -1
    return WeightLayout(n, k, (Tier(bits, k, tied=True, offset=True, group_size=group_size),))


@torch.no_grad()
def round_embeddings(model: PreTrainedModel, bits: int) -> dict[str, PackedWeight]:
    """Packed weights of `vocabulary`, by name. Raises ModelError."""
    return {
        name: _rounded(module.weight, embedding_layout(module, bits))
        for name, module in vocabulary(model).items()
    }


def _rounded(W: Tensor, layout: WeightLayout) -> PackedWeight:
    """W [n, k] on the grid of each of its groups, some rows at a time."""
    parts = [
        pack(round_rows(rows.float(), layout.tiers[0]))
        for rows in W.split(max(1, _WEIGHTS_AT_ONCE // layout.k))
    ]
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in layout.tensors()}
    return PackedWeight(layout, tensors)


def round_rows(W: Tensor, tier: Tier) -> QuantizedWeight:
    """W [n, k], all of it in one tier: min-max grids with zero among their levels, as rtn's."""
    parts = W.split(W.shape[1] if tier.group_size == -1 else tier.group_size, dim=1)
    grids = [
        fit_uniform(part, torch.ones(part.shape[1]), tier.planes, search=False) for part in parts
    ]
    codes = [grid.codes(part) for grid, part in zip(grids, parts, strict=True)]
    scale = torch.stack([grid.scale[:, :1] for grid in grids], 1)
    offset = torch.stack([grid.offset for grid in grids], 1)
    tier_of = torch.zeros(W.shape[1], dtype=torch.uint8, device=W.device)
    return QuantizedWeight((tier,), tier_of, torch.cat(codes, 1), [TierGrid(scale, offset)])
