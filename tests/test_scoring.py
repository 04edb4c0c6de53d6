"""Scores side by side under one protocol; refusals before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pbq import scoring
from pbq.errors import DataError, ModelError, UsageError
from pbq.evaluate import Perplexity
from pbq.scoring import ModelScores, Scores, score_models


class Listener:
    """An observer that remembers the stages, and whether it was closed."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.closed = False

    def stage(self, name: str, total: int | None) -> None:
        self.stages.append((name, total))

    def step(self, done: int, total: int | None = None) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night. " * 10)
    return path


def score(models: list[Path], listener: Listener | None = None, **options: Any) -> Scores:
    plain: dict[str, Any] = {
        "texts": [],
        "windows": None,
        "window": 32,
        "tasks": [],
        "data_dir": None,
        "limit": None,
        "num_fewshot": None,
        "batch_size": 2,
        "device": "cpu",
        "trust_remote_code": False,
        "observer": listener or Listener(),
    }
    return score_models([str(m) for m in models], **{**plain, **options})


@torch.no_grad()
def test_perplexity_of_a_packed_and_a_dense_model_side_by_side(
    packed_checkpoint: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], text: Path
) -> None:
    models, listener = [packed_checkpoint("llama"), tiny_checkpoint("llama")], Listener()
    found = score(models, listener, texts=[text], windows=3)
    for path, scores in zip(models, found.models, strict=True):
        assert scores.model == str(path) and scores.tasks == {}
        model = AutoModelForCausalLM.from_pretrained(path)
        ids = AutoTokenizer.from_pretrained(path)(text.read_text(), return_tensors="pt").input_ids
        losses = [model(w, labels=w).loss for w in ids[:, : 3 * 32].split(32, dim=1)]
        expected = float(torch.stack(losses).mean().exp())
        assert scores.perplexities[0].ppl == pytest.approx(expected, rel=1e-4)
    names = [f"{what} {path}" for path in models for what in ("load", "perplexity of")]
    assert [name for name, _ in listener.stages] == names
    assert [total for _, total in listener.stages] == [None, 3, None, 3] and listener.closed
    json.dumps(found.to_dict())


def test_everything_is_refused_before_a_model_is_loaded(
    tiny_checkpoint: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(scoring, "load_model", never)
    model = tiny_checkpoint("llama")
    cases: list[tuple[type[Exception], str, list[Path], dict[str, Any]]] = [
        (UsageError, "nothing to score", [model], {}),
        (
            DataError,
            "absent.txt: no such file",
            [model],
            {"texts": [text, tmp_path / "absent.txt"]},
        ),
        (ModelError, "no such directory", [model, tmp_path / "gone"], {"texts": [text]}),
        (UsageError, "cannot be used", [model], {"texts": [text], "device": "abacus"}),
        (UsageError, "pigqa", [model], {"tasks": ["pigqa"]}),
    ]
    for kind, message, models, options in cases:
        with pytest.raises(kind, match=message):
            score(models, **options)


def test_the_progress_is_taken_down_when_a_model_fails(
    tiny_checkpoint: Callable[[str], Path], text: Path
) -> None:
    listener = Listener()
    with pytest.raises(DataError, match="one window needs 5000"):
        score([tiny_checkpoint("llama")], listener, texts=[text], window=5000)
    assert listener.closed


def test_a_model_larger_than_one_gpu_is_spread(
    tiny_checkpoint: Callable[[str], Path],
    packed_checkpoint: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU and the disk stand in for two GPUs: accelerate moves what a block needs to it."""
    models = [packed_checkpoint("llama"), tiny_checkpoint("llama")]
    expected = score(models, texts=[text])
    real, asked = scoring.load_model, []

    def load_model(source: Any, dtype: Any, device: Any, *rest: Any, **options: Any) -> Any:
        asked.append(device)
        return real(source, dtype, device, *rest, **options)

    def from_pretrained(*args: Any, device_map: Any, **options: Any) -> Any:
        assert device_map == "auto"
        places = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
        around = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
        return unspread(
            *args,
            device_map=places | dict.fromkeys(around, "cpu"),
            offload_folder=tmp_path / "offload",
            **options,
        )

    unspread = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(scoring, "load_model", load_model)
    monkeypatch.setattr(scoring, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    found = score(models, texts=[text], device="auto")
    assert asked == ["auto", "auto"]
    for a, b in zip(expected.models, found.models, strict=True):
        assert a.perplexities[0].loss == b.perplexities[0].loss


def test_a_grid_has_a_row_a_measure_and_a_column_a_model() -> None:
    def of(name: str, ppl: float, acc: float) -> ModelScores:
        text = Perplexity(ppl, 3.0, 40, 2048, 40 * 2048, 100_000, "wiki.txt", "0" * 64, 1.5)
        tasks = {
            "piqa": {"acc": acc, "acc_stderr": 0.0123, "acc_norm": acc / 2, "n": 100},
            "lambada": {"acc": acc, "acc_stderr": "N/A", "n": 7},
        }
        shots = {"piqa": 0, "lambada": 5}
        return ModelScores(
            name, [text], {t: {**m, "num_fewshot": shots[t]} for t, m in tasks.items()}
        )

    header, rows = Scores([of("a", 20.0, 0.5), of("b", 123.456, 0.25)]).grid()
    assert header == ["", "a", "b"]
    assert rows[0][0].startswith("perplexity, wiki.txt, 40")
    assert rows[0][1:] == ["20.00", "123.46"]
    assert rows[1:] == [
        ["piqa acc, 100 items", "0.500 ± 0.012", "0.250 ± 0.012"],
        ["piqa acc_norm, 100 items", "0.250", "0.125"],
        ["lambada acc, 7 items, 5-shot", "0.500", "0.250"],
    ]


def test_tasks_on_local_data(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, shared_data: Path, tmp_path: Path
) -> None:
    """One token a byte: the items are longer than the tiny models' usual 64 positions."""
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    found = score([tmp_path], tasks=["piqa"], data_dir=shared_data, limit=3)
    metrics = found.models[0].tasks["piqa"]
    assert metrics["n"] == 3 and 0 <= metrics["acc"] <= 1
    assert found.grid()[1][0][0] == "piqa acc, 3 items"
