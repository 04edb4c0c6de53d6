"""When glibc gives memory back."""

import sys

import psutil
import pytest
import torch

from pbq.heap import freed_memory_kept, give_back_memory

# pieces that malloc cuts from its heap, not from the system: below 32 MiB each
PIECES, FLOATS = 16, 4 * 2**20


def resident() -> int:
    return psutil.Process().memory_info().rss


def used_and_freed() -> None:
    pieces = [torch.ones(FLOATS) for _ in range(PIECES)]
    del pieces


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept_inside_and_given_back_behind():
    give_back_memory()
    before = resident()
    total = PIECES * FLOATS * 4
    with freed_memory_kept():
        used_and_freed()
        assert resident() - before > 0.9 * total
        used_and_freed()
        assert resident() - before < 1.2 * total  # it was used again
    assert resident() - before < 0.2 * total


def test_it_ends_with_an_error_too():
    give_back_memory()
    before = resident()
    with pytest.raises(ValueError, match="inside"), freed_memory_kept():
        used_and_freed()
        raise ValueError("inside")
    assert resident() - before < 0.2 * PIECES * FLOATS * 4


def test_nothing_happens_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with freed_memory_kept():
        give_back_memory()
