"""The `pbq` command. torch is imported inside the commands, so that --help is instant."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from pbq import cli_bench, cli_compare, cli_finetune, cli_share, cli_use
from pbq.cli_options import (
    Activations,
    AsJson,
    Baseline,
    Calib,
    Device,
    Effort,
    EmbedBits,
    Fresh,
    Memory,
    Model,
    NSamples,
    Overwrite,
    Packed,
    Quiet,
    Seed,
    SeqLen,
    Texts,
    Trust,
    Window,
    short_name,
)
from pbq.console import Console, hush_libraries, resumable, run_guarded

if TYPE_CHECKING:
    from pbq.config import QuantConfig

app = typer.Typer(
    help="Binarize LLMs after training: about 1.6 true bits per weight, measured on the disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: pbq quantize MODEL OUT --bits 1.61",
)

Method = Annotated[
    str,
    typer.Option(
        help="auto, which is waterfill; arb-llm, billm, db-llm, gptq, nanoquant, pb-llm, ptq161, "
        "rtn; or a .py file of your own"
    ),
]
Bits = Annotated[float, typer.Option(help="stored bits per weight, masks and scales included")]
GroupSize = Annotated[int, typer.Option(help="columns per group of scales, -1: the row")]
Criterion = Annotated[
    str,
    typer.Option(help="salient by: damage, or the papers': absmax, mean-abs; hessian, magnitude"),
]
SalientShare = Annotated[
    float, typer.Option(help="share of salient weights at most, 0: as many as the bits allow")
]
Faithful = Annotated[bool, typer.Option(help="the paper's own recipe, whatever bits it stores")]
Preprocess = Annotated[
    str,
    typer.Option(
        help="packed checkpoint of MODEL, to be restored by LoRA and quantized in its place, as "
        "PTQ1.61 does; needs peft"
    ),
]
Percdamp = Annotated[float, typer.Option(help="damping of H, share of its mean diagonal")]
BlockEpochs = Annotated[
    float, typer.Option(help="passes of training each block, -1: as --effort says")
]
DistilSteps = Annotated[
    int, typer.Option(help="steps of training the whole model, -1: as --effort says")
]


def _chosen(context: typer.Context, recipe: Path | None = None) -> dict[str, Any]:
    """Every option by its name: from the command line, else the recipe, else its default."""
    chosen = dict(context.params)
    if recipe is not None:
        from pbq import recipes

        sources = {name: context.get_parameter_source(name) for name in chosen}
        typed = {name for name, source in sources.items() if source and source.name != "DEFAULT"}
        chosen |= {n: value for n, value in recipes.read(recipe).items() if n not in typed}
    return chosen


def _speaks() -> bool:
    """Of several processes that torchrun started (pbq.ranks), the first prints."""
    return os.environ.get("RANK", "0") == "0"


def _config(chosen: Mapping[str, Any]) -> QuantConfig:
    from pbq.config import QuantConfig

    fields = {field.name for field in dataclasses.fields(QuantConfig)}
    options = {name: value for name, value in chosen.items() if name in fields}
    if options["method"] == "auto":
        options["method"] = QuantConfig.method
    return QuantConfig(**options)


@app.command(
    epilog="Example: pbq quantize HuggingFaceTB/SmolLM2-135M-Instruct out --bits 1.61 "
    "--calib wiki.txt --ppl heldout.txt"
)
def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Optional[Path], typer.Argument(help="default: ./NAME-pbq-BITS")] = None,  # noqa: UP045
    bits: Bits = 1.61,
    method: Method = "auto",
    effort: Effort = "default",
    calib: Calib = "self",
    nsamples: NSamples = -1,
    seqlen: SeqLen = 1024,
    group_size: GroupSize = -1,
    criterion: Criterion = "damage",
    salient_share: SalientShare = 0.0,
    faithful: Faithful = False,
    block_epochs: BlockEpochs = -1.0,
    distil_steps: DistilSteps = -1,
    preprocess: Preprocess = "",
    embed_bits: EmbedBits = 0,
    percdamp: Percdamp = 0.01,
    seed: Seed = 0,
    ppl: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="text file: perplexity before and after, into the model card"),
    ] = None,
    windows: Annotated[int, typer.Option(help="windows of 2048 tokens for --ppl")] = 40,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="repeat a run: its OUT/recipe.yaml; options typed here go first"),
    ] = None,
    device: Device = "auto",
    memory: Memory = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool, typer.Option(help="only say what would be stored (= pbq plan)")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL into OUT; an interrupted run resumes with the same command."""
    chosen = _chosen(context, recipe)
    config = _config(chosen)
    quiet = quiet or not _speaks()
    console = Console(quiet=quiet)
    if dry_run:
        _print_plan(console, model, config, trust_remote_code, as_json, memory)
        return
    from pbq import pipeline

    hush_libraries()
    target = out or Path(f"{short_name(model)}-pbq-{config.bits:g}")
    with resumable(target):
        result = pipeline.quantize(
            model,
            target,
            config,
            device=chosen["device"],
            ppl_text=Path(chosen["ppl"]) if chosen["ppl"] else None,
            ppl_windows=chosen["windows"],
            overwrite=overwrite,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            memory=memory,
            observer=console,
        )
    if as_json and _speaks():
        print(json.dumps(result.to_dict()))
    elif not quiet:
        console.table({**result.rows(), "report": target / "report.html"}, title=f"{target}")


