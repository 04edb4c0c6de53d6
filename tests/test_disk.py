"""A disk that refuses, and JSON that cannot be trusted: one typed error that names the file."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pbq.disk import CheckpointError, check_space, checksum, read_json, writing
from pbq.errors import ModelError, ResourceError
from pbq_kernels.layout import PackedFormatError


def test_checksum_is_the_sha256_of_the_bytes() -> None:
    # sha256 of the bytes 00 3c 00 40, and of nothing
    assert checksum(torch.tensor([1.0, 2.0], dtype=torch.float16)) == "6b60ada811679b7b"
    assert checksum(torch.zeros(3, 0)) == "e3b0c44298fc1c14"
    columns = torch.arange(6, dtype=torch.uint8).view(2, 3).T
    assert checksum(columns) == checksum(columns.contiguous())
    assert checksum(torch.tensor(1.0)) == checksum(torch.tensor([1.0]))


def test_check_space_says_what_is_needed_and_free(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(ResourceError, match=r"there: 1048576\.0 GiB needed, .* free") as error:
        check_space(tmp_path / "not" / "there", 2**50)
    assert error.value.exit_code == 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_refusing_disk_is_a_resource_error(tmp_path: Path, code: int) -> None:
    path = tmp_path / "model.safetensors"
    # safetensors tells the system's error only in its message
    for error in (OSError(code, "no"), SafetensorError(f"I/O error: no (os error {code})")):
        with (
            pytest.raises(ResourceError, match=re.escape(os.strerror(code))) as caught,
            writing(path, 3 * 2**20),
        ):
            raise error
        assert str(path) in str(caught.value)
        assert "3.0 MiB needed" in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no"), SafetensorError("no"), KeyError()])
def test_other_errors_pass_through(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), writing(tmp_path):
        raise error


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe{}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 200_000,
    ],
    ids=["empty", "cut", "list", "null", "not utf-8", "huge number", "deep"],
)
def test_hostile_json_is_a_checkpoint_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        read_json(path)
    assert isinstance(error.value, ModelError)
    assert isinstance(error.value, PackedFormatError)
    assert error.value.exit_code == 3


def test_what_is_no_file_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json", "absent.json"):
        with pytest.raises(CheckpointError, match=f"{name}: missing"):
            read_json(tmp_path / name)
    (tmp_path / "big.json").write_text("{}" + " " * 100)
    monkeypatch.setattr("pbq.disk.MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="102 B is too much"):
        read_json(tmp_path / "big.json")
