"""What each step of `waterfill` is worth: all others kept, that one left out, at equal stored bits.

    python bench/bench_ablation.py                       # every row
    python bench/bench_ablation.py "no compensation"     # one row
    python bench/bench_ablation.py --show                # the table of bench/results/ablation.json

At `--effort fast` on 16 x 1024 tokens of WikiText-2 validation, 1.61 bits, one seed; perplexity on
20 windows of WikiText-2 test and 10 of Python's reference manual. The two files of WikiText-2 are
looked for in $PBQ_DATA/wikitext2. This file is also the method: its rows are variations of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput, most_columns, tiers_of
from pbq.config import QuantConfig
from pbq.grid import Grid, TrellisGrid, stored
from pbq.methods.waterfill import MEMORY, Waterfill
from pbq.tune import Recipe
from pbq_kernels.layout import Tier

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "ablation.json"
ROW = "PBQ_ABLATION"

ALL, PLAIN, EVEN, HALF, ONE_MIX, UNFITTED, TRAINED, UNDISTILLED = (
    "all of it",
    "plain levels, no trellis",
    "evenly spaced levels",
    "scales in 16 bits, not 8",
    "the same bits, and 1 or 4 planes a column",
    "scales from the largest entry, not fitted",
    "blocks trained too, two passes",
    "not distilled",
)
# What the method is instead.
METHODS: dict[str, dict[str, int]] = {
    PLAIN: {"memory": 0},
    EVEN: {"uneven": False},
    HALF: {"scale_bits": 16},
}
# What its recipe is instead.
RECIPES: dict[str, dict[str, object]] = {
    "the same bits for every layer": {"sensitivity": False},
    ONE_MIX: {"sensitivity": False},
    "no error feedback (GPTQ)": {"feedback": False},
    "no joint scales, no sweep over the codes": {"sweeps": 0},
    "no compensation": {"compensate": False},
    "tokens weighed alike for a whole block": {"importance": False},
    "no noise in the text": {"token_noise": 0.0},
}
OPTIONS: dict[str, dict[str, float]] = {
    TRAINED: {"block_epochs": 2.0},
    # without any no sensitivities would be measured; this one moves by next to nothing
    UNDISTILLED: {"distil_steps": 1},
}
ROWS = [ALL, *METHODS, *RECIPES, UNFITTED, UNDISTILLED, TRAINED]


@dataclass(frozen=True)
class Ablated(Waterfill):
    row: str = ALL

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        return (
            self._one_mix(layers, config) if self.row == ONE_MIX else super().plan(layers, config)
        )

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        unfitted = self.row == UNFITTED and tier.trellis  # dropped columns have no scale
        return _unfitted(W, tier) if unfitted else super().fit(W, weight, tier, row)

    def _one_mix(
        self, layers: Mapping[str, PlanInput], config: QuantConfig
    ) -> dict[str, LayerPlan]:
        """As many columns at 4 planes as the bits allow, the others at 1; all layers alike."""

        def mix(k: int, c: int) -> tuple[Tier, ...]:
            return self.tiers([0, k - c, 0, 0, c])

        def planned(name: str, layer: PlanInput) -> LayerPlan:
            n, k = layer.shape
            c = most_columns(n, k, config.bits, partial(mix, k), name)
            return LayerPlan(mix(k, c), tiers_of(layer.stats.x_sq * layer.w_sq, c))

        return {name: planned(name, layer) for name, layer in layers.items()}

    def recipe(self, config: QuantConfig) -> Recipe:
        return dataclasses.replace(super().recipe(config), **RECIPES.get(self.row, {}))


def _unfitted(W: Tensor, tier: Tier) -> Grid:
    """Levels evenly out to the largest |w| of the row."""
    return TrellisGrid.of(stored((W.abs().amax(1) / sum(tier.weights)).clamp(min=1e-7)), tier)


def method(config: QuantConfig) -> Ablated:
    row = os.environ.get(ROW, ALL)
    return dataclasses.replace(Ablated(MEMORY[config.effort], row=row), **METHODS.get(row, {}))


def measure(row: str) -> dict[str, object]:
    """Quantize and score in this process."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    from bench_quality import data_dir
    from demo_model import demo_model
    from quickstart import heldout_text

    from pbq.console import Console
    from pbq.pipeline import quantize
    from pbq.scoring import score_models

    os.environ[ROW] = row
    data, console = data_dir(), Console()
    config = QuantConfig(
        method=str(Path(__file__)),
        calib=str(data / "wiki.valid.txt"),
        nsamples=16,
        effort="fast",
        **OPTIONS.get(row, {}),
    )
    with tempfile.TemporaryDirectory() as scratch:
        out, started = Path(scratch) / "out", time.monotonic()
        report = quantize(str(demo_model()), out, config, observer=console)
        seconds = time.monotonic() - started
        texts = {data / "wiki.test.raw": 20, heldout_text(Path(scratch)): 10}
        scored = [
            score_models(
                [str(out)],
                texts=[text],
                windows=windows,
                window=2048,
                tasks=[],
                data_dir=None,
                limit=None,
                num_fewshot=None,
                batch_size=1,
                device="auto",
                trust_remote_code=False,
                observer=console,
            )
            .models[0]
            .perplexities[0]
            .ppl
            for text, windows in texts.items()
        ]
    return {
        "row": row,
        "stored_bits": report.bits,
        "ppl_wikitext2_20w": scored[0],
        "ppl_python_manual_10w": scored[1],
        "stage_seconds": report.seconds,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


def show() -> None:
    rows = {row["row"]: row for row in json.loads(RESULTS.read_text())}
    print("| | stored bits | WikiText-2 | Python manual |\n|---|---|---|---|")
    for name in (name for name in ROWS if name in rows):
        r = rows[name]
        print(
            f"| {name} | {r['stored_bits']:.3f} | {r['ppl_wikitext2_20w']:,.1f} "
            f"| {r['ppl_python_manual_10w']:,.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of: {'; '.join(ROWS)}")
    parser.add_argument("--show", action="store_true", help="print what was measured")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are: {'; '.join(ROWS)}")
    if arguments.here:
        found = measure(arguments.rows[0])
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        rows = [r for r in rows if r["row"] != found["row"]] + [found]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        return
    for row in [] if arguments.show else arguments.rows or ROWS:
        subprocess.run([sys.executable, __file__, "--here", row], check=True)
    show()


if __name__ == "__main__":
    main()
