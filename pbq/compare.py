"""`pbq compare`: methods side by side under one protocol, as CSV, plot and page.

Every pair of a method and a budget is a run of its own in the folder, with the same calibration
tokens and scored on the same windows of the same texts. What is finished is not done again.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbq import methods, pipeline, planning
from pbq.config import QuantConfig
from pbq.disk import read_json, writing
from pbq.errors import DataError, UsageError
from pbq.evaluate import Perplexity
from pbq.pipeline import Observer
from pbq.scoring import score_models
from pbq.sources import resolve_source

NO_PLOT = "The plot needs matplotlib: pip install 'pbq-llm[report]', then the same command."


@dataclass(frozen=True)
class Protocol:
    """What all runs share beside the model: the texts, and how they are scored."""

    texts: tuple[Path, ...]
    windows: int | None = 40
    window: int = 2048
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass
class Entry:
    """One run, or the unquantized model (config None), or a pair that cannot be (refused says why).

    bits: stored per weight. paper_bits: by the paper's accounting. seconds: of quantizing.
    """

    name: str
    config: dict[str, Any] | None
    bits: float = math.nan
    paper_bits: float = math.nan
    seconds: float = math.nan
    peak_bytes: int = 0
    perplexities: list[Perplexity] = field(default_factory=list)
    refused: str = ""


@dataclass
class Comparison:
    """All entries, the unquantized model first, and the files that show them."""

    source: str
    calibration: str
    entries: list[Entry]

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "calibration": self.calibration,
            "entries": [
                {k: _finite(v) for k, v in dataclasses.asdict(e).items()} for e in self.entries
            ],
        }

    def grid(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table."""
        texts = [f"perplexity, {found.label()}" for found in self.entries[0].perplexities]
        header = ["", "asked", "true bits", "label", *texts, "seconds"]
        return header, [_row(entry, len(texts)) for entry in self.entries]


def configurations(
    names: Iterable[str], bits: Sequence[float], common: QuantConfig, *, faithful: bool = False
) -> list[QuantConfig]:
    """Every method at every budget; with `faithful` also the paper's own recipe of those with one.

    A name may bring its own budget: METHOD@BITS, or METHOD@paper for the paper's recipe.
    Raises UsageError for an unknown method, or an option of `common` that one has no use for.
    """
    found: list[QuantConfig] = []
    for chosen in names:
        name, _, own = chosen.partition("@")
        budgets = [] if own == "paper" else [_budget(chosen, own)] if own else bits
        found += [dataclasses.replace(common, method=name, bits=b) for b in budgets]
        if own == "paper" or (faithful and not own and _has_paper(name)):
            found.append(dataclasses.replace(common, method=name, faithful=True))
    for config in found:
        methods.get(config.method, config)
    return found


def _budget(chosen: str, bits: str) -> float:
    try:
        return float(bits)
    except ValueError:
        raise UsageError(f"--methods {chosen}: expected METHOD@BITS or METHOD@paper") from None


def _has_paper(name: str) -> bool:
    try:
        methods.get(name, QuantConfig(method=name, faithful=True))
    except UsageError:
        return False
    return True


def compare(
    source: str,
    folder: Path,
    configs: Sequence[QuantConfig],
    protocol: Protocol,
    observer: Observer,
) -> Comparison:
    """Run what is not finished, score it, and write compare.csv, .png, .html and .json to `folder`.

    Raises PbqError as the runs do; what is finished by then is kept, and the same call goes on. A
    method that cannot keep to a budget is an entry that says so.
    """
    for text in protocol.texts:
        if not text.is_file():
            raise DataError(f"{text}: no such file")
    resolve_source(source)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    planned = [(config, _refusal(source, config, protocol)) for config in configs]
    original = Entry("unquantized", None, bits=16.0, paper_bits=16.0)
    original.perplexities = _scored(source, folder / "unquantized.scores.json", protocol, observer)
    entries = [original]
    calibration = ""
    for i, (config, refused) in enumerate(planned, 1):
        name = run_name(config)
        if refused:
            entries.append(Entry(name, config.to_dict(), refused=refused))
            continue
        observer.line(f"{name}  ({i} of {len(planned)})")
        report = _quantized(source, folder / name, config, protocol, observer)
        calibration = report["calibration"]
        entries.append(_entry(name, folder, report, protocol, observer))
        write(Comparison(source, calibration, entries), folder)
    found = Comparison(source, calibration, entries)
    write(found, folder)
    return found


