"""What would be uploaded, and that only that is; the hub is a stand-in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pbq.disk import CheckpointError
from pbq.errors import DataError, UsageError
from pbq.publish import plan_upload, push


@pytest.fixture
def out(packed_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    path = tmp_path / "out"
    shutil.copytree(packed_checkpoint("llama"), path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    (path / ".cache").write_text("private")
    return path


def test_the_plan_is_every_file_that_can_be_seen(out: Path) -> None:
    upload = plan_upload(out, "me/model", private=True)
    assert upload.files == {p.name: p.stat().st_size for p in out.iterdir() if p.name != ".cache"}
    header, rows, title = upload.grid()
    assert len(header) == 2 and rows[-1][0] == "in all" and len(rows) == len(upload.files) + 1
    assert title == "https://huggingface.co/me/model (private)"
    assert upload.to_dict()["url"] == upload.url


def test_only_a_whole_checkpoint_with_a_card_and_a_name_is_sent(out: Path) -> None:
    for name in ("model", "me/model/x", "me/ model", "../model", "me/.."):
        with pytest.raises(UsageError, match="ORGANISATION/NAME"):
            plan_upload(out, name, private=True)
    (out / "README.md").unlink()
    with pytest.raises(UsageError, match="no README"):
        plan_upload(out, "me/model", private=True)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError):
        plan_upload(out, "me/model", private=True)


def test_what_was_planned_is_sent(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    upload = plan_upload(out, "me/model", private=False)
    assert push(out, upload) == "https://huggingface.co/me/model"
    (repo, created), (_, sent) = calls
    assert repo == "me/model" and created == {"private": False, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/model", out)
    assert sent["allow_patterns"] == list(upload.files) and ".cache" not in upload.files
    assert "bits per weight" in sent["commit_message"]


def test_a_hub_that_cannot_be_reached_is_one_line(out: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(DataError, match=r"me/model: not sent .*hf auth login"):
        push(out, plan_upload(out, "me/model", private=True))
