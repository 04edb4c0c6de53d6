"""`make quickstart`: a real model to about 1.6 bits per weight, scored before and after, no hub.

Calibrates on text the model writes itself and scores on text it has not seen: the reference manual
that comes with every Python (pydoc_data.topics).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from demo_model import demo_model

from pbq.config import QuantConfig
from pbq.console import Console, hush_libraries
from pbq.generation import Sampling, Writer
from pbq.pipeline import quantize

PROMPT = "The best way to learn a new language is"
WINDOWS = 8


def heldout_text(directory: Path) -> Path:
    """Python's own manual as one text file, 200,000 tokens of prose that nobody calibrated on."""
    from pydoc_data.topics import topics

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "python-manual.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def main(out: Path) -> None:
    started = time.monotonic()
    hush_libraries()
    console = Console()
    console.stage("demo model", None)
    model = demo_model()
    config = QuantConfig(bits=1.61, effort="fast", nsamples=64, seqlen=256)
    report = quantize(
        str(model),
        out,
        config,
        ppl_text=heldout_text(out.parent),
        ppl_windows=WINDOWS,
        overwrite=True,
        observer=console,
    )
    rows = report.rows()
    rows["all in all"] = f"{time.monotonic() - started:.0f} seconds"
    console.table(rows, title=str(out))
    writer = Writer.load(str(out))
    # sampled: greedy decoding of a model this far compressed soon repeats itself
    written = writer.write(writer.ids(PROMPT), Sampling(32, temperature=0.8, top_p=0.9))
    print(f"\n{out} writes: {PROMPT}{written}")
    print(f"\nNext: open {out}/report.html   pbq chat {out}   pbq eval {out} --ppl FILE")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/quickstart.py OUT")
    main(Path(sys.argv[1]))
