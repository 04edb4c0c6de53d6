"""What a run did, as numbers: report.json, the model card, and the rows of the closing table."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pbq import __version__, html_report, recipes, samples, selftest
from pbq.allocate import LayerPlan, PlanInput
from pbq.checkpoint import copy_auxiliary
from pbq.disk import size_text, writing
from pbq.embedding import PackedEmbedding
from pbq.evaluate import Perplexity, TokenizedText
from pbq.hf import packed_linears, packed_modules
from pbq.linear import PackedLinear, PackedModule
from pbq.sources import Source
from pbq_kernels.layout import INNER

log = logging.getLogger(__name__)

HISTOGRAM_BINS = 160
HISTOGRAM_RANGE = 4.0
_PACKED_KINDS = {
    "weight": "planes",
    "scale": "scales",
    "offset": "scales",
    "column_scale": "scales",
    "tier": "masks",
}


@dataclass
class RunReport:
    """What was asked, what was got, where the bytes are and where the seconds went.

    run_options: what was asked beside the config. coverage: the share of the block weights that is
    quantized, and what is not, in words. bits: stored bits per quantized weight.
    paper_bits: the paper's own accounting, a label only. embed_bits: stored bits per weight of
    embeddings and head, 0 where they are as they were; these weights and bytes are not among the
    quantized ones.
    tiers: by layer, planes, columns and damage of each tier (`note_plan`). sensitivities: by layer,
    nats lost with it alone rounded, where that was measured. histogram: weights of one layer before
    and after. bytes_of: what OUT's tensors take, by kind. samples: what the model
    made of the same prompts before and after. notes: rows that are the method's own. seconds: per
    stage. peak_bytes: largest resident memory of the process.
    """

    source: str
    config: dict[str, Any]
    run_options: dict[str, Any] = field(default_factory=dict)
    calibration: str = ""
    coverage: str = ""
    bits: float = 0.0
    paper_bits: float = 0.0
    quantized_weights: int = 0
    quantized_bytes: int = 0
    quantized_bytes_before: int = 0
    embed_bits: float = 0.0
    embed_weights: int = 0
    embed_bytes: int = 0
    embed_bytes_before: int = 0
    model_bytes: int = 0
    model_bytes_before: int = 0
    parameters: int = 0
    before: Perplexity | None = None
    after: Perplexity | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    tiers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sensitivities: dict[str, float] = field(default_factory=dict)
    histogram: dict[str, Any] | None = None
    bytes_of: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    distillation: dict[str, Any] | None = None
    notes: dict[str, str] = field(default_factory=dict)
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

    def note_plan(self, layers: Mapping[str, PlanInput], plans: Mapping[str, LayerPlan]) -> None:
        """Keep what the plan was made from: the damage of each tier, the weights of one layer.

        damage: E[x²]·w², mean over the tier's weights: what a dropped weight costs its output.
        sensitivities: nats by layer, where they were measured.
        """
        for name, plan in plans.items():
            layer = layers[name]
            damage = (layer.stats.x_sq * layer.w_sq / layer.shape[0]).cpu()
            self.tiers[name] = [
                {
                    "planes": tier.planes,
                    "columns": tier.columns,
                    "damage": float(damage[plan.tier_of == t].mean()) if tier.columns else 0.0,
                }
                for t, tier in enumerate(plan.tiers)
            ]
            if layer.sensitivity is not None:
                self.sensitivities[name] = layer.sensitivity
        name = _shown_layer(layers)
        self.histogram = _histogram(name, layers[name].W, plans[name])

    def note_samples(self, when: str, model: Any, tokenizer: Any, text: TokenizedText) -> None:
        """What the model makes of a few passages of the text; when: before or after."""
        with self.timed("samples"):
            if not self.samples:
                found = samples.passages(tokenizer, text)
                self.samples = [{"prompt": prompt, "text": rest} for prompt, rest in found]
            for sample in self.samples:
                sample[when] = samples.continuation(model, tokenizer, sample["prompt"])

    def note_stored(self, layer: str, linear: PackedLinear) -> None:
        """What became of the layer of the histogram; of any other, nothing is kept."""
        if self.histogram is not None and self.histogram["layer"] == layer:
            self.histogram = _with_stored(self.histogram, linear)

    def count(self, model: nn.Module) -> None:
        """Fill in sizes from the packed model, as its tensors are written; they may be on meta."""
        packed = dict(packed_modules(model))
        quantized = dict(packed_linears(model))
        width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
        self.quantized_weights, self.quantized_bytes = _stored(quantized.values())
        self.quantized_bytes_before = self.quantized_weights * width
        self.bits = 8 * self.quantized_bytes / self.quantized_weights
        embeddings = [module for name, module in packed.items() if name not in quantized]
        self.embed_weights, self.embed_bytes = _stored(embeddings)
        self.embed_bytes_before = self.embed_weights * width
        self.embed_bits = 8 * self.embed_bytes / self.embed_weights if embeddings else 0.0
        # tied embeddings appear once among the parameters, as in the file
        tensors = [*model.parameters(), *_biases(packed.values())]
        others = {id(t): t for t in tensors if t.is_floating_point()}.values()
        other_bytes = sum(t.numel() * t.element_size() for t in others)
        weights = self.quantized_weights + self.embed_weights
        self.parameters = weights + sum(t.numel() for t in others)
        self.model_bytes = self.quantized_bytes + self.embed_bytes + other_bytes
        self.model_bytes_before = weights * width + other_bytes
        self.bytes_of = _bytes_of(model)
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
            **({"embeddings and head": self._embeddings()} if self.embed_bytes else {}),
            **self.notes,
            "bits per parameter, whole model": f"{whole:.2f}",
            **({"quantized": self.coverage} if self.coverage else {}),
            "calibration": self.calibration,
        }
        own = [tokens for block in self.blocks for tokens in _own_tokens(block).values()]
        if own:
            rows["experts short of calibration tokens"] = (
                f"{len(own)}, {own.count(0)} of them without any (report.json has their names)"
            )
        if self.after is not None:
            before = f"{self.before.ppl:.2f} -> " if self.before is not None else ""
            rows["perplexity"] = f"{before}{self.after.ppl:.2f} ({self.after.label()})"
        spent = ", ".join(f"{name} {s:.0f}" for name, s in self.seconds.items() if s >= 0.5)
        rows["seconds"] = f"{sum(self.seconds.values()):.0f}" + (f" ({spent})" if spent else "")
        rows["peak memory"] = size_text(self.peak_bytes)
        return rows

    def _embeddings(self) -> str:
        change = _change(self.embed_bytes_before, self.embed_bytes)
        return f"{change}, {self.embed_bits:.3f} stored bits per weight"


def _own_tokens(block: Mapping[str, Any]) -> dict[str, int]:
    """Calibration tokens of every expert of a block that had to borrow some, by its name there."""
    return {
        name.rpartition(".")[0]: layer["tokens"]
        for name, layer in block["layers"].items()
        if layer.get("borrowed")
    }


def rare_experts(block: Mapping[str, Any]) -> str:
    """For people: the experts of a block that fewer tokens reached than they have inputs, or ""."""
    found = ", ".join(f"{name} ({tokens})" for name, tokens in _own_tokens(block).items())
    return f"few calibration tokens, others' added: {found}" if found else ""


def _shown_layer(layers: Mapping[str, PlanInput]) -> str:
    """The middle one of the largest layers."""
    most = max(math.prod(layer.shape) for layer in layers.values())
    largest = [name for name, layer in layers.items() if math.prod(layer.shape) == most]
    return largest[len(largest) // 2]


def _histogram(name: str, W: Tensor, plan: LayerPlan) -> dict[str, Any]:
    """Counts of W [n, k] by tier, in units of each row's deviation; up to 256 rows."""
    rows = torch.linspace(0, len(W) - 1, min(len(W), 256), device=W.device).long().unique()
    W = W[rows].float().cpu()
    std = W.std(dim=1).clamp(min=1e-12)
    tiers = [
        {"planes": tier.planes, "columns": tier.columns, "weights": _counts(W, std, mask)}
        for tier, mask in zip(plan.tiers, _masks(plan.tier_of, len(plan.tiers)), strict=True)
    ]
    return {
        "layer": name,
        "range": HISTOGRAM_RANGE,
        "rows": rows.tolist(),
        "row_std": std.tolist(),
        "tiers": tiers,
    }


