"""Whole models on the CPU, packed against bf16: `python bench/bench_whole.py OUT`.

OUT is a packed checkpoint, measured as it is; beside it models of random weights in the shapes of
Llama-3.2-1B, packed at 1.6 bits as the default method packs, with embeddings in bf16 and at 8 bits.
`pbq bench` measures each against random bf16 weights of its shapes, with one thread and with two,
every model in a process of its own. The raw numbers go to bench/results/whole.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_cpu import MIXES, machine, packed_weight
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pbq.benchmark import Settings, compare
from pbq.hf import PbqConfig, install, install_embeddings
from pbq.rounding import round_embeddings

RESULTS = Path(__file__).resolve().parent / "results" / "whole.json"
# Of meta-llama/Llama-3.2-1B; the head is tied.
SHAPES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
MIX = "trellises, 0-4"


@torch.no_grad()
def write_random(folder: Path, shapes: dict[str, Any], mix: str = MIX, embed_bits: int = 0) -> int:
    """A packed checkpoint of random weights; only embeddings and norms are ever dense.

    Returns the bytes of the packed linears.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shapes), dtype=torch.bfloat16)
    packed = {
        f"model.layers.{name}": (packed_weight(m.out_features, m.in_features, mix, 0.2), None)
        for name, m in model.model.layers.named_modules()
        if isinstance(m, nn.Linear)
    }
    model = install(model, packed, PbqConfig("random", 1.6, provenance={"source": "random"}))
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        drawn = torch.ones(parameter.shape, dtype=parameter.dtype)
        if parameter.ndim == 2:
            drawn.normal_(std=0.02)
        setattr(model.get_submodule(owner), last, nn.Parameter(drawn, requires_grad=False))
    model.tie_weights()
    if embed_bits:
        rounded = round_embeddings(model, embed_bits)
        install_embeddings(model, rounded, model.config.quantization_config)
    model.save_pretrained(folder)
    return sum(pw.layout.stored_bits for pw, _ in packed.values()) // 8


def measure(label: str, path: Path, threads: Sequence[int], settings: Settings) -> list[Any]:
    rows = []
    for count in threads:
        found = compare(str(path), settings=Settings(**{**asdict(settings), "threads": count}))
        packed, dense = (asdict(speed) for speed in found.speeds)
        rows.append({"model": label, "packed": packed, "bf16": dense})
        ratio = packed["decode_tokens_per_s"] / dense["decode_tokens_per_s"]
        memory = dense["peak_memory_bytes"] / packed["peak_memory_bytes"]
        print(
            f"{label}, {count} threads: decode {packed['decode_tokens_per_s']:.1f} tokens/s "
            f"({ratio:.2f}x), prefill {packed['prefill_tokens_per_s']:.0f} "
            f"({packed['prefill_tokens_per_s'] / dense['prefill_tokens_per_s']:.2f}x), "
            f"peak {packed['peak_memory_bytes'] / 2**20:.0f} MiB ({memory:.2f}x less)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SHAPES["num_hidden_layers"])
    parser.add_argument("--note", default="", help="about the machine, into the results")
    parser.add_argument("--mix", default=MIX, choices=list(MIXES), help="of the 1B-shaped models")
    parser.add_argument("--out", dest="results", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    settings = Settings(options.prompt_tokens, options.new_tokens, options.repeats)
    rows = measure(options.out.name, options.out, options.threads, settings)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    shapes = {**SHAPES, "num_hidden_layers": options.layers}
    for embed_bits in (0, 8):
        with tempfile.TemporaryDirectory() as folder:
            write_random(Path(folder), shapes, options.mix, embed_bits)
            tokenizer.save_pretrained(folder)
            label = "1B-shaped" + (f", embeddings at {embed_bits} bits" if embed_bits else "")
            rows += measure(label, Path(folder), options.threads, settings)
    if not options.dry:
        found = {"machine": machine(options.note), "rows": rows}
        options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
