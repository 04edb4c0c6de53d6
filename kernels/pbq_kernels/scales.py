"""Scales in a byte: six significant bits and an exponent of three, and one exponent for all rows.

    scale[n] = (32 + low five bits of code) * 2**(high three bits) * 2**exponent,    code 0: 0

Scales of two rows differ by less than 2**8, and the 1.6 % at most that they are rounded by (0.6 %
on average) is nothing beside what signs leave of a weight. All of it is exact in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_EXPONENT, _MOST_EXPONENT = -24, 3  # of what float16 holds


def decoded_scales(codes: Tensor, exponent: Tensor) -> Tensor:
    """uint8 [n, S], int8 [S] -> float32 [n, S]."""
    return _values(codes.device)[codes.long()] * _power(exponent)


def encoded_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes uint8 [n, S] of float32 [n, S], and the exponent int8 [S] of each column.

    What is below zero becomes zero.
    """
    largest = scale.amax(0) if len(scale) else scale.new_zeros(scale.shape[1])
    # the largest has six bits above 2**12 * 2**exponent, or rounds up to the next power
    exponent = torch.frexp(largest * (1 + 2.0**-7)).exponent - 13
    exponent = exponent.clamp(_LEAST_EXPONENT, _MOST_EXPONENT).to(torch.int8)
    values = _values(scale.device)
    middle = (values[1:] + values[:-1]) / 2
    position = (scale / _power(exponent)).contiguous()
    return torch.searchsorted(middle, position).to(torch.uint8), exponent


def byte_scales(scale: Tensor) -> Tensor:
    """Scales [n, ...] as they come back: rounded together over the rows."""
    flat = scale.flatten(1)
    return decoded_scales(*encoded_scales(flat)).reshape(scale.shape)


def _values(device: torch.device) -> Tensor:
    """The value of each code at exponent 0, rising, float32 [256]."""
    code = torch.arange(256, device=device)
    return (32.0 + (code & 31)) * 2.0 ** (code >> 5) * (code > 0)


def _power(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int())
