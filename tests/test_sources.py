"""Where a model comes from, and every way in which it does not."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from pbq.errors import DataError, ModelError
from pbq.sources import Source, resolve_source


def refusal(source: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_source(str(source))
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    return str(caught.value)


# --- on this disk ------------------------------------------------------------------------------


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = resolve_source(str(tmp_path))
    assert found == Source(str(tmp_path), tmp_path)
    assert found.loading_arguments() == found.file_argument == {}


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in ("missing", "a/b/c", "x" * 50):
        assert "no such directory" in refusal(tmp_path / name)
    assert "no such directory" in refusal("./missing")
    assert "no such directory" in refusal("../missing/model")
    assert "no such file" in refusal(tmp_path / "model.gguf")


def test_what_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(b"GGML")
    assert "for tiny.gguf give the path of the file" in refusal(tmp_path)
    assert "not a GGUF file" in refusal(tmp_path / "tiny.gguf")
    (tmp_path / "model.bin").write_bytes(b"")
    assert "a file; give a model directory" in refusal(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "not JSON"), (b"\xff\xfe{", "not JSON"), (b"[]", "not a JSON obj")]
)
def test_a_damaged_config(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert said in refusal(tmp_path)


def test_a_gguf_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.Q4_1.gguf"
    file.write_bytes(b"GGUF\3\0\0\0")
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())
    with caplog.at_level(logging.WARNING):
        found = resolve_source(str(file))
    assert found == Source(str(file), tmp_path, file.name)
    assert "was already quantized" in caplog.text
    assert found.file_argument == {"gguf_file": file.name}
    assert found.loading_arguments()["quantization_config"].dequantize
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'pbq-llm[gguf]'" in refusal(file)


# --- on the hub --------------------------------------------------------------------------------


class Hub:
    """Answers for the hub: model_info raises or tells the files, downloads are noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.error = folder, ["config.json"], None
        self.downloads: list[dict[str, Any]] = []
        self.cached: str | None = None

    error: Exception | None

    def model_info(self, repo: str, timeout: float) -> SimpleNamespace:
        assert timeout <= 10
        if self.error:
            raise self.error
        siblings = [SimpleNamespace(rfilename=name) for name in self.files]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def snapshot_download(self, repo: str, **kwargs: Any) -> str:
        self.downloads.append(kwargs)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: fake.cached)
    return fake


def http_error(kind: Callable[..., Exception]) -> Exception:
    error = kind.__new__(kind)  # type: ignore[call-overload]
    error.args = ("401 Client Error.\n\nmany lines",)
    return error


def test_only_what_a_load_needs_is_downloaded(hub: Hub) -> None:
    hub.files = ["config.json", "model.safetensors", "pytorch_model.bin", "model.onnx"]
    assert resolve_source("org/name") == Source("org/name", hub.folder)
    hub.files = ["config.json", "pytorch_model.bin"]
    resolve_source("gpt2")
    with_safetensors, without = (set(d["allow_patterns"]) for d in hub.downloads)
    assert "*.safetensors" in with_safetensors and "*.bin" not in with_safetensors
    assert "*.bin" in without and "*.onnx" not in without
    assert all(d["revision"] == "abc" for d in hub.downloads)


def test_gated_and_unknown_models(hub: Hub) -> None:
    hub.error = http_error(GatedRepoError)
    assert "gated; accept its terms" in refusal("org/name")
    hub.error = http_error(RepositoryNotFoundError)
    assert "no such model on the hub" in refusal("org/name")


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("off\nline"), ConnectionError("no route")])
def test_an_unreachable_hub(error: Exception, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.error = error
    with pytest.raises(DataError, match="hub cannot be reached") as caught:
        resolve_source("org/name")
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    hub.cached = str(hub.folder / "config.json")
    assert resolve_source("org/name").path == hub.folder
    assert "the copy in the hub's cache is used" in caplog.text
    assert hub.downloads == []


def test_the_real_client_tells_at_once() -> None:
    """Offline by environment, as in every test; no retry, no waiting."""
    start = time.monotonic()
    with pytest.raises(DataError, match="the hub cannot be reached"):
        resolve_source("org/surely-not-in-any-cache")
    assert time.monotonic() - start < 5


def test_other_errors_are_not_hidden(hub: Hub) -> None:
    hub.error = KeyError("a bug of ours")
    with pytest.raises(KeyError):
        resolve_source("org/name")
