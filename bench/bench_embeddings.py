"""What `--embed-bits` costs and gives: `python bench/bench_embeddings.py OUT TEXT`.

Rounds the embeddings of a packed checkpoint (OUT, made without --embed-bits) to 8 and to 4 bits and
compares each with the same checkpoint as it is: KL of the next-token distributions, perplexity,
bytes, and the time of the head, median over the rounds, against torch's bf16 linear.
The raw numbers go to bench/results/embeddings.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_cpu import machine, seconds
from torch import Tensor
from transformers import AutoTokenizer

import pbq
from pbq.embedding import TiedHead
from pbq.evaluate import tokenize_file
from pbq.hf import install_embeddings
from pbq.rounding import round_embeddings
from pbq_kernels import BACKENDS

TOKENS = (1, 8, 64, 512)


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """float32 [tokens, vocabulary]."""
    found: Tensor = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    return found


def rounded(out: Path, bits: int) -> Any:
    model = pbq.load(str(out))
    packed = round_embeddings(model, bits)
    return install_embeddings(model, packed, model.config.quantization_config)


def compare(own: Any, other: Any, windows: list[Tensor]) -> dict[str, float]:
    """KL(own || other) a token in nats, and the perplexity of both."""
    kl, losses = [], []
    for ids in windows:
        p, q = log_probabilities(own, ids), log_probabilities(other, ids)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        losses.append([float(-x[:-1].gather(1, ids[1:, None]).mean()) for x in (p, q)])
    means = torch.tensor(losses).mean(0).exp().tolist()
    return {"kl": statistics.mean(kl), "perplexity_before": means[0], "perplexity": means[1]}


def head_ms(model: Any, tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the head for so many tokens, by backend and in bf16, one after another."""
    head = model.get_output_embeddings()
    module = head.embedding if isinstance(head, TiedHead) else head
    dense = module.dequantize(torch.bfloat16)
    x = torch.randn(tokens, dense.shape[1], dtype=torch.bfloat16)
    calls = {"bf16": lambda: torch.nn.functional.linear(x, dense)}
    for name in ("cpu", "cpu-int8"):
        backend, form = BACKENDS[name], BACKENDS[name].prepare(module.packed())
        calls[name] = lambda backend=backend, form=form: backend.matmul(x, form)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, 0.02))
    return {name: round(1e3 * statistics.median(found), 3) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="", help="kept in the file: what else the machine did")
    target = Path(__file__).parent / "results" / "embeddings.json"
    parser.add_argument("--to", type=Path, default=target)
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = pbq.load(str(args.out))
    text = tokenize_file(AutoTokenizer.from_pretrained(args.out), args.text)
    windows = list(text.ids[: args.windows * args.window].split(args.window))
    rows = []
    for bits in (8, 4):
        other = rounded(args.out, bits)
        config = other.config.quantization_config
        layouts = [layer.layout for layer in config.embeddings.values()]
        row = {
            "embed_bits": bits,
            "stored_bits": config.embed_stored_bits,
            "mib": sum(layout.stored_bits for layout in layouts) / 8 / 2**20,
            "bf16_mib": sum(2 * layout.n * layout.k for layout in layouts) / 2**20,
            **compare(own, other, windows),
            "head_ms": {m: head_ms(other, m, args.rounds) for m in TOKENS},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    found = {"machine": machine(args.note), "model": args.out.name, "text": args.text.name}
    found |= {"windows": args.windows, "window": args.window, "rows": rows}
    args.to.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