@app.command(epilog="Example: pbq plan ./model --bits 1.61 --json")
def plan(
    context: typer.Context,
    model: Model,
    bits: Bits = 1.61,
    method: Method = "auto",
    effort: Effort = "default",
    nsamples: NSamples = -1,
    seqlen: SeqLen = 1024,
    group_size: GroupSize = -1,
    criterion: Criterion = "damage",
    salient_share: SalientShare = 0.0,
    faithful: Faithful = False,
    block_epochs: BlockEpochs = -1.0,
    distil_steps: DistilSteps = -1,
    embed_bits: EmbedBits = 0,
    calib: Calib = "self",
    memory: Memory = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Say what would be quantized, stored and needed, without quantizing (= --dry-run)."""
    config = _config(_chosen(context))
    _print_plan(Console(), model, config, trust_remote_code, as_json, memory)


def _print_plan(
    console: Console,
    model: str,
    config: QuantConfig,
    trust_remote_code: bool,
    as_json: bool,
    memory: float | None,
) -> None:
    from pbq import planning

    planned = planning.plan(model, config, trust_remote_code=trust_remote_code, memory=memory)
    if as_json:
        print(json.dumps(planned.to_dict()))
    else:
        console.table(planned.rows(), title=f"{model}, {config.method}, {config.bits:g} bits")


@app.command(
    "eval",
    epilog="Example: pbq eval out --ppl wiki.test.raw --tasks piqa,arc_challenge --data-dir data",
)
def evaluate(
    model: Model,
    ppl: Texts = None,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="at most so many windows of the text; default: all of it"),
    ] = None,
    window: Window = 2048,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma separated")] = "",
    data_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="local task data: piqa/piqa.valid.jsonl, arc/ARC-Challenge-Test.jsonl"),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="items of each task")] = None,  # noqa: UP045
    num_fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="examples in the prompt of each item; default: the task's own"),
    ] = None,
    baseline: Baseline = None,
    batch_size: Annotated[int, typer.Option(help="items at once in lm-eval")] = 8,
    activations: Activations = "exact",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity on text files and lm-eval tasks, of a packed or any other model."""
    hush_libraries(quiet=quiet)
    from pbq import scoring

    console = Console(quiet=quiet)
    scores = scoring.score_models(
        [model, *([baseline] if baseline else [])],
        texts=ppl or [],
        windows=windows,
        window=window,
        tasks=[name for name in tasks.split(",") if name],
        data_dir=data_dir,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        trust_remote_code=trust_remote_code,
        observer=console,
    )
    if as_json:
        print(json.dumps(scores.to_dict()))
    else:
        console.grid(*scores.grid())


@app.command(epilog="Example: pbq inspect out --layer model.layers.0.mlp.down_proj")
def inspect(
    out: Packed,
    layer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="one layer, with its tiers and scales"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a packed checkpoint holds: layers, tiers, bits, bytes, errors."""
    from pbq import contents

    found = contents.describe_layer(out, layer) if layer else contents.describe(out)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        Console().grid(*found.grid())


@app.command(epilog="Example: pbq verify out && echo intact")
def verify(
    out: Packed,
    forward: Annotated[
        bool, typer.Option(help="also load it and compare its logits with those recorded")
    ] = True,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a packed checkpoint: every byte, what it claims to store, and one forward pass."""
    from pbq import checkpoint

    console = Console(quiet=quiet)
    with closing(console):
        console.stage("verify", None)
        report = checkpoint.verify(out, progress=console.step)
        passed = None
        if forward:
            hush_libraries()
            from pbq import selftest

            console.stage("forward pass", None)
            passed = selftest.check(out, device, trust_remote_code)
    if as_json:
        outcome = passed and dataclasses.asdict(passed)
        print(json.dumps({**report.to_dict(), "forward": outcome}))
    elif not quiet:
        said = str(passed) if passed else "none was recorded" if forward else "left out"
        console.table({**report.rows(), "forward pass": said}, title=f"{out} is intact")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log what happens")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if version:
        from pbq import __version__

        print(f"pbq {__version__}")
        raise typer.Exit


for more in (cli_finetune.app, cli_compare.app, cli_use.app, cli_bench.app, cli_share.app):
    app.registered_commands += more.registered_commands


def main() -> None:
    """The console script: exit codes are those of pbq.errors, 130 when interrupted."""
    raise SystemExit(run_guarded(app))
