"""`pbq finetune`: a packed checkpoint trained on towards the model it was made from.

Signs, scales and norms move; tiers, overlay and with them the stored bits stay. What comes out is
never worse on held-out calibration text than what went in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbq import __version__, hf
from pbq.attention import fast_attention
from pbq.calibrate import Calibration, batches, check_seqlen, load_calibration
from pbq.config import QuantConfig
from pbq.disk import check_space, read_json, size_text
from pbq.distilling import distil_model
from pbq.errors import ResourceError, UsageError
from pbq.evaluate import Perplexity
from pbq.experts import unfuse
from pbq.finished import copy_norms, kept_calibration, norms_of
from pbq.hf import packed_linears
from pbq.linear import PackedLinear
from pbq.loader import BlockLoader
from pbq.memory import budget, distilling_bytes, whole_model_bytes
from pbq.models import compute_dtype, find_linears, pick_device, weight_of
from pbq.pipeline import Observer, Silent
from pbq.recipes import FILE_NAME as RECIPE_FILE
from pbq.report import RunReport, write_beside
from pbq.sources import resolve_source
from pbq.spill import HiddenStates
from pbq.tune import Distillation, Tuned
from pbq.work import Keeper, Work, check_target

# "pbq": as quantize ends. "pb-llm": the QAT of PB-LLM (Shang et al., ICLR 2024, section 3.4), where
# salient weights are frozen and a scale is the mean size of what it scales; towards the original's
# distribution, though, where the paper has the next-token loss.
RECIPES = {
    "pbq": {"lr": 1.5e-3, "norm_lr": 1.5e-3, "latent_lr": 1e-3},
    "pb-llm": {"lr": 0.0, "norm_lr": 0.0, "latent_lr": 3e-3, "analytic": True},
}
BATCH = 2


@dataclass(frozen=True)
class Training:
    """How to train. steps: of 1,024 tokens. recipe: one of RECIPES. calib, nsamples, seqlen, seed:
    as in QuantConfig; text that no earlier stage saw helps most."""

    steps: int = 300
    recipe: str = "pbq"
    calib: str = "self"
    nsamples: int = 64
    seqlen: int = 1024
    seed: int = 0

    def settings(self) -> Distillation:
        """Raises UsageError."""
        if self.recipe not in RECIPES:
            raise UsageError(f"--recipe {self.recipe}: expected one of {', '.join(RECIPES)}")
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps}: expected at least one")
        return Distillation(steps=self.steps, **RECIPES[self.recipe])  # type: ignore[arg-type]


def finetune(
    out: Path | str,
    new: Path | str,
    training: Training | None = None,
    *,
    teacher: str | None = None,
    device: str = "auto",
    memory: float | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Tuned:
    """Train the packed checkpoint `out` towards its original, into the directory `new`.

    teacher: the original model, if it is no longer where `out` says it came from. memory: GiB that
    may be used. An interrupted run resumes with the same arguments. Raises PbqError.
    """
    out, new, training = Path(out), Path(new), training or Training()
    training.settings()
    check_target(new, overwrite)
    where = pick_device(device)
    with closing(observer or Silent()) as shown:
        shown.stage("load the models", None)
        student = hf.load(
            str(out), device_map={"": where}, trust_remote_code=trust_remote_code, dtype="auto"
        )
        about = student.config.quantization_config
        source = resolve_source(teacher or str(about.provenance.get("source", "")))
        loader = BlockLoader(source, compute_dtype(source, where), where, trust_remote_code)
        check_seqlen(training.seqlen, loader.model)
        unfuse(loader.model)  # the experts of the packed model are apart
        _check_teacher(loader, dict(packed_linears(student)), out)
        moving = _moves_signs(dict(packed_linears(student)), training, out)
        allowed = budget(memory, loader.device)
        _check_memory(loader, allowed, whole_model_bytes(student), moving)
        fingerprint = {
            "packed": resolve_source(str(out)).digest(),
            "teacher": source.digest(),
            "device": str(loader.device),
            "pbq": __version__,
            **{key: str(value) for key, value in dataclasses.asdict(training).items()},
            **{key: str(value) for key, value in dataclasses.asdict(training.settings()).items()},
        }
        with Work.open(new, fingerprint, fresh=fresh, overwrite=overwrite) as work, loader.whole():
            check_space(work.path, sum(f.stat().st_size for f in out.glob("*.safetensors")))
            calibration = _calibration(work, loader, training, shown)
            tuned = _train(student, loader, calibration, training, work, shown)
            report = _report(out, student, about.provenance)
            _note(report, about.provenance, training, calibration, tuned)

            def write(staging: Path) -> None:
                student.save_pretrained(staging)
                packed = resolve_source(str(out))
                write_beside(
                    staging, packed, loader.tokenizer, report, trust_remote_code=trust_remote_code
                )
                # it would repeat the run before this one
                (staging / RECIPE_FILE).unlink(missing_ok=True)

            shown.stage("write", None)
            work.finish(write)
    return tuned


@fast_attention()
def _train(
    student: Any,
    loader: BlockLoader,
    calibration: Calibration,
    training: Training,
    work: Work,
    observer: Observer,
) -> Tuned:
    """Leaves the better numbers in `student`."""
    rows = batches(calibration.ids.to(loader.device), BATCH)
    observer.stage("finetuning", training.steps)
    found, gains, tuned = distil_model(
        loader.model,
        loader.blocks,
        {name: linear.packed() for name, linear in packed_linears(student)},
        {name: p.detach().clone() for name, p in norms_of(student).items()},
        lambda name: weight_of(loader.model.get_submodule(name)).float(),
        rows,
        HiddenStates(),
        len(rows),
        training.settings(),
        training.seed,
        progress=observer.step,
        keep=Keeper(work, "training"),
    )
    observer.line(f"finetuning  {tuned.in_words()}")
    for name, linear in packed_linears(student):
        for key, tensor in found[name].tensors.items():
            linear.get_buffer(key).copy_(tensor)
        linear.forget_prepared()
    copy_norms(student, {f"norm.{name}": gain for name, gain in gains.items()})
    return tuned


def _check_teacher(loader: BlockLoader, linears: Mapping[str, PackedLinear], out: Path) -> None:
    found = find_linears(loader.blocks)
    for name, packed in linears.items():
        inside = name.removeprefix(f"{loader.name}.")
        shape = weight_of(found[inside]).shape if inside in found else None
        if shape != (packed.out_features, packed.in_features):
            raise UsageError(
                f"{out} was not made from this model: {name} is "
                f"{packed.out_features}x{packed.in_features} there and "
                f"{'missing' if shape is None else f'{shape[0]}x{shape[1]}'} here; "
                "give the model it was made from as --teacher"
            )


def _moves_signs(linears: Mapping[str, PackedLinear], training: Training, out: Path) -> bool:
    """Whether any code can move. Raises UsageError when there would be nothing to train."""
    rates = training.settings()
    moving = rates.latent_lr > 0 and not all(m.layout.has_trellis for m in linears.values())
    if not moving and not rates.lr:
        raise UsageError(
            f"--recipe {training.recipe}: trains signs alone, and those of {out} are paths of a "
            "trellis, which stay; leave it out to train scales and norms"
        )
    return moving


def _check_memory(loader: BlockLoader, allowed: int, packed: int, moving: bool) -> None:
    width = next(loader.model.parameters()).element_size()
    needed = packed + whole_model_bytes(loader.model)
    needed += distilling_bytes(loader.model, loader.blocks, width, moving)
    if needed > allowed:
        raise ResourceError(
            f"training this model takes about {size_text(needed)} of memory, {size_text(allowed)} "
            "may be used; use a machine with more, or overrule this estimate with --memory GIB"
        )


def _calibration(
    work: Work, loader: BlockLoader, training: Training, observer: Observer
) -> Calibration:
    def make() -> Calibration:
        observer.stage("calibration text", None)
        return load_calibration(
            training.calib,
            loader.tokenizer,
            loader.model,
            nsamples=training.nsamples,
            seqlen=training.seqlen,
            seed=training.seed,
            progress=observer.step,
        )

    return kept_calibration(work, make)


def _report(out: Path, model: Any, provenance: Mapping[str, Any]) -> RunReport:
    """The report of the run that made OUT, without what is no longer true."""
    path = out / "report.json"
    if path.is_file():
        kept = read_json(path)
        before = kept.get("before")
        kept |= {"before": Perplexity(**before) if before else None, "after": None, "samples": []}
        report = RunReport(**kept)
    else:
        config = {**QuantConfig().to_dict(), **provenance.get("config", {})}
        report = RunReport(source=str(provenance.get("source", "")), config=config)
    for name, linear in packed_linears(model):
        report.note_stored(name, linear)
    report.count(model)
    return report


def _note(
    report: RunReport,
    provenance: dict[str, Any],
    training: Training,
    calibration: Calibration,
    tuned: Tuned,
) -> None:
    """Say in the report and in the checkpoint itself what was done."""
    provenance["finetuned"] = {
        "recipe": training.recipe,
        "steps": training.steps,
        "calibration": calibration.label(),
        "held-out KL": [tuned.before, tuned.after],
    }
    report.notes["trained further"] = (
        f"{training.steps} steps, recipe {training.recipe}, on {calibration.label()}: "
        f"{tuned.in_words()}"
    )
