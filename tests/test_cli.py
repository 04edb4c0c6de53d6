"""The command line: instant help, one clear line a refusal, exit codes, JSON on stdout.

Commands run in this process, through the function that the console script calls; what only a fresh
process shows (imports, stray output of libraries) is tested in two that are started for it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pbq
from pbq import (
    benchmark,
    checkpoint,
    compare,
    contents,
    demo,
    export,
    finetune,
    generation,
    html_report,
    methods,
    pipeline,
    publish,
    scoring,
)
from pbq.cli import Method, app
from pbq.console import Console, run_guarded
from pbq.errors import NumericalError, ResourceError
from pbq.linear import backend_name
from pbq_kernels import BACKENDS
from pbq_kernels.layout import Tier, WeightLayout

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "quantize",
    "plan",
    "compare",
    "eval",
    "generate",
    "chat",
    "demo",
    "bench",
    "inspect",
    "verify",
    "report",
    "export",
    "push",
    "finetune",
]

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """invoke(*words): exit code, stdout, stderr of `pbq WORDS`."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pbq", *map(str, words)])
        capsys.readouterr()
        code = run_guarded(app)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A llama with room for a window of 2048 tokens."""
    path = tmp_path_factory.mktemp("cli") / "source"
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return path


@pytest.fixture(scope="session")
def small(text: Path) -> list[str]:
    """Options of a run of a second."""
    return ["--method", "ptq161", "--bits", "2.5", "--effort", "fast", "--nsamples", "4",
            "--seqlen", "16", "--calib", str(text)]  # fmt: skip


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def started(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs `code` with sys.argv = pbq WORDS."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)


MAIN = "from pbq_cli import main; main()"


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path, small: list[str]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """OUT, and the process that wrote it with --json."""
    out = tmp_path_factory.mktemp("cli") / "out"
    words = ["quantize", source, out, *small, "--ppl", text, "--windows", "1", "--json"]
    return out, started(MAIN, *words)


@pytest.fixture
def out(run: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return run[0]


def refusal(err: str) -> str:
    """The one line that says why, which is the last; nothing of a traceback before it."""
    lines = err.strip().splitlines()
    assert "Traceback" not in err and sum(line.startswith("pbq: ") for line in lines) == 1, err
    assert lines[-1].startswith("pbq: "), err
    return lines[-1].removeprefix("pbq: ")


# Help


def test_help_is_instant_and_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from pbq_cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 600, len(sys.modules)"  # .2 to .5 s; torch alone is a thousand
    )
    done = started(code, "--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_and_explains_every_option(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert f"Example: pbq {command} " in " ".join(plain.split())
    (found,) = [c for c in app.registered_commands if (c.name or c.callback.__name__) == command]
    assert found.callback is not None and found.callback.__doc__


def test_the_examples_are_commands_that_parse(invoke: Invoke, monkeypatch: Any) -> None:
    """Each example up to its arguments: options that do not exist would exit with 2."""
    seen: list[str] = []
    for module, name in (
        (pipeline, "quantize"),
        (scoring, "score_models"),
        (generation.Writer, "load"),
        (demo, "demo_model"),
        (export, "export"),
        (publish, "plan_upload"),
        (checkpoint, "verify"),
        (contents, "describe_layer"),
        (html_report, "write"),
        (compare, "compare"),
        (benchmark, "compare"),
        (finetune, "finetune"),
    ):

        def note(*args: Any, name: str = name, **options: Any) -> None:
            seen.append(name)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, note)
    monkeypatch.setattr("pbq.planning.plan", lambda *a, **o: note(name="plan"))
    import shlex

    for command in app.registered_commands:
        assert command.epilog
        words = shlex.split(command.epilog.removeprefix("Example: pbq ").split(" && ")[0])
        assert invoke(*words)[0] == 130
    assert len(seen) == len(COMMANDS)


@pytest.mark.parametrize(
    ("typed", "offered"), [("pbq qua", "quantize"), ("pbq export --max", "--max-error")]
)
def test_a_shell_completes_commands_and_options(
    typed: str, offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bash asks, after --install-completion."""
    monkeypatch.setenv("_PBQ_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    done = started(f"import sys; sys.argv = ['pbq']; {MAIN}")
    assert (done.returncode, done.stdout) == (0, f"{offered}\n"), done.stderr


def test_version(invoke: Invoke) -> None:
    code, out, err = invoke("--version")
    assert (code, out, err) == (0, f"pbq {pbq.__version__}\n", "")


# Output


def test_json_on_stdout_and_progress_on_stderr(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = run
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bits"] <= 2.5 and found["after"]["windows"] == 1
    assert found["bits"] == checkpoint.inspect(out).stored_bits
    lines = done.stderr.strip().splitlines()
    # a line a stage and a block, what is covered and what to expect; no bar, no warning, nothing
    # from a library
    expected = r"\[ +\d+ s\] |model\.layers\.\d |about \d|quantizing \d"
    assert all(re.match(expected, line) for line in lines), done.stderr
    assert [line.split("] ")[1] for line in lines if line.startswith("[")] == [
        "load the model",
        "calibration text",
        "perplexity before",
        "statistics",
        "blocks",
        "write",
    ]


def test_quiet_is_silent(invoke: Invoke, source: Path, small: list[str], tmp_path: Path) -> None:
    assert invoke("quantize", source, tmp_path / "out", *small, "--quiet") == (0, "", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_run_ends_with_a_table(
    invoke: Invoke, source: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("quantize", source, *small)
    assert code == 0 and "load the model" in err and "load the model" not in out
    assert "stored bits per weight" in out and "(asked: 2.5)" in out and "peak memory" in out
    assert (tmp_path / "source-pbq-2.5" / "model.safetensors").exists()
    assert Path(out.split()[-1]) == Path("source-pbq-2.5/report.html")


def test_plan_says_what_the_run_stored(
    invoke: Invoke, source: Path, small: list[str], out: Path, tmp_path: Path
) -> None:
    calib = small.index("--calib")
    code, stdout, _ = invoke("plan", source, *small[:calib], "--json")
    assert code == 0
    planned = json.loads(stdout)
    assert planned["bits"] == pytest.approx(checkpoint.inspect(out).stored_bits, abs=1e-9)
    code, again, _ = invoke("quantize", source, tmp_path / "o", *small, "--dry-run", "--json")
    # the same but for the speed of the machine at that moment
    assert code == 0 and json.loads(again) | {"seconds": planned["seconds"]} == planned
    assert not any(tmp_path.iterdir())
    code, table, _ = invoke("plan", source, *small[:calib])
    assert code == 0 and "stored bits per weight" in table and "memory while quantizing" in table


def test_eval_scores_two_models_side_by_side(
    invoke: Invoke, source: Path, out: Path, text: Path
) -> None:
    words = ["eval", out, "--ppl", text, "--window", 64, "--windows", 2, "--baseline", source]
    code, stdout, err = invoke(*words, "--json")
    assert code == 0 and "perplexity of" in err
    scores = json.loads(stdout)["models"]
    assert [m["model"] for m in scores] == [str(out), str(source)]
    ppl = [m["perplexities"][0]["ppl"] for m in scores]
    assert ppl[0] != ppl[1] and all(m["perplexities"][0]["windows"] == 2 for m in scores)
    code, table, err = invoke(*words, "--quiet")
    assert code == 0 and err == ""
    assert all(f"{value:.2f}" in table for value in ppl) and "text.txt, 2" in table


def test_activations_choose_the_kernel(
    invoke: Invoke, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbq.linear._backend_name", "auto")
    words = ["eval", out, "--ppl", text, "--window", 64, "--windows", 2, "--json", "--quiet"]

    def ppl(*more: object) -> float:
        code, stdout, err = invoke(*words, *more)
        assert (code, err) == (0, "")
        found: float = json.loads(stdout)["models"][0]["perplexities"][0]["ppl"]
        return found

    exact, int8 = ppl(), ppl("--activations", "int8")
    assert backend_name() == "cpu-int8"
    assert exact != int8 == pytest.approx(exact, rel=0.02)
    code, _, err = invoke(*words, "--activations", "int4")
    assert code == 2 and "exact or int8" in err


def test_int8_activations_on_another_device_are_one_clear_line(
    invoke: Invoke, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbq.linear._backend_name", "auto")
    monkeypatch.setattr(BACKENDS["cpu-int8"], "why_not", lambda layout, device: "it is a CPU's")
    code, stdout, err = invoke("generate", out, "--prompt", "a", "--activations", "int8")
    assert (code, stdout) == (2, "")
    assert "kernel backend 'cpu-int8' cannot be used here: it is a CPU's" in err


def test_a_recipe_repeats_a_run_byte_for_byte(
    invoke: Invoke, source: Path, out: Path, small: list[str], tmp_path: Path
) -> None:
    words = ["quantize", source, tmp_path / "again", "--recipe", out / "recipe.yaml", "--quiet"]
    assert invoke(*words) == (0, "", "")
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["config"]["nsamples"] == 4 and report["after"]["windows"] == 1
    # what is typed goes first, even where it says what the default is
    code, stdout, _ = invoke(*words, "--dry-run", "--bits", "3", "--seqlen", "1024", "--json")
    assert code == 0 and json.loads(stdout)["asked_bits"] == 3


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("bits: 2\nbits-per-weight: 2", 2, "bits-per-weight is no option"),
        ("group_siz: 2", 2, "group_siz is no option; did you mean group-size"),
        ("trust-remote-code: true", 2, "trust-remote-code is no option"),
        ("bits: '2'", 2, "bits is '2', expected float"),
        ("faithful: 1", 2, "faithful is 1, expected bool"),
        ("bits: 99", 2, "--bits 99.0: expected a number"),
        ("- bits", 4, "not a list of options"),
        ("bits: [", 4, "not YAML"),
        (None, 4, "cannot be read"),
    ],
)
def test_a_recipe_that_is_none_is_refused(
    content: str | None, code: int, message: str, invoke: Invoke, source: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    words = ["quantize", source, tmp_path / "out", "--recipe", recipe, "--dry-run"]
    found, stdout, err = invoke(*words)
    assert (found, stdout) == (code, "") and message in refusal(err)


def test_generate_writes_the_text_and_nothing_else(
    invoke: Invoke, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, first, _ = invoke("generate", out, "--prompt", "The", "--max-new-tokens", 5)
    assert code == 0 and first.strip() and "The" not in first
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    code, stdout, err = invoke("generate", out)
    assert code == 2 and not stdout and "the prompt is empty" in refusal(err)
    sampled = [
        invoke("generate", out, "--prompt", "The", "--temperature", 2, "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_reads_stdin_or_many_prompts(
    invoke: Invoke, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max-new-tokens", 4, "--json"]
    (tmp_path / "prompts.txt").write_text("The quick\n\nA lazy dog\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The\\nquick"}\n')
    code, stdout, err = invoke("generate", out, "--file", tmp_path / "prompts.txt", *options)
    found = [json.loads(line) for line in stdout.splitlines()]
    assert (code, err) == (0, "") and [f["prompt"] for f in found] == ["The quick", "A lazy dog"]
    # each as if it were alone, from stdin too
    monkeypatch.setattr(sys, "stdin", io.StringIO("A lazy dog"))
    assert json.loads(invoke("generate", out, *options)[1]) == found[1]
    code, stdout, _ = invoke("generate", out, "--file", tmp_path / "prompts.jsonl", *options)
    assert code == 0 and json.loads(stdout)["prompt"] == "The\nquick"
    _, stdout, _ = invoke("generate", out, "--file", tmp_path / "prompts.txt", *options[:2])
    assert stdout == "".join(f"{f['prompt']}{f['text']}\n" for f in found)
    for name, content, message in (
        ("none.txt", " \n", "holds no prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "a"}', "bad.jsonl:2: expected an object"),
        ("gone.txt", None, "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        code, stdout, err = invoke("generate", out, "--file", tmp_path / name)
        assert code == 4 and not stdout and message in refusal(err)


def test_chat_in_a_pipe(invoke: Invoke, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'Hello\n\n"""\nmany\nlines\n"""\nto be \\\ncontinued\n/reset\nHello\n/exit\nHello\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    words = ["chat", out, "--temperature", 0, "--max-new-tokens", 3]
    with monkeypatch.context() as patch:
        turns: list[list[dict[str, str]]] = []
        real = generation.Writer.chat_ids

        def note(self: Any, messages: Any) -> Any:
            turns.append(list(messages))
            return real(self, messages)

        patch.setattr(generation.Writer, "chat_ids", note)
        code, stdout, err = invoke(*words)
    assert code == 0 and "[forgotten]" in err and "/reset forgets" in err
    turns = turns[1:]  # the first asks whether there is a template
    assert [t[-1]["content"] for t in turns] == [
        "Hello",
        "many\nlines",
        "to be \ncontinued",
        "Hello",
    ]
    assert [len(t) for t in turns] == [1, 3, 5, 1]
    answers = [t[1]["content"] for t in turns[1:3]]
    assert answers[0] == answers[1] and stdout.startswith(answers[0])
    assert stdout.endswith(f"{answers[0]}\n")  # greedy, so the same as before /reset


def test_demo_finds_the_model_or_says_how_to_install_it(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBQ_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "find_gguf", lambda: None)
    code, stdout, err = invoke("demo")
    assert (code, stdout) == (3, "") and refusal(err).endswith(demo.INSTALL)
    (tmp_path / demo.NAME).mkdir()
    (tmp_path / demo.NAME / "config.json").write_text("{}")
    code, stdout, err = invoke("demo")
    assert (code, stdout) == (0, f"{tmp_path / demo.NAME}\n") and "next: pbq quantize" in err


def test_inspect_and_verify(invoke: Invoke, out: Path) -> None:
    code, stdout, _ = invoke("inspect", out, "--json")
    assert code == 0 and json.loads(stdout)["stored_bits"] <= 2.5
    layer = "model.layers.0.mlp.down_proj"
    code, stdout, _ = invoke("inspect", out, "--layer", layer, "--json")
    assert code == 0 and json.loads(stdout)["name"] == layer
    for words in (["inspect", out], ["inspect", out, "--layer", layer], ["verify", out]):
        code, stdout, _ = invoke(*words)
        assert code == 0 and stdout.strip()
    code, stdout, err = invoke("verify", out, "--json")
    assert code == 0 and json.loads(stdout)["layers"] == 21 and "verify" in err
    code, stdout, err = invoke("verify", out, "--quiet")
    assert (code, stdout, err) == (0, "", "")


def test_a_run_leaves_a_report_that_can_be_made_again(
    invoke: Invoke, out: Path, tmp_path: Path, figures: None
) -> None:
    """With figures, and what the model makes of a passage of the text before and after."""
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "2.5 asked" in page
    (sample,) = json.loads((out / "report.json").read_text())["samples"]  # it repeats itself
    assert sample["prompt"].startswith("The quick") and sample["before"] and sample["after"]
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "report.html").unlink()
    code, stdout, err = invoke("report", copy)
    assert (code, stdout, err) == (0, f"{copy / 'report.html'}\n", "")
    assert (copy / "report.html").read_text() == page


def test_inspect_shows_a_tree_that_grep_can_read(invoke: Invoke, out: Path) -> None:
    """In a pipe: whole names, no rules, blocks with what their layers add up to, errors."""
    code, stdout, _ = invoke("inspect", out)
    lines = stdout.rstrip().splitlines()
    assert code == 0 and stdout.isascii() and len(lines) == 2 + 3 * (1 + 7) + 3
    report = json.loads((out / "report.json").read_text())["blocks"][1]
    start = next(i for i, line in enumerate(lines) if line.startswith("model.layers.1 "))
    total, seen = 0, set()
    for line in lines[start + 1 : start + 8]:
        name, shape, *_, bits, size, error = line.split()
        nbytes = int(size.replace(",", ""))
        n, k = map(int, shape.split("x"))
        assert error == f"{report['layers'][name]['error']:.4f}"
        assert float(bits) == pytest.approx(8 * nbytes / (n * k), abs=1e-4)
        total, seen = total + nbytes, seen | {name}
    assert seen == report["layers"].keys()
    assert int(lines[start].split()[-1].replace(",", "")) == total
    listed = json.loads(invoke("inspect", out, "--json")[1])["layers"]
    errors = {layer["name"]: layer["error"] for layer in listed}
    for name, layer in report["layers"].items():
        assert errors[f"model.layers.1.{name}"] == layer["error"]


def test_blocks_are_shown_in_the_order_of_the_model() -> None:
    """config.json sorts names as words, and 10 before 2."""
    layout = WeightLayout(8, 16, (Tier(1, 16),))
    names = [f"h.{i}.{name}" for i in (0, 1, 10, 2) for name in ("a", "b")] + ["head"]
    layers = tuple(checkpoint.LayerSummary(n, layout, {"weight": 16, "scale": 16}) for n in names)
    summary = checkpoint.CheckpointSummary("m", None, 2, 2, 1, 1, 1, 0, 1, 1, None, layers, ())
    rows = contents.CheckpointContents(summary, {"h.2.a": 0.5}).grid()[1]
    assert [row[0] for row in rows][:-3] == [
        "head", *(n for i in (0, 1, 2, 10) for n in (f"h.{i}", "  a", "  b")),
    ]  # fmt: skip
    assert rows[7][0] == "h.2" and rows[7][4] == "64" and rows[8][5] == "0.5000"


def test_inspect_shows_the_scales_of_a_layer(invoke: Invoke, out: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    scale = checkpoint.read_packed(out, name).tensors["scale"].float()
    found = json.loads(invoke("inspect", out, "--layer", name, "--json")[1])
    # a binary tier and one of tied planes: one number a row each
    assert [(s["tier"], s["what"]) for s in found["scales"]] == [
        (0, "scale of plane 0"), (1, "scale of plane 0"), (1, "offset"),
    ]  # fmt: skip
    for t in (0, 1):
        column = scale[:, t]
        assert found["scales"][t] == {
            "tier": t, "what": "scale of plane 0", "count": 84, "least": float(column.min()),
            "median": float(column.median()), "most": float(column.max()),
        }  # fmt: skip
    table = invoke("inspect", out, "--layer", name)[1]
    assert f"{found['scales'][1]['median']:.3g}" in table and f"{found['error']:.4f}" in table


def test_a_checkpoint_whose_report_is_gone_or_strange_can_be_inspected(
    invoke: Invoke, out: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for report in (None, "{}", '{"blocks": [3, {"layers": {"a": 1, "b": {"error": "x"}}}]}'):
        (copy / "report.json").unlink(missing_ok=True)
        if report is not None:
            (copy / "report.json").write_text(report)
        code, stdout, _ = invoke("inspect", copy, "--json")
        assert code == 0 and {e["error"] for e in json.loads(stdout)["layers"]} == {None}


@pytest.mark.parametrize("plain", [False, True])
def test_no_color(
    plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """https://no-color.org: any value but the empty one."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1" if plain else "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console()
    console.stage("blocks", 3)
    console.step(1)
    console.close()
    colors = re.findall(r"\x1b\[(?:3[0-9]|9[0-7])[;m]", capsys.readouterr().err)
    assert bool(colors) is not plain


def test_quiet_silences_the_bars_of_libraries() -> None:
    code = (
        "from pbq.console import hush_libraries\n"
        "hush_libraries(quiet=True)\n"
        "from tqdm import tqdm\n"
        "print(list(tqdm(range(3))))"
    )
    done = started("import pbq_cli\n" + code)
    assert (done.stdout, done.stderr) == ("[0, 1, 2]\n", "")


def test_a_failure_that_leaves_blocks_names_the_command_that_resumes(
    invoke: Invoke,
    source: Path,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = tmp_path / "new"
    words = ["quantize", source, new, *small]
    command = f"the same command resumes: pbq quantize {source} {new} "
    for error, code, resumes in (
        (ResourceError("no space"), 5, True),
        (OSError(28, "No space left on device"), 5, True),
        (MemoryError(), 5, True),
        # with other options there will be nothing to resume
        (NumericalError("no numbers"), 6, False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "write_beside", raising(error))
            found, _, err = invoke(*words)
        assert found == code and (command in refusal(err)) is resumes, err
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_beside", raising(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            run_guarded(app)
    # refused before the first block was done: nothing is kept
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "record_calls", raising(MemoryError()))
        _, _, err = invoke("quantize", source, tmp_path / "other", *small)
    assert "resumes" not in refusal(err)
    code, _, err = invoke(*words)
    assert code == 0 and "model.layers" not in err and new.exists()


def test_the_bar_goes_when_a_stage_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal: a live bar that is left running would hide the cursor for good."""
    console = Console()
    console._err._force_terminal = True
    console.stage("blocks", 3)
    assert console._progress is not None
    console.step(1)
    console.line("model.layers.0  [not markup]")
    console.close()
    assert console._progress is None
    err = capsys.readouterr().err
    assert "[not markup]" in err and err.count("\x1b[?25l") == err.count("\x1b[?25h") == 1


# Refusals: (exit code, words, what the line says). Every one ends in one line and no traceback.


def damaged(out: Path, path: Path) -> Path:
    """A copy of OUT with one byte of its packed weights changed."""
    shutil.copytree(out, path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    return path


def test_usage_errors_exit_with_2(
    invoke: Invoke, source: Path, small: list[str], out: Path, text: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    start = ["quantize", source, new, *small]
    for words, message in (
        ([*start, "--bits", "0"], "--bits 0.0: expected a number above 0 and at most 8"),
        ([*start, "--bits", "nan"], "--bits nan: expected"),
        ([*start, "--bits", "1"], r"1 bits cannot hold .*; the least is --bits 1\.\d+"),
        ([*start, "--method", "magic"], "--method magic: unknown; there are .*ptq161"),
        ([*start, "--effort", "huge"], "--effort huge: expected one of fast, default, best"),
        ([*start, "--group-size", "64"], "--group-size 64: ptq161 has no use for it"),
        ([*start, "--device", "abacus"], "device 'abacus' cannot be used"),
        ([*start, "--ppl", text, "--windows", "0"], "--windows 0: at least one window"),
        (["quantize", source, out, *small], "--overwrite replaces it"),
        (["eval", out], "nothing to score; give --ppl FILE or --tasks"),
        (["eval", out, "--ppl", text, "--window", "4000"], "longer than the model's 2048"),
        (["generate", out, "--prompt", "a", "--top-p", "2"], "--top-p must be in"),
    ):
        code, stdout, err = invoke(*words)
        assert code == 2 and not stdout and re.search(message, refusal(err)), (words, err)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--nonsense"], ["quantize"], ["quantise", "a"]])
def test_words_that_do_not_parse_exit_with_2(words: list[str], invoke: Invoke) -> None:
    code, stdout, err = invoke(*words)
    assert code == 2 and not stdout and "Traceback" not in err and err.strip()


def test_model_errors_exit_with_3(
    invoke: Invoke,
    small: list[str],
    out: Path,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    text: Path,
) -> None:
    new, empty, broken = tmp_path / "new", tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{")
    false_gguf = tmp_path / "false.gguf"
    false_gguf.write_bytes(b"GGUX")
    moe = tiny_checkpoint("qwen3_moe")
    for words, message in (
        (["quantize", tmp_path / "absent", new, *small], "absent: no such directory"),
        (["quantize", empty, new, *small], "empty: no config.json in it"),
        (["quantize", broken, new, *small], "config.json: not JSON"),
        (["quantize", false_gguf, new, *small], "false.gguf: not a GGUF file"),
        (["quantize", out, new, *small], "already quantized with pbq"),
        (["inspect", empty], "config.json: missing"),
        (["verify", moe], "not a pbq checkpoint"),
        (["report", empty], r"report\.json: missing"),
        (["inspect", out, "--layer", "nope"], "no quantized layer is called 'nope'"),
        (["verify", damaged(out, tmp_path / "damaged")], "damaged"),
    ):
        code, stdout, err = invoke(*words)
        assert code == 3 and not stdout and re.search(message, refusal(err)), (words, err)
        assert not new.exists()


def test_data_errors_exit_with_4(
    invoke: Invoke, source: Path, small: list[str], out: Path, text: Path, tmp_path: Path
) -> None:
    empty, absent, new = tmp_path / "empty.txt", tmp_path / "absent.txt", tmp_path / "new"
    empty.write_text("")
    start = ["quantize", source, new, *small]
    for words, message in (
        ([*start, "--calib", absent], "absent.txt: No such file or directory"),
        ([*start, "--calib", empty], "empty.txt: 0 tokens, but 4 x 16 = 64 are needed"),
        ([*start, "--ppl", absent], "absent.txt: cannot be read"),
        ([*start, "--ppl", empty], "empty.txt: the file is empty"),
        (["quantize", "nobody/nothing", new, *small], "the hub cannot be reached"),
        (["eval", out, "--ppl", absent], "absent.txt: no such file"),
    ):
        code, stdout, err = invoke(*words)
        assert code == 4 and not stdout and re.search(message, refusal(err)), (words, err)
        assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def test_a_full_disk_or_memory_exits_with_5(
    invoke: Invoke,
    source: Path,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["quantize", source, tmp_path / "new", *small]
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
        code, _, err = invoke(*words)
    assert code == 5 and "needed, 0 B free on that disk" in refusal(err)
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "record_calls", raising(error))
            code, _, err = invoke(*words)
        assert code == 5 and "out of memory; try fewer --nsamples" in refusal(err)
    assert not (tmp_path / "new").exists()


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


def test_numbers_that_are_none_exit_with_6(
    invoke: Invoke, small: list[str], tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    code, stdout, err = invoke("quantize", tmp_path / "source", tmp_path / "out", *small)
    assert code == 6 and not stdout
    assert refusal(err).startswith("model.layers.1.mlp.down_proj: non-finite inputs")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_exits_with_130_and_names_the_command_that_resumes(
    invoke: Invoke,
    source: Path,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
) -> None:
    new = tmp_path / "a new one"
    words = ["quantize", source, new, *small]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_beside", raising(KeyboardInterrupt()))
        code, stdout, err = invoke(*words)
    assert code == 130 and not stdout and not new.exists()
    assert refusal(err).startswith("interrupted; the same command resumes: pbq quantize ")
    assert f"'{new}'" in err  # quoted for the shell
    code, _, err = invoke(*words)
    assert code == 0 and "model.layers" not in err and new.exists()
    for module, words in (
        (finetune, ["finetune", new, tmp_path / "better"]),
        (compare, ["compare", source, "--ppl", text, "--methods", "rtn"]),
    ):
        monkeypatch.setattr(module, words[0], raising(KeyboardInterrupt()))
        code, _, err = invoke(*words)
        assert code == 130 and f"the same command resumes: pbq {words[0]} " in refusal(err)
    # of the other commands there is nothing to resume
    monkeypatch.setattr(scoring, "score_models", raising(KeyboardInterrupt()))
    code, _, err = invoke("eval", new, "--ppl", text)
    assert code == 130 and refusal(err) == "interrupted"


@pytest.mark.parametrize("target", [".", "/"])
def test_an_out_without_a_name_of_its_own_is_refused(
    target: str, invoke: Invoke, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.chdir(tmp_path)
    code, _, stderr = invoke("quantize", source, target, "--calib", "a file")
    assert code == 2 and re.match(rf"{re.escape(target)} (holds|is a mount)", refusal(stderr))


def test_every_method_can_be_named(invoke: Invoke, source: Path) -> None:
    assert set(methods.names()) <= set(re.findall(r"[a-z0-9-]+", Method.__metadata__[0].help))
    for name in methods.names():
        code, stdout, _ = invoke("plan", source, "--bits", "3.5", "--method", name, "--json")
        assert code == 0 and json.loads(stdout)["method"] == name
