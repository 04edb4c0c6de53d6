"""Peak memory of quantizing, by block size, number of layers and number of samples.

    python bench/bench_memory.py                # everything, about ten minutes on two cores
    python bench/bench_memory.py --layers 16    # one row

The models are synthetic: random weights of a llama's shapes, a small vocabulary, bfloat16. Every
run is a process of its own; its peak is the kernel's VmHWM, beside what `pbq plan` estimates. With
`--memory` hidden states go to the disk as soon as they would take an eighth of it. Rows go into
bench/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
ROOT = Path(__file__).resolve().parents[1]
SEQLEN = 128
MEMORY_GIB = 1.0
# What a row changes of the first one.
ROWS = [
    {"layers": 8, "width": 1024, "nsamples": 64},
    {"layers": 16, "width": 1024, "nsamples": 64},
    {"layers": 32, "width": 1024, "nsamples": 64},
    {"layers": 8, "width": 512, "nsamples": 64},
    {"layers": 8, "width": 2048, "nsamples": 64},
    {"layers": 8, "width": 1024, "nsamples": 1024},
    {"layers": 8, "width": 1024, "nsamples": 4096},
]
QUANTIZE = """
import json, re, sys, time
from pbq import planning
from pbq.config import QuantConfig
from pbq.pipeline import quantize
source, out, options, memory = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
config = QuantConfig(**options)
started = time.monotonic()
quantize(source, out, config, memory=memory)
seconds = time.monotonic() - started
# not ru_maxrss: a child inherits its parent's across fork and exec
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
planned = planning.plan(source, config, memory=memory)
print(json.dumps({
    "peak_bytes": int(peak[1]) * 1024,
    "planned_bytes": planned.memory_bytes,
    "seconds": round(seconds, 1),
}))
"""


def write_model(folder: Path, layers: int, width: int, vocabulary: int = 512) -> int:
    """A llama of random weights and a tokenizer of single bytes; its bytes. One file a block."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    inner = 11 * width // 4
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    config.num_hidden_layers, config.dtype = layers, "bfloat16"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    inside = "model.layers.0."
    block = {n.removeprefix(inside): t for n, t in tensors.items() if n.startswith(inside)}
    around = {n: t for n, t in tensors.items() if not n.startswith(inside)}
    files = [
        around,
        *({f"model.layers.{i}.{n}": t for n, t in block.items()} for i in range(layers)),
    ]
    weight_map = {}
    for i, part in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(t.nbytes for part in files for t in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return total


def write_text(path: Path, tokens: int) -> None:
    """As many bytes, which are tokens, of words in random order."""
    import random

    words = ["the", "quick", "brown", "fox", "jumps", "over", "seven", "lazy", "dogs"]
    drawn = random.Random(0).choices(words, k=tokens // 4 + 8)
    path.write_text(" ".join(drawn)[: tokens + 1])


def measure(row: dict[str, int], method: str) -> dict[str, object]:
    """Quantize a model of the row's sizes in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch) / "model", Path(scratch) / "text.txt"
        folder.mkdir()
        size = write_model(folder, row["layers"], row["width"])
        write_text(text, row["nsamples"] * SEQLEN)
        options = {
            "method": method,
            "bits": 2.5,
            "effort": "fast",
            "calib": str(text),
            "nsamples": row["nsamples"],
            "seqlen": SEQLEN,
        }
        command = [sys.executable, "-c", QUANTIZE, str(folder), str(Path(scratch) / "out")]
        ran = subprocess.run(
            [*command, json.dumps(options), str(MEMORY_GIB * max(1, row["width"] // 1024))],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode:
        sys.exit(ran.stderr)
    found = json.loads(ran.stdout.splitlines()[-1])
    return {**row, "method": method, "model_bytes": size, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ptq161")
    for name in ("layers", "width", "nsamples"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    one = {n: getattr(given, n) for n in ("layers", "width", "nsamples") if getattr(given, n)}
    rows = [measure(row, given.method) for row in ([{**ROWS[0], **one}] if one else ROWS)]
    for row in rows:
        mib = {n: int(row[f"{n}_bytes"]) // 2**20 for n in ("model", "peak", "planned")}  # type: ignore[call-overload]
        print({**{n: row[n] for n in ("layers", "width", "nsamples", "seconds")}, **mib})
    if not one:
        about = {"machine": platform.platform(), "seqlen": SEQLEN, "memory_gib": MEMORY_GIB}
        RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
