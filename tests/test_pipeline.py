"""The whole way on tiny models: quantize, save, reload, resume, refuse.

The tiny models have random weights: nothing here says how good a quantized model is, only that it
is the one that was computed, that it is the same one every time, and that OUT is whole or absent.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pbq import checkpoint, experts, linear, pipeline, planning, work
from pbq.allocate import discounted
from pbq.blocks import BlockQuantizer, Streams
from pbq.config import QuantConfig
from pbq.distilling import distil_model, last_hidden, steps_of
from pbq.errors import (
    DataError,
    ModelError,
    NumericalError,
    PbqError,
    ResourceError,
    UsageError,
)
from pbq.hf import packed_linears
from pbq.loader import BlockLoader
from pbq.methods import ptq161
from pbq.models import find_blocks, run_tail
from pbq.report import RunReport
from pbq.shards import ShardWriter
from pbq.tune import Distillation, held_out

WORDS = ("the quick brown fox jumps over the lazy dog while seven wizards box " * 2).split()


@dataclass
class Recorder:
    """An observer that remembers, and interrupts where `stop` says so."""

    stop: Callable[[str, Any], bool] = lambda kind, what: False
    seen: list[tuple[str, Any]] = field(default_factory=list)
    closed: int = 0

    def note(self, kind: str, what: Any) -> None:
        self.seen.append((kind, what))
        if self.stop(kind, what):
            raise KeyboardInterrupt

    def stage(self, name: str, total: int | None) -> None:
        self.note("stage", name)

    def step(self, done: int, total: int | None = None) -> None:
        self.note("step", done)

    def line(self, text: str) -> None:
        self.note("line", text)

    def close(self) -> None:
        self.closed += 1

    def of(self, kind: str) -> list[Any]:
        return [what for k, what in self.seen if k == kind]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 bytes, which are as many tokens."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (1000,), generator=generator).tolist()
    path.write_text(" ".join(WORDS[i] for i in drawn)[:5000])
    return path


@pytest.fixture(scope="session")
def config(text: Path) -> QuantConfig:
    return QuantConfig("ptq161", bits=2.5, calib=str(text), nsamples=4, seqlen=16)


@pytest.fixture(scope="module", autouse=True)
def tuning_and_distillation() -> Iterator[None]:
    """ptq161 tunes every block for an epoch, waterfill distils for 8 steps, whatever is default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ptq161.EPOCHS, "default", 1.0)
        real = Distillation.__init__
        patch.setattr(
            Distillation, "__init__", lambda self, *, steps, **rates: real(self, steps=8, **rates)
        )
        yield


@dataclass
class Finished:
    out: Path
    report: RunReport
    model: PreTrainedModel
    observer: Recorder


Finish = Callable[..., Finished]


@pytest.fixture(scope="session")
def finish(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
) -> Finish:
    """finish(architecture): quantized once a session; its report, and its model still in RAM."""
    done: dict[str, Finished] = {}

    def once(architecture: str) -> Finished:
        if architecture not in done:
            out = tmp_path_factory.mktemp(f"quantized-{architecture}") / "out"
            done[architecture] = quantized(tiny_checkpoint(architecture), out, config)
        return done[architecture]

    return once


def quantized(source: Path, out: Path, config: QuantConfig, **options: Any) -> Finished:
    """pipeline.quantize, and the model put together from the parts that it was about to write."""
    tensors: dict[str, Tensor] = {}
    loaders: list[BlockLoader] = []
    observer = options.pop("observer", None) or Recorder()

    class Writer(ShardWriter):
        def add(self, part: str, given: dict[str, Tensor]) -> None:
            tensors.update({name: tensor.clone() for name, tensor in given.items()})
            super().add(part, given)

    class Loader(BlockLoader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            loaders.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ShardWriter", Writer)
        patch.setattr(pipeline, "BlockLoader", Loader)
        report = pipeline.quantize(str(source), out, config, observer=observer, **options)
    model = loaders[0].model
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return Finished(out, report, model, observer)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.eval()(ids, use_cache=False).logits


TIMES = ("seconds", "peak_bytes")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, Any]:
    """Every file of OUT; report.json and README.md without seconds and memory.

    report.html is made from report.json alone (tests/test_html_report.py).
    """
    files: dict[str, Any] = {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()
    }
    assert files.pop("report.html")
    files["report.json"] = without_times(json.loads(files["report.json"]))
    card = files["README.md"].decode()
    files["README.md"] = re.sub(r"\| (seconds|peak memory) \|.*", "", card)
    return files


