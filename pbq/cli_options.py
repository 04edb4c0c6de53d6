"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Model = Annotated[str, typer.Argument(help="hub id, local directory, or .gguf file")]
Packed = Annotated[Path, typer.Argument(help="directory that pbq quantize wrote")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1 …")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only errors")]
Memory = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="GiB of memory that the run may take; default: what is free"),
]
Trust = Annotated[bool, typer.Option(help="run code that comes with the model")]
Overwrite = Annotated[bool, typer.Option(help="replace what is there, at the very end")]
Fresh = Annotated[bool, typer.Option(help="discard an unfinished run instead of resuming")]
Baseline = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="model to compare with: the unquantized one, say"),
]
EmbedBits = Annotated[
    int, typer.Option(help="8 or 4: pack embeddings and head too, beside --bits; 0: as they are")
]
Effort = Annotated[str, typer.Option(help="fast | default | best")]
Calib = Annotated[
    str, typer.Option(help="text or jsonl file, datasets id name[:config[:split]], self; or A+B")
]
NSamples = Annotated[
    int,
    typer.Option(help="calibration segments, -1: 64, more of a longer text if the method gains"),
]
SeqLen = Annotated[int, typer.Option(help="tokens in a segment")]
Seed = Annotated[int, typer.Option(help="sampling, shuffling, held-out rows")]
Texts = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(help="text file for perplexity; may be given several times"),
]
Window = Annotated[int, typer.Option(help="tokens in a window")]


def _choose_kernels(value: str) -> str:
    if value not in ("exact", "int8"):
        raise typer.BadParameter("exact or int8")
    if value == "int8":
        from pbq.linear import set_backend

        set_backend("cpu-int8")
    return value


Activations = Annotated[
    str,
    typer.Option(
        help="of packed layers: exact, or int8 (rounded token by token: CPU only, faster)",
        callback=_choose_kernels,
    ),
]


def short_name(model: str) -> str:
    """What a folder made from the model is called where no name was given."""
    source = Path(model).resolve()  # "." has no name of its own
    return source.stem if source.suffix == ".gguf" else source.name
