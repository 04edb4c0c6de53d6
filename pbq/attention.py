"""Causal attention on CPUs, for training and calibration: as products of matrices, or of tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pbq_kernels.attention import attention_back, has_tiles
from pbq_kernels.cpu import multiplies_bfloat16

# Queries taken together, with all keys up to the last of them: few enough that little is computed
# for later tokens and that what they make stays in a CPU's cache.
QUERIES = 128

# what transformers calls: (module, query, key, value, mask, ...) -> (output, weights or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]


@contextmanager
def attention_as(change: Callable[[Attention], Attention]) -> Iterator[None]:
    """Models of this process that attend with "sdpa" call `change` of what they called before."""
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = change(usual)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


@contextmanager
def fast_attention() -> Iterator[None]:
    """Whole texts in bfloat16 on a CPU are attended to in a third of the time that torch takes.

    With AMX torch takes 3.6 ms for 1,024 tokens, 9 heads of 64, but 21 for their gradients: there
    these alone are made here, in 6. On CPUs that cannot multiply bfloat16 these take an eighth of
    torch's time, by way of float32. Masks, caches, dropout and other dtypes are left to torch.
    Not for what is scored: without AMX weights are rounded to bfloat16 before they are
    exponentiated, as in transformers' "eager", which moves the logits of a bfloat16 model by a
    fraction of what bfloat16 does.
    """

    def instead_of(usual: Attention) -> Attention:
        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,  # by this name: some models give it as a keyword
            **more: Any,
        ) -> tuple[Tensor, Tensor | None]:
            plain = _plain(module, query, key, attention_mask, more)
            ours = _ours(query, key, value) if plain else None
            if ours is None:
                return usual(module, query, key, value, attention_mask, **more)
            return ours(query, key, value, more.get("scaling")).transpose(1, 2), None

        return attend

    with attention_as(instead_of):
        yield


def _plain(module: nn.Module, query: Tensor, key: Tensor, mask: Any, more: dict[str, Any]) -> bool:
    """Is it causal attention within one text, and nothing else?"""
    causal = more.get("is_causal")
    return (
        mask is more.get("position_bias") is more.get("softcap") is more.get("s_aux") is None
        and more.get("cache") is None
        and not more.get("dropout")
        and (getattr(module, "is_causal", True) if causal is None else bool(causal))
        and query.shape[2] == key.shape[2] > 1
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
    )


def _ours(query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Tensor] | None:
    """What is faster on this CPU than torch's own, if anything is."""
    if not torch_has_tiles() and multiplies_bfloat16():
        return causal
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if not trained or query.shape[-1] != value.shape[-1] or not _torch_tells_sums():
        return None
    if not torch_has_tiles():
        return causal_by_float32
    return causal_by_tiles if has_tiles() else None


@cache
def torch_has_tiles() -> bool:
    """Does torch multiply bfloat16 by AMX on this CPU?"""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@cache
def _torch_tells_sums() -> bool:
    """Has torch the attention that `causal_by_tiles` starts with?

    Before 2.9 or 2.10 it took keys to have as many heads as queries, and read beyond them.
    """
    known = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return known and torch.__version__ >= "2.10"


def causal_by_tiles(
    query: Float[Tensor, "b h L d"],
    key: Float[Tensor, "b g L d"],
    value: Float[Tensor, "b g L d"],
    scaling: float | None = None,
) -> Float[Tensor, "b h L d"]:
    """`causal` as torch makes it where there is AMX, with gradients of attention.c."""
    return _torchs(query, key, value, scaling, attention_back)


def causal_by_float32(
    query: Float[Tensor, "b h L d"],
    key: Float[Tensor, "b g L d"],
    value: Float[Tensor, "b g L d"],
    scaling: float | None = None,
) -> Float[Tensor, "b h L d"]:
    """`causal` as torch makes it, with torch's own gradients of float32."""
    return _torchs(query, key, value, scaling, _back_by_float32)


def _back_by_float32(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    gradient: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_back`."""
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    wide = (x.float() for x in (gradient, query, key, value, out))
    of_query, of_key, of_value = back(*wide, sums, 0.0, True, scale=scaling)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _torchs(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, back: Callable[..., Any]
) -> Tensor:
    """back: of query, key, value, out, sums, gradient and scaling, the three gradients."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Torchs.apply(query, key, value, scaling, back)
    assert isinstance(out, Tensor)
    return out


class _Torchs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, back: Any
    ) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # it takes numbers of a head to lie side by side, and does not look
        query, key, value = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)
        )
        out, sums = attend(query, key, value, 0.0, True, scale=scaling)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.scaling, ctx.back = scaling, back
        assert isinstance(out, Tensor)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        found = ctx.back(query, key, value, out, sums, gradient, ctx.scaling)
        return *found, None, None


def causal(
    query: Float[Tensor, "b h L d"],
    key: Float[Tensor, "b g L d"],
    value: Float[Tensor, "b g L e"],
    scaling: float | None = None,
) -> Float[Tensor, "b h L e"]:
    """softmax(scaling · query keyᵀ) value over the tokens before each one; g divides h.

    As torch's scaled_dot_product_attention(is_causal=True, enable_gqa=True), whose tiles are too
    small for the matrix products of a CPU to be fast.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.unflatten(1, (key.shape[1], -1))
    out = _Causal.apply(grouped, key, value, scaling)
    assert isinstance(out, Tensor)
    return out.flatten(1, 2)


class _Causal(torch.autograd.Function):
    """query [b, g, n, L, d]; the attention weights are made again for the gradients, not kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for start in range(0, query.shape[3], QUERIES):
            some = slice(start, start + QUERIES)
            _, weights = _weights(query, key, some, scaling)
            out[:, :, :, some] = (weights @ value[:, :, : weights.shape[-1]]).view_as(
                out[:, :, :, some]
            )
        ctx.save_for_backward(query, key, value, out)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        # of the softmax: Σ over keys of weight · gradient, token by token
        wide = torch.promote_types(query.dtype, torch.float32)
        inner = (gradient.to(wide) * out.to(wide)).sum(-1, keepdim=True).to(query.dtype)
        by_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        by_key, by_value = torch.zeros_like(key), torch.zeros_like(value)
        for start in range(0, query.shape[3], QUERIES):
            some = slice(start, start + QUERIES)
            scaled, weights = _weights(query, key, some, ctx.scaling)
            seen = slice(0, weights.shape[-1])
            back = gradient[:, :, :, some].flatten(2, 3)
            by_value[:, :, seen] += weights.mT @ back
            by_score = (back @ value[:, :, seen].mT).sub_(inner[:, :, :, some].flatten(2, 3))
            by_score.mul_(weights)
            by_query[:, :, :, some] = (
                (by_score @ key[:, :, seen]).mul_(ctx.scaling).view_as(by_query[:, :, :, some])
            )
            by_key[:, :, seen] += by_score.mT @ scaled
        return by_query, by_key, by_value, None


def _weights(query: Tensor, key: Tensor, some: slice, scaling: float) -> tuple[Tensor, Tensor]:
    """Of some tokens' queries of all heads that share a key [b, g, n · tokens, ...].

    Scaled they are, and what they give each key up to the last token's.
    """
    own = query[:, :, :, some]
    tokens = own.shape[3]
    scaled = (own * scaling).flatten(2, 3)
    scores = scaled @ key[:, :, : some.start + tokens].mT
    later = torch.full((tokens, tokens), -math.inf, dtype=scores.dtype).triu(1)
    scores.unflatten(2, (-1, tokens))[..., some.start :] += later
    return scaled, scores.softmax(-1)
