"""`pbq compare`: every run once, under one protocol, and told as it is."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pbq import compare, pipeline
from pbq.compare import Comparison, Entry, Protocol, configurations, page, plot
from pbq.config import QuantConfig
from pbq.errors import DataError, UsageError
from pbq.evaluate import Perplexity
from pbq.pipeline import Silent

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "box")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    drawn = torch.randint(len(WORDS), (600,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(WORDS[i] for i in drawn.tolist())[:2500])
    return path


@pytest.fixture
def common(text: Path) -> QuantConfig:
    return QuantConfig(calib=str(text), nsamples=4, seqlen=16, effort="fast")


@pytest.fixture
def protocol(text: Path) -> Protocol:
    return Protocol((text,), windows=3, window=32, device="cpu")


def finished(
    source: Path, folder: Path, configs: list[QuantConfig], protocol: Protocol
) -> Comparison:
    return compare.compare(str(source), folder, configs, protocol, Silent())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were really made."""
    made: list[str] = []
    real = pipeline.quantize

    def quantize(source: str, out: Path, *args: Any, **options: Any) -> Any:
        made.append(out.name)
        return real(source, out, *args, **options)

    monkeypatch.setattr(pipeline, "quantize", quantize)
    return made


def test_every_method_at_every_budget_and_the_papers_once(common: QuantConfig) -> None:
    found = configurations(["ptq161", "rtn"], [2.5, 3.5], common, faithful=True)
    assert [compare.run_name(config) for config in found] == [
        "ptq161-2.5",
        "ptq161-3.5",
        "ptq161-faithful",
        "rtn-2.5",
        "rtn-3.5",
    ]
    assert {(config.nsamples, config.effort) for config in found} == {(4, "fast")}
    with pytest.raises(UsageError, match="nonsense"):
        configurations(["nonsense"], [2.0], common)


def test_a_method_may_bring_its_own_budget() -> None:
    found = configurations(["rtn@2.15", "gptq", "pb-llm@paper"], [3.5], QuantConfig())
    assert [(c.method, c.bits, c.faithful) for c in found] == [
        ("rtn", 2.15, False),
        ("gptq", 3.5, False),
        ("pb-llm", QuantConfig().bits, True),
    ]
    with pytest.raises(UsageError, match="rtn@two: expected METHOD@BITS or METHOD@paper"):
        configurations(["rtn@two"], [3.5], QuantConfig())


def test_a_comparison_says_what_each_run_stored(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, common: QuantConfig,
    protocol: Protocol, counted: list[str],
) -> None:  # fmt: skip
    source, configs = (
        tiny_checkpoint("llama"),
        configurations(["rtn", "ptq161"], [2.0, 3.5], common),
    )
    found = finished(source, tmp_path, configs, protocol)
    by_name = {entry.name: entry for entry in found.entries}
    assert list(by_name) == ["unquantized", "rtn-2", "rtn-3.5", "ptq161-2", "ptq161-3.5"]
    assert counted == ["rtn-3.5", "ptq161-2", "ptq161-3.5"]
    # two planes and their scales are above 2 bits: no run, and the reason is told
    assert "the least is --bits" in by_name["rtn-2"].refused
    for name in counted:
        entry = by_name[name]
        assert entry.config is not None and entry.bits <= entry.config["bits"]
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (entry.bits, entry.paper_bits) == (report["bits"], report["paper_bits"])
        assert entry.perplexities[0].windows == 3 and entry.perplexities[0].ppl > 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "compare.csv").read_text())))
    assert [row["run"] for row in rows] == list(by_name)
    assert float(rows[2]["ppl wiki.txt"]) == by_name["rtn-3.5"].perplexities[0].ppl
    assert rows[1]["refused"] and not rows[1]["stored_bits"]
    written = json.loads((tmp_path / "compare.json").read_text())
    assert [entry["name"] for entry in written["entries"]] == list(by_name)
    assert "ptq161-3.5" in (tmp_path / "compare.html").read_text()


