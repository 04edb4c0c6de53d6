"""The loss of distillation, compiled and in torch: milliseconds for 1,024 tokens, best of ten.

python bench/bench_divergence.py [VOCABULARY]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from timeit import repeat

import torch

from pbq_kernels.divergence import divergence, divergence_naive

TOKENS = 1024


def milliseconds(run: Callable[[], object]) -> float:
    return min(repeat(run, number=1, repeat=10)) * 1e3


def main() -> None:
    vocabulary = int(sys.argv[1]) if len(sys.argv) > 1 else 49152
    student, target = (3 * torch.randn(TOKENS, vocabulary).bfloat16() for _ in range(2))
    print(f"{torch.get_num_threads()} threads, {TOKENS} x {vocabulary}")
    for gradient in (False, True):
        own, twin = (
            milliseconds(partial(find, student, target, gradient=gradient))
            for find in (divergence, divergence_naive)
        )
        print(f"{'with' if gradient else 'without'} gradient: {own:.0f} ms, in torch {twin:.0f} ms")


if __name__ == "__main__":
    main()
