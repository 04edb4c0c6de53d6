"""Products of bfloat16 matrices on CPUs that have no unit for them: by way of float32.

There torch takes one number after the other: AVX2 machines need 6 to 80 times as long as for
float32, which multiplies a layer of 1024 tokens at their full speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pbq_kernels.cpu import multiplies_bfloat16

# Numbers that are held in float32 at once: of rows 64 MB, of columns 2 MB, which stay in a CPU's
# cache. MKL takes up to three times as long for a head in one piece.
ROWS, COLUMNS = 2**24, 2**19
# As many rows as make up for converting columns, and the other way round.
_LEAST = 256
_LINEAR = F.linear
# What else models multiply by. Products of one token are limited by memory, and left to torch.
_OTHERS = frozenset(
    {
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm),
        *(torch.bmm, Tensor.bmm, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm),
    }
)


@contextmanager
def fast_products() -> Iterator[None]:
    """Around a model's forward pass: its bfloat16 products at the speed of float32.

    Every product is rounded once, from a sum in float32; backward passes of what was made inside
    are as fast. Does nothing where the CPU multiplies bfloat16, or a GPU is at work, which would be
    waiting: looking at an operation takes 4 us.
    """
    if multiplies_bfloat16() or torch.cuda.is_initialized():
        yield
        return
    with _ByFloat32():
        yield


class _ByFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR:
            found = _linear(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        if func in _OTHERS and "out" not in kwargs and all(map(_is_ours, _tensors(args, kwargs))):
            return func(*map(_wide, args), **{k: _wide(v) for k, v in kwargs.items()}).bfloat16()
        return func(*args, **kwargs)


def _is_ours(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.is_cpu


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    return (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) else x


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """As torch's; None where that is to do it: another dtype or device, or a single token."""
    known = _is_ours(input) and _is_ours(weight) and (bias is None or _is_ours(bias))
    if not known or weight.ndim != 2 or input.numel() <= weight.shape[1]:
        return None
    found = _Linear.apply(input, weight, bias)
    assert isinstance(found, Tensor)
    return found


class _Linear(torch.autograd.Function):
    """Saves what torch's own does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        flat = x.reshape(-1, x.shape[-1])
        return product(flat, weight.T, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        back = gradients[0].reshape(-1, len(weight))
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(back, weight).view_as(x) if of_x else None,
            product(back.T, x.reshape(-1, x.shape[-1])) if of_weight else None,
            back.float().sum(0).bfloat16() if of_bias else None,
        )


def product(
    a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "m n"]:
    """a @ b + bias of bfloat16, summed in float32 and rounded once, in parts (ROWS, COLUMNS)."""
    (m, k), n = a.shape, b.shape[1]
    rows, columns = max(_LEAST, ROWS // k), max(_LEAST, COLUMNS // k)
    out = a.new_empty(m, n)
    for top in range(0, m, rows):
        some = a[top : top + rows].float()
        for left in range(0, n, columns):
            part = b[:, left : left + columns].float()
            if bias is None:
                found = some @ part
            else:
                found = torch.addmm(bias[left : left + columns].float(), some, part)
            out[top : top + rows, left : left + columns] = found
    return out
