"""What sampling the model's own text costs: `python bench/bench_sampling.py MODEL`.

Samples as `--calib self` does, one batch of documents. Every so many tokens the same token is also
computed the plain way (transformers' own cache and attention, one cumulative sum over the
vocabulary) from a copy of the same keys and values. Seconds are the processor's, so that other work
on the machine counts little; the last lines split the time by operation, from torch's profiler.
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
from transformers import DynamicCache
from transformers.cache_utils import Cache

from pbq.models import compute_dtype, load_model
from pbq.own_text import DOCUMENT, _attention_over_room, _draw, _make_room
from pbq.sources import resolve_source


def seconds(call: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    started = time.process_time()
    found = call(*given)
    return time.process_time() - started, found


def sampled(model: Any, token: Tensor, cache: Cache | None, generator: torch.Generator) -> Any:
    """One token more, as `sample_from_model` makes it."""
    with _attention_over_room():
        out = model(token, past_key_values=cache, use_cache=True)
    if cache is None:
        _make_room(out.past_key_values, DOCUMENT)
    return _draw(out.logits[:, -1], generator, 0), out.past_key_values


def plain(model: Any, token: Tensor, cache: Cache, generator: torch.Generator) -> Tensor:
    out = model(token, past_key_values=cache, use_cache=True)
    total = out.logits[:, -1].float().softmax(-1).cumsum(-1)
    drawn = torch.rand(len(total), 1, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, drawn, right=True).clamp_max(total.shape[1] - 1)


def copied(cache: Cache) -> DynamicCache:
    copy = DynamicCache()
    for i, layer in enumerate(cache.layers):
        copy.update(layer.keys.clone(), layer.values.clone(), i)
    return copy


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
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--every", type=int, default=16, help="tokens between the plain ones")
    parser.add_argument("--tokens", type=int, default=DOCUMENT)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = resolve_source(str(args.model))
    model, _ = load_model(source, compute_dtype(source, torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    token, cache = torch.randint(vocabulary, (args.documents, 1), generator=generator), None
    own, other, ratios = [], [], []
    for step in range(1, args.tokens):
        before = copied(cache) if cache and step % args.every == 0 else None
        taken, (following, cache) = seconds(sampled, model, token, cache, generator)
        own.append(taken)
        if before is not None:
            other.append(seconds(plain, model, token, before, generator)[0])
            ratios.append(other[-1] / taken)
            print(f"token {step}: {taken:.3f} s, plain {other[-1]:.3f} s", flush=True)
        token = following
    rates = [args.documents / statistics.mean(times) for times in (own, other)]
    print(f"{rates[0]:.0f} tokens a second, plain {rates[1]:.0f}: {rates[0] / rates[1]:.2f} times")
    print(f"median of the pairs {statistics.median(ratios):.2f}")
    print("now:  ", *split(sampled, model, token, cache, generator), sep="  ")
    print("plain:", *split(plain, model, token, copied(cache), generator), sep="  ")


if __name__ == "__main__":
    main()