def test_what_is_finished_is_not_done_again(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, common: QuantConfig,
    protocol: Protocol, counted: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, first = tiny_checkpoint("llama"), configurations(["rtn"], [3.5], common)
    before = finished(source, tmp_path, first, protocol)
    monkeypatch.setattr(compare, "score_models", None)  # would be called to score
    again = finished(source, tmp_path, first, protocol)
    assert counted == ["rtn-3.5"] and again.to_dict() == before.to_dict()
    monkeypatch.undo()
    # other windows: scored again, not quantized
    fewer = finished(source, tmp_path, first, replace(protocol, windows=2))
    assert fewer.entries[1].perplexities[0].windows == 2
    others = [replace(c, seqlen=8) for c in first]
    with pytest.raises(UsageError, match=r"of another comparison \(seqlen: was 16, is now 8\)"):
        finished(source, tmp_path, others, protocol)
    # removed, as it says, it is another model: its scores are not those of the one before
    shutil.rmtree(tmp_path / "rtn-3.5")
    real, scored = compare.score_models, []

    def noting(models: list[str], **more: Any) -> Any:
        scored.append(models)
        return real(models, **more)

    monkeypatch.setattr(compare, "score_models", noting)
    finished(source, tmp_path, others, replace(protocol, windows=2))
    assert scored[-1] == [str(tmp_path / "rtn-3.5")]


def test_a_run_that_fails_leaves_the_finished_ones(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, common: QuantConfig,
    protocol: Protocol, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, configs = tiny_checkpoint("llama"), configurations(["rtn"], [3.5, 4.5], common)
    real, made = pipeline.quantize, []

    def interrupted(source: str, out: Path, *args: Any, **options: Any) -> Any:
        if out.name == "rtn-4.5" and not made:
            made.append(out)
            raise KeyboardInterrupt
        return real(source, out, *args, **options)

    monkeypatch.setattr(pipeline, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finished(source, tmp_path, configs, protocol)
    assert "rtn-3.5" in (tmp_path / "compare.csv").read_text()
    found = finished(source, tmp_path, configs, protocol)
    assert [entry.name for entry in found.entries[1:]] == ["rtn-3.5", "rtn-4.5"]


def test_a_missing_text_is_refused_before_anything(tmp_path: Path, common: QuantConfig) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        finished(tmp_path, tmp_path / "out", [common], Protocol((tmp_path / "nowhere.txt",)))
    assert not (tmp_path / "out").exists()


def example() -> Comparison:
    ppl = Perplexity(20.5, 3.0, 4, 64, 256, 1000, "<wiki>.txt", "0" * 64, 1.5)

    def entry(
        method: str, bits: float, paper: float, value: float, faithful: bool = False
    ) -> Entry:
        config = QuantConfig(method=method, bits=bits, faithful=faithful).to_dict()
        name = f"{method}-{'faithful' if faithful else bits}"
        return Entry(name, config, bits, paper, 12.0, 1, [replace(ppl, ppl=value)])

    return Comparison(
        "someone/model",
        "wiki.txt",
        [
            Entry("unquantized", None, 16.0, 16.0, math.nan, 0, [ppl]),
            entry("ptq161", 1.6, 1.55, 160.0),
            entry("ptq161", 2.5, 2.4, 40.0),
            entry("billm", 2.9, 1.1, 3000.0, faithful=True),
            Entry("rtn-1.6", QuantConfig(method="rtn").to_dict(), refused="the least is 2.06"),
        ],
    )


def test_the_page_is_whole_and_says_what_could_not_be() -> None:
    found = example()
    image = plot(found)
    assert image is not None and image.startswith(b"\x89PNG")
    html = page(found, image)
    assert "data:image/png;base64," in html and "http" not in html.replace("http-equiv", "")
    assert "&lt;wiki&gt;.txt" in html and "<wiki>" not in html
    assert "rtn-1.6: the least is 2.06" in html
    header, rows = found.grid()
    assert all(len(row) == len(header) for row in rows)
    assert rows[3][:4] == ["billm-faithful", "", "2.900", "1.10"]


def test_without_matplotlib_there_is_a_table_and_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot(example()) is None
    assert "pip install &#39;pbq-llm[report]&#39;" in page(example(), None)


def test_true_bits_are_filled_and_labels_hollow() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    entries = [entry for entry in example().entries if entry.config and not entry.refused]
    for method in ("ptq161", "billm"):
        mine = [e for e in entries if e.config and e.config["method"] == method]
        compare._draw_method(axes, method, mine, 0, "C0", "o")
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    hollow = [line for line in marks if line.get_markerfacecolor() == "none"]
    assert sorted(float(x) for line in hollow for x in line.get_xdata()) == [1.1, 1.55, 2.4]
    filled = [line for line in marks if line not in hollow]
    assert sorted(float(x) for line in filled for x in line.get_xdata()) == [1.6, 2.5, 2.9]


@pytest.mark.parametrize("bits", ["", "1.6;2", "two"])
def test_bits_that_are_no_numbers_are_refused(bits: str) -> None:
    from pbq.cli_compare import _numbers

    with pytest.raises(UsageError, match="--bits"):
        _numbers(bits)
