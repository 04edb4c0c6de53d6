"""What sampling the model's own text costs: `python bench/bench_sampling.py MODEL`.

Tokens as `--calib self` samples them and the plain way (transformers' own cache and attention, one
cumulative sum over the vocabulary) in turn, behind documents of four lengths. Seconds are the
processor's, so that other work on the machine counts little. The last two lines split them by
operation, behind the longest documents.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import Cache

from pbq.models import cache_name, compute_dtype, load_model
from pbq.own_text import DOCUMENT, _attention_over_room, _draw, _make_room
from pbq.sources import resolve_source

# In the middle of what a cache has room for, four times over a document
LENGTHS = (28, 92, 156, 220)


def seconds(call: Callable[..., Any], *given: Any) -> float:
    started = time.process_time()
    call(*given)
    return time.process_time() - started


def grown(model: Any, token: Tensor, length: int) -> Cache:
    """Keys and values of `length` tokens, all of them those of the first."""
    cache: Cache = model(token, use_cache=True)[cache_name(model)]
    for i, layer in enumerate(cache.layers):
        cache.update(*(x.expand(-1, -1, length - 1, -1) for x in (layer.keys, layer.values)), i)
    return cache


def sampled(model: Any, token: Tensor, cache: Cache, generator: torch.Generator) -> Tensor:
    """One token more, as `sample_from_model` makes it."""
    with _attention_over_room():
        out = model(token, use_cache=True, **{cache_name(model): cache})
    return _draw(out.logits[:, -1], generator, 0)


def plain(model: Any, token: Tensor, cache: Cache, generator: torch.Generator) -> Tensor:
    out = model(token, use_cache=True, **{cache_name(model): cache})
    total = out.logits[:, -1].float().softmax(-1).cumsum(-1)
    drawn = torch.rand(len(total), 1, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, drawn, right=True).clamp_max(total.shape[1] - 1)


def split(call: Callable[..., Any], *given: Any, shown: int = 8) -> list[str]:
    """Shares of the processor's time, by operation."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call(*given)
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [f"{row.key} {row.self_cpu_time_total / total:.0%}" for row in rows[:shown]]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = resolve_source(str(args.model))
    model, _ = load_model(source, compute_dtype(source, torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(1000, (args.documents, 1), generator=generator)
    medians = []
    for length in LENGTHS:
        caches = {call: grown(model, token, length) for call in (sampled, plain)}
        _make_room(caches[sampled], DOCUMENT)
        pairs = [
            [seconds(call, model, token, cache, generator) for call, cache in caches.items()]
            for _ in range(args.rounds + 1)
        ][1:]
        own, other = (statistics.median(times) for times in zip(*pairs, strict=True))
        medians.append((own, other))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{length} tokens: {own:.3f} s, plain {other:.3f} s, {ratio:.2f} times", flush=True)
    rates = [args.documents / statistics.mean(times) for times in zip(*medians, strict=True)]
    print(f"{rates[0]:.0f} tokens a second, plain {rates[1]:.0f}: {rates[0] / rates[1]:.2f} times")
    for call, cache in caches.items():
        print(f"{call.__name__}:", *split(call, model, token, cache, generator), sep="  ")


if __name__ == "__main__":
    main()
