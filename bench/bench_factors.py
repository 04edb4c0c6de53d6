"""Two factors of signs, or tiers of planes? Relative H-error of single layers at equal stored bits.

    python bench/bench_factors.py

Four layers of SmolLM2-135M-Instruct on the original model's inputs (8 x 1024 tokens of WikiText-2
validation, looked for in $PBQ_DATA/wikitext2), without compensation and before any training: what
`nanoquant` and `waterfill` make of each at 1, 1.61 and 2 bits. Into bench/results/factors.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
RESULTS = HERE / "results" / "factors.json"
LAYERS = ("1.self_attn.q_proj", "10.mlp.gate_proj", "10.mlp.down_proj", "20.self_attn.o_proj")
BITS = (1.0, 1.61, 2.0)
ROWS, LENGTH = 8, 1024


class _Enough(Exception):
    """The last layer has seen its input."""


@torch.no_grad()
def weights_and_hessians() -> dict[str, tuple[Tensor, Tensor]]:
    """W [n, k] and H = E[x xᵀ] [k, k] of each layer."""
    from bench_quality import data_dir
    from demo_model import demo_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pbq.hessian import Hessian

    source = str(demo_model())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    text = (data_dir() / "wiki.valid.txt").read_text(encoding="utf-8")[: 16 * ROWS * LENGTH]
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids[0]
    modules = {name: model.get_submodule(f"model.layers.{name}") for name in LAYERS}
    sums = {name: Hessian(module.in_features) for name, module in modules.items()}

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor]) -> None:
            sums[name].update(args[0])
            if name == LAYERS[-1]:
                raise _Enough

        return hook

    for name, module in modules.items():
        module.register_forward_pre_hook(note(name))
    for row in ids[: ROWS * LENGTH].view(ROWS, LENGTH):
        try:
            model(row[None])
        except _Enough:
            continue
    return {name: (m.weight.float(), sums[name].mean()) for name, m in modules.items()}


def measure(method_name: str, bits: float, name: str, W: Tensor, H: Tensor) -> dict[str, Any]:
    from pbq import methods
    from pbq.allocate import ChannelStats, PlanInput
    from pbq.config import QuantConfig
    from pbq.hessian import proxy_loss

    config = QuantConfig(method=method_name, bits=bits)
    method = methods.get(method_name, config)
    x_sq = H.diagonal()
    layers = {name: PlanInput(W, ChannelStats(x_sq, x_sq.sqrt(), x_sq.sqrt()))}
    plan = method.plan(layers, config)[name]
    started = time.process_time()
    qw, _, _ = methods.rebuild(method, method.recipe(config), config, plan, W, H, name)
    spent = time.process_time() - started
    return {
        "layer": name,
        "method": method_name,
        "bits": bits,
        "stored_bits": qw.layout().bits_per_weight,
        "rank": plan.rank,
        "error": proxy_loss(W, qw.dequantize(), H),
        "cpu_seconds": spent,
    }


def main() -> None:
    rows = []
    for name, (W, H) in weights_and_hessians().items():
        for bits in BITS:
            for method in ("nanoquant", "waterfill"):
                rows.append(measure(method, bits, name, W, H))
                print(json.dumps(rows[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
