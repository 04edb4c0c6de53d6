"""A run in progress: resumed, refused, torn, out of space, and killed at every system call."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pbq.errors import ResourceError, UsageError
from pbq.work import Keeper, Work, drop_finished

PRINT = {"model": "tiny", "bits": "1.61", "seed": "0"}
TENSORS = {
    "weight": torch.arange(63, dtype=torch.uint8).view(7, 9).T,
    "scale": torch.tensor([[0.5], [1.0]], dtype=torch.float16),
    "hidden": torch.linspace(-1, 1, 33).to(torch.bfloat16),
    "step": torch.tensor(7),
    "empty": torch.zeros(3, 0),
}
META = {"loss": 0.25, "tiers": [[1, 5], [4, 2]], "name": "späť"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "model-pbq"


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def write_model(text: str) -> Callable[[Path], None]:
    """A stand-in for save_pretrained: a packed checkpoint whose content is `text`."""

    def write(folder: Path) -> None:
        config = {"quantization_config": {"quant_method": "pbq", "method": "ptq161"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_text(text)
        (folder / "model.safetensors").chmod(0o600)
        (folder / "templates").mkdir()
        (folder / "templates" / "chat.jinja").write_text(text)

    return write


def content(out: Path) -> str | None:
    """The text of a whole checkpoint, None when there is none; anything in between fails."""
    if not out.exists():
        return None
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "templates",
    ]
    text = (out / "model.safetensors").read_text()
    assert (out / "templates" / "chat.jinja").read_text() == text
    return text


def old_checkpoint(out: Path) -> None:
    out.mkdir(parents=True)
    write_model("old")(out)


def assert_saved(work: Work, name: str) -> None:
    tensors, meta = work.load(name)
    assert meta == META
    assert tensors.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor)


def test_a_run_is_resumed_and_finished(out: Path) -> None:
    with Work.open(out, PRINT) as work:
        assert work.path == partial(out)
        assert work.names() == []
        assert not work.has("block-0")
        with pytest.raises(KeyError):
            work.load("block-0")
        work.save("block-0", TENSORS, META)
        work.save("block-1", TENSORS, {})
    assert not out.exists()
    with Work.open(out, PRINT) as work:
        assert work.names() == ["block-0", "block-1"]
        assert work.has("block-0")
        assert_saved(work, "block-0")
        work.save("block-1", TENSORS, META)
        assert_saved(work, "block-1")
        work.finish(write_model("new"))
    assert content(out) == "new"
    assert not partial(out).exists()


def test_the_result_is_readable_as_the_umask_says(out: Path) -> None:
    before = os.umask(0o027)
    try:
        with Work.open(out, PRINT) as work:
            work.finish(write_model("new"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o640


def test_another_run_is_refused_field_by_field(out: Path) -> None:
    with Work.open(out, PRINT) as work:
        work.save("block-0", TENSORS, META)
    changed = {"model": "tiny", "bits": "1.5", "effort": "best"}
    with pytest.raises(UsageError) as error:
        Work.open(out, changed)
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        "  bits: was 1.61, is now 1.5",
        "  effort: was (not set), is now best",
        "  seed: was 0, is now (not set)",
    ]
    assert "--fresh" in lines[4]
    with Work.open(out, PRINT) as work:
        assert work.has("block-0")
    with Work.open(out, changed, fresh=True) as work:
        assert work.names() == [] and work.held_bytes("block-") == 0
    with Work.open(out, changed) as work:
        assert work.names() == []
        work.save("block-0", TENSORS, META)
        work.save("calibration", TENSORS, META)
        assert work.held_bytes("block-") == (work.path / "block-0.safetensors").stat().st_size


def test_a_run_that_finished_no_step_is_in_nobodys_way(out: Path) -> None:
    """It was refused, or stopped in its first seconds: the next one has other options."""
    Work.open(out, PRINT).close()
    Work.open(out, {**PRINT, "seed": "1"}).close()
    # nor does it make a directory ours that holds anything else
    (partial(out) / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="seed: was 1, is now 0"):
        Work.open(out, PRINT)
    assert (partial(out) / "thesis.txt").read_text() == "years"


def test_a_damaged_fingerprint_is_refused(out: Path) -> None:
    with Work.open(out, PRINT) as work:
        work.save("block-0", TENSORS, META)
    (partial(out) / "fingerprint.json").write_text('{"model": ')
    with pytest.raises(UsageError, match=r"fingerprint\.json.*--fresh"):
        Work.open(out, PRINT)
    Work.open(out, PRINT, fresh=True).close()


def test_two_runs_cannot_share_a_work_directory(out: Path) -> None:
    with Work.open(out, PRINT):
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on"):
            Work.open(out, PRINT)
        with pytest.raises(UsageError, match="in use"):
            Work.open(out, PRINT, fresh=True)
    Work.open(out, PRINT).close()


def test_a_lock_on_a_removed_directory_is_not_a_lock(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run finishes, and removes its directory, between our open and our flock."""
    import fcntl

    real, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            shutil.rmtree(partial(out))
        real(descriptor, operation)

    monkeypatch.setattr("pbq.work.fcntl.flock", flock)
    with Work.open(out, PRINT) as work:
        work.save("block-0", TENSORS, META)
        assert len(calls) == 2
        with pytest.raises(UsageError, match="in use"):
            Work.open(out, PRINT)


