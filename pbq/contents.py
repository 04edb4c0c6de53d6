"""What `pbq inspect` shows: the layers of a packed checkpoint as a tree, or one with its scales."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbq import checkpoint
from pbq.checkpoint import CheckpointSummary, LayerSummary, Table
from pbq.disk import read_json
from pbq_kernels.layout import expand_offsets, expand_scales


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint's layers; errors: relative output error by layer, where report.json has it."""

    summary: CheckpointSummary
    errors: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        found = self.summary.to_dict()
        for layer in found["layers"]:
            layer["error"] = self.errors.get(layer["name"])
        return found

    def grid(self) -> Table:
        """A row for each block, its layers below it, then the totals."""
        header, flat, title = self.summary.grid()
        layers, totals = flat[: len(self.summary.layers)], flat[len(self.summary.layers) :]
        rows = []
        for block, members in _by_block(self.summary.layers).items():
            if block:
                nbytes = sum(layer.total_bytes for layer in members)
                weights = sum(layer.layout.n * layer.layout.k for layer in members)
                rows.append([block, "", "", f"{8 * nbytes / weights:.4f}", f"{nbytes:,}", ""])
            indent = "  " if block else ""
            for layer in members:
                _, *cells = layers[self.summary.layers.index(layer)]
                name = layer.name.removeprefix(f"{block}.")
                rows.append([f"{indent}{name}", *cells, _number(self.errors.get(layer.name))])
        return [*header, "error"], rows + [[*row, ""] for row in totals], title


@dataclass(frozen=True)
class LayerContents:
    """One layer. scales: for every stored plane and offset, where its numbers lie."""

    summary: LayerSummary
    error: float | None
    scales: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {**self.summary.to_dict(), "error": self.error, "scales": self.scales}

    def grid(self) -> Table:
        """A row for each tier, its planes below it, then one for each stored tensor."""
        header, flat, title = self.summary.grid()
        tiers = flat[: len(self.summary.layout.tiers)]
        rows = []
        for t, (name, columns, planes, kind) in enumerate(tiers):
            rows.append([name, columns, planes, kind])
            for found in self.scales:
                if found["tier"] == t:
                    where = " .. ".join(f"{found[q]:.3g}" for q in ("least", "median", "most"))
                    rows.append([f"  {found['what']}", f"{found['count']} numbers", "", where])
        if self.error is not None:
            title += f", error {self.error:.4f}"
        return header, rows + flat[len(tiers) :], title


def describe(out: Path | str) -> CheckpointContents:
    """The whole checkpoint, from its headers and its report. Raises CheckpointError."""
    return CheckpointContents(checkpoint.inspect(out), _errors(Path(out)))


def describe_layer(out: Path | str, name: str) -> LayerContents:
    """One layer, its scales read and checked. Raises CheckpointError."""
    summary = checkpoint.inspect(out, name)
    packed = checkpoint.read_packed(out, name)
    found = []
    if packed.layout.rank:
        outer, packed = packed.factors()
        spread = _spread(outer.tensors["scale"])
        found.append({"tier": 0, "what": "scale of the outer factor", **spread})
    scales = expand_scales(packed.layout, packed.tensors)
    offsets = expand_offsets(packed.layout, packed.tensors.get("offset"))
    for t, tier in enumerate(packed.layout.tiers):
        # the planes of a tied tier follow from its first
        for p in range(min(tier.planes, 1) if tier.tied else tier.planes):
            found.append({"tier": t, "what": f"scale of plane {p}", **_spread(scales[t][..., p])})
        offset = offsets[t]
        if offset is not None:
            found.append({"tier": t, "what": "offset", **_spread(offset)})
    return LayerContents(summary, _errors(Path(out)).get(name), found)


def _spread(values: Tensor) -> dict[str, float]:
    """Count, least, median and greatest; the lower median of an even number."""
    flat = values.flatten()
    if not len(flat):
        return {"count": 0, "least": 0.0, "median": 0.0, "most": 0.0}
    found = torch.stack([flat.min(), flat.median(), flat.max()]).tolist()
    return {"count": len(flat), **dict(zip(("least", "median", "most"), found, strict=True))}


def _by_block(layers: tuple[LayerSummary, ...]) -> dict[str, list[LayerSummary]]:
    """Layers by the name of their block: up to the first number, "" where there is none."""
    found: dict[str, list[LayerSummary]] = {}
    for layer in layers:
        block = re.match(r"(.*?\.\d+)\.", layer.name)
        found.setdefault(block.group(1) if block else "", []).append(layer)
    # names come sorted as words, where 10 is before 2
    return dict(sorted(found.items(), key=lambda named: _numbers(named[0])))


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _errors(out: Path) -> dict[str, float]:
    """What report.json says of each layer; nothing where there is none, or not pbq's."""
    file = out / "report.json"
    return dict(_reported(read_json(file).get("blocks"))) if file.exists() else {}


def _reported(blocks: Any) -> Iterator[tuple[str, float]]:
    for block in blocks if isinstance(blocks, list) else []:
        layers = block.get("layers") if isinstance(block, dict) else None
        for name, layer in layers.items() if isinstance(layers, dict) else ():
            error = layer.get("error") if isinstance(layer, dict) else None
            if isinstance(error, float):
                yield f"{block.get('name')}.{name}", error


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
