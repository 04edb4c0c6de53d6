"""Two methods side by side on one text, through the Python API.

python examples/compare_methods.py MODEL CALIBRATION.txt HELDOUT.txt
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pbq

METHODS = ("ptq161", "rtn")


def compare(model: str, calibration: str, heldout: str, **options: object) -> dict[str, float]:
    """Perplexity on `heldout` by method, and of the unquantized model."""
    found = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            config = pbq.QuantConfig(method=method, calib=calibration, **options)
            out = pbq.quantize(model, Path(folder, "out"), config, ppl=heldout, windows=10)
            report = json.loads((out / "report.json").read_text())
        found["unquantized"] = report["before"]["ppl"]
        found[f"{method}, {report['bits']:.3f} bits"] = report["after"]["ppl"]
    return found


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    for name, perplexity in compare(*sys.argv[1:], bits=2.5).items():
        print(f"{name:>24}  {perplexity:10.2f}")
