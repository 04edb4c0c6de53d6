"""Causal attention and its gradients on this CPU, ours and torch's: milliseconds, best of 30.

python bench/bench_attention.py [TOKENS HEADS HEADS_OF_KEYS WIDTH]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from timeit import timeit

import torch
import torch.nn.functional as F

from pbq.attention import causal, causal_by_tiles
from pbq_kernels.attention import has_tiles

ROUNDS = 30


def main() -> None:
    tokens, heads, keys, width = (int(x) for x in sys.argv[1:] or (1024, 9, 3, 64))
    query, key, value, back = (
        torch.randn(1, tokens, h, width).bfloat16().transpose(1, 2)
        for h in (heads, keys, keys, heads)
    )
    given = [x.requires_grad_() for x in (query, key, value)]
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "torch": partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True),
        "matrices": causal,
    }
    if has_tiles():
        ways["tiles"] = causal_by_tiles
    runs: dict[str, Callable[[], object]] = {}
    for name, attend in ways.items():
        runs[name] = partial(attend, *given)
        runs[f"{name}, gradients"] = partial(
            torch.autograd.grad, attend(*given), given, back, retain_graph=True
        )
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            best[name] = min(best[name], timeit(run, number=1))
    print(
        f"{torch.get_num_threads()} threads, {tokens} tokens, {heads} heads of {width} over {keys}"
    )
    for name, found in best.items():
        print(f"{name:>20} {found * 1e3:7.2f} ms")


if __name__ == "__main__":
    main()
