"""The GPU kernels against torch's bf16 linear, and a whole model: `python bench/bench_gpu.py`.

Correctness first: awkward shapes and every timed weight, against float64. Then CUDA graphs that
multiply with one copy of a weight after another, together four times the L2 cache, so that weights
come from memory as they do in a model; the bf16 weights rotate in the same way. The copy bandwidth
measured in the same run is the roofline. Last, a model of Llama-2-7B's shapes with random weights
decodes in a CUDA graph, packed and in bf16. The numbers go to bench/results/gpu.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from pbq_kernels import BACKENDS, PackedWeight, Tier, WeightLayout
from pbq_kernels.reference import dequantize
from pbq_kernels.scales import encoded_scales

# (out_features, in_features) of the linears of a block.
MODELS = {
    "Llama-2-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-3-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Qwen3-32B": ((8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600)),
}
TOKENS = (1, 4, 16, 64, 512)
UNEVEN = {"tied": True, "trellis": 12, "uneven": True}
# Tiers by share of the columns; the last takes the rest. With trellises: as the default makes them.
MIXES: dict[str, tuple[tuple[float, dict[str, Any]], ...]] = {
    "1 bit": ((1.0, {"planes": 1}),),
    "1.61 bits, 1+4": ((0.82, {"planes": 1}), (0.18, {"planes": 4, "tied": True, "offset": True})),
    "1.6 bits, 0-4": (
        *((0.09, {"planes": 0}), (0.48, {"planes": 1}), (0.24, {"planes": 2})),
        *((0.12, {"planes": 3}), (0.07, {"planes": 4})),
    ),
    "trellises, 0-4": (
        (0.09, {"planes": 0}),
        *((share, {"planes": p, **UNEVEN}) for p, share in ((1, 0.48), (2, 0.24), (3, 0.12))),
        (0.07, {"planes": 4, "tied": True, "trellis": 12}),
    ),
    "2 bits, groups of 128": ((1.0, {"planes": 2, "offset": True, "group_size": 128}),),
}
AWKWARD = ((33, 577), (65, 1420), (130, 4097))
AWKWARD_TOKENS = (1, 3, 17, 33, 65)
MODEL_MIX = "trellises, 0-4"
BACKEND = BACKENDS["triton"]
L2_TIMES = 4
REPLAYS = 20


def packed_weight(n: int, k: int, mix: str, seed: int = 0) -> PackedWeight:
    """Random bits and scales on the GPU, columns shuffled."""
    generator = torch.Generator("cuda").manual_seed(seed)
    # whole bytes, where k allows: random bits in the padding would have the module keep them
    counts = [8 * round(share * k / 8) for share, _ in MIXES[mix]]
    counts[-1] += k - sum(counts)
    tiers = tuple(
        Tier(columns=count, **kind) for count, (_, kind) in zip(counts, MIXES[mix], strict=True)
    )
    layout = WeightLayout(n, k, tiers, scale_bits=8 if any(t.uneven for t in tiers) else 16)
    owner = torch.repeat_interleave(torch.tensor(counts)).byte().cuda()

    def halves(count: int) -> Tensor:
        return (0.02 * torch.rand(n, count, generator=generator, device="cuda") + 0.01).half()

    drawn = {
        "weight": torch.randint(
            256, (n, layout.row_bytes), dtype=torch.uint8, generator=generator, device="cuda"
        ),
        "scale": halves(sum(tier.scales for tier in tiers)),
        "offset": halves(sum(tier.offsets for tier in tiers)),
        "tier": owner[torch.randperm(k, generator=generator, device="cuda")],
    }
    if layout.scale_bits == 8:
        drawn["scale"], drawn["scale_exponent"] = encoded_scales(drawn["scale"].float())
    return PackedWeight(layout, {name: drawn[name] for name in layout.tensors()})


def error(pw: PackedWeight, prepared: Any, m: int, dtype: torch.dtype) -> float:
    """Relative error against float64. Memory that is not written reads as NaN."""
    x = torch.randn(m, pw.layout.k, device="cuda", dtype=torch.float64).to(dtype)
    expected = x.double() @ dequantize(pw, torch.float64).T
    y = BACKEND.matmul(x, prepared).double()
    return float((y - expected).norm() / expected.norm())


def check(pw: PackedWeight, tokens: Sequence[int]) -> None:
    """Raise AssertionError where a product is not as exact as its dtype."""
    prepared = BACKEND.prepare(pw)
    for m, dtype in itertools.product(tokens, (torch.float16, torch.bfloat16)):
        found = error(pw, prepared, m, dtype)
        # NaN fails too
        assert found < 2 * torch.finfo(dtype).eps, (pw.layout, m, dtype, found)


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of one call, from replays of a graph that makes them all in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for replay in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(1e-3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_seconds([lambda: target.copy_(source)] * 4)


def copies(nbytes: int) -> int:
    """So many that none is in a cache when its turn comes; AMD's last cache (256 MB) is no L2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    least = 2**30 if torch.version.hip else L2_TIMES * l2
    return math.ceil(least / nbytes) + 1