def test_somebody_elses_directory_is_left_alone(out: Path) -> None:
    partial(out).mkdir(parents=True)
    (partial(out) / "thesis.tex").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(UsageError, match=r"not an unfinished pbq run \(it holds thesis\.tex\)"):
            Work.open(out, PRINT, fresh=fresh)
    assert (partial(out) / "thesis.tex").read_text() == "precious"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def change_meta(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(b"0.25") == 1
    path.write_bytes(data.replace(b"0.25", b"0.26"))


@pytest.mark.parametrize(
    "tear",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 5),
        lambda path: flip(path, 0),
        lambda path: flip(path, -1),
        lambda path: flip(path, 40),
        change_meta,
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["empty", "cut", "no header", "length", "data", "header", "meta", "garbage", "directory"],
)
def test_a_torn_artefact_is_absent_and_can_be_saved_again(
    out: Path, caplog: pytest.LogCaptureFixture, tear: Callable[[Path], object]
) -> None:
    with Work.open(out, PRINT) as work:
        work.save("block-0", TENSORS, META)
        path = work.path / "block-0.safetensors"
        tear(path)
        with caplog.at_level(logging.WARNING, "pbq.work"):
            assert not work.has("block-0")
        assert f"{path} is damaged" in caplog.text
        with pytest.raises(KeyError):
            work.load("block-0")
        if not path.is_dir():
            work.save("block-0", TENSORS, META)
            assert_saved(work, "block-0")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\0b", "lock\n"])
def test_a_name_that_is_no_file_name_is_refused(out: Path, name: str) -> None:
    with Work.open(out, PRINT) as work, pytest.raises(ValueError, match="artefact"):
        work.save(name, TENSORS, META)


def test_an_empty_out_is_taken(out: Path) -> None:
    out.mkdir(parents=True)
    with Work.open(out, PRINT) as work:
        work.finish(write_model("new"))
    assert content(out) == "new"


def test_a_checkpoint_is_replaced_only_when_asked_and_only_at_the_end(out: Path) -> None:
    old_checkpoint(out)
    with pytest.raises(UsageError, match=r"holds a pbq checkpoint \(ptq161\); --overwrite"):
        Work.open(out, PRINT)
    assert not partial(out).exists()
    with Work.open(out, PRINT, overwrite=True) as work:
        work.save("block-0", TENSORS, META)
        assert content(out) == "old"
        work.finish(write_model("new"))
    assert content(out) == "new"
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", '{"model_type": "llama"}', r"a model that is not pbq's \(unquantized\)"),
        ("config.json", '{"quantization_config": {"quant_method": "gptq"}}', r"pbq's \(gptq\)"),
        ("config.json", '{"quantization_config": 3}', r"pbq's \(unknown\)"),
        ("config.json", "nonsense", r"1 files that are no checkpoint \(config\.json\)"),
        ("thesis.tex", "precious", r"1 files that are no checkpoint \(thesis\.tex\)"),
    ],
)
def test_what_pbq_did_not_write_is_never_replaced(
    out: Path, name: str, text: str, says: str, overwrite: bool
) -> None:
    out.mkdir(parents=True)
    (out / name).write_text(text)
    with pytest.raises(UsageError, match=says):
        Work.open(out, PRINT, overwrite=overwrite)
    assert (out / name).read_text() == text
    assert not partial(out).exists()


