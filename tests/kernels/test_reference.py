"""The reference against the formula of the layout, written out entry by entry in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pbq_kernels import dequant_matmul
from pbq_kernels.layout import PackedWeight, Tier
from pbq_kernels.reference import dequantize, matmul

RandomPacked = Callable[..., PackedWeight]

CASES = {
    "one bit": (33, 577, [Tier(1, 577)]),
    "a single weight": (1, 1, [Tier(8, 1, offset=True)]),
    "paper tiers": (33, 96, [Tier(1, 77), Tier(4, 19, tied=True, offset=True)]),
    "all planes": (3, 63, [Tier(p, 7, offset=p % 2 == 0) for p in range(9)]),
    "groups that do not divide": (
        7,
        63,
        [Tier(2, 40, group_size=16), Tier(3, 23, tied=True, offset=True, group_size=5)],
    ),
    "empty tiers": (5, 7, [Tier(0, 0), Tier(1, 7), Tier(3, 0, tied=True), Tier(2, 0, offset=True)]),
    "pruned to an offset": (5, 7, [Tier(0, 7, offset=True, group_size=3)]),
}


def decode(pw: PackedWeight) -> Tensor:
    """float64 [n, k] by the rules of docs/format.md, with Python loops and none of our helpers."""
    layout, tensors = pw.layout, {name: t.tolist() for name, t in pw.tensors.items()}
    columns_of: list[list[int]] = [[] for _ in layout.tiers]
    for column, tier in enumerate(tensors.get("tier", [0] * layout.k)):
        columns_of[tier].append(column)
    W = torch.zeros(layout.n, layout.k, dtype=torch.float64)
    for row in range(layout.n):
        stored = iter(tensors["weight"][row])
        scales, offsets = iter(tensors.get("scale", [[]] * layout.n)[row]), iter([])
        if "offset" in tensors:
            offsets = iter(tensors["offset"][row])
        for tier, columns in zip(layout.tiers, columns_of, strict=True):
            for column, value in zip(
                columns, decode_tier(tier, stored, scales, offsets), strict=True
            ):
                W[row, column] = value * tensors.get("column_scale", [1.0] * layout.k)[column]
    nibbles = (half for byte in tensors.get("overlay_gap", []) for half in (byte & 15, byte >> 4))
    values = iter(tensors.get("overlay_value", []))
    for row, count in enumerate(tensors.get("overlay_count", [])):
        column = -1
        for _ in range(count):
            while (gap := next(nibbles)) == 15:
                column += 15
            column += gap + 1
            W[row, column] = next(values) * tensors["overlay_scale"][row]
    return W


def decode_tier(
    tier: Tier, stored: Iterator[int], scales: Iterator[float], offsets: Iterator[float]
) -> list[float]:
    """One row of one tier. Takes its bytes, scales and offsets from the front of the iterators."""
    size = tier.columns if tier.group_size == -1 else tier.group_size
    groups = math.ceil(tier.columns / size) if tier.columns else 0
    data = [next(stored) for _ in range(math.ceil(tier.planes * tier.columns / 8))]
    per_group = min(tier.planes, 1) if tier.tied else tier.planes
    scale = [[next(scales) for _ in range(per_group)] for _ in range(groups)]
    offset = [next(offsets) if tier.offset else 0.0 for _ in range(groups)]
    row = []
    for c in range(tier.columns):
        value = offset[c // size]
        for p in range(tier.planes):
            bit = p * tier.columns + c
            sigma = 1.0 if data[bit // 8] >> (bit % 8) & 1 else -1.0
            factor = scale[c // size][0] * 2**p if tier.tied else scale[c // size][p]
            value += factor * sigma
        row.append(value)
    return row


@pytest.mark.parametrize("extras", [{}, {"column_scale": True, "overlay": 0.1}], ids=["", "extras"])
@pytest.mark.parametrize("case", CASES)
def test_dequantize_is_the_formula(random_packed: RandomPacked, case: str, extras: dict) -> None:
    n, k, tiers = CASES[case]
    pw = random_packed(n, k, tiers, seed=3, **extras)
    W = dequantize(pw)
    assert W.dtype == torch.float32
    # sums of at most 9 float16 numbers in float32: a few rounding errors of the largest term
    torch.testing.assert_close(W.double(), decode(pw), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_matmul_is_the_formula(random_packed: RandomPacked, case: str) -> None:
    n, k, tiers = CASES[case]
    pw = random_packed(n, k, tiers, seed=4, column_scale=True, overlay=0.05)
    x = torch.randn(2, 3, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("bmk,nk->bmn", x, decode(pw))
    scale = float(expected.abs().max())
    torch.testing.assert_close(matmul(x, pw), expected, rtol=0, atol=1e-6 * scale)
    assert torch.equal(dequant_matmul(x, pw, "reference"), matmul(x, pw))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dequantize_rounds_once(random_packed: RandomPacked, dtype: torch.dtype) -> None:
    pw = random_packed(33, 96, seed=1, column_scale=True)
    assert torch.equal(dequantize(pw, dtype), dequantize(pw).to(dtype))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(matmul(x, pw), torch.nn.functional.linear(x, dequantize(pw, dtype)))


def test_scaling_the_scales_scales_the_weight(random_packed: RandomPacked) -> None:
    pw = random_packed(33, 96, seed=2)
    doubled = {n: t * 2 if n in ("scale", "offset") else t for n, t in pw.tensors.items()}
    assert torch.equal(dequantize(PackedWeight(pw.layout, doubled)), 2 * dequantize(pw))
