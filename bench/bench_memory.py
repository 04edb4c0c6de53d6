"""What a run takes beside what `pbq plan` says: memory, disk, time; by size of block, layers, text.

    python bench/bench_memory.py            # everything, about six minutes
    python bench/bench_memory.py --row 3    # one row, printed only

The models are synthetic: random weights of a llama's shapes, a small vocabulary, bfloat16. Every
run is a process of its own with one thread. Its peak is the kernel's VmHWM; its disk the largest
size seen of OUT and OUT.partial together; its time that of the stages which the forecast counts, in
seconds of the processor, the forecast's too, so that other work on the machine counts in neither.
Rows go into bench/results/memory.json and the table of docs/reliability.md.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "memory.json"
SEQLEN = 128
# What the run may take; hidden states go to the disk when they would take an eighth of it.
PLENTY_GIB, LITTLE_GIB = 64.0, 0.75
ROWS = [
    {"layers": layers, "width": width, "nsamples": nsamples, "memory_gib": memory}
    for layers, width, nsamples, memory in (
        # by number of layers
        (4, 512, 4, PLENTY_GIB),
        (16, 512, 4, PLENTY_GIB),
        (48, 512, 4, PLENTY_GIB),
        # by size of the block
        (2, 256, 4, PLENTY_GIB),
        (2, 512, 4, PLENTY_GIB),
        (2, 1024, 4, PLENTY_GIB),
        # by calibration text: in memory, on the disk, twice as much
        (2, 256, 256, LITTLE_GIB),
        (2, 256, 1024, LITTLE_GIB),
        (2, 256, 2048, LITTLE_GIB),
    )
]
QUANTIZE = """
import json, re, sys, threading, time
from pathlib import Path
from pbq import planning
from pbq.config import QuantConfig
from pbq.pipeline import quantize

source, out, options, memory = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
config, memory, largest, ended = QuantConfig(**options), float(memory), 0, threading.Event()

def held():
    \"\"\"Bytes of all files below OUT and OUT.partial; one may go while it is looked at.\"\"\"
    total = 0
    for folder in (out, out.with_name(out.name + ".partial")):
        for file in folder.rglob("*"):
            try:
                total += file.stat().st_size
            except FileNotFoundError:
                pass
    return total

def watch():
    global largest
    while not ended.wait(0.2):
        largest = max(largest, held())

time.perf_counter = time.monotonic = time.process_time  # of the forecast and the report
planned = planning.plan(source, config, memory=memory)
watcher = threading.Thread(target=watch)
watcher.start()
try:
    report = quantize(source, out, config, memory=memory)
finally:
    ended.set()
    watcher.join()
# not ru_maxrss: a child inherits its parent's across fork and exec
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({
    "peak_bytes": int(peak[1]) * 1024,
    "planned_peak_bytes": planned.memory_bytes,
    "disk_bytes": largest,
    "planned_disk_bytes": planned.disk_bytes,
    "seconds": round(sum(report.seconds[stage] for stage in planned.seconds), 1),
    "planned_seconds": round(sum(planned.seconds.values()), 1),
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


def measure(row: dict[str, Any], method: str) -> dict[str, Any]:
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
            [*command, json.dumps(options), str(row["memory_gib"])],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode:
        sys.exit(ran.stderr)
    return {**row, "model_bytes": size, **json.loads(ran.stdout.splitlines()[-1])}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as docs/reliability.md has them."""
    names = ["layers", "width", "samples", "model"]
    names += ["memory", "planned", "disk", "planned", "seconds", "planned"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        sizes = [
            f"{row[name] / 2**20:.0f} MiB"
            for name in (
                "model_bytes",
                "peak_bytes",
                "planned_peak_bytes",
                "disk_bytes",
                "planned_disk_bytes",
            )
        ]
        times = [f"{row[name]:.0f}" for name in ("seconds", "planned_seconds")]
        shape = [f"{row[name]:,}" for name in ("layers", "width", "nsamples")]
        lines.append("| " + " | ".join([*shape, *sizes, *times]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ptq161")
    parser.add_argument("--row", type=int, choices=range(len(ROWS)))
    given = parser.parse_args()
    chosen = ROWS if given.row is None else [ROWS[given.row]]
    rows = []
    for row in chosen:
        rows.append(measure(row, given.method))
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if given.row is None:
        about = {
            "command": "make bench-memory",
            "machine": platform.platform(),
            "method": given.method,
            "seqlen": SEQLEN,
        }
        RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
