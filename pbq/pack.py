"""Quantized <-> PackedWeight, exact in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from pbq.grid import Factors, Overlay, Quantized, QuantizedWeight, TierGrid
from pbq_kernels.layout import (
    INNER,
    PackedWeight,
    Tier,
    check_tensors,
    encode_overlay,
    overlay_positions,
    pack_codes,
    stored_scales,
    tier_codes,
)
from pbq_kernels.scales import decoded_scales, encoded_scales


def pack(qw: Quantized) -> PackedWeight:
    """Lay a quantized weight out as the file holds it.

    Raises ValueError when a scale is not representable in float16 or a code has more bits than its
    tier, PackedFormatError when `tier_of` and `tiers` disagree.
    """
    if isinstance(qw, Factors):
        inner = {f"{INNER}{name}": tensor for name, tensor in pack(qw.inner).tensors.items()}
        return PackedWeight(qw.layout(), {**pack(qw.outer).tensors, **inner})
    layout = qw.layout()
    rows = [_packed_codes(qw.codes[:, qw.columns(t)], tier) for t, tier in enumerate(qw.tiers)]
    tensors: dict[str, Tensor] = {"weight": torch.cat(rows, 1).contiguous()}
    # an empty tier stores nothing, though it may be of a kind that has scales and offsets
    scales = [grid.scale.flatten(1) for grid in qw.grids if grid.scale.numel()]
    offsets = [g.offset for g in qw.grids if g.offset is not None and g.offset.numel()]
    if scales and layout.scale_bits == 8:
        tensors["scale"], tensors["scale_exponent"] = _bytes(torch.cat(scales, 1))
    elif scales:
        tensors["scale"] = _half(torch.cat(scales, 1))
    if offsets:
        tensors["offset"] = _half(torch.cat(offsets, 1))
    if len(qw.tiers) > 1:
        tensors["tier"] = qw.tier_of.clone()
    if qw.column_scale is not None:
        tensors["column_scale"] = _half(qw.column_scale)
    if qw.overlay is not None and layout.overlay:
        tensors["overlay_count"], tensors["overlay_gap"] = encode_overlay(qw.overlay.mask)
        tensors["overlay_value"] = qw.overlay.value[qw.overlay.mask]
        tensors["overlay_scale"] = _half(qw.overlay.scale)
    check_tensors(layout, tensors, values=True)
    return PackedWeight(layout, tensors)


def _packed_codes(codes: Tensor, tier: Tier) -> Tensor:
    if codes.numel() and int(codes.max()) >= 2**tier.depth:
        raise ValueError(f"code {int(codes.max())} does not fit in {tier.depth} planes")
    return pack_codes(tier.stored_codes(codes), tier.planes)


def _half(x: Tensor) -> Tensor:
    half = x.half()
    if not torch.equal(half.float(), x.float()):
        raise ValueError("scales must be finite and rounded to float16 before packing")
    return half.contiguous()


def _bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, exponent = encoded_scales(x)
    if not torch.equal(decoded_scales(codes, exponent), x):
        raise ValueError("scales must be rounded to the byte they are stored in before packing")
    return codes, exponent


def unpack(pw: PackedWeight) -> Quantized:
    """Inverse of `pack`; an overlay without entries comes back as none."""
    if pw.layout.rank:
        outer, inner = pw.factors()
        return Factors(_unpack(outer), _unpack(inner))
    return _unpack(pw)


def _unpack(pw: PackedWeight) -> QuantizedWeight:
    layout, tensors = pw.layout, pw.tensors
    n, k = layout.n, layout.k
    device = tensors["weight"].device
    tier_of = tensors.get("tier", torch.zeros(k, dtype=torch.uint8, device=device))
    codes = torch.zeros(n, k, dtype=torch.uint8, device=device)
    grids: list[TierGrid] = []
    nothing = torch.zeros(n, 0, dtype=torch.float32, device=device)
    scales = stored_scales(tensors) if "scale" in tensors else nothing
    scale = offset = 0
    for t, (tier, found) in enumerate(
        zip(layout.tiers, tier_codes(layout, tensors["weight"]), strict=True)
    ):
        codes[:, (tier_of == t).nonzero(as_tuple=True)[0]] = found
        stored_planes = min(tier.planes, 1) if tier.tied else tier.planes
        stored_scale = nothing.new_zeros(n, tier.groups, stored_planes)
        if tier.scales:
            part = scales[:, scale : scale + tier.scales]
            stored_scale = part.reshape(stored_scale.shape)
        stored_offset = None
        if tier.offset:
            stored_offset = (
                tensors["offset"][:, offset : offset + tier.offsets].float()
                if tier.offsets
                else nothing
            )
        scale, offset = scale + tier.scales, offset + tier.offsets
        grids.append(TierGrid(stored_scale, stored_offset))
    column_scale = tensors["column_scale"].float() if layout.column_scale else None
    overlay = _unpacked_overlay(pw) if layout.overlay else None
    return QuantizedWeight(
        layout.tiers, tier_of, codes, grids, column_scale, overlay, layout.scale_bits
    )


def _unpacked_overlay(pw: PackedWeight) -> Overlay:
    where = overlay_positions(pw.layout, pw.tensors)
    value = torch.zeros(pw.layout.n, pw.layout.k, dtype=torch.int8, device=where[0].device)
    mask = torch.zeros_like(value, dtype=torch.bool)
    value[where], mask[where] = pw.tensors["overlay_value"], True
    return Overlay(mask, value, pw.tensors["overlay_scale"].float())
