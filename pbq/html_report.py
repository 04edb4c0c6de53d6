"""report.html: one self-contained page, made from report.json and nothing else.

It opens offline, follows the reader's light or dark setting, and fits a phone. Figures need
matplotlib; without it the page says how to get them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pbq import plots
from pbq.disk import read_json, size_text, writing
from pbq.errors import ModelError
from pbq.forecast import duration

log = logging.getLogger(__name__)

NO_PLOTS = "Figures need matplotlib: pip install 'pbq-llm[report]', then pbq report OUT."


def write(out: Path | str) -> Path:
    """Make OUT/report.html from OUT/report.json. Raises ModelError when that is not there."""
    out = Path(out)
    report = read_json(out / "report.json")
    if not isinstance(report.get("config"), dict) or not isinstance(report.get("blocks"), list):
        raise ModelError(f"{out / 'report.json'}: not the report of a pbq run")
    page = out / "report.html"
    with writing(page):
        page.write_text(render(report), encoding="utf-8")
    return page


def write_if_possible(out: Path) -> None:
    """As `write`, but a page that cannot be made costs no run: the reason is logged."""
    try:
        write(out)
    # hours of quantization are behind us: no bug in a figure may lose them
    except Exception as error:
        log.warning("report.html was not written (%s); `pbq report OUT` tries again", error)


def render(report: Mapping[str, Any]) -> str:
    """The page, as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pbq"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["size"] = size_text
    figures, note = _figures(report)
    template = environment.get_template("report.html.j2")
    return template.render(**_content(report), figures=figures, note=note)


def _figures(report: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Figures by name, and what to say when there are none."""
    from markupsafe import Markup

    try:
        drawn = plots.draw_all(report)
    except ImportError:
        log.info("report.html has no figures: pip install 'pbq-llm[report]', then `pbq report`")
        return {}, NO_PLOTS
    return {name: Markup(svg) for name, svg in drawn.items()}, ""


def _content(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, in the order in which it does."""
    layers = [
        _layer_row(report, block, name) for block in report["blocks"] for name in block["layers"]
    ]
    tiers = report.get("tiers") or {}
    return {
        "name": Path(report["source"]).name,
        "report": report,
        "tiles": _tiles(report),
        "asked": _asked(report),
        "options": [(k, v) for k, v in report["config"].items() if k not in ("bits", "calib")],
        "bytes": _shares(report.get("bytes_of") or {}),
        "seconds": _shares(report["seconds"]),
        "shown_layer": (report.get("histogram") or {}).get("layer"),
        "plane_counts": sorted({t["planes"] for row in tiers.values() for t in row}),
        "samples": report.get("samples") or [],
        "layers": layers,
        "worst": max(layers, key=lambda row: row["error"], default=None),
        "dearest": max(layers, key=lambda row: row["bits"], default=None),
        "cheapest": min(layers, key=lambda row: row["bits"], default=None),
    }


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that matter most: value, what it is, and what it is measured against."""
    before, after = report.get("before"), report.get("after")
    smaller = report["model_bytes_before"] / max(report["model_bytes"], 1)
    tiles = [
        {
            "value": f"{report['bits']:.3f}",
            "label": "bits per weight",
            "note": f"stored; {report['config']['bits']:g} asked",
        },
        {
            "value": size_text(report["model_bytes"]),
            "label": "whole checkpoint",
            "note": f"was {size_text(report['model_bytes_before'])}, {smaller:.1f} times as much",
        },
    ]
    if after is not None:
        was = f"was {before['ppl']:.2f}; " if before else ""
        tokens = f"{after['windows']} \N{MULTIPLICATION SIGN} {after['window']} tokens"
        note = f"{was}{after['file']}, {tokens}"
        tiles.append({"value": f"{after['ppl']:.4g}", "label": "perplexity", "note": note})
    seconds = sum(report["seconds"].values())
    note = f"peak memory {size_text(report['peak_bytes'])}"
    tiles.append({"value": duration(seconds), "label": "to quantize", "note": note})
    return tiles


def _asked(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, asked, got): the promises of a run, and what came of them."""
    config = report["config"]
    rows = [
        ("bits per weight", f"{config['bits']:g}", f"{report['bits']:.4f} stored"),
        ("by the paper's accounting", "", f"{report['paper_bits']:.3f}"),
        ("calibration", config["calib"], report["calibration"]),
        ("weights quantized", "", f"{report['quantized_weights']:,}"),
    ]
    rows += [(name, "", text) for name, text in (report.get("notes") or {}).items()]
    found = report.get("distillation")
    if found:
        kept = "" if found.get("kept", True) else ", not kept"
        change = f"held-out KL {found['before']:.4f} → {found['after']:.4f}{kept}"
        rows.append(("distillation", "", change))
    return rows


def _shares(parts: Mapping[str, float]) -> list[dict[str, Any]]:
    """Name, value and percentage of every part, largest first."""
    total = sum(parts.values()) or 1
    found = sorted(parts.items(), key=lambda part: -part[1])
    return [
        {"name": name, "value": value, "percent": round(100 * value / total, 2)}
        for name, value in found
        if value > 0
    ]


def _layer_row(report: Mapping[str, Any], block: Mapping[str, Any], name: str) -> dict[str, Any]:
    layer, full = block["layers"][name], f"{block['name']}.{name}"
    layout, tiers = layer["layout"], (report.get("tiers") or {}).get(full)
    return {
        "name": full,
        "shape": f"{layout['n']}x{layout['k']}",
        "tiers": " + ".join(f"{t['columns']} at {t['planes']}" for t in layout["tiers"]),
        "bits": layer["bits"],
        "error": layer["error"],
        "damage": plots.mean_damage(tiers) if tiers else None,
    }
