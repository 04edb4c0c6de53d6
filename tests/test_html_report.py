"""report.html: whole, offline, safe, and never the reason why a run fails."""

from __future__ import annotations

import builtins
import dataclasses
import json
import logging
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pbq import html_report, plots
from pbq.config import QuantConfig
from pbq.errors import ModelError
from pbq.evaluate import Perplexity
from pbq.report import RunReport

VOID = {"meta", "br", "path", "use", "hr"}
pytestmark = pytest.mark.usefixtures("figures")


def tiers(damage: float) -> list[dict[str, Any]]:
    return [
        {"planes": 0, "columns": 4, "damage": damage / 4},
        {"planes": 1, "columns": 30, "damage": damage},
        {"planes": 4, "columns": 6, "damage": 8 * damage},
    ]


def block(i: int, **more: Any) -> dict[str, Any]:
    layout = {"n": 9, "k": 40, "tiers": [{"planes": t["planes"], "columns": t["columns"]}
                                        for t in tiers(1)]}  # fmt: skip
    layer = {"layout": layout, "bits": 1.55, "error": 0.01 * (i + 1), "damping": 0.01}
    names = ("attn.q_proj", "mlp.down_proj")
    return {"name": f"model.layers.{i}", "layers": dict.fromkeys(names, layer), **more}


@pytest.fixture
def report() -> dict[str, Any]:
    """What report.json of a small run with everything in it would hold."""
    counts = [0, 5, 9, 5, 0]
    ppl = Perplexity(20.5, 3.0, 4, 64, 256, 1000, "wiki.txt", "0" * 64, 1.5)
    blocks = [block(i, tuning={"before": 0.2, "after": 0.1 * i}) for i in range(3)]
    found = RunReport(
        source="someone/<b>model</b>",
        config=QuantConfig(bits=1.6, calib="wiki.txt").to_dict(),
        calibration="wiki.txt, 64 x 1024 tokens",
        bits=1.5543,
        paper_bits=1.5,
        quantized_weights=1080,
        quantized_bytes=210,
        model_bytes=1210,
        model_bytes_before=3160,
        parameters=1580,
        before=ppl,
        after=dataclasses.replace(ppl, ppl=123.456),
        blocks=blocks,
        tiers={f"{b['name']}.{name}": tiers(0.1 + i) for i, b in enumerate(blocks)
               for name in b["layers"]},
        sensitivities={f"{b['name']}.{name}": 0.001 * (1 + i + 4 * (name == "mlp.down_proj"))
                       for i, b in enumerate(blocks) for name in b["layers"]},
        histogram={"layer": "model.layers.1.mlp.down_proj", "range": 4.0, "rows": [0],
                   "row_std": [1.0], "tiers": [{**t, "weights": counts, "stored": counts}
                                               for t in tiers(1)]},
        bytes_of={"embeddings": 1000, "planes": 150, "scales": 54, "masks": 6},
        samples=[{"prompt": "It was", "text": " night", "before": " late",
                  "after": "<script>alert(1)</script>"}],
        seconds={"load": 0.25, "blocks": 61.5},
        distillation={"before": 1.2, "after": 0.8, "curve": [[75, 0.9], [150, 0.8]]},
        notes={"overlay": "2.5 % of the weights"},
        peak_bytes=3 * 2**30,
    )  # fmt: skip
    return json.loads(json.dumps(found.to_dict()))


