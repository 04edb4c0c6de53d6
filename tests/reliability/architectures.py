"""Every architecture, as a tiny random model: its blocks, a run, a reload, a generation.

blocks: run one by one, each with its own recorded arguments, on sequences longer than the sliding
windows, they are the model bit for bit. quantize: a whole run, within its budget, every weight but
routers covered. reload: the files are whole, nothing is missing, and the packed model's logits are
those of the same values dense. generate: greedy tokens, the same with and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pbq import checkpoint
from pbq.config import QuantConfig
from pbq.experts import unfuse
from pbq.linear import set_backend
from pbq.models import find_blocks, record_calls, run_block, run_tail
from pbq.pipeline import quantize

STEPS = ("blocks", "quantize", "reload", "generate")
# Longer than every sliding window of conftest; no token that ends a text.
IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass
class Matrix:
    """passed: the steps that each architecture took. faults: what stopped it."""

    passed: dict[str, dict[str, bool]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"tried": len(self.passed), "matrix": self.passed, "faults": self.faults}


def try_architectures(
    names: Sequence[str],
    build: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> Matrix:
    """build: makes the tiny model of a name."""
    found = Matrix()
    for name in names:
        row = found.passed.setdefault(name, dict.fromkeys(STEPS, False))
        try:
            for step in _steps(build(name), tokenizer, folder / name):
                row[step] = True
        except Exception as error:  # whatever it is: the others are still tried
            found.faults.append(f"{name}: {type(error).__name__}: {error}")
    return found


def table(matrix: Mapping[str, Mapping[str, bool]]) -> str:
    """As docs/reliability.md has it."""
    rows = [["architecture", *STEPS], ["---"] * (1 + len(STEPS))]
    for name, passed in matrix.items():
        rows.append([name, *("yes" if passed[step] else "no" for step in STEPS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _steps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Iterator[str]:
    """Each step when it has been taken; raises AssertionError, or what pbq raises."""
    source, out = folder / "source", folder / "out"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    _check_blocks(model)
    yield "blocks"
    text = folder / "text.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 6)
    config = QuantConfig("ptq161", bits=3.0, effort="fast", calib=str(text), nsamples=4, seqlen=24)
    report = quantize(str(source), out, config)
    assert report.bits <= 3.0, f"{report.bits} bits"
    assert "not a linear" not in report.coverage, report.coverage
    yield "quantize"
    checkpoint.verify(out)
    packed, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), str(info)
    _check_reloaded(packed, out)
    yield "reload"
    _check_generation(packed)
    yield "generate"


@torch.no_grad()
def _check_blocks(model: PreTrainedModel) -> None:
    for apart in (False, True):
        if apart:
            unfuse(model)
        _, blocks = find_blocks(model)
        recording = record_calls(model, blocks, [IDS])
        hidden = recording.hidden[0]
        for block, calls in zip(blocks, recording.calls, strict=True):
            hidden = run_block(block, hidden, calls[0])
        logits = run_tail(model, blocks, IDS, hidden)
        assert torch.equal(logits, model(IDS, use_cache=False).logits), "blocks are not the model"


@torch.no_grad()
def _check_reloaded(packed: PreTrainedModel, out: Path) -> None:
    set_backend("reference")
    try:
        found = packed(IDS, use_cache=False).logits
        dense = AutoModelForCausalLM.from_pretrained(out).dequantize()
        expected = dense(IDS, use_cache=False).logits
    finally:
        set_backend("auto")
    assert torch.isfinite(found).all(), "logits are not finite"
    # biases may be added before or after the last rounding, experts in another order
    gap = float((found - expected).abs().max())
    assert gap <= 1e-4 * float(expected.abs().max()), f"logits are {gap} off"


def _check_generation(packed: PreTrainedModel) -> None:
    options = {"max_new_tokens": 6, "do_sample": False}
    cached, plain = (packed.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert cached.shape[1] > IDS.shape[1], "nothing was generated"
    assert torch.equal(cached, plain), "a cache changes the tokens"
