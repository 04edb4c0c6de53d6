"""The truth that every kernel is compared with: plain torch, no tricks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pbq_kernels.layout import (
    PackedWeight,
    WeightLayout,
    expand_offsets,
    expand_scales,
    overlay_positions,
    permutation,
    tier_codes,
)

# The stored tensors that have a row for each row of the weight.
BY_ROW = ("weight", "scale", "offset")


def dequantize(pw: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [n, k] of `pw`: computed in float32, rounded once to `dtype`."""
    if pw.layout.rank:
        outer, inner = pw.factors()
        return (dequantize(outer) @ dequantize(inner)).to(dtype)
    W = dense_rows(pw.layout, pw.tensors)
    if pw.layout.overlay:
        rows, columns = overlay_positions(pw.layout, pw.tensors)
        values = pw.tensors["overlay_value"].float() * pw.tensors["overlay_scale"].float()[rows]
        W[rows, columns] = values
    return W.to(dtype)


def dense_rows(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Offsets and planes of as many rows as there are in the tensors of BY_ROW: float32 [rows, k].

    Of some rows only these are W_hat where they stand by themselves (`WeightLayout.check_rows`).
    """
    scales = expand_scales(layout, tensors)
    offsets = expand_offsets(layout, tensors.get("offset"))
    device, n = tensors["weight"].device, len(tensors["weight"])
    parts = []
    found = tier_codes(layout, tensors["weight"])
    for tier, codes, scale, offset in zip(layout.tiers, found, scales, offsets, strict=True):
        group = tier.group_of_column(device)
        part = torch.zeros(n, tier.columns, dtype=torch.float32, device=device)
        for p in range(tier.depth):
            sign = ((codes >> p) & 1).float() * 2 - 1
            part += scale[:, :, p][:, group] * sign
        if offset is not None:  # last: sums of tied planes are exact, so this alone rounds
            part += offset[:, group]
        parts.append(part)
    W = torch.empty(n, layout.k, dtype=torch.float32, device=device)
    W[:, permutation(layout, tensors)] = torch.cat(parts, 1)
    if layout.column_scale:
        W *= tensors["column_scale"].float()
    return W


def matmul(x: Tensor, pw: PackedWeight) -> Tensor:
    """x [*b, k] @ W_hat.T -> [*b, n] in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(pw, x.dtype))
