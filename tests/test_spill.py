"""Hidden states on the disk are those that were put there, and leave no file behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from pbq.errors import ResourceError
from pbq.spill import Spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_is_what_was_appended(
    dtype: torch.dtype, on_disk: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(b, 5, 7).to(dtype) for b in (2, 2, 1)]
    given.append(torch.randn(7, 3).to(dtype).T)  # not contiguous
    states = Spill(tmp_path if on_disk else None).states()
    for x in given:
        states.append(x)
    assert len(states) == 4 and len(list(tmp_path.iterdir())) == on_disk
    for found in (list(states), [states[i] for i in range(4)], states[:]):
        assert all(torch.equal(x, y) for x, y in zip(found, given, strict=True))
        assert all(x.dtype == dtype for x in found)
    assert torch.equal(states[-1], given[-1]) and torch.equal(states[1:3][0], given[1])
    states.close()
    assert len(states) == 0 and not any(tmp_path.iterdir())


def test_streams_do_not_share_a_file(tmp_path: Path) -> None:
    spill, other = Spill(tmp_path), Spill(tmp_path)
    made = [spill.states(), spill.states(), other.states()]
    for i, states in enumerate(made):
        states.append(torch.full((3,), float(i)))
    assert [float(states[0][0]) for states in made] == [0, 1, 2]


def test_what_was_read_may_be_changed(tmp_path: Path) -> None:
    states = Spill(tmp_path).states()
    states.append(torch.ones(3))
    states[0].zero_()
    assert states[0].tolist() == [1, 1, 1]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = Spill(tmp_path).states()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(ResourceError, match=r"hidden-.*No space left.*12 B needed"):
        states.append(torch.ones(3))
