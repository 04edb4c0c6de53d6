"""The gradients of causal attention in bfloat16, by the tiles of a CPU (AMX): attention.c."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from pbq_kernels.cpu import UNITS
from pbq_kernels.paths import compiled


@cache
def has_tiles() -> bool:
    """Can this CPU multiply tiles, and is what makes use of it compiled?"""
    library = compiled()
    return library is not None and UNITS[library.pbq_unit()] == "amx"


def attention_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    back: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query [b, h, L, d], key and value [b, g, L, d] of causal attention; g divides h.

    out [b, h, L, d] = softmax(scaling · query keyᵀ) value over each token and those before it, sums
    [b, h, L], float32, the logarithm of what its softmax divides by, back the loss's gradient by
    out. bfloat16 on the CPU, for where `has_tiles`. Raises ValueError where shapes do not fit.
    """
    (b, h, length, d), g = query.shape, key.shape[1]
    given, of_query, of_key = [query, key, value, out, back], (b, h, length, d), (b, g, length, d)
    shapes = [tuple(x.shape) for x in given]
    if shapes != [of_query, of_key, of_key, of_query, of_query] or h % g or not query.numel():
        raise ValueError(f"attention: {shapes} do not fit")
    if sums.shape != query.shape[:3]:
        raise ValueError(f"sums: {tuple(sums.shape)}, of {tuple(query.shape)}")
    on_cpu = all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in given)
    library = compiled()
    if not (on_cpu and library is not None and has_tiles()):
        raise ValueError("attention: needs bfloat16 on a CPU with tiles")
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in given]
    sums = sums.float().contiguous()
    found = tuple(x.new_empty(x.shape) for x in given[:3])
    steps = [step for x in given for step in x.stride()[:3]]
    failed = library.pbq_attention_back(
        (ctypes.c_void_p * 5)(*(x.data_ptr() for x in given)),
        (ctypes.c_int64 * 15)(*steps),
        sums.data_ptr(),
        (ctypes.c_int64 * 5)(b, h, g, length, d),
        *(scaling, *(x.data_ptr() for x in found), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for the gradients of attention to {length} tokens")
    return found[0], found[1], found[2]


def attention_back_naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    back: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_back` in torch, all weights at once, on any device and in any dtype."""
    shared = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (key, value))
    scores = (query @ k.mT) * scaling
    later = torch.full_like(scores[0, 0], -math.inf).triu(1)
    weights = (scores + later - sums[..., None]).exp()
    by_score = weights * (back @ v.mT - (back * out).sum(-1, keepdim=True)) * scaling

    def together(x: Tensor) -> Tensor:
        return x.unflatten(1, (key.shape[1], shared)).sum(2)

    return by_score @ k, together(by_score.mT @ query), together(weights.mT @ back)
