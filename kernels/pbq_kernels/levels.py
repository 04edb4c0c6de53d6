"""Dense weights from a byte each and a scale for each row and tier, and back: for training on CPUs.

Compiled from levels.c where there is a C compiler; what a GPU or a machine without one does is up
to the caller. Every function has its slow twin here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbq_kernels.paths import compiled

# As levels.c has it.
MOST_TIERS = 16


def weights(position: Tensor, tier_of: Tensor, scale: Tensor) -> Tensor:
    """scale[r, tier_of[c]] * position[r, c], rounded to bfloat16 [n, k].

    position int8 [n, k], tier_of int32 [k], scale float32 [n, tiers], all contiguous, on the CPU,
    with `paths.compiled()`. Raises ValueError where they do not fit together.
    """
    n, k = _checked(position, tier_of, scale)
    out = scale.new_empty(n, k, dtype=torch.bfloat16)
    library = compiled()
    assert library is not None
    library.pbq_levels(
        *(position.data_ptr(), tier_of.data_ptr(), scale.data_ptr()),
        *(n, k, scale.shape[1], out.data_ptr(), _threads(position)),
    )
    return out


def weights_naive(position: Tensor, tier_of: Tensor, scale: Tensor) -> Tensor:
    """`weights` in torch."""
    return (scale[:, tier_of.long()] * position).bfloat16()


def gradients(position: Tensor, tier_of: Tensor, gradient: Tensor, tiers: int) -> Tensor:
    """Of a scale [n, tiers], float32: the sum over its tier of gradient * position.

    gradient bfloat16 [n, k]: of `weights`. The rest as there; results do not depend on the threads.
    """
    out = position.new_empty(len(position), tiers, dtype=torch.float32)
    n, k = _checked(position, tier_of, out)
    if gradient.shape != position.shape or gradient.dtype != torch.bfloat16:
        raise ValueError(f"gradient: {gradient.dtype} {tuple(gradient.shape)}, not bfloat16 {n, k}")
    gradient = gradient.contiguous()
    library = compiled()
    assert library is not None
    library.pbq_levels_gradient(
        *(position.data_ptr(), tier_of.data_ptr(), gradient.data_ptr()),
        *(n, k, tiers, out.data_ptr(), _threads(position)),
    )
    return out


def gradients_naive(position: Tensor, tier_of: Tensor, gradient: Tensor, tiers: int) -> Tensor:
    """`gradients` in torch."""
    product = (gradient.float() * position).T
    return product.new_zeros(tiers, len(position)).index_add(0, tier_of.long(), product).T


def _checked(position: Tensor, tier_of: Tensor, scale: Tensor) -> tuple[int, int]:
    """n and k; the kernels read what these say, so nothing else may pass."""
    n, k = position.shape
    tiers = scale.shape[1]
    wanted = (
        (position, "position", torch.int8, (n, k)),
        (tier_of, "tier_of", torch.int32, (k,)),
        (scale, "scale", torch.float32, (n, tiers)),
    )
    for x, name, dtype, shape in wanted:
        if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
            raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)}, not contiguous {dtype} {shape}")
    if tiers > MOST_TIERS:
        raise ValueError(f"{tiers} tiers, {MOST_TIERS} at most")
    return n, k


def _threads(position: Tensor) -> int:
    return torch.get_num_threads() if position.numel() > 2**15 else 1
