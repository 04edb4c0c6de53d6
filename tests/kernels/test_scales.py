"""Scales in a byte: every code, the rounding against a search, and what a layout makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbq_kernels.layout import PackedFormatError, PackedWeight, Tier, WeightLayout, expand_scales
from pbq_kernels.reference import dequantize
from pbq_kernels.scales import byte_scales, decoded_scales, encoded_scales

EVERY = torch.arange(256, dtype=torch.uint8)[:, None]


@pytest.mark.parametrize("exponent", [-24, -7, 0, 3])
def test_every_code_is_exact_in_float16_and_comes_back(exponent: int) -> None:
    scale = decoded_scales(EVERY, torch.tensor([exponent], dtype=torch.int8))
    assert torch.equal(scale.half().float(), scale)
    assert (scale.diff(dim=0) > 0).all() and scale[0, 0] == 0
    codes, found = encoded_scales(scale)
    assert torch.equal(codes, EVERY) and found.tolist() == [exponent]


def test_values_by_hand() -> None:
    codes = torch.tensor([[0], [1], [31], [32], [255]], dtype=torch.uint8)
    scale = decoded_scales(codes, torch.tensor([-10], dtype=torch.int8))
    assert (scale[:, 0] * 1024).tolist() == [0, 33, 63, 64, 63 * 128]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 50), st.integers(0, 2**16), st.floats(-10, 10))
def test_rounding_is_to_the_nearest_and_idempotent(n: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 3, generator=generator) * 2**size
    rounded = byte_scales(scale)
    assert torch.equal(byte_scales(rounded), rounded)
    exponent = encoded_scales(scale)[1]
    every = decoded_scales(EVERY.repeat(1, 3), exponent)  # [256, 3]
    nearest = (every[:, None] - scale).abs().amin(0)
    torch.testing.assert_close((rounded - scale).abs(), nearest, rtol=1e-6, atol=0)
    large = scale > scale.amax(0) / 64
    assert ((rounded / scale - 1).abs()[large] <= 1 / 64).all()


def test_each_column_has_its_exponent_and_nothing_is_below_zero() -> None:
    scale = torch.tensor([[1.0, 1e-3, -1.0], [0.5, 2e-3, 0.0]])
    rounded = byte_scales(scale)
    torch.testing.assert_close(rounded[:, :2], scale[:, :2], rtol=1 / 64, atol=0)
    assert rounded[:, 2].tolist() == [0, 0]


def test_a_weight_with_them_is_the_weight_with_float16() -> None:
    layout = WeightLayout(
        5, 20, (Tier(1, 12), Tier(3, 8, tied=True, group_size=5)), True, scale_bits=8
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(100, spec.shape, generator=generator).to(spec.dtype)
        for name, spec in layout.tensors().items()
    }
    tensors["tier"] = torch.tensor([0] * 12 + [1] * 8, dtype=torch.uint8)
    tensors["scale_exponent"] = torch.tensor([-12, -9, -13], dtype=torch.int8)
    pw = PackedWeight(layout, tensors)
    assert tensors["scale"].dtype == torch.uint8
    assert layout.stored_bits == layout.plain().stored_bits - 8 * 5 * 3 + 8 * 3
    assert torch.equal(dequantize(pw), dequantize(pw.plain()))
    half = decoded_scales(tensors["scale"], tensors["scale_exponent"])
    assert torch.equal(expand_scales(layout, tensors)[0][:, 0, 0], half[:, 0])
    assert WeightLayout.from_dict(layout.to_dict()) == layout


def test_other_widths_are_refused() -> None:
    with pytest.raises(PackedFormatError, match="scales of 4 bits"):
        WeightLayout(4, 8, (Tier(1, 8),), scale_bits=4)
