"""Memory that a packed model holds on the CPU: `python bench/bench_resident.py`, Linux only.

The model has a llama's shapes and 304 M random weights of 1.61 bits. Each case is a process of its
own: as transformers loads it, its tensors mapped from the file; and copied into memory, as after
`.to()`. Shown is how much more the process holds than before loading: all that is resident, what
no file stands behind, and the peak.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from bench_whole import write_random
from torch import nn

import pbq
from pbq.heap import give_back_memory

SHAPES = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
KINDS = {"resident": "VmRSS", "of no file": "RssAnon", "peak": "VmHWM"}


def held() -> dict[str, int]:
    """Bytes, of each of KINDS."""
    give_back_memory()
    status = Path("/proc/self/status").read_text()
    found = {kind: re.search(rf"{name}:\s+(\d+)", status) for kind, name in KINDS.items()}
    return {kind: 1024 * int(match[1]) for kind, match in found.items() if match}


def copy_tensors(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    gc.collect()


@torch.no_grad()
def measure(folder: Path, copied: bool) -> dict[str, dict[str, int]]:
    """Bytes of each of KINDS after each step, above those before loading."""
    before, found = held(), {}
    ids = torch.arange(8)[None]

    def note(step: str) -> None:
        now = held()
        found[step] = {kind: now[kind] - before[kind] for kind in KINDS}

    model = pbq.load(str(folder), dtype=torch.bfloat16)
    if copied:
        copy_tensors(model)
    note("loaded")
    model(ids)
    note("one forward")
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
    note("saved")
    model(ids)
    note("one more forward")
    return found


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        size = write_random(Path(scratch), SHAPES, "1.61 bits, 1+4")
        print(f"packed weights: {size / 1e6:.0f} MB; MB above the start:")
        for case in ("mapped", "copied"):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                steps = pool.submit(measure, Path(scratch), case == "copied").result()
            for step, kinds in steps.items():
                sizes = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in kinds.items())
                print(f"{case}, {step}: {sizes}")


if __name__ == "__main__":
    main()
