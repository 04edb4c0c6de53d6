"""Commands about a finished checkpoint: look at it, hand it on."""

from __future__ import annotations

import typer

from pbq.cli_options import Packed

app = typer.Typer()


@app.command(epilog="Example: pbq report out")
def report(out: Packed) -> None:
    """Make OUT/report.html again, from OUT/report.json: after installing pbq[report], say."""
    from pbq import html_report

    print(html_report.write(out))
