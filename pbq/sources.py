"""Where a model comes from: a local directory, a .gguf file, or an id on the Hugging Face hub.

Whatever it is, `resolve_source` ends with a directory on this disk, or with one clear refusal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbq.disk import reading
from pbq.errors import DataError, ModelError

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Once, before anything else: an unreachable hub is told in seconds, not after a client's retries.
_HUB_TIMEOUT_S = 5.0
_ALWAYS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class Source:
    """A model's files. name: as the user gave it; path: their directory; gguf: file name in it."""

    name: str
    path: Path
    gguf: str | None = None

    @property
    def file_argument(self) -> dict[str, Any]:
        """What from_pretrained of a config or a tokenizer takes beside the path."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    def digest(self) -> str:
        """Of the bytes of the weights and the config."""
        files = [self.path / self.gguf] if self.gguf else self._model_files()
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with reading(file), open(file, "rb") as opened:
                while chunk := opened.read(2**24):
                    digest.update(chunk)
        return digest.hexdigest()

    def _model_files(self) -> list[Path]:
        kinds = ("config.json", "*.safetensors", "*.bin")
        return sorted(file for kind in kinds for file in self.path.glob(kind))

    def loading_arguments(self) -> dict[str, Any]:
        """What from_pretrained of a model takes beside the path."""
        if self.gguf is None:
            return {}
        from transformers import GgufConfig

        return {**self.file_argument, "quantization_config": GgufConfig(dequantize=True)}


def resolve_source(source: str) -> Source:
    """Find the model; one on the hub is downloaded, or taken from the hub's cache.

    Raises ModelError for what is not there, not a model or gated, DataError when the hub cannot be
    reached.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_file(source, path)
    if path.is_dir():
        return _directory(source, path)
    if path.exists():
        raise ModelError(f"{source}: a file; give a model directory, a .gguf file or a hub id")
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise ModelError(f"{source}: no such directory")
    return Source(source, _download(source))


def _gguf_file(source: str, path: Path) -> Source:
    if not path.is_file():
        raise ModelError(f"{source}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{source}: not a GGUF file")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError(f"{source}: reading GGUF needs `pip install 'pbq-llm[gguf]'`") from None
    log.warning("%s was already quantized: what that lost is lost here too", source)
    return Source(source, path.parent, path.name)


def _directory(source: str, path: Path) -> Source:
    config = path / "config.json"
    if not config.is_file():
        files = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; for {files[0]} give the path of the file" if files else ""
        raise ModelError(f"{source}: no config.json in it{hint}")
    try:
        data = json.loads(config.read_bytes())
    except ValueError as error:
        raise ModelError(f"{config}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{config}: not a JSON object")
    return Source(source, path)


def _download(repo: str) -> Path:
    """The hub's snapshot of the files that a load needs."""
    from huggingface_hub import HfApi, snapshot_download

    cached = _cached(repo)
    try:
        with _hub_errors(repo):
            info = HfApi().model_info(repo, timeout=_HUB_TIMEOUT_S)
    except DataError as error:
        if cached is None:
            raise
        log.warning("%s; the copy in the hub's cache is used", error)
        return cached
    names = [file.rfilename for file in info.siblings or []]
    weights = "*.safetensors" if any(n.endswith(".safetensors") for n in names) else "*.bin"
    with _hub_errors(repo):
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=[*_ALWAYS, weights]))


def _cached(repo: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    return Path(config).parent if isinstance(config, str) else None


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{repo}: gated; accept its terms on its hub page and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{repo}: no such directory, and no such model on the hub (a private one needs "
            "`hf auth login`)"
        ) from error
    # OSError: no network and offline mode; the HTTP client's own errors have no common ancestor
    # with it, and differ between versions of the hub's client
    except Exception as error:
        if isinstance(error, HfHubHTTPError | OSError) or "httpx" in type(error).__module__:
            said = " ".join(str(error).split())
            raise DataError(
                f"{repo}: no such directory, and the hub cannot be reached ({said:.120}); give a "
                "local directory or a .gguf file"
            ) from error
        raise