def test_out_that_cannot_be_a_directory(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.parent.mkdir()
    out.write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        Work.open(out, PRINT, overwrite=True)
    with pytest.raises(UsageError, match="a file is in the way"):
        Work.open(out / "below", PRINT)
    with pytest.raises(UsageError, match="cannot be an output directory"):
        Work.open("/", PRINT)
    out.unlink()
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with pytest.raises(UsageError, match="mount point"):
        Work.open(out, PRINT)


def test_out_that_appears_during_the_run_is_kept(out: Path) -> None:
    with Work.open(out, PRINT) as work:
        work.save("block-0", TENSORS, META)
        old_checkpoint(out)
        with pytest.raises(UsageError, match="--overwrite"):
            work.finish(write_model("new"))
    assert content(out) == "old"
    with Work.open(out, PRINT, overwrite=True) as work:
        assert work.has("block-0")
        work.finish(write_model("new"))
    assert content(out) == "new"


def test_out_may_be_a_symlink(out: Path) -> None:
    out.parent.mkdir()
    target = out.parent / "elsewhere"
    out.symlink_to(target)
    with Work.open(out, PRINT) as work:
        work.finish(write_model("new"))
    assert out.is_symlink()
    assert content(target) == "new"


class Interrupt(BaseException):
    """Ctrl-C, but never anybody else's."""


@pytest.mark.parametrize("replacing", [False, True])
def test_an_exception_while_finishing_leaves_out_as_it_was(
    out: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    """At every rename, sync and mode change of `finish`, one after the other."""
    if replacing:
        old_checkpoint(out)
    before, reached = content(out), 0
    work = Work.open(out, PRINT, overwrite=True)
    work.save("block-0", TENSORS, META)
    while True:
        with monkeypatch.context() as patch:
            calls = interrupt_at(patch, reached, Interrupt())
            try:
                work.finish(write_model("new"))
                break
            except Interrupt:
                pass
            # only the sync after the last rename comes too late to undo anything
            done = calls[-1].startswith("fsync") and content(out) == "new"
            if done:
                break
        assert content(out) == before
        assert not (work.path / "staging").exists()
        assert work.has("block-0")
        reached += 1
    assert reached > 9
    assert content(out) == "new"
    work.close()


def interrupt_at(patch: pytest.MonkeyPatch, stop: int, error: BaseException) -> list[str]:
    """Raise instead of the call number `stop`; returns the list of calls, growing."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append(f"{name} {args}")
            if len(calls) - 1 == stop:
                raise error
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "chmod"):
        patch.setattr(os, name, counted(name))
    return calls


def in_child(run: Callable[[], None]) -> int:
    """Exit status of a forked child that runs it: 0 done, 1 an exception, 9 killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(stop: int) -> None:
    """SIGKILL this process instead of its system call number `stop`. For a forked child."""
    count = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count > stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "chmod", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.fixture
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL loses nothing that was written, so these many runs need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("quick_fsync")
@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_call_is_survived(out: Path, replacing: bool) -> None:
    """From opening to the removal of the work directory: OUT is old or new, and the run goes on."""

    def run() -> None:
        with Work.open(out, PRINT, overwrite=True) as work:
            for name in ("block-0", "block-1"):
                if not work.has(name):
                    work.save(name, TENSORS, META)
            work.finish(write_model("new"))

    stop, status, seen = 0, -signal.SIGKILL, set()
    while status != 0:
        shutil.rmtree(out.parent, ignore_errors=True)
        if replacing:
            old_checkpoint(out)
        status = in_child(lambda stop=stop: (kill_at(stop), run()))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL)
        seen.add(content(out))
        drop_finished(out)
        assert content(out) in seen
        if content(out) == "new":
            assert not out.with_name(f"{out.name}.partial").exists()
        with Work.open(out, PRINT, overwrite=True) as work:
            assert content(out) in ({"old", "new"} if replacing else {None, "new"})
            for name in work.names():
                assert_saved(work, name)
            work.save("block-0", TENSORS, META)
            work.finish(write_model("newer"))
        assert content(out) == "newer"
        assert [p.name for p in out.parent.iterdir()] == [out.name]
        stop += 1
    assert stop > 30
    # None beside "old": between the two renames only the work directory knows the old one
    assert seen == ({"old", None, "new"} if replacing else {None, "new"})


@pytest.mark.usefixtures("quick_fsync")
def test_discarding_is_survived_too(out: Path) -> None:
    """A kill while --fresh empties the directory must not make it look like somebody else's."""
    stop, status = 0, -signal.SIGKILL
    while status != 0:
        shutil.rmtree(out.parent, ignore_errors=True)
        with Work.open(out, PRINT) as work:
            work.save("block-0", TENSORS, META)
        status = in_child(
            lambda stop=stop: (kill_at(stop), Work.open(out, {"bits": "2"}, fresh=True))  # type: ignore[misc]
        )
        with Work.open(out, {"bits": "2"}, fresh=True) as work:
            assert work.names() == []
        stop += 1
    assert stop > 5


def test_a_full_disk_while_saving(out: Path) -> None:
    """A real one: the child may write no file beyond 16 KiB."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
        with Work.open(out, PRINT) as work:
            work.save("block-0", TENSORS, META)
            with pytest.raises(ResourceError, match=r"block-1\.safetensors: File too large; 39\.1"):
                work.save("block-1", {"hidden": torch.zeros(10_000)}, META)
            assert sorted(os.listdir(work.path)) == [
                "block-0.safetensors",
                "fingerprint.json",
                "lock",
            ]

    assert in_child(run) == 0
    with Work.open(out, PRINT) as work:
        assert_saved(work, "block-0")
        assert work.names() == ["block-0"]


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_no_space_left(out: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Work.open(out, PRINT) as work:
        work.save("block-0", TENSORS, META)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(ResourceError, match=r"No space left on device; .* free") as error:
                work.save("block-0", TENSORS, {})
        assert error.value.exit_code == 5
        assert not list(work.path.glob("*.tmp"))
        assert_saved(work, "block-0")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "shard-2.safetensors"),
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_no_space_for_the_checkpoint(out: Path, error: Exception) -> None:
    def write(folder: Path) -> None:
        write_model("new")(folder)
        raise error

    with Work.open(out, PRINT) as work:
        work.save("block-0", TENSORS, META)
        with pytest.raises(ResourceError, match=r"(shard-2|staging).*No space left on device"):
            work.finish(write)
        assert not out.exists()
        assert not (work.path / "staging").exists()
        work.finish(write_model("new"))
    assert content(out) == "new"


def test_a_directory_that_may_not_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match=r"model-pbq\.partial: Permission denied"):
        Work.open(out, PRINT)


def test_what_cannot_be_removed_afterwards_is_only_a_warning(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work.open(out, PRINT)
    monkeypatch.setattr(
        Work, "_empty", lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    with caplog.at_level(logging.WARNING, "pbq.work"):
        work.finish(write_model("new"))
    assert content(out) == "new"
    assert "could not be removed" in caplog.text


def test_a_state_is_kept_when_it_is_due_and_there_is_room(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr("pbq.work.time.monotonic", lambda: clock[0])
    with Work.open(out, PRINT) as work:
        keeper = Keeper(work, "training")
        assert keeper.load() is None
        for clock[0], kept in ((299.0, None), (300.0, 300.0), (599.0, 300.0), (600.0, 600.0)):
            keeper.offer(lambda: (TENSORS, {"at": clock[0]}))
            found = keeper.load()
            assert (found and found[1]["at"]) == kept
        clock[0] = 900.0
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "pbq.work"):
            patch.setattr("pbq.work.free_bytes", lambda path: 100)
            keeper.offer(lambda: (TENSORS, {"at": clock[0]}))
        assert "no room to keep" in caplog.text
        found = keeper.load()
        assert found is not None and found[1]["at"] == 600.0
        work.forget("training")
        assert work.names() == [] and keeper.load() is None
