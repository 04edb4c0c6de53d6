"""The forward pass that a packed checkpoint carries with it, and what it finds out."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pbq import linear, selftest
from pbq.disk import CheckpointError
from pbq.hf import packed_linears


@pytest.fixture
def out(packed_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A packed llama with its pass recorded."""
    path = Path(shutil.copytree(packed_checkpoint("llama"), tmp_path / "out"))
    selftest.record(path)
    return path


def change(path: Path, **fields: object) -> None:
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, **fields}))


def test_the_pass_is_repeated_after_loading(out: Path) -> None:
    found = selftest.check(out)
    assert found is not None and found.positions == 16
    assert found.difference < 1e-5 < found.tolerance == 1e-3
    assert (out / selftest.FILE_NAME).stat().st_size < 4000


def test_another_backend_stays_within_the_tolerance(out: Path) -> None:
    asked = linear.backend_name()
    linear.set_backend("reference")
    try:
        found = selftest.check(out)
    finally:
        linear.set_backend(asked)
    assert found is not None and found.difference < 1e-4


def test_sixteen_bits_have_a_tolerance_of_their_own(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    selftest.record(out)
    (out / "config.json").write_text(json.dumps(config))
    found = selftest.check(out)  # in float32, as it was stored
    assert found is not None and found.tolerance == 0.2
    assert 1e-4 < found.difference < 0.15


def test_a_layer_that_computes_otherwise_is_noticed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = selftest.load_model

    def load(*args: object, **kwargs: object) -> object:
        model, tokenizer = real(*args, **kwargs)  # type: ignore[arg-type]
        next(packed_linears(model))[1].packed().tensors["scale"].mul_(1.5)
        return model, tokenizer

    monkeypatch.setattr(selftest, "load_model", load)
    with pytest.raises(CheckpointError, match=r"logits differ by \d.* of their spread"):
        selftest.check(out)


def test_another_tokenizer_is_noticed(out: Path) -> None:
    path = out / selftest.FILE_NAME
    change(path, ids=[*json.loads(path.read_text())["ids"][:-1], 0])
    with pytest.raises(CheckpointError, match="other tokens than when it was packed"):
        selftest.check(out)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": None},
        {"tokens": [[10**6] * 8] * 16},
        {"tokens": [[1]]},
        {"logits": "x"},
        {"spread": 0},
        {"spread": "wide"},
        {"dtype": "nonsense"},
        {"dtype": "load"},
        {"logits": [[float("nan")] * 8] * 16},
    ],
)
def test_a_record_that_makes_no_sense_is_refused(out: Path, fields: dict[str, object]) -> None:
    change(out / selftest.FILE_NAME, **fields)
    with pytest.raises(CheckpointError, match=r"selftest\.json|logits differ by nan"):
        selftest.check(out)


def test_where_none_was_recorded_there_is_none(packed_checkpoint: Callable[[str], Path]) -> None:
    assert selftest.check(packed_checkpoint("llama")) is None


def test_a_model_beyond_the_memory_is_not_loaded_for_it(
    packed_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(packed_checkpoint("llama"), tmp_path / "out"))
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(selftest.psutil, "virtual_memory", lambda: memory(1000))
    with caplog.at_level(logging.WARNING, "pbq.selftest"):
        selftest.record(out)
    assert not (out / selftest.FILE_NAME).exists() and "do not fit into memory" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("where", ["_logits", "AutoModelForCausalLM.from_pretrained"])
def test_memory_that_runs_out_costs_the_record_alone(
    where: str,
    error: type[Exception],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """GPUs have an error of their own for it, CPUs have not."""

    def full(*args: object, **options: object) -> None:
        raise error("DefaultCPUAllocator: can't allocate memory")

    (out / selftest.FILE_NAME).unlink()
    monkeypatch.setattr(f"pbq.{'selftest' if where == '_logits' else 'models'}.{where}", full)
    with caplog.at_level(logging.WARNING, "pbq.selftest"):
        selftest.record(out)
    assert not (out / selftest.FILE_NAME).exists() and "memory ran out" in caplog.text
