"""The terminal: progress with ETA on stderr, tables, and errors as one line with an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pbq.errors import PbqError, ResourceError, is_out_of_memory

INTERRUPTED = 130
# Commands that go on where they stopped.
_RESUMABLE = {"quantize", "finetune", "compare"}
# Of a table in a file or a pipe: no terminal's width, so that no name is folded.
_UNFOLDED = 1000


class Console:
    """Shows stages, steps and lines of a run. Not a terminal: a plain line per stage, no bar."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = rich.console.Console()
        self._err = rich.console.Console(stderr=True)
        for console in (self._out, self._err):
            if not console.is_terminal:
                console.width = _UNFOLDED
        self._quiet = quiet
        self._progress: Progress | None = None
        self._started = time.monotonic()

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage of `total` steps (None: unknown); ends the stage before it."""
        self.close()
        if self._quiet:
            return
        if not self._err.is_terminal:
            self._err.print(f"[{time.monotonic() - self._started:6.0f} s] {name}", markup=False)
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._err,
            transient=True,
        )
        self._progress.add_task(name, total=total)
        self._progress.start()

    def step(self, done: int, total: int | None = None) -> None:
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=done, total=total)

    def line(self, text: str) -> None:
        """One line that stays, above the bar."""
        if not self._quiet:
            self._err.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def table(self, rows: Mapping[str, Any], title: str = "") -> None:
        """Two columns, on stdout."""
        self.grid(["", ""], [[name, value] for name, value in rows.items()], title, header=False)

    def grid(
        self,
        header_row: Sequence[str],
        rows: Sequence[Sequence[Any]],
        title: str = "",
        *,
        header: bool = True,
    ) -> None:
        """A table on stdout; columns after the first are aligned right when there is a header.

        Ruled on a terminal; elsewhere bare columns, for grep and awk.
        """
        self.close()
        lines: dict[str, Any] = {} if self._out.is_terminal else {"box": None, "pad_edge": False}
        # Text, here and below: what a file says of itself is no markup
        if title:  # not the table's own, which would fold it to the table's width
            self._out.print(Text(title, style="italic"), soft_wrap=True)
        table = Table(show_header=header, **lines)
        for i, name in enumerate(header_row):
            table.add_column(
                Text(name), justify="right" if header and i else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._out.print(table)


def hush_libraries(*, quiet: bool = False) -> None:
    """Turn off the progress bars of transformers: a run shows its own. Imports transformers.

    quiet: those of all libraries, lm-eval's too; for this, call it before they are imported.
    """
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read by tqdm when it is imported
    # it says at length that it builds a cache of fonts, the first time
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class Unfinished(Exception):
    """A run failed after some blocks were done, and these are kept. Its cause says why."""


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Around a run into `out`: tells a failure that leaves something to resume from others."""
    try:
        yield
    except Exception as error:
        out = out.resolve()  # "." has no name
        done = out.parent.joinpath(f"{out.name}.partial").glob("*.safetensors")
        if any(file.name.startswith(("block-", "training")) for file in done):
            raise Unfinished from error
        raise


def run_guarded(app: Callable[..., Any]) -> int:
    """Run the command line and turn what it raises into one clear line and an exit code."""
    # offline is a state to report at once, not to retry for half a minute a file
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this without a word
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """One line and an exit code for what a user can act upon; anything else is raised again."""
    cause = error.__cause__ if isinstance(error, Unfinished) else error
    assert isinstance(cause, Exception)
    explained = _explained(cause)
    if explained is None:
        if cause is not error:
            _refuse(f"failed; finished blocks are kept, the same command resumes: {_command()}", 1)
        raise cause
    message, code = explained
    # elsewhere other options are the way out, and with these there is nothing to resume
    if cause is not error and code == ResourceError.exit_code:
        message += f"; finished blocks are kept, the same command resumes: {_command()}"
    return _refuse(message, code)


def _explained(error: Exception) -> tuple[str, int] | None:
    if isinstance(error, PbqError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", ResourceError.exit_code
    if is_out_of_memory(error):
        way_out = "try fewer --nsamples or a shorter --seqlen"
        return f"out of memory; {way_out}", ResourceError.exit_code
    return None


def _refuse(message: str, code: int) -> int:
    """Tell it; of several processes (pbq.ranks), one does."""
    if "RANK" in os.environ:
        from pbq import ranks

        if not ranks.is_speaker():
            return code
    with contextlib.suppress(OSError):
        print(f"pbq: {message}", file=sys.stderr)
    return code


def _interrupted() -> int:
    resumes = not _RESUMABLE.isdisjoint(sys.argv[1:3])
    way_on = f"; the same command resumes: {_command()}" if resumes else ""
    return _refuse(f"interrupted{way_on}", INTERRUPTED)


def _command() -> str:
    """What was typed, quoted for a shell."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", "--nproc_per_node", processes, "-m", "pbq"] if processes else ["pbq"]
    return shlex.join([*start, *sys.argv[1:]])
