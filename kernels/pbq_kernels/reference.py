"""The truth that every kernel is compared with: plain torch, no tricks."""

from __future__ import annotations

import torch
from torch import Tensor

from pbq_kernels.layout import (
    PackedWeight,
    expand_offsets,
    expand_scales,
    overlay_positions,
    unpack_codes,
)


def dequantize(pw: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [n, k] of `pw`: computed in float32, rounded once to `dtype`."""
    if pw.layout.rank:
        outer, inner = pw.factors()
        return (dequantize(outer) @ dequantize(inner)).to(dtype)
    layout, tensors = pw.layout, pw.tensors
    scales = expand_scales(layout, tensors.get("scale"))
    offsets = expand_offsets(layout, tensors.get("offset"))
    parts, start = [], 0
    for tier, scale, offset in zip(layout.tiers, scales, offsets, strict=True):
        device = tensors["weight"].device
        data = tensors["weight"][:, start : start + tier.row_bytes]
        start += tier.row_bytes
        codes = unpack_codes(data, tier.planes, tier.columns)
        group = tier.group_of_column().to(device)
        part = torch.zeros(layout.n, tier.columns, device=device)
        if offset is not None:
            part += offset[:, group]
        for p in range(tier.planes):
            sign = ((codes >> p) & 1).float() * 2 - 1
            part += scale[:, :, p][:, group] * sign
        parts.append(part)
    W = torch.empty(layout.n, layout.k, device=tensors["weight"].device)
    W[:, pw.permutation()] = torch.cat(parts, 1)
    if layout.column_scale:
        W *= tensors["column_scale"].float()
    if layout.overlay:
        rows, columns = overlay_positions(layout, tensors)
        values = tensors["overlay_value"].float() * tensors["overlay_scale"].float()[rows]
        W[rows, columns] = values
    return W.to(dtype)


def matmul(x: Tensor, pw: PackedWeight) -> Tensor:
    """x [*b, k] @ W_hat.T -> [*b, n] in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(pw, x.dtype))