def run_name(config: QuantConfig) -> str:
    """Of the run's directory in the folder."""
    budget = "faithful" if config.faithful else f"{config.bits:g}"
    return f"{Path(config.method).stem}-{budget}"


def _refusal(source: str, config: QuantConfig, protocol: Protocol) -> str:
    """Why the method cannot keep to the budget, or nothing."""
    try:
        planned = planning.plan(source, config, trust_remote_code=protocol.trust_remote_code)
    except UsageError as error:
        return str(error)
    if planned.bits > config.bits and not config.faithful:
        return f"it would store {planned.bits:.3f} bits"
    return ""


def _quantized(
    source: str, out: Path, config: QuantConfig, protocol: Protocol, observer: Observer
) -> Mapping[str, Any]:
    """report.json of the run, which is made unless it is there."""
    if (out / "report.json").exists():
        report = read_json(out / "report.json")
        _refuse_another(out, report, source, config)
        return report
    pipeline.quantize(
        source,
        out,
        config,
        device=protocol.device,
        trust_remote_code=protocol.trust_remote_code,
        observer=observer,
    )
    return read_json(out / "report.json")


def _refuse_another(out: Path, report: Mapping[str, Any], source: str, config: QuantConfig) -> None:
    # an option that came later had its default
    was = {**QuantConfig().to_dict(), **report.get("config", {}), "model": report.get("source")}
    now = {**config.to_dict(), "model": source}
    differing = [key for key in now if was.get(key) != now[key]]
    if differing:
        key = differing[0]
        raise UsageError(
            f"{out} is of another comparison ({key}: was {was[key]}, is now {now[key]}); "
            "choose another folder or remove it"
        )


def _entry(
    name: str, folder: Path, report: Mapping[str, Any], protocol: Protocol, observer: Observer
) -> Entry:
    return Entry(
        name,
        dict(report["config"]),
        bits=report["bits"],
        paper_bits=report["paper_bits"],
        seconds=sum(report["seconds"].values()),
        peak_bytes=report["peak_bytes"],
        perplexities=_scored(
            str(folder / name), folder / f"{name}.scores.json", protocol, observer
        ),
    )


def _scored(model: str, file: Path, protocol: Protocol, observer: Observer) -> list[Perplexity]:
    """Perplexity of every text, from `file` where that was made under the same protocol."""
    config = Path(model) / "config.json"  # of a packed model it holds all checksums
    key = {
        "texts": [hashlib.sha256(text.read_bytes()).hexdigest() for text in protocol.texts],
        "windows": protocol.windows,
        "window": protocol.window,
        "model": model,
        # what is at a path may be made anew
        "config": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else "",
    }
    kept = read_json(file) if file.exists() else {}
    if kept.get("protocol") == key:
        return [Perplexity(**found) for found in kept["perplexities"]]
    scores = score_models(
        [model],
        texts=protocol.texts,
        windows=protocol.windows,
        window=protocol.window,
        tasks=[],
        data_dir=None,
        limit=None,
        num_fewshot=None,
        batch_size=1,
        device=protocol.device,
        trust_remote_code=protocol.trust_remote_code,
        observer=observer,
    )
    found = scores.models[0].perplexities
    content = {"protocol": key, "perplexities": [dataclasses.asdict(p) for p in found]}
    with writing(file):
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return found


# What is written


def write(found: Comparison, folder: Path) -> None:
    """compare.csv, compare.json, compare.html and, with matplotlib, compare.png."""
    image = plot(found)
    with writing(folder):
        (folder / "compare.csv").write_text(_csv(found), encoding="utf-8")
        numbers = json.dumps(found.to_dict(), indent=1)
        (folder / "compare.json").write_text(numbers + "\n", encoding="utf-8")
        if image is not None:
            (folder / "compare.png").write_bytes(image)
        (folder / "compare.html").write_text(page(found, image), encoding="utf-8")


