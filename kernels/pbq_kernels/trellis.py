"""Trellis-coded tiers: one more plane of levels than stored bits, read down the rows of a column.

A tier of p stored planes with a trellis has the equally spaced levels of p + 1 tied planes, but not
every sequence of them. The lowest stored plane is a column's path u; the two low planes of the
levels follow from it and the rows above, the others are stored as they are:

    plane 0 of row r = XOR of u[r - i], bit i of h0;  plane 1 = XOR of u[r - i], bit i of h1

with u = 0 above the first row. Which levels a row may take thus depends on the `memory` rows before
it; there are twice as many of them, and the nearest path leaves 16 to 23 % less squared error of a
Gaussian than plain levels of as many bits. This is trellis-coded quantization (Marcellin and
Fischer 1990) with codes like Ungerboeck's (1982, table I). A column is a sequence by itself, so
error feedback from column to column goes on as without a trellis.

The levels need not be equally spaced: the 2**(p + 1) sums of ± a number for each plane can be put,
with the right numbers (`WEIGHTS`), where a Gaussian wants them, which takes another 1, 9 and 20 %
off its error at 1, 2 and 3 stored bits. Then the two low planes and those behind them do not give
the signs of the planes but the place of the level among all, rising; `plane_codes` has the signs.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

# (h1, h0) by memory. Bit 0 of h1 is set and h0 is a single bit, which is what `stored_codes` needs.
# The first two are Ungerboeck's, the others the best on a Gaussian of some hundred drawn at random.
POLYNOMIALS = {
    2: (0o5, 0o2),
    4: (0o23, 0o4),
    6: (0o147, 0o2),
    8: (0o615, 0o2),
    10: (0o3047, 0o2),
    12: (0o15107, 0o2),
}

# What the scale of a row is multiplied with for each plane of unevenly spaced levels, by planes:
# Lloyd's algorithm on a Gaussian, rounded to what keeps a scale of a byte exact in float16.
WEIGHTS = {2: (2, 3), 3: (13, 21, 27), 4: (13, 21, 26, 30)}


def plane_weights(planes: int, uneven: bool) -> tuple[int, ...]:
    """What the stored scale is multiplied with for each plane of tied levels."""
    return WEIGHTS[planes] if uneven else tuple(2**p for p in range(planes))


@cache
def sums(planes: int, uneven: bool) -> tuple[tuple[int, int], ...]:
    """(level, its signs) in units of a row's scale, rising; bit p of the signs: plane p is +1."""
    weights = plane_weights(planes, uneven)
    found = []
    for signs in itertools.product((0, 1), repeat=planes):
        level = sum(w if sign else -w for w, sign in zip(weights, signs, strict=True))
        found.append((level, sum(sign << p for p, sign in enumerate(signs))))
    return tuple(sorted(found))


@cache
def plane_codes(planes: int, uneven: bool, device: torch.device | str = "cpu") -> Tensor:
    """The signs of each level's planes, levels rising: uint8 [2**planes], not to be changed.

    Made once: no copy to a GPU may be recorded in a CUDA graph.
    """
    with torch.inference_mode(False):
        return torch.tensor([s for _, s in sums(planes, uneven)], dtype=torch.uint8, device=device)


def level_codes(stored: Tensor, memory: int, planes: int = 0) -> Tensor:
    """Stored codes uint8 [n, c] -> codes of the levels uint8 [n, c], a plane more.

    planes: of unevenly spaced levels, else 0.
    """
    h1, h0 = POLYNOMIALS[memory]
    path = stored & 1
    rank = (stored >> 1 << 2) | (_filtered(path, h1) << 1) | _filtered(path, h0)
    return plane_codes(planes, True, stored.device)[rank.long()] if planes else rank


def _filtered(path: Tensor, polynomial: int) -> Tensor:
    """XOR of the path [n, c] shifted down by i rows, for every bit i of the polynomial."""
    out = torch.zeros_like(path)
    for i in range(polynomial.bit_length()):
        if polynomial >> i & 1 and i < len(path):
            out[i:] ^= path[: len(path) - i]
    return out


def stored_codes(codes: Tensor, memory: int, planes: int = 0) -> Tensor:
    """Inverse of `level_codes`. Raises ValueError where a column is no path of the trellis."""
    if planes:
        codes = torch.argsort(plane_codes(planes, True, codes.device)).to(torch.uint8)[codes.long()]
    h1, h0 = POLYNOMIALS[memory]
    n, delay = len(codes), h0.bit_length() - 1
    path = torch.zeros_like(codes)
    path[: max(n - delay, 0)] = codes[delay:] & 1
    for r in range(max(n - delay, 0), n):  # what plane 0 would only tell of rows to come
        path[r] = codes[r] >> 1 & 1
        for i in range(1, min(h1.bit_length(), r + 1)):
            if h1 >> i & 1:
                path[r] ^= path[r - i]
    stored = (codes >> 2 << 1) | path
    if not torch.equal(level_codes(stored, memory), codes):
        raise ValueError("codes of a tier with a trellis are no path of it")
    return stored