class Page(HTMLParser):
    """Text of a page and its tags; every tag must be closed, and in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_tells_everything_that_was_measured(report: dict[str, Any]) -> None:
    page = Page(html_report.render(report))
    words = " ".join(page.text.split())
    for said in (
        "1.554 stored; 1.6 asked",
        "123.5 was 20.50; wiki.txt, 4 \N{MULTIPLICATION SIGN} 64 tokens",
        "1.2 KiB was 3.1 KiB, 2.6 times as much",
        "62 s peak memory 3.0 GiB",
        "embeddings 1000 B 82.6 %",
        "blocks 61.5 s 99.6 %",
        "1.5543 stored",
        "overlay 2.5 % of the weights",
        "by the paper's accounting 1.500",
        "All 6 layers",
        "most, 1.55, went to model.layers.0.attn.q_proj",
        "model.layers.2.mlp.down_proj 9x40 4 at 0 + 30 at 1 + 6 at 4 1.5500 0.0300",
        "It was … before late after, 1.55 bits <script>alert(1)</script> the text itself night",
    ):
        assert said.replace(" ", "") in words.replace(" ", ""), said
    figures = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == 6 and all(figures)


def test_a_page_is_one_file_that_runs_nothing(report: dict[str, Any]) -> None:
    text = html_report.render(report)
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "b>model"), tag
        for name in ("href", "src"):
            assert (attrs.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert "url(" not in text.replace("url(#", "")
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "two figures share an id"
    # a figure that kept a colour of its own would vanish in one of the two themes
    figures = text[text.index("<svg") :]
    assert "#0" not in figures.replace("url(#", "").replace('href="#', "")


def test_what_a_figure_shows_is_what_was_measured(report: dict[str, Any]) -> None:
    """Read back from the markup: a mark per tier, per layer, per cell, per block."""
    drawn = plots.draw_all(report)
    assert list(drawn) == [
        "bits",
        "sensitivities",
        "errors",
        "tuning",
        "distillation",
        "levels",
    ]
    assert drawn["bits"].count("var(--planes-") - drawn["bits"].count("opacity: 0.75") == 0
    for planes in (0, 1, 4):
        assert drawn["bits"].count(f"var(--planes-{planes})") == 6
    cells = drawn["errors"].split("QuadMesh_1")[1].split("</g>")[0]
    assert cells.count("<path") == 6
    # errors of blocks 0, 1, 2 are 1, 2, 3: lightest, between, darkest
    assert cells.count("var(--heat-1)") == cells.count("var(--heat-9)") == 2
    # .001, .002, .003 for the q_proj and .005, .006, .007 nats for the down_proj, of 9 x 40 weights
    cells = drawn["sensitivities"].split("QuadMesh_1")[1].split("</g>")[0]
    assert cells.count("<path") == 6
    assert (cells.count("var(--heat-1)"), cells.count("var(--heat-9)")) == (1, 2)
    assert ">2.8<" in drawn["sensitivities"] and ">19<" in drawn["sensitivities"]
    assert drawn["levels"].count("var(--quiet)") == 3
    # a mark before the first step, and one each time that it was looked at
    assert drawn["distillation"].count("fill: var(--accent)") == 3


def test_a_run_without_extras_still_has_a_page(report: dict[str, Any]) -> None:
    """As one of an older pbq, or one that was asked for no perplexity."""
    for name in ("tiers", "sensitivities", "histogram", "bytes_of", "samples", "distillation"):
        del report[name]
    report["before"] = report["after"] = None
    for found in report["blocks"]:
        del found["tuning"]
    page = Page(html_report.render(report))
    assert [a["aria-label"] for t, a in page.tags if t == "svg"] == [
        "Relative output error of every layer"
    ]
    assert "perplexity" not in page.text
    report["blocks"] = []
    assert "svg" not in [tag for tag, _ in Page(html_report.render(report)).tags]


def test_without_matplotlib_the_page_says_how_to_get_figures(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    page = Page(html_report.render(report))
    assert html_report.NO_PLOTS in page.text and "61.5 s" in page.text
    assert "svg" not in [tag for tag, _ in page.tags]


def test_a_broken_figure_costs_no_run(
    report: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report))

    def broken(report: Any) -> None:
        raise ZeroDivisionError("no width")

    monkeypatch.setattr(plots, "draw_all", broken)
    with caplog.at_level(logging.WARNING):
        html_report.write_if_possible(tmp_path)
    assert "no width" in caplog.text and not (tmp_path / "report.html").exists()
    with pytest.raises(ZeroDivisionError):
        html_report.write(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"config": {}, "blocks": 3}', "{", None])
def test_what_is_no_report_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ModelError, match=r"report\.json"):
        html_report.write(tmp_path)


def test_unusual_blocks_are_drawn(report: dict[str, Any]) -> None:
    """Hybrid models: a linear that only some blocks have; errors that are zero or not finite."""
    layer = report["blocks"][0]["layers"]["attn.q_proj"]
    report["blocks"][1]["layers"] = {"ssm.in_proj": {**layer, "error": 0.0}}
    report["blocks"][2]["layers"] = {"ssm.in_proj": {**layer, "error": float("nan")}}
    cells = plots.draw_all(report)["errors"].split("QuadMesh_1")[1].split("</g>")[0]
    assert "in_proj" in plots.draw_all(report)["errors"]
    assert cells.count("var(--heat-") == 2
