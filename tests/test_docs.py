"""What the README and the pages of docs/ tell people to type works, on a tiny model."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from pbq.cli import app
from pbq.console import run_guarded

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A run of a second: a tiny model's scales need more bits, and its positions end at 64.
SMALL = ["--nsamples", "2", "--seqlen", "16", "--effort", "fast"]


# Shell lines that are not run here, by how they begin, and why.
NOT_RUN = {
    "make quickstart": "ten minutes and a real model: tests/test_real.py runs its parts",
    "make test": "this is it",
    "pip install": "this environment has it",
    "torchrun": "several processes: tests/test_ranks.py runs two",
    "python -c": "a server: transformers' own, which needs packages that pbq does not ask for",
    "curl": "needs that server",
    "transformers chat": "needs that server",
}
# Options left out when a command is run here, and why.
LEFT_OUT = {"--tasks": "their data may not be there; tests/test_evaluate.py has some of its own"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def shell_lines(page: Path) -> list[list[str]]:
    """Words of every command in the page's shell blocks, comments left out."""
    found = []
    for block in blocks(page, "sh"):
        lines = iter(block.splitlines())
        for line in lines:
            while line.count("'") % 2:  # a string that goes on in the next line
                line += "\n" + next(lines)
            found.append(shlex.split(line, comments=True))
    return found


def commands(page: Path) -> list[list[str]]:
    """Words after `pbq` of every such command."""
    return [words[1:] for words in shell_lines(page) if words[0] == "pbq"]


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Path:
    path = tmp_path_factory.mktemp("docs") / "MODEL"
    return shutil.copytree(tiny_checkpoint("llama"), path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    import pbq

    text = tmp_path_factory.mktemp("docs") / "text.txt"
    text.write_text("It was a dark and stormy night. " * 20)
    config = pbq.QuantConfig(bits=3.0, calib=str(text), nsamples=2, seqlen=16, effort="fast")
    return pbq.quantize(source, text.parent / "OUT", config)


@pytest.fixture
def folder(
    tmp_path: Path, source: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Path]:
    """folder(): the current directory is one that has what the pages name."""
    shutil.copytree(source, tmp_path / "MODEL")
    shutil.copytree(packed, tmp_path / "OUT")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name in ("text.txt", "heldout.txt"):
        (tmp_path / name).write_text("It was a dark and stormy night. " * 20)
    (tmp_path / "prompts.txt").write_text("It was\nOnce\n")
    monkeypatch.chdir(tmp_path)
    return lambda: tmp_path


def on_a_tiny_model(words: list[str]) -> list[str]:
    """The same command, smaller, and without the options that are left out."""
    for option in LEFT_OUT:
        if option in words:
            at = words.index(option)
            words = words[:at] + words[at + 2 :]
    words = ["4" if before == "--bits" else word for before, word in zip(["", *words], words)]  # noqa: B905
    if words[0] == "quantize" and "--recipe" not in words:
        words += SMALL
    if words[0] == "plan":
        words += ["--seqlen", "16"]
    if words[0] == "finetune":
        words += ["--steps", "2", "--nsamples", "4", "--seqlen", "16"]
    return words + (["--window", "32"] if words[0] == "eval" else [])


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_run(
    page: Path,
    folder: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = folder()
    for words in commands(page):
        if words[:3] == ["quantize", "MODEL", "OUT"]:
            shutil.rmtree(here / "OUT", ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["pbq", *on_a_tiny_model(words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/exit\n"))
        assert run_guarded(app) == 0, f"{words}: {capsys.readouterr().err}"


def test_every_shell_line_is_run_or_has_a_reason_not_to_be() -> None:
    others = [" ".join(w) for page in PAGES for w in shell_lines(page) if w[0] != "pbq"]
    assert all(any(line.startswith(begin) for begin in NOT_RUN) for line in others), others
    assert all(any(line.startswith(begin) for line in others) for begin in NOT_RUN)


def test_every_block_is_of_a_language_that_is_tested() -> None:
    fences = [line for page in PAGES for line in re.findall(r"^```(.*)$", page.read_text(), re.M)]
    assert set(fences) == {"", "sh", "python"} and fences.count("") == len(fences) / 2


INLINE = [
    (page.name, shlex.split(code))
    for page in PAGES
    for code in re.findall(r"`((?:pbq|make|python) [^`]+)`", page.read_text())
]


@pytest.mark.parametrize(("page", "words"), INLINE, ids=lambda value: " ".join(value)[:40])
def test_commands_in_a_sentence_exist(page: str, words: list[str]) -> None:
    """Those are not run: what they name is there."""
    program, first, *rest = words
    if program == "make":
        assert re.search(rf"^{first}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        module = rest[0] if first == "-m" else None
        assert find_spec(module) if module else (ROOT / first).is_file()
    elif first not in ("--install-completion", "--show-completion", "COMMAND"):
        command = typer.main.get_group(app).commands[first]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, folder: Callable[[], Path]) -> None:
    """As written, but for a run of a second."""
    for block in blocks(page, "python"):
        here = folder()
        if "pbq.quantize(" in block:
            shutil.rmtree(here / "OUT")
        small = 'bits=4.0, effort="fast", nsamples=2, seqlen=16, '
        exec(compile(block.replace("bits=1.61, ", small), page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """`make lint` checks those between pages, anchors too; these also those of the README."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert all((page.parent / target).exists() for target in local), local


def test_pages_with_commands_are_found() -> None:
    assert {"README.md", "index.md", "use.md"} <= {page.name for page in WITH_COMMANDS}