def nothing_at(out: Path) -> bool:
    """Neither OUT nor an unfinished run of it."""
    return not out.exists() and not out.with_name(out.name + ".partial").exists()


# From a checkpoint to a packed checkpoint


def test_a_reloaded_model_is_the_one_that_was_quantized(
    architecture: str, finish: Finish, ids: Tensor
) -> None:
    done = finish(architecture)
    loaded = AutoModelForCausalLM.from_pretrained(done.out)
    assert torch.equal(logits(loaded, ids), logits(done.model, ids))
    names = [name for name, _ in packed_linears(loaded)]
    assert names == [name for name, _ in packed_linears(done.model)] != []
    generated = loaded.generate(ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 14)


def test_packed_layers_compute_what_their_dense_weights_would(
    architecture: str, finish: Finish, ids: Tensor
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(finish(architecture).out)
    asked = linear.backend_name()
    linear.set_backend("reference")
    try:
        slow = logits(loaded, ids)
    finally:
        linear.set_backend(asked)
    fast = logits(loaded, ids)
    dense = logits(loaded.dequantize(), ids)
    assert torch.equal(slow, dense)
    torch.testing.assert_close(fast, dense, atol=1e-4, rtol=1e-4)


def test_stored_bits_are_promised_reported_and_on_the_disk(
    architecture: str, finish: Finish
) -> None:
    done = finish(architecture)
    verified = checkpoint.verify(done.out)
    assert verified.stored_bits == pytest.approx(done.report.bits, abs=1e-9)
    assert 2.2 < done.report.bits <= 2.5 and not verified.unchecked and not verified.warnings
    summary = checkpoint.inspect(done.out)
    assert done.report.quantized_bytes == summary.quantized_bytes
    assert done.report.quantized_weights == summary.quantized_parameters
    assert done.report.parameters == summary.parameters
    assert done.report.model_bytes == summary.quantized_bytes + summary.other_bytes
    written = json.loads((done.out / "report.json").read_text())
    assert written["bits"] == done.report.bits


@pytest.mark.usefixtures("measured_speed")
def test_a_plan_foretells_the_run(
    finish: Finish, tiny_checkpoint: Callable[[str], Path], config: QuantConfig
) -> None:
    done, planned = finish("opt"), planning.plan(str(tiny_checkpoint("opt")), config)
    assert planned.bits == pytest.approx(done.report.bits, abs=1e-9)
    assert planned.paper_bits == pytest.approx(done.report.paper_bits, abs=1e-9)
    assert planned.quantized_bytes == done.report.quantized_bytes


def test_out_holds_all_that_a_load_needs(finish: Finish, text: Path) -> None:
    done = finish("llama")
    tokenizer = AutoTokenizer.from_pretrained(done.out)
    assert tokenizer("abc").input_ids and tokenizer.chat_template
    assert (done.out / "generation_config.json").exists()
    card = (done.out / "README.md").read_text()
    assert f"{done.report.bits:.3f} (asked: 2.5)" in card and "method `ptq161`" in card
    assert text.name in card and "4 x 16 tokens" in card and "import pbq" in card
    settings = json.loads((done.out / "config.json").read_text())["quantization_config"]
    assert settings["method"] == "ptq161" and settings["bits"] == 2.5
    assert re.fullmatch("[0-9a-f]{64}", settings["provenance"]["calibration_sha256"])
    assert settings["provenance"]["config"]["seqlen"] == 16
    assert not done.out.with_name("out.partial").exists()


def test_the_observer_is_told_and_closed(finish: Finish) -> None:
    observer = finish("llama").observer
    stages = observer.of("stage")
    assert stages[0] == "load the model" and stages[-2:] == ["blocks", "write"]
    covered, forecast, *lines = observer.of("line")
    assert covered == "quantizing 100.00% of the block weights"
    assert forecast.startswith("about ") and "statistics" in forecast
    assert [line.split()[0] for line in lines] == [f"model.layers.{i}" for i in range(3)]
    assert all("layer error" in line and "damping 0.01  block loss" in line for line in lines)
    assert observer.closed >= 1


def test_one_stream_follows_the_original_model_and_one_the_quantized_one(
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    real = BlockQuantizer.run

    def run(self: BlockQuantizer, streams: Streams, plans: Any) -> Any:
        seen.append((torch.cat(list(streams.fp)), torch.cat(list(streams.quant))))
        return real(self, streams, plans)

    monkeypatch.setattr(BlockQuantizer, "run", run)
    source = tiny_checkpoint("llama")
    done = quantized(source, tmp_path / "out", config)
    ids = AutoTokenizer.from_pretrained(source)(text.read_text(), return_tensors="pt").input_ids
    rows = ids[0, : 4 * 16].view(4, 16)
    for which, model in enumerate((AutoModelForCausalLM.from_pretrained(source), done.model)):
        with torch.no_grad():
            hidden = model(rows, use_cache=False, output_hidden_states=True).hidden_states
        for i, streams in enumerate(seen):
            assert (streams[which] - hidden[i]).norm() < 1e-4 * hidden[i].norm()
    assert len(seen) == 3 and torch.equal(*seen[0])
    assert all((fp - quant).norm() > 0.01 * fp.norm() for fp, quant in seen[1:])


def test_a_model_in_bfloat16_stays_in_bfloat16(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, config: QuantConfig, ids: Tensor
) -> None:
    """The dtype of real checkpoints: weights are rounded after dequantizing, before and after."""
    source = tmp_path / "source"
    tiny_model("llama").bfloat16().save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    done = quantized(source, tmp_path / "out", config)
    loaded = AutoModelForCausalLM.from_pretrained(done.out)
    assert loaded.dtype == done.model.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, ids), logits(done.model, ids))
    assert done.report.quantized_bytes_before == 2 * done.report.quantized_weights


