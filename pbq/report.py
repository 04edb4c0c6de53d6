"""What a run did, as numbers: report.json, the model card, and the rows of the closing table."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pbq.checkpoint import copy_auxiliary
from pbq.disk import size_text, writing
from pbq.evaluate import Perplexity
from pbq.linear import PackedLinear
from pbq.sources import Source


@dataclass
class RunReport:
    """What was asked, what was got, where the bytes are and where the seconds went.

    bits: stored bits per quantized weight. paper_bits: the paper's own accounting, a label only.
    seconds: per stage. peak_bytes: largest resident memory of the process.
    """

    source: str
    config: dict[str, Any]
    calibration: str = ""
    bits: float = 0.0
    paper_bits: float = 0.0
    quantized_weights: int = 0
    quantized_bytes: int = 0
    quantized_bytes_before: int = 0
    model_bytes: int = 0
    model_bytes_before: int = 0
    parameters: int = 0
    before: Perplexity | None = None
    after: Perplexity | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    distillation: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def count(self, model: nn.Module) -> None:
        """Fill in sizes from the packed model, as its tensors will be written."""
        packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
        width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
        self.quantized_weights = sum(m.in_features * m.out_features for m in packed)
        self.quantized_bytes = sum(m.packed().stored_bits // 8 for m in packed)
        self.quantized_bytes_before = self.quantized_weights * width
        self.bits = 8 * self.quantized_bytes / self.quantized_weights
        # tied embeddings appear once among the parameters, as in the file
        tensors = [*model.parameters(), *(m.bias for m in packed if m.bias is not None)]
        others = {t.data_ptr(): t for t in tensors if t.is_floating_point()}.values()
        other_bytes = sum(t.numel() * t.element_size() for t in others)
        self.parameters = self.quantized_weights + sum(t.numel() for t in others)
        self.model_bytes = self.quantized_bytes + other_bytes
        self.model_bytes_before = self.quantized_bytes_before + other_bytes
        self.peak_bytes = peak_bytes()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def rows(self) -> dict[str, str]:
        """What a person wants to know at the end of a run."""
        whole = 8 * self.model_bytes / max(self.parameters, 1)
        rows = {
            "quantized layers": _change(self.quantized_bytes_before, self.quantized_bytes),
            "whole checkpoint": _change(self.model_bytes_before, self.model_bytes),
            "stored bits per weight": f"{self.bits:.3f} (asked: {self.config['bits']:g})",
            "by the paper's accounting": f"{self.paper_bits:.2f}",
            "bits per parameter, whole model": f"{whole:.2f}",
            "calibration": self.calibration,
        }
        if self.after is not None:
            before = f"{self.before.ppl:.2f} -> " if self.before is not None else ""
            rows["perplexity"] = f"{before}{self.after.ppl:.2f} ({self.after.label()})"
        spent = ", ".join(f"{name} {s:.0f}" for name, s in self.seconds.items() if s >= 0.5)
        rows["seconds"] = f"{sum(self.seconds.values()):.0f}" + (f" ({spent})" if spent else "")
        rows["peak memory"] = size_text(self.peak_bytes)
        return rows


def _change(before: int, after: int) -> str:
    return f"{size_text(before)} -> {size_text(after)} ({before / max(after, 1):.1f}x smaller)"


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_checkpoint(
    staging: Path,
    source: Source,
    model: Any,
    tokenizer: Any,
    report: RunReport,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Everything OUT holds: packed weights, tokenizer, the source's other files, card, report."""
    with writing(staging, report.model_bytes):
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        # a .gguf file lies among files that are not its own
        if source.gguf is None:
            copy_auxiliary(source.path, staging, trust_remote_code=trust_remote_code)
        (staging / "README.md").write_text(model_card(report), encoding="utf-8")
        numbers = json.dumps(report.to_dict(), indent=1, default=str)
        (staging / "report.json").write_text(numbers + "\n", encoding="utf-8")


def model_card(report: RunReport) -> str:
    """README.md of a packed checkpoint: where it comes from, what it stores, how to load it."""
    config = report.config
    base = f"base_model: {report.source}\n" if _is_hub_id(report.source) else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in report.rows().items())
    options = ", ".join(f"`{name}={value}`" for name, value in config.items())
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [pbq, quantized, {config["method"]}]
---
# {Path(report.source).name}, {report.bits:.2f} stored bits per weight

Quantized from `{report.source}` with pbq, method `{config["method"]}`.
Linear layers of the decoder blocks are packed; embeddings, norms and head are as they were (norms
are tuned along).

| | |
|---|---|
{table}

Stored bits count every byte that replaces the quantized weights: sign planes, scales, masks and
padding. {"" if report.after else "Perplexity was not measured: `pbq eval` does. "}\
Options: {options}.

## Load

```python
import pbq  # teaches transformers the packed layout
from transformers import AutoModelForCausalLM, AutoTokenizer

# OUT: this directory
model = AutoModelForCausalLM.from_pretrained("OUT")
tokenizer = AutoTokenizer.from_pretrained("OUT")
```

Without `import pbq` loading fails; it never returns a model with missing layers.
"""


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not Path(source).exists()
