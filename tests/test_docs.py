"""What the README and the pages of docs/ tell people to type works, on a tiny model."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbq.cli import app
from pbq.console import run_guarded

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A run of a second: a tiny model's scales need more bits, and its positions end at 64.
SMALL = ["--nsamples", "2", "--seqlen", "16", "--effort", "fast"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Words of every `pbq` command in the page's shell blocks, comments left out."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pbq ")]


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("docs") / "MODEL"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


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
    """The same command, smaller, and without tasks, whose data may not be there."""
    if "--tasks" in words:
        at = words.index("--tasks")
        words = words[:at] + words[at + 2 :]
    words = ["4" if before == "--bits" else word for before, word in zip(["", *words], words)]  # noqa: B905
    if words[0] == "quantize" and "--recipe" not in words:
        words += SMALL
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_parses(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """`make lint` checks those between pages, anchors too; these also those of the README."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert all((page.parent / target).exists() for target in local), local


def test_pages_with_commands_are_found() -> None:
    assert {"README.md", "index.md", "use.md"} <= {page.name for page in WITH_COMMANDS}
