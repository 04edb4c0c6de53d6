"""`pbq bench`: every model in its own process, the same prompt; figures that fit together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pbq import benchmark
from pbq.benchmark import Benchmark, Settings, Speed, compare, measure_gguf, measure_shapes
from pbq.cli import app
from pbq.console import run_guarded
from pbq.errors import ModelError, UsageError
from pbq.sources import resolve_source

SMALL = Settings(prompt_tokens=9, new_tokens=4, repeats=1, threads=1, device="cpu")
Checkpoints = Callable[[str], Path]


def test_compares_with_the_same_shapes_in_processes_of_their_own(
    packed_checkpoint: Checkpoints,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(packed_checkpoint("llama"))
    small = ["--prompt-tokens", "9", "--new-tokens", "4", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["pbq", "bench", out, *small, "--json", "--quiet"])
    assert run_guarded(app) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["prompt_tokens"] == 9
    assert [speed["model"] for speed in found["speeds"]] == [out, "bf16, same shapes"]
    for speed in found["speeds"]:
        assert speed["threads"] == 1 and speed["device"] == "cpu"
        assert speed["prefill_tokens_per_s"] == pytest.approx(9 / speed["first_token_s"])
        assert speed["decode_tokens_per_s"] > 0
        # a process that imported torch, but not the weights of this one
        assert 50e6 < speed["peak_memory_bytes"] < 4e9


def inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure in this process, and note what with."""
    called: list[str] = []

    def measure(function: Callable[..., Speed], argument: object, settings: Settings) -> Speed:
        called.append(function.__name__)
        return function(argument, settings)

    monkeypatch.setattr(benchmark, "_in_new_process", measure)
    return called


def test_a_baseline_is_loaded(
    packed_checkpoint: Checkpoints, tiny_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = inline(monkeypatch)
    baseline = str(tiny_checkpoint("llama"))
    found = compare(str(packed_checkpoint("llama")), baseline, settings=SMALL)
    assert called == ["measure_packed", "measure_packed"]
    assert found.speeds[1].model == baseline


def test_same_shapes_are_not_quantized(
    packed_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def keep(name: str, model: torch.nn.Module, *_: object) -> None:
        seen.update({key: tuple(p.shape) for key, p in model.named_parameters()})
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    monkeypatch.setattr(benchmark, "_measure", keep)
    measure_shapes(resolve_source(str(packed_checkpoint("llama"))), SMALL)
    assert seen["model.layers.0.mlp.down_proj.weight"] == (48, 84)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"new_tokens": 1}, "--new-tokens"),
        ({"repeats": 0}, "--repeats"),
        ({"threads": -1}, "--threads"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Settings(**changes)  # type: ignore[arg-type]


def test_refuses_before_loading(
    packed_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "_in_new_process", lambda *_: pytest.fail("measured"))
    out = str(packed_checkpoint("llama"))
    with pytest.raises(UsageError, match=r"64 positions; .* need 576"):
        compare(out)
    with pytest.raises(UsageError, match="pip install llama-cpp-python"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        compare(out, gguf=tmp_path / "absent.gguf", settings=SMALL)
    monkeypatch.undo()
    with pytest.raises(ModelError):
        compare(str(tmp_path / "absent"), settings=SMALL)


class FakeLlama:
    """llama_cpp.Llama, as far as it is used: notes what it was given."""

    made: list[FakeLlama] = []  # noqa: RUF012

    def __init__(self, path: str, **options: object) -> None:
        self.path, self.options = path, options
        self.evaluated: list[int] = []
        FakeLlama.made.append(self)

    def n_vocab(self) -> int:
        return 100

    def reset(self) -> None:
        self.evaluated.clear()

    def eval(self, tokens: list[int]) -> None:
        self.evaluated += tokens

    def sample(self, temp: float) -> int:
        assert temp == 0
        return 7


def test_llama_cpp_reads_and_writes_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=FakeLlama))
    speed = measure_gguf(Path("model.gguf"), SMALL)
    (llama,) = FakeLlama.made
    assert (llama.path, llama.options["n_ctx"]) == ("model.gguf", 13)
    assert len(llama.evaluated) == 9 + 4 and llama.evaluated[9:] == [7] * 4
    assert speed.prefill_tokens_per_s == pytest.approx(9 / speed.first_token_s)


def test_ratios_say_how_many_times_as_good() -> None:
    packed = Speed("out", "cpu", 2, 0.5, 200.0, 30.0, 100_000_000)
    dense = Speed("dense", "cpu", 2, 1.0, 100.0, 10.0, 400_000_000)
    header, rows, title = Benchmark(Settings(), [packed, dense]).grid()
    assert header == ["", "out", "dense"]
    assert rows == [
        ["prefill, tokens/s", "200.0 (2.00x)", "100.0"],
        ["decode, tokens/s", "30.0 (3.00x)", "10.0"],
        ["first token, ms", "500 (2.00x)", "1000"],
        ["peak memory, MB", "100 (4.00x)", "400"],
    ]
    assert "cpu, 2 threads" in title and "dense" in title
