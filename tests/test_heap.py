"""When glibc gives memory back.

Each in a process of its own: in one that has run other tests, small leftovers lie between the
pieces that are freed here, and what is cut up like that cannot be used again.
"""

import subprocess
import sys

import pytest

from pbq.heap import freed_memory_kept, give_back_memory

MEASURED = """
import psutil, resource, torch
from pbq.heap import freed_memory_kept, give_back_memory

# pieces that malloc cuts from its heap, not from the system: below 32 MiB each
PIECES, FLOATS = 16, 4 * 2**20
TOTAL = PIECES * FLOATS * 4

def used_and_freed():
    pieces = [torch.ones(FLOATS) for _ in range(PIECES)]
    del pieces

def grown():
    "Resident memory since the start, in pieces' sizes together."
    return (psutil.Process().memory_info().rss - before) / TOTAL

def faults():
    "Pages that the system had to give until now."
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

give_back_memory()
before = psutil.Process().memory_info().rss
"""


def measured(code: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED + code], capture_output=True, text=True, check=True
    )
    return [float(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept_inside_and_given_back_behind():
    inside, first, later, behind = measured("""
with freed_memory_kept():
    start = faults()
    used_and_freed()
    print(grown())
    once = faults()
    for _ in range(10):
        used_and_freed()
    print(once - start, (faults() - once) / 10)
print(grown())
""")
    assert inside > 0.9
    # Used again: what a round asks of the system is next to nothing.  Resident memory would not say
    # it as well: a piece that a small leftover keeps from its place grows the heap once, by itself.
    assert later < 0.1 * first
    assert behind < 0.2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_it_ends_with_an_error_too():
    raised, behind = measured("""
try:
    with freed_memory_kept():
        used_and_freed()
        raise ValueError("inside")
except ValueError:
    print(1)
print(grown())
""")
    assert raised == 1
    assert behind < 0.2


def test_nothing_happens_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with freed_memory_kept():
        give_back_memory()
