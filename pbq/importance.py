"""How much each token counts in the error of a linear: what of it reaches the block's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pbq.models import run_block

# Tokens whose output is zero would otherwise count without limit.
LEAST_ENERGY = 1e-6


def token_importance(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    call: Any,
    hidden: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output y [b, L, d], and for each linear what tokens count, float32 [tokens].

    That is of mean 1, Σ over outputs s of |∂y_s/∂z_t|² / |y_s|.

    z_t is what the linear gives for token t, y_s the block's output for token s: an error in z_t
    matters as far as it changes outputs. A token that all others attend to (an attention sink, Xiao
    et al. 2024) may have two thirds of all importance in the value projection though its own
    output, of a hundred times the usual norm, hardly counts. Outputs are divided by the root of
    their norm: of errors relative to the norm itself a sink's own would be nothing, though later
    blocks depend on it, of absolute ones everything. One random ±1 for each entry of y, sent
    backwards, has the sum for its expected square (Hutchinson), and a token's outputs are hundreds
    to average over. hidden: [b, L, d], one batch.
    """
    outputs: dict[str, Tensor] = {}
    handles = [
        linear.register_forward_hook(lambda m, args, out, n=name: outputs.__setitem__(n, out))
        for name, linear in linears.items()
    ]
    try:
        with torch.enable_grad():
            y = run_block(block, hidden.detach().requires_grad_(), call)
    finally:
        for handle in handles:
            handle.remove()
    signs = _random_signs(y.shape, generator)
    energy = y.detach().float().pow(2).mean(-1, keepdim=True) + LEAST_ENERGY
    back = (signs.to(y.device) / energy.sqrt().sqrt()).to(y.dtype)
    found = torch.autograd.grad(y, list(outputs.values()), back, allow_unused=True)
    return y.detach(), {
        name: _of_mean_one(out if gradient is None else gradient, gradient is None)
        for (name, out), gradient in zip(outputs.items(), found, strict=True)
    }


def _random_signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """±1, float32; eight from each random byte, in a third of the time of one from each."""
    count = shape.numel()
    drawn = torch.randint(256, (-(-count // 8), 1), generator=generator, dtype=torch.uint8)
    bits = (drawn >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].view(shape) * 2.0 - 1


@torch.no_grad()
def _of_mean_one(gradient: Tensor, unused: bool) -> Tensor:
    energy = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).pow(2).flatten()
    mean = energy.mean()
    # outputs that nothing depends on: every token alike
    return torch.ones_like(energy) if unused or mean == 0 else energy / mean
