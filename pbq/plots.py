"""The figures of report.html, as SVG that takes its colours and fonts from the page around it.

matplotlib is an optional dependency (`pip install 'pbq-llm[report]'`): it is imported when a
figure is drawn, and without it the page says so. Every function takes report.json as a dict and
returns the SVG, or None where the run has nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

# Colours are drawn as these and replaced by variables of the page, which knows light from dark.
_HEAT = [f"#0000{i:02x}" for i in range(1, 10)]
_PLANES = [f"#0100{i:02x}" for i in range(1, 10)]
_INK, _MUTED, _GRID, _PAPER, _ACCENT = "#020001", "#020002", "#020003", "#020004", "#020005"
_QUIET = "#020006"
_VARIABLES = {
    **{color: f"var(--heat-{i})" for i, color in enumerate(_HEAT, 1)},
    **{color: f"var(--planes-{i})" for i, color in enumerate(_PLANES)},
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _PAPER: "var(--paper)",
    _ACCENT: "var(--accent)",
    _QUIET: "var(--quiet)",
}
# One column of a page: text keeps its size on a phone; elsewhere two figures stand side by side.
_WIDTH = 4.6
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pbq",
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelpad": 5.0,
    "figure.facecolor": "none",
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.2,
}


def draw_all(report: Report) -> dict[str, str]:
    """Every figure the report has data for, by name. Raises ImportError without matplotlib."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figures = (bits, sensitivities, errors, tuning, distillation, levels)
        drawn = {draw.__name__: draw(report) for draw in figures}
    return {name: svg for name, svg in drawn.items() if svg is not None}


def bits(report: Report) -> str | None:
    """Planes of each tier, and stored bits of each layer, against what a dropped weight costs."""
    tiers = [tier for layer in report.get("tiers", {}).values() for tier in layer]
    tiers = [tier for tier in tiers if tier["columns"] and tier["damage"] > 0]
    if not tiers:
        return None
    figure, axes = _figure(2.9)
    axes.set_xscale("log")
    axes.grid(axis="y")
    planes = sorted({tier["planes"] for tier in tiers})
    for count in planes:
        _dots(axes, [tier["damage"] for tier in tiers if tier["planes"] == count], count)
    _diamonds(axes, report)
    axes.set_ylim(planes[0] - 0.55 if planes[0] else -0.45, planes[-1] + 0.45)
    axes.set_yticks(range(planes[0], planes[-1] + 1))
    axes.set_xlabel("cost of dropping a weight, E[x²]·w² (log)")
    axes.set_ylabel("bits per weight")
    return _svg(figure, "Bits of tiers and layers against the cost of dropping a weight")


def _dots(axes: Axes, damages: list[float], planes: int) -> None:
    """A dot a tier, spread a little so that all are seen: golden-ratio steps never line up."""
    heights = [planes + 0.32 * (i * 0.6180339887 % 1) - 0.16 for i in range(len(damages))]
    color = _PLANES[min(planes, 8)]
    axes.scatter(damages, heights, s=13, alpha=0.75, linewidths=0, color=color)


def _diamonds(axes: Axes, report: Report) -> None:
    """A diamond a layer, at its mean damage and the bits it stores."""
    planned = report["tiers"]
    layers = {name: layer for name, layer in _layers(report).items() if name in planned}
    axes.scatter(
        [mean_damage(planned[name]) for name in layers],
        [layer["bits"] for layer in layers.values()],
        s=9,
        marker="D",
        facecolors="none",
        linewidths=0.6,
        edgecolors=_INK,
    )


def mean_damage(tiers: Sequence[Mapping[str, float]]) -> float:
    """Of a whole layer, from that of its tiers."""
    columns = sum(tier["columns"] for tier in tiers)
    return sum(tier["damage"] * tier["columns"] for tier in tiers) / columns


def errors(report: Report) -> str | None:
    """Relative error of every linear, blocks from left to right."""
    found = {name: layer["error"] for name, layer in _layers(report).items()}
    return _by_block(report, found, "Relative output error of every layer")


def sensitivities(report: Report) -> str | None:
    """What the model loses with one linear rounded, per million weights, where it was measured."""
    found = report.get("sensitivities") or {}
    nats = {
        name: 1e6 * found[name] / (layer["layout"]["n"] * layer["layout"]["k"])
        for name, layer in _layers(report).items()
        if name in found
    }
    return _by_block(report, nats, "Sensitivity of the model to every layer")


def _by_block(report: Report, values: Mapping[str, float], title: str) -> str | None:
    """A value for every linear, blocks from left to right."""
    layers = {name: v for name, v in values.items() if v > 0 and math.isfinite(v)}
    if len(layers) < 2:
        return None
    blocks = [block["name"] for block in report["blocks"]]
    kinds = list(dict.fromkeys(n for block in report["blocks"] for n in block["layers"]))
    figure, axes = _figure(0.95 + 0.26 * len(kinds))
    grid = [[layers.get(f"{block}.{kind}", math.nan) for block in blocks] for kind in kinds]
    _heat_map(figure, axes, grid, min(layers.values()), max(layers.values()))
    axes.invert_yaxis()
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], [_short(kind) for kind in kinds])
    shown = range(0, len(blocks), max(1, math.ceil(len(blocks) / 8)))
    axes.set_xticks([i + 0.5 for i in shown], [str(i) for i in shown])
    axes.set_xlabel("block")
    axes.spines[:].set_visible(False)
    return _svg(figure, title)


