"""When glibc gives memory back.

Each in a process of its own: in one that has run other tests, small leftovers lie between the
pieces that are freed here, and what is cut up like that cannot be used again.
"""

import subprocess
import sys

import pytest

from pbq.heap import freed_memory_kept, give_back_memory

MEASURED = """
import ctypes, psutil
from pbq.heap import freed_memory_kept, give_back_memory

# pieces that malloc cuts from its heap, not from the system: below 32 MiB each
PIECES, BYTES = 16, 16 * 2**20
TOTAL = PIECES * BYTES

# Not tensors: what torch allocates beside each is left over between the pieces, and a piece that
# this keeps from its old place grows the heap.
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def used_and_freed():
    pieces = [libc.malloc(BYTES) for _ in range(PIECES)]
    for piece in pieces:
        ctypes.memset(piece, 1, BYTES)
    for piece in pieces:
        libc.free(piece)

def grown():
    "Resident memory since the start, in pieces' sizes together."
    return (psutil.Process().memory_info().rss - before) / TOTAL

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
    inside, later, behind = measured("""
with freed_memory_kept():
    used_and_freed()
    print(grown())
    for _ in range(10):
        used_and_freed()
    print(grown())
print(grown())
""")
    assert inside > 0.9
    assert later < 1.2  # it was used again
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
