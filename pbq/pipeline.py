"""quantize(): the story of a run, top to bottom.

load → calibration text → statistics → plan → block by block (reconstruct, tune, save) → distil →
pack into OUT. Every finished step is saved, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pbq import __version__, methods
from pbq.allocate import LayerPlan, PlanInput, stored_bits
from pbq.blocks import BlockQuantizer, Reconstructed, Streams
from pbq.calibrate import STATISTICS_ROWS, Calibration, batches, channel_stats, load_calibration
from pbq.config import QuantConfig
from pbq.disk import check_space, tensor_bytes
from pbq.errors import DataError, UsageError
from pbq.evaluate import (
    WINDOW,
    Perplexity,
    TokenizedText,
    perplexity,
    tokenize_file,
)
from pbq.forecast import Speed, in_words, seconds
from pbq.hf import PbqConfig, install
from pbq.models import (
    check_coverage,
    compute_dtype,
    find_blocks,
    find_linears,
    load_model,
    pick_device,
    record_calls,
    run_block,
    run_tail,
    set_weight,
    weight_of,
)
from pbq.pack import pack, unpack
from pbq.report import RunReport, write_checkpoint
from pbq.sources import resolve_source
from pbq.tune import STEP_TOKENS, TunableWeight, distill, held_out, tune_block
from pbq.work import Keeper, Work, check_target
from pbq_kernels import PackedWeight, WeightLayout


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
    observer: Observer | None = None,
) -> RunReport:
    """Quantize the causal LM at `source` into the directory `out`.

    source: hub id, local directory or .gguf file. device: auto | cpu | cuda[:i]. ppl_text: measure
    the perplexity on this file before and after and put it in the model card. An interrupted run
    resumes with the same arguments; `fresh` discards it instead. Raises PbqError.
    """
    out = Path(out)
    method = methods.get(config.method, config)
    check_target(out, overwrite)
    run_options = {"ppl": ppl_text and str(ppl_text), "windows": ppl_windows, "device": device}
    report = RunReport(source=source, config=config.to_dict(), run_options=run_options)
    with closing(observer or Silent()) as shown:
        shown.stage("load the model", None)
        with report.timed("load"):
            found, where = resolve_source(source), pick_device(device)
            dtype = compute_dtype(found, where)
            model, tokenizer = load_model(found, dtype, where, trust_remote_code)
            model.requires_grad_(False)
            check_coverage(model)
            text = _text(model, tokenizer, ppl_text, ppl_windows) if ppl_text else None
        run = _Run(model, tokenizer, config, method, report, shown)
        opened = Work.open(out, run.fingerprint(source), fresh=fresh, overwrite=overwrite)
        with opened as work, _dropping_what_was_refused(work):
            check_space(work.path, run.estimated_bytes())
            shown.line(run.forecast())
            calibration = run.calibration(work)
            if text is not None:
                report.before = run.perplexity(work, text, ppl_windows)
                report.note_samples("before", model, tokenizer, text)
            packed = run.quantize_blocks(work, calibration)
            run.install(packed, calibration)
            if text is not None:
                report.after = run.perplexity(None, text, ppl_windows)
                report.note_samples("after", model, tokenizer, text)
            report.count(model)
            shown.stage("write", None)
            work.finish(
                lambda staging: write_checkpoint(
                    staging, found, model, tokenizer, report, trust_remote_code=trust_remote_code
                )
            )
    return report


def _text(model: Any, tokenizer: Any, path: Path, windows: int | None) -> TokenizedText:
    """The text to be scored; whatever `perplexity` would refuse about it is refused here."""
    text = tokenize_file(tokenizer, path)
    text.count_windows(_window(model), windows)
    return text


def _window(model: Any) -> int:
    """Tokens in a window: 2048 as in the papers, fewer in a model of fewer positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(WINDOW, positions or WINDOW)


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

    model: Any
    tokenizer: Any
    config: QuantConfig
    method: methods.Method
    report: RunReport
    observer: Observer
    blocks_name: str = field(init=False)
    blocks: nn.ModuleList = field(init=False)

    def __post_init__(self) -> None:
        self.blocks_name, self.blocks = find_blocks(self.model)
        self.recipe = self.method.recipe(self.config)

    def linears(self) -> dict[str, nn.Module]:
        """Every linear that will be quantized, by its name in the model."""
        return {
            f"{self.blocks_name}.{i}.{name}": module
            for i, block in enumerate(self.blocks)
            for name, module in find_linears(block).items()
        }

    def fingerprint(self, source: str) -> dict[str, str]:
        """What must be equal for a half-finished run to go on."""
        config = {f"config.{k}": str(v) for k, v in self.config.to_dict().items()}
        recipe = {f"recipe.{k}": str(v) for k, v in dataclasses.asdict(self.recipe).items()}
        calib = self.config.calib
        named = (calib, *calib.split("+"), self.config.method)
        files = [Path(x) for x in named if Path(x).is_file()]
        text = ",".join(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)
        return {
            "model": source,
            "weights": _digest(self.model),
            "calibration text, method file": text,
            "device": str(next(self.model.parameters()).device),
            "pbq": __version__,
            **config,
            **recipe,
        }

    def estimated_bytes(self) -> int:
        """Disk for the finished steps and for OUT: packed weights twice, everything else once.

        Latent weights, where signs will move, are kept in bfloat16 until they have.
        """
        linears = self.linears().values()
        quantized = sum(weight_of(m).numel() for m in linears)
        everything = sum(p.numel() * p.element_size() for p in self.model.parameters())
        dense = sum(weight_of(m).numel() * weight_of(m).element_size() for m in linears)
        latents = 2 * quantized if self._keeps_latents() else 0
        return int(2 * quantized * self.config.bits / 8) + everything - dense + latents

    def _keeps_latents(self) -> bool:
        return self.recipe.distillation is not None and self.recipe.distillation.latent_lr > 0

    def forecast(self) -> str:
        """How long the stages will take on this machine, for people."""
        weights = {name: weight_of(m) for name, m in self.linears().items()}
        first = next(iter(weights.values()))
        head = self.model.get_output_embeddings().weight.numel()
        shapes = {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}
        speed = Speed.measure(first.dtype, first.device)
        found = seconds(shapes, head, self.config, self.recipe, speed)
        return f"at this machine's present speed about {in_words(found)}"

    # --- calibration ---------------------------------------------------------------------------

    def calibration(self, work: Work) -> Calibration:
        if work.has("calibration"):
            tensors, meta = work.load("calibration")
            return Calibration(tensors["ids"], meta["source"])
        self.observer.stage("calibration text", None)
        with self.report.timed("calibration text"):
            calibration = load_calibration(
                self.config.calib,
                self.tokenizer,
                self.model,
                nsamples=self.config.nsamples,
                seqlen=self.config.seqlen,
                seed=self.config.seed,
                progress=self.observer.step,
            )
        work.save("calibration", {"ids": calibration.ids}, {"source": calibration.source})
        return calibration

    def perplexity(self, work: Work | None, text: TokenizedText, windows: int | None) -> Perplexity:
        """Before (kept in `work`, so that a resumed run need not measure again) or after."""
        window = _window(self.model)
        if work is not None and work.has("perplexity"):
            kept = Perplexity(**work.load("perplexity")[1])
            # the text is no part of the run's fingerprint: another may be given when resuming
            if (kept.sha256, kept.windows) == (text.sha256, text.count_windows(window, windows)):
                return kept
        name = "after" if work is None else "before"
        self.observer.stage(f"perplexity {name}", None)
        with self.report.timed("perplexity"):
            found = perplexity(
                self.model, text, window=window, max_windows=windows, progress=self.observer.step
            )
        if work is not None:
            work.save("perplexity", {}, dataclasses.asdict(found))
        return found

    # --- plan ----------------------------------------------------------------------------------

    def plan(self, ids: Tensor) -> dict[str, LayerPlan]:
        """Statistics of the original model on up to 16 segments, and the tiers from them."""
        self.observer.stage("statistics", None)
        linears = self.linears()
        with self.report.timed("statistics"):
            stats = channel_stats(
                self.model,
                linears,
                ids[:: max(1, len(ids) // STATISTICS_ROWS)][:STATISTICS_ROWS],
                gradients=self.method.wants_gradients,
                progress=self.observer.step,
            )
            layers = {n: PlanInput(weight_of(m), stats[n]) for n, m in linears.items()}
            plans = self.method.plan(layers, self.config)
            self.report.note_plan(layers, plans)
        rows = {name: layer.W.shape[0] for name, layer in layers.items()}
        self.report.bits = stored_bits(plans, rows)
        self.report.paper_bits = self.method.paper_bits(plans, rows)
        if self.report.bits > self.config.bits and not self.config.faithful:
            raise UsageError(
                f"{self.config.method} would store {self.report.bits:.3f} bits, "
                f"above --bits {self.config.bits:g}"
            )
        return plans

    # --- blocks --------------------------------------------------------------------------------

    def quantize_blocks(self, work: Work, calibration: Calibration) -> dict[str, PackedWeight]:
        """Block by block; a block already in `work` is only run, to feed the one behind it."""
        device = next(self.model.parameters()).device
        rows = batches(calibration.ids.to(device), self.recipe.batch)
        plans = self.plan(calibration.ids)
        recording = record_calls(self.model, self.blocks, rows)
        streams = Streams(recording.hidden, list(recording.hidden))
        packed: dict[str, PackedWeight] = {}
        self.observer.stage("blocks", len(self.blocks))
        for i, block in enumerate(self.blocks):
            name = f"{self.blocks_name}.{i}"
            with self.report.timed("blocks"):
                packed |= self._block(work, block, name, i, recording.calls[i][0], streams, plans)
            self.observer.step(i + 1, len(self.blocks))
        if self.recipe.distillation is not None:
            packed = self._distil(work, packed, rows, streams.fp)
        return packed

    def _distil(
        self,
        work: Work,
        packed: Mapping[str, PackedWeight],
        rows: Sequence[Tensor],
        hidden: Sequence[Tensor],
    ) -> dict[str, PackedWeight]:
        """Train the whole model towards the original, whose last hidden states are `hidden`."""
        settings = self.recipe.distillation
        assert settings is not None
        linears = self.linears()
        if work.has("distillation"):
            tensors, meta = work.load("distillation")
            device = next(self.model.parameters()).device
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        else:
            self.observer.stage("distillation", settings.steps)
            with self.report.timed("distillation"):
                tensors, meta = self._train(work, packed, rows, hidden, linears)
            work.save("distillation", tensors, meta)
            work.forget("training")
        self.report.distillation = meta["tuned"]
        found = _unflatten(tensors, {n: pw.layout for n, pw in packed.items()})
        for name, pw in found.items():
            set_weight(linears[name], unpack(pw).dequantize())
        _copy_norms(self.model, tensors)
        return found

    def _latent(self, work: Work, name: str) -> Tensor:
        """Where the latent weight of a linear starts: as GPTQ compensated it before rounding."""
        index, linear = name.removeprefix(f"{self.blocks_name}.").split(".", 1)
        tensors, _ = work.load(f"block-{int(index):05d}")
        return tensors[f"latent.{linear}"].float().to(next(self.model.parameters()).device)

    def _train(
        self,
        work: Work,
        packed: Mapping[str, PackedWeight],
        rows: Sequence[Tensor],
        hidden: Sequence[Tensor],
        linears: Mapping[str, nn.Module],
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings = self.recipe.distillation
        assert settings is not None
        steps, unseen = _steps_of(rows)
        # views of single rows: a step may take them from several batches
        rows = [row for batch in rows for row in batch.split(1)]
        hidden = [row for batch in hidden for row in batch.split(1)]

        def student(W: Mapping[str, Tensor], gains: Mapping[str, Tensor], i: int) -> Tensor:
            called = _Functional(self.model, linears, W, gains)
            return called(torch.cat([rows[j] for j in steps[i]]), use_cache=False).logits

        # functional: the model keeps its own final norm, so the target does not move
        norms = {n: p.detach().clone() for n, p in _norms(self.model).items()}

        def teacher(i: int) -> Tensor:
            ids, states = (torch.cat([x[j] for j in steps[i]]) for x in (rows, hidden))
            return run_tail(self.model, self.blocks, ids, states)

        weights = {
            n: TunableWeight(
                unpack(pw),
                self._latent(work, n) if settings.latent_lr else None,
                settings.only_planes,
                weight_of(linears[n]).dtype,
            )
            for n, pw in packed.items()
        }
        found, gains, tuned = distill(
            student,
            teacher,
            weights,
            norms,
            len(steps),
            unseen,
            settings,
            self.config.seed,
            progress=self.observer.step,
            keep=Keeper(work, "training"),
        )
        self.observer.line(
            f"distillation  held-out KL {tuned.before:.4f} -> {tuned.after:.4f} nats"
            + ("" if tuned.kept else ", not kept")
        )
        tensors = _flatten({n: pack(qw) for n, qw in found.items()})
        tensors |= {f"norm.{n}": gain for n, gain in gains.items()}
        return tensors, {"tuned": dataclasses.asdict(tuned)}

    def _block(
        self,
        work: Work,
        block: nn.Module,
        name: str,
        index: int,
        call: Any,
        streams: Streams,
        plans: Mapping[str, LayerPlan],
    ) -> dict[str, PackedWeight]:
        """Quantize one block, or take it from `work`; move both streams behind it."""
        key, started = f"block-{index:05d}", time.monotonic()
        resumed = work.has(key)
        if resumed:
            targets = [_forward(block, x, call) for x in streams.fp]
            packed, meta = _restore(work, key, block)
        else:
            quantizer = BlockQuantizer(
                block, find_linears(block), call, self.method, self.recipe, self.config, name, index
            )
            done = quantizer.run(streams, plans)
            targets = quantizer.targets
            packed, meta = self._tune_and_pack(quantizer, done, streams, index)
            meta["seconds"] = time.monotonic() - started
            kept = {f"norm.{n}": p for n, p in _norms(block).items()}
            if self._keeps_latents():
                kept |= {f"latent.{n}": x.bfloat16() for n, x in done.latents.items()}
            work.save(key, {**_flatten(packed), **kept}, meta)
        streams.quant = [_forward(block, x, call) for x in streams.quant]
        streams.fp = targets
        self.report.blocks.append({"name": name, **meta})
        if not resumed:
            self.observer.line(_block_line(name, meta))
        return {f"{name}.{linear}": pw for linear, pw in packed.items()}

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
                return run_block(_Functional(block, linears, W, gains), x, call)

            weights, gains, tuned = tune_block(
                run,
                {
                    n: TunableWeight(
                        qw,
                        done.latents[n] if tuning.latent_lr else None,
                        tuning.only_planes,
                        weight_of(linears[n]).dtype,
                    )
                    for n, qw in weights.items()
                },
                _norms(block),
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

    def install(self, packed: Mapping[str, PackedWeight], calibration: Calibration) -> None:
        """Swap the dense linears for packed ones; from here on the model is what will be loaded."""
        self.report.calibration = calibration.label()
        self.report.notes = methods.notes(self.method, packed)
        linears = self.linears()
        biases = {name: getattr(linears[name], "bias", None) for name in packed}
        quantization = PbqConfig(
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
        install(self.model, {n: (pw, biases[n]) for n, pw in packed.items()}, quantization)


def _steps_of(batches: Sequence[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Rows taken together in a step of STEP_TOKENS tokens, and the indices of held-out steps."""
    judges = set(held_out(len(batches)))
    judged = [i in judges for i, batch in enumerate(batches) for _ in batch]
    size = max(1, STEP_TOKENS // batches[0].shape[1])
    train, unseen = ([i for i, j in enumerate(judged) if j is which] for which in (False, True))
    steps = [part[i : i + size] for part in (train, unseen) for i in range(0, len(part), size)]
    return steps, list(range(math.ceil(len(train) / size), len(steps)))


class _Functional:
    """A module called with other weights: the caller sees a module, autograd sees the weights."""

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor],
        gains: Mapping[str, Tensor],
    ) -> None:
        self._block = block
        self._parameters: dict[str, Tensor] = {}
        for name, W in weights.items():
            dtype = weight_of(linears[name]).dtype
            # Conv1D of gpt2 keeps its weight transposed
            oriented = W if isinstance(linears[name], nn.Linear) else W.T
            self._parameters[f"{name}.weight"] = oriented.to(dtype)
        for name, gain in gains.items():
            self._parameters[name] = gain.to(block.get_parameter(name).dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._block, self._parameters, args, kwargs)


def _norms(block: nn.Module) -> dict[str, Tensor]:
    """Gains of the block's norms: they are stored anyway, so tuning them costs no bits."""
    return {
        f"{name}.weight": module.weight
        for name, module in block.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


@torch.no_grad()
def _forward(block: nn.Module, x: Tensor, call: Any) -> Tensor:
    return run_block(block, x, call)


def _flatten(packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    return {f"{n}.{key}": t for n, pw in packed.items() for key, t in pw.tensors.items()}


def _restore(
    work: Work, key: str, block: nn.Module
) -> tuple[dict[str, PackedWeight], dict[str, Any]]:
    """A finished block from `work`: its packed weights, and its dense values put in place."""
    tensors, meta = work.load(key)
    device = next(block.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    layouts = {n: WeightLayout.from_dict(found["layout"]) for n, found in meta["layers"].items()}
    packed = _unflatten(tensors, layouts)
    for name, module in find_linears(block).items():
        set_weight(module, unpack(packed[name]).dequantize())
    _copy_norms(block, tensors)
    return packed, meta


def _unflatten(
    tensors: Mapping[str, Tensor], layouts: Mapping[str, WeightLayout]
) -> dict[str, PackedWeight]:
    """Inverse of `_flatten`."""
    return {
        name: PackedWeight(layout, {key: tensors[f"{name}.{key}"] for key in layout.tensors()})
        for name, layout in layouts.items()
    }


@torch.no_grad()
def _copy_norms(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in _norms(module).items():
        parameter.copy_(tensors[f"norm.{name}"])


def _digest(model: nn.Module) -> str:
    """Of every parameter's name, shape and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(tensor_bytes(p.detach().cpu().contiguous()))
    return digest.hexdigest()


def _block_line(name: str, meta: Mapping[str, Any]) -> str:
    errors = [layer["error"] for layer in meta["layers"].values()]
    bits = [layer["bits"] for layer in meta["layers"].values()]
    tuned = meta.get("tuning")
    loss = f"  block loss {tuned['before']:.4f} -> {tuned['after']:.4f}" if tuned else ""
    return (
        f"{name}  {sum(bits) / len(bits):.3f} bits  layer error {sum(errors) / len(errors):.4f}"
        f"{loss}  {meta['seconds']:.0f} s"
    )
