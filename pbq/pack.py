"""QuantizedWeight <-> PackedWeight, exact in both directions."""

from __future__ import annotations

import torch
from pbq_kernels.layout import PackedWeight, pack_codes, unpack_codes
from torch import Tensor

from pbq.grid import QuantizedWeight, TierGrid


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Lay a quantized weight out as the file holds it. Scales must be representable in float16."""
    layout = qw.layout()
    rows = [
        pack_codes(qw.codes[:, qw.columns(t)], tier.planes) for t, tier in enumerate(qw.tiers)
    ]
    tensors: dict[str, Tensor] = {"weight": torch.cat(rows, 1).contiguous()}
    scales = [grid.scale.flatten(1) for grid in qw.grids if grid.scale.numel()]
    offsets = [grid.offset for grid in qw.grids if grid.offset is not None]
    if scales:
        tensors["scale"] = _half(torch.cat(scales, 1))
    if offsets:
        tensors["offset"] = _half(torch.cat(offsets, 1))
    if len(qw.tiers) > 1:
        tensors["tier"] = qw.tier_of.clone()
    if qw.column_scale is not None:
        tensors["column_scale"] = _half(qw.column_scale)
    return PackedWeight(layout, tensors)


def _half(x: Tensor) -> Tensor:
    half = x.half()
    if not torch.equal(half.float(), x.float()):
        raise ValueError("scales must be rounded to float16 before packing")
    return half.contiguous()


def unpack(pw: PackedWeight) -> QuantizedWeight:
    """Inverse of `pack`."""
    layout, tensors = pw.layout, pw.tensors
    n, k = layout.n, layout.k
    device = tensors["weight"].device
    tier_of = tensors.get("tier", torch.zeros(k, dtype=torch.uint8, device=device))
    codes = torch.zeros(n, k, dtype=torch.uint8, device=device)
    grids: list[TierGrid] = []
    byte = scale = offset = 0
    for t, tier in enumerate(layout.tiers):
        columns = (tier_of == t).nonzero(as_tuple=True)[0]
        data = tensors["weight"][:, byte : byte + tier.row_bytes]
        codes[:, columns] = unpack_codes(data, tier.planes, tier.columns)
        byte += tier.row_bytes
        stored_scale = torch.zeros(n, tier.groups, 0, device=device)
        if tier.scales:
            part = tensors["scale"][:, scale : scale + tier.scales].float()
            stored_scale = part.reshape(n, tier.groups, -1)
        stored_offset = None
        if tier.offset:
            stored_offset = (
                tensors["offset"][:, offset : offset + tier.offsets].float()
                if tier.offsets
                else torch.zeros(n, 0, device=device)
            )
        scale, offset = scale + tier.scales, offset + tier.offsets
        grids.append(TierGrid(stored_scale, stored_offset))
    column_scale = tensors["column_scale"].float() if layout.column_scale else None
    return QuantizedWeight(layout.tiers, tier_of, codes, grids, column_scale)
