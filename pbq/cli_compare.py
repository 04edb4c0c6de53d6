"""`pbq compare`: several methods under one protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from pbq.cli_options import (
    AsJson,
    Calib,
    Device,
    Effort,
    Model,
    NSamples,
    Quiet,
    Seed,
    SeqLen,
    Texts,
    Trust,
    Window,
    short_name,
)
from pbq.console import Console, hush_libraries
from pbq.errors import UsageError

app = typer.Typer()


@app.command(
    epilog="Example: pbq compare ./model runs --methods ptq161,pb-llm,gptq --bits 1.61,2.5 "
    "--calib wiki.txt --ppl heldout.txt"
)
def compare(
    model: Model,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="holds a directory for every run; default: ./NAME-compare"),
    ] = None,
    ppl: Texts = None,
    methods: Annotated[
        str,
        typer.Option(
            help="comma separated, or all; METHOD@BITS and METHOD@paper bring their own budget"
        ),
    ] = "all",
    bits: Annotated[str, typer.Option(help="stored bits per weight, comma separated")] = "1.61,2,3",
    faithful: Annotated[
        bool, typer.Option(help="also the papers' own recipes, at the bits they truly store")
    ] = False,
    effort: Effort = "default",
    calib: Calib = "self",
    nsamples: NSamples = 64,
    seqlen: SeqLen = 1024,
    seed: Seed = 0,
    windows: Annotated[int, typer.Option(help="at most so many windows of each text")] = 40,
    window: Window = 2048,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL with several methods and score them alike; finished runs are not redone."""
    if not ppl:
        raise UsageError("a comparison needs a text to score: --ppl FILE")
    budgets = _numbers(bits)
    from pbq import compare as comparing
    from pbq import methods as registry
    from pbq.config import QuantConfig

    hush_libraries(quiet=quiet)
    common = QuantConfig(effort=effort, calib=calib, nsamples=nsamples, seqlen=seqlen, seed=seed)
    names = registry.names() if methods == "all" else [m for m in methods.split(",") if m]
    configs = comparing.configurations(names, budgets, common, faithful=faithful)
    protocol = comparing.Protocol(tuple(ppl), windows, window, device, trust_remote_code)
    target = folder or Path(f"{short_name(model)}-compare")
    console = Console(quiet=quiet)
    found = comparing.compare(model, target, configs, protocol, console)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console.grid(*found.grid(), title=f"{target}/compare.html")
    for entry in found.entries:
        if entry.refused:
            console.line(f"{entry.name}: {entry.refused}")


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--bits {text}: expected numbers with commas between them") from None
    if not found:
        raise UsageError("--bits: expected at least one number")
    return found
