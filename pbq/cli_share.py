"""Commands about a finished checkpoint: look at it, hand it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pbq.cli_options import AsJson, Packed, Quiet, Trust
from pbq.console import Console, hush_libraries

if TYPE_CHECKING:
    from pbq.export import Exported
    from pbq.gguf_export import GgufFile

app = typer.Typer()


@app.command(epilog="Example: pbq report out")
def report(out: Packed) -> None:
    """Make OUT/report.html again, from OUT/report.json: after installing matplotlib, say."""
    from pbq import html_report

    print(html_report.write(out))


@app.command(epilog="Example: pbq export out dense && pbq export out out.gguf --dtype q8_0")
def export(
    out: Packed,
    dense: Annotated[Path, typer.Argument(help="directory, or .gguf file, that will be written")],
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16 | float16 | float32, which is exact; for .gguf also a block type, as "
            "q8_0, or smallest: of every layer the smallest within --max-error"
        ),
    ] = "bfloat16",
    max_error: Annotated[
        float, typer.Option(help="relative error of a layer that a .gguf may have")
    ] = 0.01,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a plain checkpoint with the same values, which loads without pbq, or a .gguf file."""
    hush_libraries(quiet=quiet)
    if dense.suffix == ".gguf":
        from pbq.gguf_export import export_gguf

        done: Exported | GgufFile = export_gguf(
            out, dense, dtype, max_error=max_error, trust_remote_code=trust_remote_code
        )
    else:
        from pbq.export import export

        done = export(out, dense, dtype, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(done.to_dict()))
    elif not quiet:
        Console().table(done.rows(), title=str(dense))


@app.command(epilog="Example: pbq push out me/my-model-pbq --dry-run")
def push(
    out: Packed,
    repo: Annotated[str, typer.Argument(help="ORGANISATION/NAME on the hub")],
    private: Annotated[bool, typer.Option(help="if the repository is new, make it private")] = True,
    dry_run: Annotated[bool, typer.Option(help="only print what would be uploaded")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, once it has been verified."""
    from pbq import publish

    upload = publish.plan_upload(out, repo, private)
    if as_json:
        print(json.dumps(upload.to_dict()))
    elif dry_run:
        Console().grid(*upload.grid())
    if not dry_run:
        url = publish.push(out, upload)
        if not as_json:
            print(url)