def _row(entry: Entry, texts: int) -> list[str]:
    if entry.refused:
        asked = f"{entry.config['bits']:g}" if entry.config else ""
        return [entry.name, asked, *["\N{EN DASH}"] * (texts + 3)]
    config = entry.config or {}
    asked = "" if not config or config["faithful"] else f"{config['bits']:g}"
    seconds = "" if math.isnan(entry.seconds) else f"{entry.seconds:.0f}"
    scores = [f"{p.ppl:.2f}" for p in entry.perplexities]
    return [entry.name, asked, f"{entry.bits:.3f}", f"{entry.paper_bits:.2f}", *scores, seconds]


def _csv(found: Comparison) -> str:
    texts = [p.file for p in found.entries[0].perplexities]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["run", "method", "faithful", "asked_bits", "stored_bits", "paper_bits"]
        + [f"ppl {text}" for text in texts]
        + ["seconds", "peak_bytes", "refused"]
    )
    for entry in found.entries:
        config = entry.config or {"method": "", "faithful": False, "bits": ""}
        numbers = [entry.bits, entry.paper_bits, *(p.ppl for p in entry.perplexities)]
        numbers += [math.nan] * (2 + len(texts) - len(numbers))
        writer.writerow(
            [entry.name, config["method"], config["faithful"], config["bits"]]
            + ["" if math.isnan(x) else x for x in (*numbers, entry.seconds)]
            + [entry.peak_bytes or "", entry.refused]
        )
    return out.getvalue()


def _finite(value: Any) -> Any:
    """None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(found: Comparison) -> bytes | None:
    """PNG: perplexity on a logarithmic axis against true stored bits, a panel for every text.

    The paper's own label is a hollow mark at the same height. None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    original, *runs = found.entries
    runs = [entry for entry in runs if not entry.refused]
    texts = original.perplexities
    figure = Figure(figsize=(6.4 * len(texts), 4.4), layout="constrained", dpi=144)
    names = list(dict.fromkeys(e.config["method"] for e in runs if e.config))
    for i, axes in enumerate(figure.subplots(1, len(texts), squeeze=False)[0]):
        axes.axhline(original.perplexities[i].ppl, color="0.6", linestyle="--", linewidth=1)
        for number, name in enumerate(names):
            mine = [e for e in runs if e.config and e.config["method"] == name]
            _draw_method(axes, name, mine, i, f"C{number % 10}", "os^Dvp*X"[number // 10 % 8])
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.set_xlabel("stored bits per weight (hollow: by the paper's accounting)")
        axes.set_ylabel("perplexity (log)")
        axes.set_title(texts[i].label(), fontsize=10)
        if names:
            axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_method(
    axes: Any, name: str, entries: Sequence[Entry], text: int, color: str, marker: str
) -> None:
    solved = sorted((e for e in entries if not _faithful(e)), key=lambda e: e.bits)
    axes.plot(
        [e.bits for e in solved],
        [e.perplexities[text].ppl for e in solved],
        color=color,
        marker=marker,
        linewidth=1,
        label=name if solved else None,
    )
    for entry in entries:
        ppl = entry.perplexities[text].ppl
        axes.plot([entry.paper_bits, entry.bits], [ppl, ppl], color=color, ls=":", linewidth=0.8)
        axes.plot(entry.paper_bits, ppl, marker=marker, color=color, markerfacecolor="none")
        if _faithful(entry):
            axes.plot(entry.bits, ppl, marker="*", ms=11, color=color, ls="", label=entry.name)


def _faithful(entry: Entry) -> bool:
    return bool(entry.config and entry.config["faithful"])


def page(found: Comparison, image: bytes | None) -> str:
    """One HTML page that needs nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pbq"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    header, rows = found.grid()
    return environment.get_template("compare.html.j2").render(
        name=Path(found.source).name,
        calibration=found.calibration,
        header=header,
        rows=rows,
        refused=[(e.name, e.refused) for e in found.entries if e.refused],
        image=base64.b64encode(image).decode() if image else "",
        note=NO_PLOT,
    )
