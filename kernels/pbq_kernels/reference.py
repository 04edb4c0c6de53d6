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
    unpack_codes,
)


def dequantize(pw: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [n, k] of `pw`: computed in float32, rounded once to `dtype`."""
    if pw.layout.rank:
        outer, inner = pw.factors()
        return (dequantize(outer) @ dequantize(inner)).to(dtype)
    W = _planes(pw.layout, pw.tensors, pw.permutation())
    if pw.layout.overlay:
        rows, columns = overlay_positions(pw.layout, pw.tensors)
        values = pw.tensors["overlay_value"].float() * pw.tensors["overlay_scale"].float()[rows]
        W[rows, columns] = values
    return W.to(dtype)


def gather(pw: PackedWeight, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """dequantize(pw, dtype)[rows], from the bytes of these rows alone; rows int [*b] -> [*b, k].

    The layout must be one whose rows stand by themselves (`WeightLayout.check_rows`).
    """
    flat = rows.flatten()
    taken = {
        name: tensor[flat] if name in ("weight", "scale", "offset") else tensor
        for name, tensor in pw.tensors.items()
    }
    W = _planes(pw.layout, taken, pw.permutation())
    return W.to(dtype).view(*rows.shape, pw.layout.k)


def _planes(layout: WeightLayout, tensors: Mapping[str, Tensor], permutation: Tensor) -> Tensor:
    """Offsets and planes of as many rows as there are in `tensors`: float32 [rows, k]."""
    scales = expand_scales(layout, tensors.get("scale"))
    offsets = expand_offsets(layout, tensors.get("offset"))
    device, n = tensors["weight"].device, len(tensors["weight"])
    parts, start = [], 0
    for tier, scale, offset in zip(layout.tiers, scales, offsets, strict=True):
        data = tensors["weight"][:, start : start + tier.row_bytes]
        start += tier.row_bytes
        codes = unpack_codes(data, tier.planes, tier.columns)
        group = tier.group_of_column().to(device)
        part = torch.zeros(n, tier.columns, device=device)
        if offset is not None:
            part += offset[:, group]
        for p in range(tier.planes):
            sign = ((codes >> p) & 1).float() * 2 - 1
            part += scale[:, :, p][:, group] * sign
        parts.append(part)
    W = torch.empty(n, layout.k, device=device)
    W[:, permutation] = torch.cat(parts, 1)
    if layout.column_scale:
        W *= tensors["column_scale"].float()
    return W


def matmul(x: Tensor, pw: PackedWeight) -> Tensor:
    """x [*b, k] @ W_hat.T -> [*b, n] in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(pw, x.dtype))