def test_faithful_stores_more_than_asked_and_says_so(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, config: QuantConfig, ids: Tensor
) -> None:
    faithful = dataclasses.replace(config, faithful=True, bits=1.61)
    done = quantized(tiny_checkpoint("gpt2"), tmp_path / "out", faithful)
    assert done.report.bits > 3 and done.report.paper_bits < done.report.bits
    assert f"{done.report.bits:.3f} (asked: 1.61)" in (done.out / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(done.out)
    assert torch.equal(logits(loaded, ids), logits(done.model, ids))
    assert all(layer.layout.column_scale for _, layer in packed_linears(loaded))
    # the 4-bit channels have not moved: their columns are multiplied by one
    for _, layer in packed_linears(loaded):
        fine = layer.tier == 1
        assert (layer.column_scale[fine] == 1).all() and (layer.column_scale[~fine] != 1).any()


# Calibration text


def test_the_same_text_gives_the_same_model_whatever_file_it_is_in(
    finish: Finish,
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    text: Path,
    tmp_path: Path,
) -> None:
    lines = tmp_path / "calibration.jsonl"
    lines.write_text(json.dumps({"text": text.read_text()}) + "\n\n")
    source = tiny_checkpoint("llama")
    done = quantized(source, tmp_path / "o", dataclasses.replace(config, calib=str(lines)))
    weights = "model.safetensors"
    assert (done.out / weights).read_bytes() == (finish("llama").out / weights).read_bytes()
    assert "calibration.jsonl" in done.report.calibration


def test_the_model_can_calibrate_itself(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, tmp_path: Path
) -> None:
    own = dataclasses.replace(config, calib="self", seed=3)
    done = quantized(tiny_checkpoint("llama"), tmp_path / "out", own)
    assert "sampled from the model itself, seed 3" in (done.out / "README.md").read_text()


def test_too_little_text_is_refused(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, tmp_path: Path
) -> None:
    short, out = tmp_path / "short.txt", tmp_path / "out"
    short.write_text("only a few words")
    with pytest.raises(DataError, match=r"short\.txt: 16 tokens, but 4 x 16 = 64 are needed"):
        quantized(tiny_checkpoint("llama"), out, dataclasses.replace(config, calib=str(short)))
    assert nothing_at(out)


def test_segments_longer_than_the_model_reads_are_refused(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, tmp_path: Path
) -> None:
    out, longer = tmp_path / "out", dataclasses.replace(config, seqlen=65)
    with pytest.raises(UsageError, match="--seqlen 65 is more than the model's 64 positions"):
        quantized(tiny_checkpoint("gpt2"), out, longer)
    assert nothing_at(out)


# Perplexity


@pytest.fixture(scope="session")
def long_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any
) -> Path:
    """A llama with room for a window of 2048 tokens."""
    path = tmp_path_factory.mktemp("long")
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def test_perplexity_before_and_after_is_in_the_card(
    long_model: Path, config: QuantConfig, text: Path, tmp_path: Path
) -> None:
    done = quantized(long_model, tmp_path / "out", config, ppl_text=text, ppl_windows=1)
    before, after = done.report.before, done.report.after
    assert before and after and before.ppl != after.ppl and before.windows == after.windows == 1
    # random weights know nothing: every byte is as likely as another
    assert 150 < before.ppl < 600 and 150 < after.ppl < 600
    card = (done.out / "README.md").read_text()
    assert f"{before.ppl:.2f} -> {after.ppl:.2f} (calibration.txt, 1 " in card
    assert " 2048 tokens)" in card


