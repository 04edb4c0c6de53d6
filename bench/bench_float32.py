"""What CPUs without bfloat16 gain by way of float32, and the rates of AVX2's kernels.

    python bench/bench_float32.py

First torch's bfloat16 products and gradients against ours (pbq.bfloat16, pbq.attention), in ms of
1,024 tokens, with as many threads as torch takes; then, on one thread, what the rates of
pbq_kernels.cpu rest on, in 1e9 a second. The best of several calls: other jobs only ever slow one
down. docs/kernels.md quotes both.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bench_cpu import packed_weight
from torch import Tensor

from pbq.attention import causal_by_float32
from pbq.bfloat16 import multiplies_bfloat16, product
from pbq_kernels import cpu
from pbq_kernels.cpu import CpuBackend

N, K, TOKENS = 1536, 576, 1024
SIDE = 2048


def best(call: Callable[..., object], *given: object) -> float:
    """Seconds."""
    call(*given)
    least = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        call(*given)
        least = min(least, time.perf_counter() - started)
    return least


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def gradients(y: Tensor, x: Sequence[Tensor]) -> None:
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)


def products() -> None:
    x, weight, back = drawn(TOKENS, K), drawn(N, K), drawn(TOKENS, N)
    given = {"y": (x, weight.T), "gradient of x": (back, weight), "of the weight": (back.T, x)}
    seconds = {name: (best(torch.mm, *pair), best(product, *pair)) for name, pair in given.items()}
    heads = [drawn(1, h, TOKENS, 64).requires_grad_() for h in (9, 3, 3)]
    torchs = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    ours = causal_by_float32(*heads)
    seconds["attention's, 9 heads"] = best(gradients, torchs, heads), best(gradients, ours, heads)
    for name, (before, after) in seconds.items():
        print(f"{name:22}{1e3 * before:8.0f} ms {1e3 * after:8.0f} ms")


def rates() -> None:
    torch.set_num_threads(1)
    dense = torch.randn(SIDE, SIDE)
    for mix, m in itertools.product(("1 bit", "trellises, 0-4"), (1, 4, 64, 512)):
        weight = CpuBackend("cpu").prepare(packed_weight(SIDE, SIDE, mix))
        x, y = torch.randn(m, SIDE), torch.empty(m, SIDE)
        row = f"{mix:15}{m:4} tokens"
        given = {"exact": (x, "exact"), "of bf16": (x.bfloat16(), "exact"), "int8": (x, "int8")}
        for name, (tokens, mode) in given.items():
            took = best(cpu._look_up, tokens, weight, weight.address, cpu._MODES[mode], m, y)
            row += f"  {name} {m * weight.bits / 1e9 / took:6.1f}"
        if weight.floats:
            took = best(cpu._multiply_as_floats, x, weight, weight.address, y)
            row += f"  floats.c {y.numel() * SIDE / 1e9 / took:6.1f}"
        print(f"{row}  torch float32 {y.numel() * SIDE / 1e9 / best(torch.mm, x, dense.T):6.1f}")


if __name__ == "__main__":
    print(f"torch multiplies bfloat16 here: {multiplies_bfloat16()}; torch, ours")
    products()
    rates()
