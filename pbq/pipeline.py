"""quantize(): the story of a run, top to bottom.

calibration text → statistics → plan → block by block (load, reconstruct, tune, save) → distil →
write OUT, block by block. Only what samples from the model, takes its gradients or distils it needs
more than one block in memory. Every finished step is saved, so that the same command goes on where
it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pbq import __version__, hf, methods, preprocessing, ranks
from pbq.allocate import LayerPlan, stored_bits
from pbq.attention import fast_attention
from pbq.blocks import BlockQuantizer, Reconstructed, Streams
from pbq.blockwise import Layers, ScoredText, through_block
from pbq.calibrate import (
    STATISTICS_ROWS,
    Calibration,
    batches,
    check_seqlen,
    load_calibration,
    most_rows,
)
from pbq.config import QuantConfig
from pbq.disk import check_space
from pbq.distilling import Functional, distil_model
from pbq.errors import DataError, UsageError
from pbq.evaluate import WINDOW, Perplexity, TokenizedText, tokenize_file
from pbq.experts import unfuse
from pbq.finished import (
    Finished,
    block_key,
    copy_norms,
    flatten,
    kept_calibration,
    norms_of,
    restore,
)
from pbq.forecast import Speed, in_words, seconds
from pbq.hf import PbqConfig, install, install_embeddings, packed_linears
from pbq.loader import BlockLoader
from pbq.memory import budget, disk_bytes, needs, refuse, spills, whole_model_bytes
from pbq.models import (
    check_coverage,
    compute_dtype,
    find_linears,
    most_positions,
    pick_device,
    record_calls,
    run_block,
    set_weight,
    weight_of,
)
from pbq.pack import pack
from pbq.report import RunReport, rare_experts, write_beside
from pbq.rounding import round_embeddings, vocabulary
from pbq.sensitivity import sensitivities, where_known
from pbq.shards import ShardWriter
from pbq.sources import Source, resolve_source
from pbq.spill import HiddenStates, Spill
from pbq.tunable import tunable
from pbq.tune import STEP_TOKENS, tune_block
from pbq.work import Keeper, SharedWork, Work, check_target, drop_finished
from pbq_kernels import PackedWeight

# Shards of a model of small blocks need not be as small.
LEAST_SHARD_BYTES = 64 * 2**20


class Observer(Protocol):
    """Is told how a run proceeds; pbq.console.Console shows it."""

    def stage(self, name: str, total: int | None) -> None: ...

    def step(self, done: int, total: int | None = None) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """The observer of library calls that asked for none."""

    def stage(self, name: str, total: int | None) -> None:
        pass

    def step(self, done: int, total: int | None = None) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


# whatever the caller's mode is: scales and signs are found by gradients
@torch.inference_mode(False)
@torch.enable_grad()
def quantize(
    source: str,
    out: Path | str,
    config: QuantConfig,
    *,
    device: str = "auto",
    ppl_text: Path | None = None,
    ppl_windows: int | None = 40,
    overwrite: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    memory: float | None = None,
    observer: Observer | None = None,
) -> RunReport:
    """Quantize the causal LM at `source` into the directory `out`.

    source: hub id, local directory or .gguf file. device: auto | cpu | cuda[:i]. ppl_text: measure
    the perplexity on this file before and after and put it in the model card. memory: GiB that the
    run may take, if not all there are. An interrupted run resumes with the same arguments; `fresh`
    discards it instead. Of several processes (pbq.ranks) all call it alike. Raises PbqError.
    """
    out = Path(out)
    method = methods.get(config.method, config)
    drop_finished(out)
    check_target(out, overwrite)
    run_options = {"ppl": ppl_text and str(ppl_text), "windows": ppl_windows, "device": device}
    report = RunReport(source=source, config=config.to_dict(), run_options=run_options)
    with ranks.together(device), closing(_told(observer)) as shown:
        shown.stage("load the model", None)
        with report.timed("load"):
            found, where = resolve_source(source), pick_device(device)
            dtype = compute_dtype(found, where)
            loader = BlockLoader(found, dtype, where, trust_remote_code)
            unfuse(loader.model)
            report.coverage = check_coverage(loader.model).line()
            text = _text(loader, ppl_text, ppl_windows) if ppl_text else None
        allowed = budget(memory, loader.device, ranks.on_this_machine())
        run = _Run(loader, config, method, report, shown, allowed)
        run.check_memory()
        fingerprint = run.fingerprint(found)

        def opened() -> Work:
            return Work.open(out, fingerprint, fresh=fresh, overwrite=overwrite)

        shared = opened() if ranks.count() == 1 else SharedWork(out, opened)
        with shared as work, _dropping_what_was_refused(work):
            held = work.held_bytes("block-") + work.held_bytes("start-")
            check_space(work.path, run.disk_bytes() - held)
            shown.line(f"quantizing {report.coverage}")
            if not isinstance(shown, Silent):  # it takes a second to find out
                shown.line(run.forecast())
            calibration = run.calibration(work)
            ranks.first(lambda: run.preprocess(work, calibration))
            if text is not None:
                run.score_original(work, text)
            finished = run.quantize_blocks(work, calibration)
            shown.stage("write", len(loader.blocks))

            def write(staging: Path) -> None:
                run.write_model(staging, work, finished, calibration, text)
                write_beside(
                    staging,
                    found,
                    loader.tokenizer,
                    report,
                    trust_remote_code=trust_remote_code,
                    memory=run.budget,
                )

            work.finish(write)
        return ranks.first(lambda: report)


def _told(observer: Observer | None) -> Observer:
    """Rank 0 alone speaks."""
    return observer if observer is not None and ranks.rank() == 0 else Silent()


def _text(loader: BlockLoader, path: Path, windows: int | None) -> _Text:
    """The text to be scored; whatever `perplexity` would refuse about it is refused here."""
    text, window = tokenize_file(loader.tokenizer, path), _window(loader.model)
    return _Text(text, window, text.count_windows(window, windows))


@dataclass(frozen=True)
class _Text:
    """A text to be scored, and in how many windows of how many tokens."""

    tokenized: TokenizedText
    window: int
    windows: int


def _window(model: Any) -> int:
    """Tokens in a window: 2048 as in the papers, fewer in a model of fewer positions."""
    return min(WINDOW, most_positions(model.config) or WINDOW)


@contextmanager
def _dropping_what_was_refused(work: Work) -> Iterator[None]:
    """A request refused before the first block is no run to resume: the next one will differ."""
    try:
        yield
    except (UsageError, DataError):
        if not any(name.startswith("block-") for name in work.names()):
            work.discard()
        raise


@dataclass
class _Run:
    """What the steps of one run share."""

    loader: BlockLoader
    config: QuantConfig
    method: methods.Method
    report: RunReport
    observer: Observer
    budget: int

    def __post_init__(self) -> None:
        self.model, self.blocks = self.loader.model, self.loader.blocks
        check_seqlen(self.config.seqlen, self.model)
        self.recipe = where_known(methods.recipe_of(self.method, self.config), self.blocks)
        if self.config.embed_bits:
            vocabulary(self.model)  # refused now, not when OUT is written
        self.needs = needs(
            self.model,
            self.config,
            self.recipe,
            gradients=self.method.wants_gradients,
            streams=self.loader.streams,
            budget=self.budget,
        )

    def check_memory(self) -> None:
        """Raise ResourceError before the work when memory will not do for it."""
        refuse(Path(self.report.source).name, self.needs, self.budget, self.config)

    def linears(self) -> dict[str, nn.Module]:
        """Every linear that will be quantized, by its name in the model."""
        return {
            f"{self.loader.name}.{i}.{name}": module
            for i, block in enumerate(self.blocks)
            for name, module in find_linears(block).items()
        }

    def fingerprint(self, source: Source) -> dict[str, str]:
        """What must be equal for a half-finished run to go on."""
        config = {f"config.{k}": str(v) for k, v in self.config.to_dict().items()}
        recipe = {f"recipe.{k}": str(v) for k, v in dataclasses.asdict(self.recipe).items()}
        calib = self.config.calib
        named = (calib, *calib.split("+"), self.config.method)
        files = [Path(x) for x in named if Path(x).is_file()]
        text = ",".join(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)
        return {
            "model": source.name,
            "weights": source.digest(),
            "calibration text, method file": text,
            "preprocessed": self._start_digest(),
            "device": str(self.loader.device),
            "pbq": __version__,
            **config,
            **recipe,
        }

    def disk_bytes(self) -> int:
        """Disk for the finished steps and for OUT."""
        return disk_bytes(
            self.model,
            self.config,
            self.recipe,
            self.needs,
            bits=self.config.bits,
            budget=self.budget,
        )

    def forecast(self) -> str:
        """How long the stages will take on this machine, for people."""
        weights = {name: weight_of(m) for name, m in self.linears().items()}
        first = next(iter(weights.values()))
        head = self.model.get_output_embeddings().weight.numel()
        shapes = {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}
        speed = Speed.measure(first.dtype, self.loader.device, self.recipe, self.config)
        found = seconds(shapes, head, self.config, self.recipe, speed)
        return f"about {in_words(found)} at this machine's present speed"

    # --- calibration ---------------------------------------------------------------------------

    def calibration(self, work: Work) -> Calibration:
        def make() -> Calibration:
            self.observer.stage("calibration text", None)
            with self.report.timed("calibration text"):
                return ranks.first(self._load_calibration)

        return kept_calibration(work, make)

    def _load_calibration(self) -> Calibration:
        sampled = "self" in self.config.calib.split("+")
        with self.loader.whole() if sampled else nullcontext(self.model) as model:
            return load_calibration(
                self.config.calib,
                self.loader.tokenizer,
                model,
                nsamples=self.config.segments,
                seqlen=self.config.seqlen,
                seed=self.config.seed,
                more=most_rows(self.config, self.recipe) - self.config.segments,
                further=self._further(),
                token_noise=self.recipe.token_noise,
                progress=self.observer.step,
            )

    def _further(self) -> int:
        """Segments the distillation asks for: text that it need not see twice."""
        settings = self.recipe.distillation
        return 0 if settings is None else settings.steps * STEP_TOKENS // self.config.seqlen

    def score_original(self, work: Work, text: _Text) -> None:
        """Perplexity and samples before; in `work`, so that a resumed run need not measure again.

        Samples are written by the whole model: without the memory for it there are none.
        """
        self.report.before = self._kept_perplexity(work, text) or self._score(work, text)
        if ranks.rank() > 0:
            return
        if self.fits_whole():
            with self.loader.whole() as model:
                self.report.note_samples("before", model, self.loader.tokenizer, text.tokenized)
        else:
            self.observer.line("no samples of text: the whole model does not fit into memory")

    def fits_whole(self) -> bool:
        return whole_model_bytes(self.model) <= self.budget - self.needs.imports

    def _kept_perplexity(self, work: Work, text: _Text) -> Perplexity | None:
        if not work.has("perplexity"):
            return None
        kept = Perplexity(**work.load("perplexity")[1])
        # the text is no part of the run's fingerprint: another may be given when resuming
        same = (kept.sha256, kept.windows) == (text.tokenized.sha256, text.windows)
        return kept if same else None

    def _score(self, work: Work, text: _Text) -> Perplexity:
        self.observer.stage("perplexity before", len(self.blocks))
        with self.report.timed("perplexity"):
            scored = self._scored_text(work, text)
            for i in range(len(self.blocks)):
                with self.loader.loaded(i):
                    scored.through(i)
                self.observer.step(i + 1, len(self.blocks))
            found = scored.perplexity()
        work.save("perplexity", {}, dataclasses.asdict(found))
        return found

    def _scored_text(self, work: Work, text: _Text) -> ScoredText:
        spill = self._spill(work, text.windows * text.window)
        return ScoredText(self.loader, text.tokenized, text.window, text.windows, spill)

    def _spill(self, work: Work, tokens: int) -> Spill:
        """Where hidden states of so many tokens are kept."""
        rows = most_rows(self.config, self.recipe)
        all_of_them = self.needs.states * tokens // (rows * self.config.seqlen)
        return Spill(work.path if spills(all_of_them, self.budget) else None)

    # --- preprocessing -------------------------------------------------------------------------

    def _start_digest(self) -> str:
        start = self.config.preprocess
        return resolve_source(start).digest() if start else ""

    @fast_attention()
    def preprocess(self, work: Work, calibration: Calibration) -> None:
        """The tensors that blocks are to start from, if not from their own, into `work`."""
        if not self.config.preprocess:
            return
        keys = [_start_key(i) for i in range(len(self.blocks))]
        if all(work.has(key) for key in [*keys, "preprocessed"]):
            return
        steps = preprocessing.STEPS[self.config.effort]
        self.observer.stage("preprocessing", steps)
        with self.report.timed("preprocessing"):
            found = preprocessing.restored(
                self.config.preprocess,
                preprocessing.rows_of(calibration.ids.to(self.loader.device)),
                self.blocks,
                steps=steps,
                seed=self.config.seed,
                device=self.loader.device,
                progress=self.observer.step,
            )
        for key, tensors in zip(keys, found.blocks, strict=True):
            work.save(key, tensors, {})
        note = f"{steps} steps of LoRA on {self.config.preprocess}"
        loss = f"{found.before:.4f} -> {found.after:.4f} nats a held-out token"
        work.save("preprocessed", {}, {"note": f"{note}, {loss}"})
        self.observer.line(f"preprocessing  {note}, {loss}")

    def _start(self, work: Work, index: int) -> dict[str, Tensor] | None:
        return work.load(_start_key(index))[0] if self.config.preprocess else None

    # --- plan ----------------------------------------------------------------------------------

    def plan(self, work: Work, ids: Tensor) -> dict[str, LayerPlan]:
        """Statistics of the original model on up to 16 segments, and the tiers from them."""
        self.observer.stage("statistics", None)
        some = ids[:: max(1, len(ids) // STATISTICS_ROWS)][:STATISTICS_ROWS]
        with closing(Layers(self.loader)) as read:
            with self.report.timed("statistics"):
                layers = read.inputs(
                    some,
                    gradients=self.method.wants_gradients,
                    spill=self._spill(work, some.numel()),
                    progress=self.observer.step,
                )
                plans = self.method.plan(layers, self.config)
            if self.recipe.sensitivity:
                for name, nats in self._sensitivities(work, ids, plans).items():
                    layers[name].sensitivity = nats
                plans = self.method.plan(layers, self.config)
            self.report.note_plan(layers, plans)
        rows = {name: layer.shape[0] for name, layer in layers.items()}
        self.report.bits = stored_bits(plans, rows)
        self.report.paper_bits = self.method.paper_bits(plans, rows)
        if self.report.bits > self.config.bits and not self.config.faithful:
            raise UsageError(
                f"{self.config.method} would store {self.report.bits:.3f} bits, "
                f"above --bits {self.config.bits:g}"
            )
        return plans

    def _sensitivities(
        self, work: Work, ids: Tensor, plans: Mapping[str, LayerPlan]
    ) -> dict[str, float]:
        """Of every linear, rounded as planned; measured once, by rank 0."""

        def measured() -> dict[str, float]:
            with self.loader.whole() as model:
                return sensitivities(
                    model,
                    ids.to(self.loader.device),
                    self.method,
                    self.recipe,
                    self.config,
                    plans,
                    self.observer.step,
                )

        if not work.has("sensitivities"):
            self.observer.stage("sensitivities", len(self.blocks))
            with self.report.timed("sensitivities"):
                work.save("sensitivities", {}, {"nats": ranks.first(measured)})
        nats: dict[str, float] = work.load("sensitivities")[1]["nats"]
        return nats

    # --- blocks --------------------------------------------------------------------------------

    @fast_attention()
    def quantize_blocks(self, work: Work, calibration: Calibration) -> Finished:
        """Block by block; a block already in `work` is only run, to feed the one behind it."""
        ids = calibration.ids.to(self.loader.device)
        rows = batches(ids, self.recipe.batch)
        plans = self.plan(work, calibration.ids)
        spill = self._spill(work, ids.numel())
        recording = record_calls(self.model, self.blocks, rows, spill.states())
        unfinished = [i for i in range(len(self.blocks)) if not work.has(block_key(i))]
        distils = self.recipe.distillation is not None and not work.has("distillation")
        hidden = recording.hidden
        # nothing is left that would look at them, nor at what the original makes of them
        if not (unfinished or (distils and not calibration.noisy)):
            hidden.close()
            hidden = HiddenStates()
        streams = Streams(hidden, hidden)
        self.observer.stage("blocks", len(self.blocks))
        for i, calls in enumerate(recording.calls):
            with self.report.timed("blocks"), self.loader.loaded(i) as block:
                feeds = any(i < later for later in unfinished)
                streams = self._block(work, block, i, calls[0], streams, plans, spill, feeds=feeds)
            self.observer.step(i + 1, len(self.blocks))
        finished = Finished(work, self.loader.name, len(self.blocks), self.loader.device)
        if calibration.noisy:
            streams.close()
        if self.recipe.distillation is not None:
            finished.replace_by(self._distil(work, finished, calibration, streams.fp))
        streams.close()
        return finished

    def _distil(
        self, work: Work, finished: Finished, calibration: Calibration, hidden: HiddenStates
    ) -> dict[str, Tensor]:
        """Train the whole model towards the original.

        hidden: the last hidden states of the original on the segments that blocks were fitted to,
        if those have no noise.
        """
        settings = self.recipe.distillation
        assert settings is not None
        if work.has("distillation"):
            tensors, meta = work.load("distillation")
        else:
            with self.report.timed("distillation"):
                # rank 0 alone: a step is one row of text, which cannot be divided
                tensors, meta = ranks.first(
                    lambda: self._distilled(work, finished, calibration, hidden)
                )
            work.save("distillation", tensors, meta)
            work.forget("training")
        self.report.distillation = meta["tuned"]
        return {name: tensor.to(self.loader.device) for name, tensor in tensors.items()}

    def _distilled(
        self,
        work: Work,
        finished: Finished,
        calibration: Calibration,
        hidden: HiddenStates,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Packed tensors and norms by full name, and how the training went."""
        settings = self.recipe.distillation
        assert settings is not None
        rows = batches(calibration.clean.to(self.loader.device), self.recipe.batch)
        size, prefix = len(rows[0]), f"{self.loader.name}."
        further = calibration.further.to(self.loader.device).split(size)
        with self.loader.whole():
            if calibration.noisy:
                hidden = self._spill(work, calibration.clean.numel()).states()
            self.observer.stage("distillation", settings.steps)
            gains = {n: p.detach().clone() for n, p in norms_of(self.model).items()}
            for i in range(len(self.blocks)):
                gains |= {
                    f"{prefix}{i}.{name.removeprefix('norm.')}": gain
                    for name, gain in finished.block(i)[1].items()
                }
            packed, gains, tuned = distil_model(
                self.model,
                self.blocks,
                dict(finished),
                gains,
                finished.latent,
                [*rows, *(batch for batch in further if len(batch) == size)],
                hidden,
                len(rows),
                settings,
                self.config.seed,
                progress=self.observer.step,
                keep=Keeper(work, "training"),
            )
        hidden.close()
        self.observer.line(f"distillation  {tuned.in_words()}")
        tensors = flatten(packed) | {f"norm.{n}": gain for n, gain in gains.items()}
        return tensors, {"tuned": dataclasses.asdict(tuned)}

    def _block(
        self,
        work: Work,
        block: nn.Module,
        index: int,
        call: Any,
        streams: Streams,
        plans: Mapping[str, LayerPlan],
        spill: Spill,
        *,
        feeds: bool,
    ) -> Streams:
        """Quantize one block, or take it from `work`; return both streams behind it.

        feeds: the quantized stream goes on, to a block that is still to be quantized.
        """
        name, key, started = f"{self.loader.name}.{index}", block_key(index), time.monotonic()
        resumed = work.has(key)
        entering = streams.quant if feeds else HiddenStates()
        if resumed:
            targets = through_block(block, streams.fp, call, spill)
            meta = restore(work, key, block)
            leaving = through_block(block, entering, call, spill)
        else:
            quantizer = BlockQuantizer(
                block,
                find_linears(block),
                call,
                self.method,
                self.recipe,
                self.config,
                name,
                index,
                spill,
                self._start(work, index),
            )
            done = quantizer.run(streams, plans)
            targets = quantizer.targets
            packed, meta = ranks.first(lambda: self._tune_and_pack(quantizer, done, streams, index))
            quantizer.second.close()
            meta["seconds"] = time.monotonic() - started
            kept = {f"norm.{n}": p for n, p in norms_of(block).items()}
            if self.recipe.moves_signs_at_the_end:
                kept |= {f"latent.{n}": x.bfloat16() for n, x in done.latents.items()}
            work.save(key, {**flatten(packed), **kept}, meta)
            if ranks.count() > 1:
                restore(work, key, block)  # rank 0 alone has tuned it
            if self.recipe.block is not None:
                quantizer.memory.close()  # it may have other weights and norms now
            leaving = quantizer.through(entering)
        behind = Streams(targets, leaving)
        streams.close()
        self.report.blocks.append({"name": name, **meta})
        if not resumed:
            self.observer.line(_block_line(name, meta))
            if rare := rare_experts(meta):
                self.observer.line(f"  {rare}")
        return behind

    def _tune_and_pack(
        self, quantizer: BlockQuantizer, done: Reconstructed, streams: Streams, index: int
    ) -> tuple[dict[str, PackedWeight], dict[str, Any]]:
        weights, tuning = done.weights, self.recipe.block
        meta: dict[str, Any] = {
            "layers": {
                n: {"layout": done.weights[n].layout().to_dict(), **dataclasses.asdict(r)}
                for n, r in done.layers.items()
            },
        }
        if tuning is not None and tuning.epochs > 0:
            block, call = quantizer.block, quantizer.call
            linears = find_linears(block)

            def run(W: Mapping[str, Tensor], gains: Mapping[str, Tensor], x: Tensor) -> Tensor:
                return run_block(Functional(block, linears, W, gains), x, call)

            weights, gains, tuned = tune_block(
                run,
                tunable(
                    weights,
                    done.latents.__getitem__,
                    tuning,
                    lambda name: weight_of(linears[name]).dtype,
                ),
                norms_of(block),
                streams.quant,
                quantizer.targets,
                quantizer.second if tuning.dual else None,
                tuning,
                self.config.seed + index,
            )
            meta["tuning"] = dataclasses.asdict(tuned)
            for n, qw in weights.items():
                set_weight(linears[n], qw.dequantize())
            with torch.no_grad():
                for n, gain in gains.items():
                    block.get_parameter(n).copy_(gain)
        return {n: pack(qw) for n, qw in weights.items()}, meta

    # --- the packed model ----------------------------------------------------------------------

    def write_model(
        self,
        staging: Path,
        work: Work,
        finished: Finished,
        calibration: Calibration,
        text: _Text | None,
    ) -> None:
        """Pack block after block into the model, write it, and score it on the way."""
        self.report.calibration = calibration.label()
        self.report.notes = methods.notes(self.method, finished)
        if self.config.preprocess:
            note = work.load("preprocessed")[1]["note"]
            self.report.notes["preprocessed, so not the model's own weights"] = note
        quantization = self._quantization_config(calibration)
        copy_norms(self.model, finished.norms_around())
        if self.config.embed_bits:
            with self.report.timed("embeddings"):
                rounded = round_embeddings(self.model, self.config.embed_bits)
            install_embeddings(self.model, rounded, quantization)
        scored = None if text is None else self._scored_text(work, text)
        inside = f"{self.loader.name}."
        writer = ShardWriter(self.model, staging, self._shard_bytes(), self._written)
        for i in range(len(self.blocks)):
            block = self.loader.load(i)
            packed, norms = finished.block(i)
            copy_norms(block, norms)
            linears = find_linears(block)
            named = {f"{inside}{i}.{n}": (pw, linears[n].bias) for n, pw in packed.items()}
            install(self.model, named, quantization)
            for name in named:
                self.report.note_stored(name, self.model.get_submodule(name))
            if scored is not None:
                with self.report.timed("perplexity"):
                    scored.through(i)
            if i == 0:
                around = self.model.state_dict()
                writer.add("", {n: t for n, t in around.items() if not n.startswith(inside)})
            writer.add(str(i), block.state_dict(prefix=f"{inside}{i}."))
            self.observer.step(i + 1, len(self.blocks))
        writer.finish()
        if text is not None and scored is not None:
            with self.report.timed("perplexity"):
                self.report.after = scored.perplexity()
            self._sample_from(staging, text)
        self.report.count(self.model)

    def _written(self, part: str) -> None:
        """A block is on the disk: drop it."""
        if part:
            for _, linear in packed_linears(self.blocks[int(part)]):
                linear.forget_prepared()
            self.loader.drop(int(part))

    def _shard_bytes(self) -> int:
        """As much as is in memory anyway while a block is quantized."""
        around = whole_model_bytes(self.model) - whole_model_bytes(self.blocks)
        largest = max(whole_model_bytes(block) for block in self.blocks)
        return around + max(largest, LEAST_SHARD_BYTES)

    def _sample_from(self, staging: Path, text: _Text) -> None:
        """What the model as it was written makes of the prompts, if there are any."""
        if self.report.samples:
            model = hf.load(
                str(staging),
                device_map={"": self.loader.device},
                trust_remote_code=self.loader.trust_remote_code,
            )
            self.report.note_samples("after", model, self.loader.tokenizer, text.tokenized)

    def _quantization_config(self, calibration: Calibration) -> PbqConfig:
        return PbqConfig(
            method=self.config.method,
            # a paper's recipe promises no budget
            bits=None if self.config.faithful else self.config.bits,
            provenance={
                "source": self.report.source,
                "config": self.config.to_dict(),
                "calibration": calibration.label(),
                "calibration_sha256": calibration.sha256,
                "pbq": __version__,
            },
        )


def _start_key(index: int) -> str:
    """The name of what a block starts from in the work directory."""
    return f"start-{index:05d}"


def _block_line(name: str, meta: Mapping[str, Any]) -> str:
    errors = [layer["error"] for layer in meta["layers"].values()]
    bits = [layer["bits"] for layer in meta["layers"].values()]
    damping = max(layer["damping"] for layer in meta["layers"].values())
    tuned = meta.get("tuning")
    loss = f"  block loss {tuned['before']:.4f} -> {tuned['after']:.4f}" if tuned else ""
    return (
        f"{name}  {sum(bits) / len(bits):.3f} bits  layer error {sum(errors) / len(errors):.4f}"
        f"  damping {damping:g}{loss}  {meta['seconds']:.0f} s"
    )