def test_a_text_that_cannot_be_scored_is_refused_before_the_work(
    tiny_checkpoint: Callable[[str], Path],
    long_model: Path,
    config: QuantConfig,
    tmp_path: Path,
) -> None:
    short, out = tmp_path / "short.txt", tmp_path / "out"
    short.write_text("a few words")
    cases: list[tuple[Path, Path, type[PbqError], str]] = [
        (long_model, short, DataError, r"short\.txt: 11 tokens, and one window needs 2048"),
        (long_model, tmp_path / "absent.txt", DataError, r"absent\.txt: cannot be read"),
        (tiny_checkpoint("llama"), short, DataError, "one window needs 64"),
    ]
    for source, file, kind, message in cases:
        observer = Recorder()
        with pytest.raises(kind, match=message):
            quantized(source, out, config, ppl_text=file, observer=observer)
        assert observer.of("stage") == ["load the model"] and nothing_at(out)


def test_a_model_of_few_positions_is_scored_in_windows_of_as_many(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, text: Path, tmp_path: Path
) -> None:
    done = quantized(tiny_checkpoint("gpt2"), tmp_path / "out", config, ppl_text=text)
    assert done.report.before and done.report.before.window == 64
    assert done.report.after and done.report.after.windows == 40
    assert "64 tokens)" in (done.out / "README.md").read_text()


def test_a_resumed_run_measures_another_text_anew(
    long_model: Path, config: QuantConfig, text: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    at_blocks = Recorder(lambda kind, what: what == "blocks")
    with pytest.raises(KeyboardInterrupt):
        quantized(long_model, out, config, ppl_text=text, ppl_windows=1, observer=at_blocks)
    again = Recorder(lambda kind, what: what == "blocks")
    with pytest.raises(KeyboardInterrupt):
        quantized(long_model, out, config, ppl_text=text, ppl_windows=1, observer=again)
    assert "perplexity before" not in again.of("stage")
    done = quantized(long_model, out, config, ppl_text=other, ppl_windows=2)
    assert done.report.before and done.report.before.file == "other.txt"
    assert done.report.before.windows == 2


# The same result, however it came about


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("ptq161", ("line", "model.layers.1")),
        ("ptq161", ("stage", "write")),
        ("waterfill", ("line", "distillation")),
    ],
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    method: str,
    where: tuple[str, str],
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    whole: Callable[[str], Finished],
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    config = dataclasses.replace(config, method=method)
    stopping = Recorder(lambda kind, what: kind == where[0] and str(what).startswith(where[1]))
    with pytest.raises(KeyboardInterrupt):
        quantized(source, out, config, observer=stopping)
    assert not out.exists() and stopping.closed >= 1
    done = quantized(source, out, config)
    assert contents(out) == contents(whole(method).out)
    # what was finished has not been done again
    finished = sum(line.startswith("model.layers") for line in stopping.of("line"))
    again = [line for line in done.observer.of("line") if line.startswith("model.layers")]
    assert finished + len(again) == 3 and finished > 0
    assert "calibration text" not in done.observer.of("stage")
    assert not out.with_name("out.partial").exists()


