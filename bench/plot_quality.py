"""The README's plot: perplexity against true stored bits, from bench/results.

    python bench/plot_quality.py            # writes docs/quality.png

Ours from quality.json (bench_quality.py), the papers' public code from peers.json, all on
SmolLM2-135M-Instruct. Of several rows of one method and width the last of default effort is drawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
UNQUANTIZED = 20.58


def ours() -> list[dict[str, Any]]:
    rows = json.loads((HERE / "results" / "quality.json").read_text())
    last = {
        (row["method"], row["config"]["bits"]): row
        for row in rows
        if row["config"]["effort"] == "default"
    }
    # by bits; those of one method lie close together, the first alone has room for its name
    found = sorted(last.values(), key=lambda row: row["stored_bits"])
    named: dict[str, str] = {}
    for row in found:
        named.setdefault(row["method"], f"pbq {row['method']}, ")
        row["name"], named[row["method"]] = named[row["method"]], ""
    return [{**row, "ppl": row["ppl_wikitext2_40w"]} for row in found]


def draw(axes: Any, row: dict[str, Any], color: str) -> None:
    """A full mark at the stored bits; a hollow one, joined to it, at the paper's own accounting."""
    bits, label, ppl = row["stored_bits"], row["paper_bits"], row["ppl"]
    axes.plot([label, bits], [ppl, ppl], color=color, ls=":", lw=1)
    axes.plot(label, ppl, "o", color=color, mfc="white")
    axes.plot(bits, ppl, "o", color=color)
    axes.annotate(
        row["name"] + (f"{ppl:,.4g}" if ppl < 1000 else f"{ppl:,.0f}"),
        (max(bits, label), ppl),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=color,
    )


def main() -> None:
    peers = json.loads((HERE / "results" / "peers.json").read_text())
    figure = Figure(figsize=(7.6, 4.4), layout="constrained", dpi=144)
    axes = figure.subplots()
    peers = [{**row, "name": f"{row['name']}, "} for row in peers]
    for rows, color in ((peers, "0.35"), (ours(), "C0")):
        for row in rows:
            draw(axes, row, color)
    axes.axhline(UNQUANTIZED, color="0.6", ls="--", lw=1)
    axes.text(4.15, UNQUANTIZED * 1.08, f"unquantized, {UNQUANTIZED}", ha="right", fontsize=9)
    axes.set(xlim=(0.9, 4.2), yscale="log", ylim=(14, 1e5))
    axes.set_xlabel("stored bits per weight, everything counted (hollow: as the paper counts)")
    axes.set_ylabel("perplexity, WikiText-2 test")
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "quality.png")


if __name__ == "__main__":
    main()
