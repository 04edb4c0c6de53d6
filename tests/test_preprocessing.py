"""Restorative LoRA before quantization: what it trains, what stays the reference, refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pbq import methods, pipeline, preprocessing
from pbq.allocate import ChannelStats, PlanInput
from pbq.blocks import BlockQuantizer, Streams
from pbq.checkpoint import read_packed, verify
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.models import find_blocks, find_linears, record_calls, run_block
from pbq.tune import Recipe
from pbq_kernels.reference import dequantize

pytest.importorskip("peft")


def config(text: Path, **options: Any) -> QuantConfig:
    return QuantConfig(method="ptq161", bits=3.5, effort="fast", nsamples=8, seqlen=32,
                       calib=str(text), **options)  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pipeline.quantize(str(source), out, config(text))
    return out


def restored(packed: Path, source: Path, steps: int = 12) -> preprocessing.Restored:
    rows = list(torch.arange(4 * 2 * 24).remainder(61).view(4, 2, 24))
    blocks = find_blocks(AutoModelForCausalLM.from_pretrained(source))[1]
    return preprocessing.restored(
        str(packed), rows, blocks, steps=steps, seed=0, device=torch.device("cpu")
    )


def test_lora_restores_all_but_the_attentions_output(packed: Path, source: Path) -> None:
    found = restored(packed, source)
    assert found.after < found.before
    for i, block in enumerate(found.blocks):
        for name, tensor in block.items():
            if "proj" not in name:
                continue
            stored = read_packed(packed, f"model.layers.{i}.{name.removesuffix('.weight')}")
            same = torch.equal(tensor, dequantize(stored))
            assert same == ("o_proj" in name), name


def test_the_seed_decides_and_nothing_else_is_disturbed(packed: Path, source: Path) -> None:
    torch.manual_seed(7)
    first = restored(packed, source, steps=2)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    second = restored(packed, source, steps=2)
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_preprocessed_run_is_labelled_and_compared_with_the_original(
    packed: Path, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(text, preprocess=str(packed))
    ppl = {"ppl_text": text, "ppl_windows": 2}

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline._Run, "quantize_blocks", stopped)
        pipeline.quantize(str(source), tmp_path / "new", asked, **ppl)
    # it is trained once
    monkeypatch.setattr(preprocessing, "restored", stopped)
    report = pipeline.quantize(str(source), tmp_path / "new", asked, **ppl)
    assert verify(tmp_path / "new").stored_bits <= 3.5
    label = report.rows()["preprocessed, so not the model's own weights"]
    assert "30 steps of LoRA" in label and str(packed) in label
    plain = pipeline.quantize(str(source), tmp_path / "plain", config(text), **ppl)
    assert report.before is not None and plain.before is not None
    assert report.before.loss == plain.before.loss
    name = "model.layers.1.mlp.up_proj"
    new, old = (read_packed(tmp_path / out, name).tensors for out in ("new", "plain"))
    assert not torch.equal(new["weight"], old["weight"])


def test_targets_are_the_originals(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Block tuning and distillation aim at these; only the weights are another block's."""
    model, other = tiny_model("llama"), tiny_model("llama")
    blocks = find_blocks(model)[1]
    ids = [torch.arange(18).view(2, 9)]
    recording = record_calls(model, blocks, ids)
    call = recording.calls[0][0]
    with torch.no_grad():
        expected = run_block(blocks[0], recording.hidden[0], call)
    start = find_blocks(other)[1][0].state_dict()
    start["mlp.up_proj.weight"] = torch.roll(start["mlp.up_proj.weight"], 1, 0)
    method = methods.get("rtn", QuantConfig(method="rtn", bits=8, nsamples=2, seqlen=9))
    recipe = Recipe(feedback=False, sweeps=0, compensate=False)
    linears = find_linears(blocks[0])
    quantizer = BlockQuantizer(
        blocks[0], linears, call, method, recipe, QuantConfig(nsamples=2, seqlen=9), "b",
        start=start,
    )  # fmt: skip
    plan = method.plan(
        {f"b.{n}": _layer(m.weight.detach()) for n, m in linears.items()}, QuantConfig(bits=8)
    )
    done = quantizer.run(Streams(recording.hidden, recording.hidden), plan)
    torch.testing.assert_close(quantizer.targets[0], expected)
    rounded = done.weights["mlp.up_proj"].dequantize()
    torch.testing.assert_close(rounded, start["mlp.up_proj.weight"], rtol=0, atol=1e-3)


def _layer(W: Tensor) -> Any:
    one = torch.ones(W.shape[1])
    return PlanInput(W, ChannelStats(one, one, one))


def test_another_models_checkpoint_is_refused(
    packed: Path, tiny_checkpoint: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    asked = config(text, preprocess=str(packed))
    with pytest.raises(UsageError, match="not made from this model"):
        pipeline.quantize(str(tiny_checkpoint("qwen3")), tmp_path / "new", asked)


def test_without_peft_it_says_what_to_install(
    packed: Path, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    asked = config(text, preprocess=str(packed))
    with pytest.raises(UsageError, match=r"pip install 'pbq-llm\[preprocess\]'"):
        pipeline.quantize(str(source), tmp_path / "new", asked)
    assert not (tmp_path / "new").exists()