def _heat_map(figure: Figure, axes: Axes, grid: list[list[float]], low: float, high: float) -> None:
    """Cells in nine steps of equal ratio from `low` to `high`, and the scale beside them."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    # a little beyond, so that rounding leaves the extremes on the scale
    low, ratio = low * 0.999, max(high / low, 1.25) * 1.002
    edges = [low * ratio ** (i / len(_HEAT)) for i in range(len(_HEAT) + 1)]
    drawn = axes.pcolormesh(
        grid,
        cmap=ListedColormap(_HEAT),
        norm=BoundaryNorm(edges, len(_HEAT)),
        edgecolors=_PAPER,
        linewidth=0.6,
    )
    ticks = [edges[0], math.sqrt(edges[0] * edges[-1]), edges[-1]]
    bar = figure.colorbar(drawn, ax=axes, ticks=ticks, pad=0.02, fraction=0.05)
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    bar.outline.set_visible(False)


def tuning(report: Report) -> str | None:
    """Loss of every block before and after its tuning."""
    tuned = {i: block["tuning"] for i, block in enumerate(report["blocks"]) if block.get("tuning")}
    if not tuned:
        return None
    figure, axes = _figure(2.5)
    axes.grid(axis="y")
    for when, color in (("before", _MUTED), ("after", _ACCENT)):
        losses = [found[when] for found in tuned.values()]
        axes.plot(list(tuned), losses, color=color, marker="o", markersize=3, label=when)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel("loss on held-out rows")
    axes.legend(ncols=2, loc="upper left")
    return _svg(figure, "Loss of every block before and after tuning")


def distillation(report: Report) -> str | None:
    """Divergence from the original model while the packed one was trained towards it."""
    found = report.get("distillation")
    if not found or not found.get("curve"):
        return None
    figure, axes = _figure(2.2)
    axes.grid(axis="y")
    steps, losses = zip((0, found["before"]), *found["curve"], strict=True)
    axes.plot(steps, losses, color=_ACCENT, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("KL, held-out text")
    return _svg(figure, "Divergence from the original model during distillation")


def levels(report: Report) -> str | None:
    """Weights of one layer (up) and the values stored for them (down), tier by tier."""
    shown = report.get("histogram")
    if not shown or not all("stored" in tier for tier in shown["tiers"]):
        return None
    tiers = [tier for tier in shown["tiers"] if tier["columns"]]
    figure, all_axes = _figure(0.7 + 1.35 * len(tiers), rows=len(tiers))
    for axes, tier in zip(all_axes, tiers, strict=True):
        _mirrored(axes, tier, shown["range"])
    for axes in all_axes[:-1]:
        axes.set_xticklabels([])
    all_axes[-1].set_xlabel("weight, in standard deviations of its row")
    return _svg(figure, f"Weights of {shown['layer']} and the levels they are stored at")


def _mirrored(axes: Axes, tier: Mapping[str, Any], reach: float) -> None:
    """Counts of the weights above the line and of the stored values below it."""
    stored_color = _PLANES[min(tier["planes"], 8)]
    for values, sign, color in ((tier["weights"], 1, _QUIET), (tier["stored"], -1, stored_color)):
        # each side fills its half: a level holds far more weights than a bin of the original
        heights = [sign * value / max(values) for value in values]
        edges = [reach * (2 * i / len(values) - 1) for i in range(len(values) + 1)]
        axes.stairs(heights, edges, fill=True, color=color, linewidth=0)
    axes.axhline(0, color=_GRID, linewidth=0.8)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-1.05, 1.05)
    axes.set_yticks([0.5, -0.5], ["weights", "stored"])
    axes.spines[["left", "bottom"]].set_visible(False)
    title = f"{tier['planes']} bit, {tier['columns']} columns"
    axes.set_title(title, loc="left", fontsize=9, color=_INK, pad=3)


def _layers(report: Report) -> dict[str, Any]:
    """What is reported of every linear, by its full name."""
    return {
        f"{block['name']}.{name}": layer
        for block in report["blocks"]
        for name, layer in block["layers"].items()
    }


def _short(name: str) -> str:
    """self_attn.q_proj -> q_proj: the last word tells linears of a block apart."""
    return name.rpartition(".")[2]


def _figure(height: float, rows: int = 0) -> tuple[Figure, Any]:
    """A figure and its axes; with rows: a list of axes one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    if not rows:
        return figure, figure.add_subplot()
    axes: list[Axes] = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The figure's markup, to be put into a page as it is."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    # the XML prolog, and a size in points: the page decides
    markup = markup[markup.index("<svg") :]
    (view,) = re.findall(r'viewBox="[^"]*"', markup)
    opening = f'<svg role="img" aria-label="{title}" {view}>'
    markup = re.sub(r"<svg[^>]*>", opening, markup, count=1)
    markup = re.sub(r"<(metadata|style)\b.*?</\1>", "", markup, flags=re.DOTALL)
    markup = markup.replace("xlink:href=", "href=")
    # ids are those of the page now
    name = title.split()[0].lower()
    markup = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', markup)
    markup = re.sub(r'="#([^"]+)"', rf'="#{name}-\1"', markup)
    markup = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", markup)
    # fonts are those of the page, too
    markup = re.sub(r"font-family: [^;]*; ?", "", markup)
    for color, variable in _VARIABLES.items():
        markup = markup.replace(color, variable)
    return markup
