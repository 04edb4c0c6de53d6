"""The short form of `make reliability`: the same code with smaller numbers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "reliability"


def reliability(tmp_path: Path, **tries: int) -> dict[str, Any]:
    """What the script found; that nothing was lost, its exit code says too."""
    words = [word for name, count in tries.items() for word in (f"--{name}", str(count))]
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER), *words, "--json", str(out)],
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stderr
    found = json.loads(out.read_text())
    parts = [part for part in found.values() if isinstance(part, dict)]
    assert [fault for part in parts for fault in part["faults"]] == []
    assert done.returncode == 0
    return dict(found)


def test_kills_in_every_stage_are_survived(tmp_path: Path) -> None:
    kills = reliability(tmp_path, kills=4)["kills"]
    assert kills["survived"] == kills["tried"] and len(kills["tried"]) >= 3


def test_disks_that_refuse_and_torn_files_are_recovered_from(tmp_path: Path) -> None:
    found = reliability(tmp_path, refusals=3, tears=2)
    for part in ("refusals", "tears"):
        assert found[part]["recovered"] == found[part]["injected"] != {}


def test_several_processes_end_when_one_dies_and_are_resumed(tmp_path: Path) -> None:
    processes = reliability(tmp_path, processes=1)["processes"]
    assert processes["recovered"] == processes["tried"] == {"2": 1}


def test_mutated_checkpoints_are_refused_or_harmless(tmp_path: Path) -> None:
    found = reliability(tmp_path, mutations=300)["mutations"]
    assert found["total"] == 300 == found["refused"] + found["harmless"] + found["signed"]
    assert found["refused"] > 200 and found["grown_bytes"] < 2**28


@pytest.fixture(scope="module")
def mutations() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import mutations  # type: ignore[import-not-found]

        yield mutations


@settings(max_examples=100, deadline=None)
@given(kind=st.integers(0, 5), draw=st.randoms(use_true_random=False))
def test_hypothesis_finds_no_mutation_that_passes(
    kind: int, draw: random.Random, packed_with_everything: Path, mutations: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = list(mutations.KINDS)[kind]
        found = mutations.attempt(packed_with_everything, Path(folder) / "copy", name, draw)
    assert found in ("refused", "harmless", "signed")
