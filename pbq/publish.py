"""`pbq push`: a packed checkpoint to the Hugging Face hub, or what would be sent there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbq import checkpoint
from pbq.disk import read_json, size_text
from pbq.errors import DataError, UsageError


@dataclass(frozen=True)
class Upload:
    """repo: ORGANISATION/NAME. files: name and bytes of everything that is sent."""

    repo: str
    private: bool
    files: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "url": self.url}

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}"

    def grid(self) -> tuple[list[str], list[list[str]], str]:
        rows = [[name, size_text(size)] for name, size in self.files.items()]
        total = size_text(sum(self.files.values()))
        kind = "private" if self.private else "public"
        return ["file", "size"], [*rows, ["in all", total]], f"{self.url} ({kind})"


def plan_upload(out: Path, repo: str, private: bool) -> Upload:
    """What would be sent. Raises UsageError, and CheckpointError unless `out` is intact."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UsageError(f"{repo}: not the name of a repository, which is ORGANISATION/NAME")
    checkpoint.verify(out)
    if not (out / "README.md").is_file():
        raise UsageError(f"{out}: has no README.md, the model card; `pbq quantize` writes one")
    files = sorted(p for p in out.rglob("*") if p.is_file() and not p.name.startswith("."))
    return Upload(repo, private, {str(p.relative_to(out)): p.stat().st_size for p in files})


def push(out: Path, upload: Upload) -> str:
    """Send the files of `upload`; returns the page they can be seen on. Raises DataError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        api.upload_folder(
            repo_id=upload.repo,
            folder_path=out,
            allow_patterns=list(upload.files),
            commit_message=f"pbq, {_bits(out)} stored bits per weight",
        )
    # of the hub's client, its HTTP library and the network; none of them is an error of pbq's
    except Exception as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"{upload.repo}: not sent ({said:.160}); log in with `hf auth login`, "
            "or look at what would be sent with --dry-run"
        ) from error
    return upload.url


def _bits(out: Path) -> str:
    return f"{read_json(out / 'config.json')['quantization_config']['stored_bits']:.3f}"
