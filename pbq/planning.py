"""`pbq plan`: what a run would store and need, from the model's config alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from pbq import methods
from pbq.allocate import ChannelStats, PlanInput, stored_bits
from pbq.calibrate import check_seqlen
from pbq.config import QuantConfig
from pbq.disk import size_text
from pbq.experts import unfuse
from pbq.forecast import Speed, in_words, seconds
from pbq.memory import budget, disk_bytes, needs
from pbq.models import (
    check_coverage,
    find_blocks,
    find_linears,
    outline,
    pick_device,
    weight_of,
)
from pbq.rounding import embedding_layout, vocabulary
from pbq.sensitivity import where_known
from pbq.sources import resolve_source


@dataclass(frozen=True)
class PlannedRun:
    """What would be stored and needed. Bytes are estimates except the stored ones.

    embed_bits, embed_bytes: of embeddings and head where they are packed, else 0.
    """

    model: str
    method: str
    asked_bits: float
    bits: float
    paper_bits: float
    layers: int
    coverage: float
    covered: str
    quantized_weights: int
    quantized_bytes: int
    embed_bits: float
    embed_bytes: int
    model_bytes: int
    model_bytes_before: int
    memory_bytes: int
    disk_bytes: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def rows(self) -> dict[str, str]:
        smaller = self.model_bytes_before / self.model_bytes
        return {
            "quantized": f"{self.layers} linears, {self.quantized_weights:,} weights, "
            + self.covered,
            "stored bits per weight": f"{self.bits:.3f} (asked: {self.asked_bits:g})",
            "by the paper's accounting": f"{self.paper_bits:.2f}",
            "quantized layers": size_text(self.quantized_bytes),
            **({"embeddings and head": self._embeddings()} if self.embed_bytes else {}),
            "whole checkpoint": f"{size_text(self.model_bytes_before)} -> "
            f"{size_text(self.model_bytes)} ({smaller:.1f}x smaller)",
            "memory while quantizing": f"about {size_text(self.memory_bytes)}",
            "disk while quantizing": f"about {size_text(self.disk_bytes)}",
            "time at the present speed": f"about {in_words(self.seconds)}",
        }

    def _embeddings(self) -> str:
        return f"{size_text(self.embed_bytes)}, {self.embed_bits:.3f} stored bits per weight"


def plan(
    name: str,
    config: QuantConfig,
    *,
    trust_remote_code: bool = False,
    memory: float | None = None,
) -> PlannedRun:
    """Plan a run without loading a weight. Raises PbqError where the run itself would.

    memory: GiB that it may take, if not all there are.
    """
    method = methods.get(config.method, config)
    source, device = resolve_source(name), pick_device("auto")
    model = outline(source, trust_remote_code)
    unfuse(model)
    covered = check_coverage(model)
    block_name, blocks = find_blocks(model)
    check_seqlen(config.seqlen, model)
    recipe = where_known(methods.recipe_of(method, config), blocks)
    shapes = {
        f"{block_name}.{i}.{linear}": (weight_of(module).shape[0], weight_of(module).shape[1])
        for i, block in enumerate(blocks)
        for linear, module in find_linears(block).items()
    }
    plans = method.plan({n: _unknown(*shape) for n, shape in shapes.items()}, config)
    rows = {n: shape[0] for n, shape in shapes.items()}
    weights = sum(n * k for n, k in shapes.values())
    bits = stored_bits(plans, rows)
    width = next(model.parameters()).element_size()
    before = sum(p.numel() for p in model.parameters()) * width
    packed = round(weights * bits / 8)
    embeddings = vocabulary(model).values() if config.embed_bits else ()
    layouts = [embedding_layout(module, config.embed_bits) for module in embeddings]
    embed_weights = sum(layout.n * layout.k for layout in layouts)
    embed_bytes = sum(layout.stored_bits for layout in layouts) // 8
    after = before - (weights + embed_weights) * width + packed + embed_bytes
    allowed = budget(memory, device)
    estimated = needs(
        model,
        config,
        recipe,
        gradients=method.wants_gradients,
        streams=source.gguf is None,
        budget=allowed,
    )
    return PlannedRun(
        model=name,
        method=config.method,
        asked_bits=config.bits,
        bits=bits,
        paper_bits=method.paper_bits(plans, rows),
        layers=len(shapes),
        coverage=covered.share,
        covered=covered.line(),
        quantized_weights=weights,
        quantized_bytes=packed,
        embed_bits=8 * embed_bytes / embed_weights if embed_weights else 0.0,
        embed_bytes=embed_bytes,
        model_bytes=after,
        model_bytes_before=before,
        memory_bytes=estimated.peak,
        disk_bytes=disk_bytes(model, config, recipe, estimated, bits=bits, budget=allowed),
        seconds=seconds(
            shapes,
            model.get_output_embeddings().weight.numel(),
            config,
            recipe,
            Speed.measure(next(model.parameters()).dtype, device, recipe, config),
        ),
    )


def _unknown(n: int, k: int) -> PlanInput:
    """A layer of which only the shape is known: weights that take no memory, even channels."""
    one = torch.ones(k)
    stats = ChannelStats(one, one, one, torch.ones(n))
    return PlanInput(lambda: torch.ones(1).expand(n, k), stats, (n, k), n * one)