def _with_stored(histogram: dict[str, Any], linear: PackedLinear) -> dict[str, Any] | None:
    """The histogram with counts of the stored values; None if the layer's tiers are not as planned.

    A method may settle tiers later than the plan, when it has seen a Hessian.
    """
    planned = [(tier["planes"], tier["columns"]) for tier in histogram["tiers"]]
    if planned != [(tier.planes, tier.columns) for tier in linear.layout.tiers]:
        return None
    W = linear.dequantize()[histogram["rows"]].cpu()
    std = torch.tensor(histogram["row_std"])
    tier_of = linear.packed().tensors.get("tier", torch.zeros(W.shape[1])).cpu()
    tiers = [
        {**tier, "stored": _counts(W, std, mask)}
        for tier, mask in zip(histogram["tiers"], _masks(tier_of, len(planned)), strict=True)
    ]
    return {**histogram, "tiers": tiers}


def _masks(tier_of: Tensor, tiers: int) -> list[Tensor]:
    return [tier_of == t for t in range(tiers)]


def _counts(W: Tensor, std: Tensor, columns: Tensor) -> list[int]:
    """How many of W[:, columns] / std fall into each bin; what lies beyond counts at the ends."""
    values = (W[:, columns] / std[:, None]).clamp(-HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    found = torch.histc(values, HISTOGRAM_BINS, -HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    return [int(count) for count in found]


def _stored(modules: Iterable[PackedModule]) -> tuple[int, int]:
    """Weights and stored bytes, without biases."""
    layouts = [module.layout for module in modules]
    return sum(L.n * L.k for L in layouts), sum(L.stored_bits // 8 for L in layouts)


def _biases(modules: Iterable[PackedModule]) -> list[Tensor]:
    found = [module.bias for module in modules if isinstance(module, PackedLinear)]
    return [bias for bias in found if bias is not None]


def _bytes_of(model: Any) -> dict[str, int]:
    """Bytes of every tensor that is written, by kind; tied ones once."""
    sizes: Counter[str] = Counter()
    quantized = dict(packed_linears(model))
    for module_name, module in packed_modules(model):
        own = "embeddings" if isinstance(module, PackedEmbedding) else "head"
        for name, spec in module.layout.tensors().items():
            kind = _PACKED_KINDS.get(name.removeprefix(INNER), "overlay")
            sizes[kind if module_name in quantized else own] += spec.nbytes
        for bias in _biases([module]):
            sizes["biases"] += bias.nbytes
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if module is embeddings:
                kind = "embeddings"
            elif module is head:
                kind = "head"
            else:
                kind = "norms" if "norm" in f"{name} {type(module).__name__}".lower() else "other"
            sizes[kind] += parameter.nbytes
    return dict(sizes.most_common())


def _change(before: int, after: int) -> str:
    return f"{size_text(before)} -> {size_text(after)} ({before / max(after, 1):.1f}x smaller)"


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_beside(
    staging: Path,
    source: Source,
    tokenizer: Any,
    report: RunReport,
    *,
    trust_remote_code: bool = False,
    memory: int | None = None,
) -> None:
    """What OUT holds beside the model: tokenizer, the source's other files, card, report.

    memory: bytes that the record for `pbq verify` may take, if not all there are.
    """
    with writing(staging):
        tokenizer.save_pretrained(staging)
        # a .gguf file lies among files that are not its own
        if source.gguf is None:
            copy_auxiliary(source.path, staging, trust_remote_code=trust_remote_code)
        device = report.run_options.get("device") or "auto"
        selftest.record(staging, device, trust_remote_code, memory)
        card = model_card(report, {} if source.gguf else card_metadata(source.path))
        (staging / "README.md").write_text(card, encoding="utf-8")
        about = {"pbq": __version__, "model": report.source}
        recipe = recipes.to_yaml(about, {**report.config, **report.run_options})
        (staging / recipes.FILE_NAME).write_text(recipe, encoding="utf-8")
        numbers = json.dumps(report.to_dict(), indent=1, default=str)
        (staging / "report.json").write_text(numbers + "\n", encoding="utf-8")
        html_report.write_if_possible(staging)


# What is as true of the packed model as of the model it was made from.
_CARRIED_OVER = ("license", "license_name", "license_link", "language")


def card_metadata(source_dir: Path) -> dict[str, Any]:
    """Licence and language from the source's own model card, if it has one that says."""
    from huggingface_hub import metadata_load

    card = source_dir / "README.md"
    try:
        found = (metadata_load(card) or {}) if card.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # no run fails of another's file
        said = " ".join(str(error).split())
        log.warning("%s: licence and language were not taken over (%.100s)", card, said)
        return {}
    return {key: found[key] for key in _CARRIED_OVER if key in found}


def _card_head(report: RunReport, source: Mapping[str, Any]) -> str:
    """The card's metadata as YAML, the perplexity as a result of model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    results, after = [], report.after
    if after is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_name=after.file,
                dataset_type=Path(after.file).stem.lower(),
                dataset_args={
                    "windows": after.windows,
                    "window": after.window,
                    "sha256": after.sha256,
                },
                metric_type="perplexity",
                metric_name=f"perplexity, {after.label()}",
                metric_value=round(after.ppl, 4),
            )
        ]
    base: dict[str, Any] = {"base_model": report.source, "base_model_relation": "quantized"}
    data = ModelCardData(
        **(base if _is_hub_id(report.source) else {}),
        **source,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pbq", "quantized", report.config["method"]],
        model_name=f"{Path(report.source).name}, pbq {report.bits:.2f} bits",
        eval_results=results or None,
    )
    return str(data.to_yaml())


def model_card(report: RunReport, source: Mapping[str, Any] | None = None) -> str:
    """README.md of a packed checkpoint: where it comes from, what it stores, how to load it.

    source: what `card_metadata` found.
    """
    config = report.config
    table = "\n".join(f"| {name} | {value} |" for name, value in report.rows().items())
    options = ", ".join(f"`{name}={value}`" for name, value in config.items())
    return f"""---
{_card_head(report, source or {})}
---
# {Path(report.source).name}, {report.bits:.2f} stored bits per weight

Quantized from `{report.source}` with pbq, method `{config["method"]}`.
Linear layers of the decoder blocks are packed; {_around(report)}.

| | |
|---|---|
{table}

Stored bits count every byte that replaces the quantized weights: sign planes, scales, masks and
padding. {"" if report.after else "Perplexity was not measured: `pbq eval` does. "}\
Options: {options}.

## Load

With pbq installed (not PyPI's `pbq`, which is another project):

```python
import pbq  # teaches transformers the packed layout
from transformers import AutoModelForCausalLM, AutoTokenizer

# OUT: this directory
model = AutoModelForCausalLM.from_pretrained("OUT")
tokenizer = AutoTokenizer.from_pretrained("OUT")
```

Without `import pbq` loading fails; it never returns a model with missing layers.
"""


def _around(report: RunReport) -> str:
    if not report.embed_bytes:
        return "embeddings and head are as they were; norms may be trained along"
    bits = f"{report.config['embed_bits']} bits, {report.embed_bits:.2f} with their scales"
    return f"embeddings and head are rounded to {bits}; norms may be trained along"


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not Path(source).exists()