def test_a_distillation_that_was_killed_halfway_goes_on_from_there(
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    whole: Callable[[str], Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "KEEP_SECONDS", 0)
    monkeypatch.setattr(work, "KEEP_SHARE", 0)
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    config = dataclasses.replace(config, method="waterfill")
    stopping = Recorder()
    stopping.stop = lambda kind, what: (
        kind == "step" and what == 5 and stopping.of("stage")[-1] == "distillation"
    )
    with pytest.raises(KeyboardInterrupt):
        quantized(source, out, config, observer=stopping)
    done = quantized(source, out, config)
    assert contents(out) == contents(whole("waterfill").out)
    stage = done.observer.seen.index(("stage", "distillation"))
    assert done.observer.seen[stage + 1 : stage + 5] == [("step", i) for i in range(5, 9)]


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    finish: Finish,
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
) -> Callable[[str], Finished]:
    """whole(method): a llama quantized without an interruption."""
    done: dict[str, Finished] = {}

    def once(method: str) -> Finished:
        if method == "ptq161":
            return finish("llama")
        if method not in done:
            out = tmp_path_factory.mktemp(method) / "out"
            done[method] = quantized(
                tiny_checkpoint("llama"), out, dataclasses.replace(config, method=method)
            )
        return done[method]

    return once


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_two_runs_are_the_same_byte_for_byte(
    mode: Callable[[], Any],
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    finish: Finish,
) -> None:
    torch.manual_seed(123)  # whatever the process did before must not matter
    with mode():
        done = quantized(tiny_checkpoint("llama"), tmp_path / "another", config)
    assert contents(done.out) == contents(finish("llama").out)


def test_distillation_is_reported_and_reloads(
    whole: Callable[[str], Finished], ids: Tensor
) -> None:
    done = whole("waterfill")
    assert done.report.bits <= 2.5
    loaded = AutoModelForCausalLM.from_pretrained(done.out)
    assert torch.equal(logits(loaded, ids), logits(done.model, ids))
    tuned = json.loads((done.out / "report.json").read_text())["distillation"]
    assert tuned["kept"] == (tuned["after"] < tuned["before"])


