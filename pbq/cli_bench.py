"""The command that measures speed: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from pbq.cli_options import Activations, AsJson, Baseline, Device, Model, Quiet, Trust
from pbq.console import Console, hush_libraries

app = typer.Typer()


@app.command(epilog="Example: pbq bench out --baseline ./model --new-tokens 128")
def bench(
    out: Model,
    baseline: Baseline = None,
    gguf: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="a .gguf file to run beside them by llama.cpp, if that is installed"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the random prompt")] = 512,
    new_tokens: Annotated[int, typer.Option(help="tokens to write")] = 64,
    repeats: Annotated[int, typer.Option(help="runs after one that warms up; medians")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads, 0: torch's own number")] = 0,
    static_cache: Annotated[
        bool, typer.Option(help="transformers' static cache, which it compiles on GPUs")
    ] = False,
    activations: Activations = "exact",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tokens a second, time to the first token and peak memory, against the same model in bf16.

    Without --baseline that is random weights of the same shapes, which are as fast.
    """
    hush_libraries()
    from pbq.benchmark import Settings, compare

    settings = Settings(
        prompt_tokens, new_tokens, repeats, threads, device, static_cache, trust_remote_code
    )
    console = Console(quiet=quiet)
    found = compare(out, baseline, gguf, settings, console)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        console.grid(*found.grid())
