"""Several processes: their shares, and two ranks on gloo against one process, on a tiny model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pbq import checkpoint, html_report, ranks, selftest
from pbq.cli import app
from pbq.console import run_guarded
from pbq.spill import Spill

ROOT = Path(__file__).resolve().parents[1]
# Waterfill in tuned blocks, distilled; the second rank may be told to die in its second block.
METHOD = """
import os, signal
from pathlib import Path
from pbq.methods import waterfill
from pbq.tune import BlockTuning, Distillation, Recipe

DOOM = Path(__file__).with_name("doom")

class Mortal(waterfill.Waterfill):
    wants_gradients = True

    def fit(self, W, weight, tier, row):
        if os.environ.get("RANK") == "1" and DOOM.exists() and Path(DOOM.read_text()).exists():
            DOOM.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(W, weight, tier, row)

    def recipe(self, config):
        distillation = Distillation(steps=3, latent_lr=3e-3)
        block = BlockTuning(epochs=1)
        return Recipe(sensitivity=True, block=block, distillation=distillation)

def method(config):
    return Mortal()
"""


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [1, 2, 5, 7, 32])
def test_every_item_has_one_owner(monkeypatch: pytest.MonkeyPatch, total: int, count: int) -> None:
    monkeypatch.setattr(ranks, "count", lambda: count)
    owners = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        owners += [rank for _ in ranks.mine(total)]
    assert owners == [ranks.owner(i, total) for i in range(total)] == sorted(owners)
    assert max(map(owners.count, owners)) - total // count <= 1


def test_one_process_is_its_own_company() -> None:
    made: list[int] = []

    def make(i: int) -> torch.Tensor:
        made.append(i)
        return torch.tensor([float(i)])

    states = Spill().filled([torch.zeros(1)] * 3, make)
    assert [x.item() for x in states] == made == [0, 1, 2]
    assert not Spill().filled([], make)
    x = torch.ones(2, dtype=torch.float64)
    ranks.sum_up(x)
    assert x.tolist() == [1, 1] and ranks.largest_of(x) is x
    assert ranks.first(lambda: made) is made and ranks.merged({0: x}) == {0: x}
    assert (ranks.rank(), ranks.count(), list(ranks.mine(2))) == (0, 1, [0, 1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    (path / "method.py").write_text(METHOD)
    (path / "text.txt").write_text("It was a dark and stormy night; rain fell in torrents. " * 20)
    return path


@pytest.fixture(scope="module")
def command(folder: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], list[str]]:
    """Words after `pbq` of a run into `out`."""
    options = ["--method", folder / "method.py", "--calib", folder / "text.txt", "--bits", 4]
    options += ["--nsamples", 16, "--seqlen", 32, "--device", "cpu"]
    source = tiny_checkpoint("qwen3_moe")
    return lambda out: [str(word) for word in ("quantize", source, folder / out, *options)]


@pytest.fixture(scope="module")
def run(command: Callable[[str], list[str]]) -> Run:
    """run(out): `pbq quantize`, by two ranks."""

    def run(out: str) -> subprocess.CompletedProcess[str]:
        words = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pbq"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
        return subprocess.run(
            [sys.executable, "-m", *words, *command(out)],
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.timeout(900)
def test_two_ranks_make_what_one_makes_and_a_dead_one_ends_all(
    run: Run,
    command: Callable[[str], list[str]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    monkeypatch.setattr(sys, "argv", ["pbq", *command("one")])
    assert run_guarded(app) == 0
    first_block = folder / "two.partial" / "block-00000.safetensors"
    (folder / "doom").write_text(str(first_block))
    died = run("two")
    assert died.returncode != 0 and first_block.exists() and not (folder / "two").exists()
    (told,) = (line for line in died.stderr.splitlines() if line.startswith("pbq: "))
    assert "another of the 2 processes of this run has ended; finished blocks are kept" in told
    assert "the same command resumes: torchrun --nproc_per_node 2 -m pbq quantize" in told
    together = run("two")
    assert together.returncode == 0, together.stderr
    # one of them prints; what was finished is not done again
    assert together.stderr.count("] blocks") == 1 and together.stdout.count("quantized layers") == 1
    assert "model.layers.0  " not in together.stderr and "model.layers.1  " in together.stderr
    checkpoint.verify(folder / "two")
    one, two = (load_file(folder / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_being_told_to_end_is_no_error_that_a_run_survives(
    monkeypatch: pytest.MonkeyPatch, packed_checkpoint: Callable[[str], Path], one_rank: None
) -> None:
    """A run that went on had an OUT without the record for `pbq verify`, or without its page."""
    out = packed_checkpoint("llama")

    def told(*given: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(selftest, "_load", told)
    monkeypatch.setattr(html_report, "render", told)
    monkeypatch.setattr(html_report, "read_json", lambda path: {"config": {}, "blocks": []})
    for survives in (selftest.record, html_report.write_if_possible):
        with pytest.raises(ranks.LostRank), ranks.together("cpu"):
            survives(out)
        torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`together` takes this process for one of several, which it meets alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "_started", lambda: 2)
    monkeypatch.setattr(ranks, "_store", None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_refusal_is_told_once(run: Run, folder: Path) -> None:
    refused = run("text.txt")
    assert refused.stderr.count("pbq: ") == 1 and "is a file; choose another" in refused.stderr