def test_a_distillation_has_the_text_without_noise_and_the_original_as_it_was(
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, given = tiny_checkpoint("llama"), {}

    def noting(model: Any, blocks: Any, packed: Any, norms: Any, latent: Any, *rest: Any, **more):
        assert len(rest[1]) == 0
        given.update(norms=norms, rows=rest[0], hidden=rest[1])
        gains = {name: p.detach().clone() for name, p in model.named_parameters() if name in norms}
        given.update(before=gains, logits=model(rest[0][-1], use_cache=False).logits)
        done = distil_model(model, blocks, packed, norms, latent, *rest, **more)
        given.update(hidden=list(rest[1]))
        return done

    monkeypatch.setattr(pipeline, "distil_model", noting)
    changed = {"method": "waterfill", "token_noise": 0.3, "block_epochs": 1.0, "seqlen": 24}
    quantized(source, tmp_path / "out", dataclasses.replace(config, **changed))

    original = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    encoded = tokenizer(Path(config.calib).read_text(), add_special_tokens=False).input_ids
    segments = [encoded[i : i + 24] for i in range(0, len(encoded), 24)]
    rows = [row.tolist() for batch in given["rows"] for row in batch]
    assert len(rows) > 8 and all(row in segments for row in rows)
    _, blocks = find_blocks(original)
    assert 0 < len(given["hidden"]) <= len(given["rows"])
    exact = [last_hidden(original, blocks, batch) for batch in given["rows"]]
    for hidden in given["hidden"]:
        assert any(torch.allclose(hidden, each, atol=1e-6) for each in exact)
    # norms start where the blocks left them, but the teacher keeps its own
    assert torch.allclose(given["logits"], logits(original, given["rows"][-1]), atol=1e-5)
    assert any(not torch.equal(given["norms"][n], own) for n, own in given["before"].items())


def test_bits_go_to_the_layers_that_the_model_is_sensitive_to(
    whole: Callable[[str], Finished],
) -> None:
    report = whole("waterfill").report
    stored = {
        f"{block['name']}.{name}": layer["bits"]
        for block in report.blocks
        for name, layer in block["layers"].items()
    }
    assert report.sensitivities.keys() == stored.keys()
    assert report.seconds["sensitivities"] > 0
    # layers of one shape: scales and masks take the same share of their bits
    same = [name for name in stored if name.endswith(("gate_proj", "up_proj"))]
    nats = {
        name: discounted(report.sensitivities[name], int(name.split(".")[2]) / len(report.blocks))
        for name in same
    }
    by_nats = sorted(same, key=lambda name: nats[name])
    assert stored[by_nats[0]] < stored[by_nats[-1]]
    assert report.bits <= 2.5


def test_sensitivities_are_measured_once(
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[str], Finished],
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    config = dataclasses.replace(config, method="waterfill")
    with pytest.raises(KeyboardInterrupt):
        quantized(source, out, config, observer=Recorder(lambda kind, what: what == "blocks"))
    monkeypatch.setattr(pipeline, "sensitivities", None)
    quantized(source, out, config)
    assert contents(out) == contents(whole("waterfill").out)


def test_layers_of_a_model_with_experts_get_the_same_bits(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, method="waterfill", block_epochs=0.5)
    report = quantized(tiny_checkpoint("mixtral"), tmp_path / "out", config).report
    assert report.sensitivities == {}
    assert "sensitivities" not in report.seconds


def test_an_unfinished_run_is_not_resumed_with_other_options(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantized(source, out, config, observer=Recorder(lambda kind, what: what == "blocks"))
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(UsageError, match=r"config\.seed: was 0, is now 1"):
        quantized(source, out, other)
    with pytest.raises(UsageError, match="model: was"):
        quantized(tiny_checkpoint("mistral"), out, config)
    assert quantized(source, out, other, fresh=True).out == out


# Refusals, each of which leaves OUT as it was


def test_a_budget_that_cannot_be_met_leaves_nothing_and_names_one_that_can(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    with pytest.raises(UsageError, match="the least is --bits") as refused:
        quantized(source, out, dataclasses.replace(config, bits=1.0))
    assert "model.layers" in str(refused.value) and nothing_at(out)
    found = re.search(r"--bits (\d+\.\d+)", str(refused.value))
    assert found
    done = quantized(source, out, dataclasses.replace(config, bits=float(found.group(1))))
    assert done.report.bits <= float(found.group(1))


def test_experts_that_cannot_be_taken_apart_are_refused_with_the_coverage(
    moe_architecture: str,
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts, "is_fused", lambda module: False)
    with pytest.raises(ModelError, match=r"only \d+\.\d% of the block weights"):
        quantized(tiny_checkpoint(moe_architecture), tmp_path / "out", config)
    assert nothing_at(tmp_path / "out")
    with pytest.raises(ModelError, match=r"only \d+\.\d% of the block weights"):
        planning.plan(str(tiny_checkpoint(moe_architecture)), config)


def test_a_model_of_nans_is_refused_with_the_layer(
    tiny_model: Any, tiny_tokenizer: Any, config: QuantConfig, tmp_path: Path
) -> None:
    model, source, out = tiny_model("llama"), tmp_path / "source", tmp_path / "out"
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: non-finite"):
        quantized(source, out, config)
    assert not out.exists()


def test_a_layer_that_is_never_fed_does_no_harm(
    tiny_model: Any, tiny_tokenizer: Any, config: QuantConfig, tmp_path: Path, ids: Tensor
) -> None:
    """H is zero there, as positive definite as it will ever be."""
    model, source = tiny_model("llama"), tmp_path / "source"
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()
    model.save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    done = quantized(source, tmp_path / "out", config)
    assert torch.isfinite(logits(done.model, ids)).all()


def test_a_full_disk_is_refused_before_the_work(
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    observer, out = Recorder(), tmp_path / "out"
    with pytest.raises(ResourceError, match=r"KiB needed, 1000 B free on that disk"):
        quantized(tiny_checkpoint("llama"), out, config, observer=observer)
    assert observer.of("stage") == ["load the model"] and not out.exists()


def test_a_disk_that_fills_up_while_writing_leaves_a_run_to_resume(
    tiny_checkpoint: Callable[[str], Path],
    config: QuantConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finish: Finish,
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "README.md")

    with monkeypatch.context() as patch:
        patch.setattr("pbq.report.copy_auxiliary", full)
        with pytest.raises(ResourceError, match="No space left"):
            quantized(source, out, config)
    assert not out.exists() and not (tmp_path / "out.partial" / "staging").exists()
    # what is there already need not find room again
    needed = []
    monkeypatch.setattr(pipeline, "check_space", lambda path, nbytes: needed.append(nbytes))
    done = quantized(source, out, config)
    quantized(source, tmp_path / "another", config)
    assert needed[0] < 0.8 * needed[1]
    assert not any(line.startswith("model.layers") for line in done.observer.of("line"))
    assert contents(out) == contents(finish("llama").out)


def test_an_out_that_exists_is_left_alone(
    tiny_checkpoint: Callable[[str], Path], config: QuantConfig, tmp_path: Path, finish: Finish
) -> None:
    source = tiny_checkpoint("llama")
    foreign, file, packed = tmp_path / "photos", tmp_path / "file", tmp_path / "packed"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"meow")
    file.write_text("a file")
    shutil.copytree(finish("gpt2").out, packed)
    before = contents(packed)
    for out, message in (
        (foreign, "files that are no checkpoint"),
        (file, "is a file"),
        (packed, "--overwrite replaces it"),
        (source, "a model that is not pbq's"),
    ):
        observer = Recorder()
        with pytest.raises(UsageError, match=message):
            quantized(source, out, config, observer=observer)
        assert not observer.seen  # before anything was loaded
    with pytest.raises(UsageError, match="files that are no checkpoint"):
        quantized(source, foreign, config, overwrite=True)
    assert [p.name for p in foreign.iterdir()] == ["cat.jpg"] and file.read_text() == "a file"
    # with --overwrite the old checkpoint is there until the new one is whole
    with pytest.raises(KeyboardInterrupt):
        at_write = Recorder(lambda kind, what: what == "write")
        quantized(source, packed, config, overwrite=True, observer=at_write)
    assert contents(packed) == before
    quantized(source, packed, config, overwrite=True)
    assert contents(packed) == contents(finish("llama").out)


def test_a_packed_checkpoint_is_not_quantized_again(
    finish: Finish, config: QuantConfig, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="already quantized with pbq; give the model it was made"):
        quantized(finish("llama").out, tmp_path / "out", config)
    assert nothing_at(tmp_path / "out")


def test_an_unknown_method_is_refused_before_loading(config: QuantConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--method nonsense: unknown"):
        quantized(tmp_path, tmp_path / "out", dataclasses.replace(config, method="nonsense"))


# A real model


@pytest.mark.real
def test_a_gguf_file_can_be_planned(real_gguf: Path) -> None:
    planned = planning.plan(str(real_gguf), QuantConfig(bits=1.61))
    assert planned.layers == 210 and planned.coverage == 1.0
    assert 1.58 < planned.bits <= 1.61
    assert planned.quantized_weights == 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_original_continues_behind_its_last_block(
    tiny_model: Any, ids: Tensor, architecture: str
) -> None:
    model = tiny_model(architecture)
    _, blocks = find_blocks(model)
    hidden = last_hidden(model, blocks, ids)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(run_tail(model, blocks, ids, hidden), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "seqlen"), [([2] * 32, 1024), ([2] * 31 + [1], 256), ([3], 16)]
)
def test_a_step_takes_a_thousand_tokens_and_never_mixes_in_held_out_rows(
    lengths: list[int], seqlen: int
) -> None:
    batches = [torch.zeros(rows, seqlen) for rows in lengths]
    steps, unseen = steps_of(batches, held_out(len(batches)))
    assert sorted(i for step in steps for i in step) == list(range(sum(lengths)))
    assert all(len(step) * seqlen <= 1024 for step in steps)
    starts = [sum(lengths[:b]) for b in held_out(len(lengths))]
    judges = {start + i for start in starts for i in range(2)}
    assert {i for step in unseen for i in steps[step]} == judges
    full = [len(step) for i, step in enumerate(steps) if i not in unseen]
    assert set(full[:-1]) <= {max(1, 1024 // seqlen)}
