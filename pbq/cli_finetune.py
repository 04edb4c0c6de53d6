"""The command that trains a packed checkpoint on: finetune."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from pbq.cli_options import (
    AsJson,
    Calib,
    Device,
    Fresh,
    Memory,
    NSamples,
    Overwrite,
    Packed,
    Quiet,
    Seed,
    SeqLen,
    Trust,
)
from pbq.console import Console, hush_libraries, resumable

app = typer.Typer()


@app.command(epilog="Example: pbq finetune out better --steps 600 --calib text.txt+self")
def finetune(
    out: Packed,
    new: Annotated[Path, typer.Argument(help="directory for the trained checkpoint")],
    steps: Annotated[int, typer.Option(help="of 1,024 tokens each")] = 300,
    recipe: Annotated[
        str,
        typer.Option(
            help="pbq: scales and norms, and signs of tiers without a trellis; pb-llm: its QAT, "
            "signs alone, each scale the mean size of its weights"
        ),
    ] = "pbq",
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="the original model; default: where OUT says it came from"),
    ] = None,
    calib: Calib = "self",
    nsamples: NSamples = 64,
    seqlen: SeqLen = 1024,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Memory = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train OUT on towards the original model, into NEW: the same bits, other values in them."""
    hush_libraries(quiet=quiet)
    from pbq import finetune as finetuning

    console = Console(quiet=quiet)
    with resumable(new):
        tuned = finetuning.finetune(
            out,
            new,
            finetuning.Training(steps, recipe, calib, nsamples, seqlen, seed),
            teacher=teacher,
            device=device,
            memory=memory,
            overwrite=overwrite,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            observer=console,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(tuned)))
    elif not quiet:
        console.table({"held-out text": tuned.in_words(), "checkpoint": str(new)}, title=str(new))