def measure(
    n: int, k: int, mix: str, tokens: Sequence[int], bandwidth: float
) -> Iterator[dict[str, Any]]:
    """One row for each number of tokens, bfloat16."""
    pw = packed_weight(n, k, mix)
    check(pw, tokens)
    first = BACKEND.prepare(pw)
    nbytes = first.words.nbytes + first.scales.nbytes
    packed = [first, *(BACKEND.prepare(pw) for _ in range(copies(nbytes) - 1))]
    dense = [
        torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies(2 * n * k))
    ]
    for m in tokens:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        seconds = graph_seconds([partial(BACKEND.matmul, x, w) for w in packed])
        bf16_seconds = graph_seconds([partial(nn.functional.linear, x, w) for w in dense])
        yield {
            "n": n,
            "k": k,
            "mix": mix,
            "bits_in_memory": round(8 * nbytes / (n * k), 3),
            "m": m,
            "us": round(1e6 * seconds, 2),
            "bf16_us": round(1e6 * bf16_seconds, 2),
            "ratio": round(bf16_seconds / seconds, 2),
            "roofline_percent": round(100 * nbytes / bandwidth / seconds, 1),
        }


# --- a whole model -------------------------------------------------------------------------------


def llama_2_7b(mix: str | None) -> nn.Module:
    """Random weights in the shapes of Llama-2-7B; with a mix, the linears of its blocks packed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pbq.linear import PackedLinear

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if mix is None:
        return model
    linears = [name for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
    for seed, name in enumerate(linears):
        old = model.model.layers.get_submodule(name)
        pw = packed_weight(old.out_features, old.in_features, mix, seed)
        model.model.layers.set_submodule(name, PackedLinear.from_packed(pw))
    gc.collect()
    torch.cuda.empty_cache()
    return model


@torch.no_grad()
def decode_seconds(model: nn.Module, prompt: int = 128) -> float:
    """Median seconds of a greedy step with a static cache, replayed from a CUDA graph."""
    from transformers import StaticCache

    from pbq.models import cache_name

    cache = StaticCache(config=model.config, max_cache_len=1024)
    kept = {cache_name(model): cache}
    ids = torch.randint(model.config.vocab_size, (1, prompt), device="cuda")
    token = model(ids, **kept).logits[:, -1:].argmax(-1)

    def step() -> None:
        # the cache counts its tokens on the GPU: every replay is one position further
        token.copy_(model(token, **kept).logits.argmax(-1))

    return graph_seconds([step])


def measure_model() -> dict[str, Any]:
    found: dict[str, Any] = {"model": "Llama-2-7B shapes, random weights", "mix": MODEL_MIX}
    for name, mix in (("bf16", None), ("packed", MODEL_MIX)):
        model = llama_2_7b(mix)
        torch.cuda.reset_peak_memory_stats()
        found[f"{name}_tokens_per_s"] = round(1 / decode_seconds(model), 1)
        found[f"{name}_peak_mb"] = torch.cuda.max_memory_allocated() // 10**6
        del model
        gc.collect()
        torch.cuda.empty_cache()
    found["ratio"] = round(found["packed_tokens_per_s"] / found["bf16_tokens_per_s"], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--no-model", action="store_true", help="leave the whole model out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu: torch sees no CUDA GPU here; nothing was measured")
    # empty memory is NaN: what a kernel leaves out shows up in `check`
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS refuses to be deterministic
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    for (n, k), mix in itertools.product(AWKWARD, args.mixes):
        check(packed_weight(n, k, mix), AWKWARD_TOKENS)
    print(f"{len(AWKWARD) * len(args.mixes)} awkward weights are right; timing", flush=True)
    torch.use_deterministic_algorithms(False)
    bandwidth = copy_bandwidth()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}: copies {bandwidth / 1e12:.2f} TB/s")
    print(f"{'weight':>11} {'mix':22} {'m':>4}       us  bf16 us   ratio  roofline")
    rows = []
    shapes = dict.fromkeys(shape for name in args.models for shape in MODELS[name])
    for (n, k), mix in itertools.product(shapes, args.mixes):
        for row in measure(n, k, mix, args.tokens, bandwidth):
            rows.append(row)
            print(
                f"{n:>5}x{k:<5} {mix:22} {row['m']:>4} {row['us']:>8} {row['bf16_us']:>8} "
                f"{row['ratio']:>6}x {row['roofline_percent']:>7} %",
                flush=True,
            )
    machine = {
        "gpu": gpu,
        "copy_bytes_per_s": round(bandwidth),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    whole = None if args.no_model else measure_model()
    print(whole)
    args.out.write_text(
        json.dumps({"machine": machine, "rows": rows, "model": whole}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
