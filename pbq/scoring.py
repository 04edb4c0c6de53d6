"""`pbq eval`: one or two models under one protocol."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbq.errors import DataError, UsageError
from pbq.evaluate import (
    Perplexity,
    TaskSet,
    perplexity,
    resolve_tasks,
    run_tasks,
    tokenize_file,
)
from pbq.models import compute_dtype, load_model, pick_device
from pbq.pipeline import Observer
from pbq.sources import Source, resolve_source


@dataclass
class ModelScores:
    """Perplexity of every text and metrics of every task, for one model."""

    model: str
    perplexities: list[Perplexity] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Scores:
    """Several models under the same protocol, in the order they were given."""

    models: list[ModelScores]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def grid(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: a row per text and metric, a column per model."""
        header = ["", *(scores.model for scores in self.models)]
        first, rows = self.models[0], []
        for i, found in enumerate(first.perplexities):
            values = [f"{scores.perplexities[i].ppl:.2f}" for scores in self.models]
            rows.append([f"perplexity, {found.label()}", *values])
        for task, metrics in first.tasks.items():
            for metric in ("acc", "acc_norm"):
                if metric in metrics:
                    values = [_metric(scores.tasks[task], metric) for scores in self.models]
                    shots = f", {metrics['num_fewshot']}-shot" if metrics["num_fewshot"] else ""
                    rows.append([f"{task} {metric}, {metrics['n']} items{shots}", *values])
        return header, rows


def _metric(metrics: dict[str, Any], name: str) -> str:
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")


def score_models(
    models: Sequence[str],
    *,
    texts: Sequence[Path],
    windows: int | None,
    window: int,
    tasks: Sequence[str],
    data_dir: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    device: str,
    trust_remote_code: bool,
    observer: Observer,
) -> Scores:
    """Score each model on each text and task. All that can be refused is refused before loading."""
    if not texts and not tasks:
        raise UsageError("nothing to score; give --ppl FILE or --tasks NAME,…")
    sources = [resolve_source(model) for model in models]
    where = pick_device(device)
    # one GPU may be too small for the unquantized model
    spread = "auto" if device == "auto" and where.type == "cuda" else where
    for path in texts:
        if not path.is_file():
            raise DataError(f"{path}: no such file")

    def score(source: Source, resolved: TaskSet | None) -> ModelScores:
        observer.stage(f"load {source.name}", None)
        model, tokenizer = load_model(
            source, compute_dtype(source, where), spread, trust_remote_code, packed=True
        )
        scores = ModelScores(source.name)
        for path in texts:
            text = tokenize_file(tokenizer, path)
            count = text.count_windows(window, windows)
            observer.stage(f"perplexity of {source.name}", count)
            scores.perplexities.append(
                perplexity(model, text, window=window, max_windows=windows, progress=observer.step)
            )
        if resolved is not None:
            observer.stage(f"tasks of {source.name}", None)
            scores.tasks = run_tasks(model, tokenizer, resolved, limit=limit, batch_size=batch_size)
        return scores

    with closing(observer):
        resolved = None
        if tasks:
            observer.stage("find tasks", None)
            resolved = resolve_tasks(tasks, data_dir, num_fewshot=num_fewshot)
        found = []
        for source in sources:
            found.append(score(source, resolved))
            gc.collect()  # the next model should find this one's memory free
    return Scores(found)
