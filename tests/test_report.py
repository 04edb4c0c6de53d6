"""The numbers of a run: counted from the packed model, and told truthfully in card and table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from pbq import checkpoint
from pbq.allocate import ChannelStats, LayerPlan, PlanInput
from pbq.config import QuantConfig
from pbq.evaluate import Perplexity
from pbq.linear import PackedLinear
from pbq.report import RunReport, card_metadata, model_card, peak_bytes, write_beside
from pbq.sources import Source
from pbq_kernels.layout import Tier


def measured(ppl: float) -> Perplexity:
    return Perplexity(ppl, 3.0, 40, 2048, 40 * 2048, 100_000, "wiki.txt", "0" * 64, 1.5)


def report(**changes: object) -> RunReport:
    config = QuantConfig("ptq161", bits=1.61, calib="wiki.txt").to_dict()
    plain = RunReport(
        source="someone/model",
        config=config,
        calibration="wiki.txt, 64 x 1024 tokens",
        bits=1.6049,
        paper_bits=1.5,
        quantized_weights=1000,
        quantized_bytes=200,
        quantized_bytes_before=2000,
        model_bytes=1200,
        model_bytes_before=3000,
        parameters=1500,
        seconds={"load": 0.2, "blocks": 61.4},
        peak_bytes=3 * 2**30,
    )
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_counts_what_save_pretrained_will_write(
    architecture: str, packed_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Tied embeddings once (both models tie), biases, and every packed tensor."""
    model = packed_model(architecture)
    found = report()
    found.count(model)
    model.save_pretrained(tmp_path)
    summary = checkpoint.inspect(tmp_path)
    assert found.bits == summary.stored_bits
    assert found.quantized_weights == summary.quantized_parameters
    assert found.quantized_bytes == summary.quantized_bytes
    assert found.parameters == summary.parameters
    assert found.model_bytes == summary.quantized_bytes + summary.other_bytes
    # float32 before, and all else unchanged
    dense = 4 * found.quantized_weights
    assert found.quantized_bytes_before == dense
    assert found.model_bytes_before == dense + summary.other_bytes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_every_byte_is_of_some_kind(
    architecture: str, packed_model: Callable[..., PreTrainedModel]
) -> None:
    model = packed_model(architecture)
    found = report()
    found.count(model)
    packed = [found.bytes_of[kind] for kind in ("planes", "scales", "masks")]
    assert sum(packed) == found.quantized_bytes
    assert sum(found.bytes_of.values()) == found.model_bytes
    assert found.bytes_of["embeddings"] == model.get_input_embeddings().weight.nbytes
    assert "head" not in found.bytes_of  # tied
    assert ("biases" in found.bytes_of) is (architecture != "llama")


def planned(W: torch.Tensor, x_sq: torch.Tensor, tier_of: list[int]) -> tuple[Any, Any]:
    stats = ChannelStats(x_sq, x_sq.sqrt(), x_sq.sqrt())
    tiers = (Tier(1, tier_of.count(0)), Tier(2, tier_of.count(1)), Tier(0, 0))
    return PlanInput(W, stats), LayerPlan(tiers, torch.tensor(tier_of, dtype=torch.uint8))


def test_damage_is_what_a_dropped_weight_costs_the_output() -> None:
    W, x = torch.randn(5, 4), torch.randn(1000, 4)
    layer, plan = planned(W, x.pow(2).mean(0), [0, 1, 1, 0])
    found = report()
    found.note_plan({"a": layer}, {"a": plan})
    for tier, columns in enumerate([[0, 3], [1, 2]]):
        # mean square of the change of one output, over every weight of the tier
        costs = [(x[:, k] * W[n, k]).pow(2).mean() for n in range(5) for k in columns]
        expected = float(torch.stack(costs).mean())
        assert found.tiers["a"][tier]["damage"] == pytest.approx(expected, rel=1e-5)
    assert found.tiers["a"][2] == {"planes": 0, "columns": 0, "damage": 0.0}
    json.dumps(found.to_dict())


def test_weights_and_stored_values_are_counted_in_the_same_bins(
    packed_model: Callable[..., PreTrainedModel],
) -> None:
    """Of the middle one of the largest layers, tier by tier; a plan changed later has no figure."""
    model = packed_model("llama")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    plans, layers = {}, {}
    for name, m in linears.items():
        tier_of = m.packed().tensors["tier"]
        W = m.dequantize()
        layers[name] = PlanInput(W, ChannelStats(*(torch.ones(m.in_features),) * 3))
        plans[name] = LayerPlan(m.layout.tiers, tier_of)
    found = report()
    found.note_plan(layers, plans)
    assert found.histogram is not None
    name = found.histogram["layer"]
    assert name == "model.layers.1.mlp.up_proj"
    found.note_stored("another", linears["model.layers.0.mlp.up_proj"])
    assert all("stored" not in tier for tier in found.histogram["tiers"])
    found.note_stored(name, linears[name])
    for tier in found.histogram["tiers"]:
        # the "original" is the stored weight here
        assert tier["weights"] == tier["stored"]
        assert sum(tier["stored"]) == 84 * tier["columns"]
    W = linears[name].dequantize()
    one = W[:, plans[name].tier_of == 1] / W.std(1, keepdim=True)
    expected = torch.histc(one.clamp(-4, 4), 160, -4, 4).int().tolist()
    assert found.histogram["tiers"][1]["stored"] == expected
    found.note_plan(layers, {**plans, name: LayerPlan((Tier(1, 48),), torch.zeros(48).byte())})
    found.note_stored(name, linears[name])
    assert found.histogram is None


def test_counts_against_the_models_own_dtype(packed_model: Callable[..., PreTrainedModel]) -> None:
    found = report()
    found.count(packed_model("llama").bfloat16())
    assert found.quantized_bytes_before == 2 * found.quantized_weights


def test_time_is_added_up_per_stage_even_when_a_stage_fails() -> None:
    found = RunReport("m", {})
    with found.timed("a"):
        pass
    first = found.seconds["a"]
    with pytest.raises(KeyError), found.timed("a"):
        raise KeyError
    assert found.seconds["a"] > first > 0 and list(found.seconds) == ["a"]


def test_rows_are_what_a_person_wants_to_know() -> None:
    rows = report(before=measured(20.5), after=measured(123.456)).rows()
    assert rows == {
        "quantized layers": "2.0 KiB -> 200 B (10.0x smaller)",
        "whole checkpoint": "2.9 KiB -> 1.2 KiB (2.5x smaller)",
        "stored bits per weight": "1.605 (asked: 1.61)",
        "by the paper's accounting": "1.50",
        "bits per parameter, whole model": "6.40",
        "calibration": "wiki.txt, 64 x 1024 tokens",
        "perplexity": f"20.50 -> 123.46 ({measured(1).label()})",
        "seconds": "62 (blocks 61)",
        "peak memory": "3.0 GiB",
    }
    assert "perplexity" not in report().rows()
    assert report(seconds={"load": 0.1}).rows()["seconds"] == "0"


def test_the_card_has_valid_metadata_and_says_what_was_not_measured(tmp_path: Path) -> None:
    card = model_card(report(before=measured(20.5), after=measured(123.456)))
    head = yaml.safe_load(card.split("---")[1])
    (index,) = head.pop("model-index")
    assert head == {
        "base_model": "someone/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pbq", "quantized", "ptq161"],
    }
    (result,) = index["results"]
    assert index["name"] == "model, pbq 1.60 bits" and result["dataset"]["name"] == "wiki.txt"
    assert result["dataset"]["args"] == {"windows": 40, "window": 2048, "sha256": "0" * 64}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("perplexity", 123.456)
    assert "# model, 1.60 stored bits per weight" in card and "20.50 -> 123.46" in card
    assert "not measured" not in card and "`calib=wiki.txt`" in card
    local = model_card(report(source=str(tmp_path)))
    assert "base_model" not in local and "Perplexity was not measured" in local
    assert "model-index" not in local


def test_licence_and_language_are_those_of_the_source(tmp_path: Path) -> None:
    assert card_metadata(tmp_path) == {}
    source = tmp_path / "README.md"
    source.write_text("no metadata")
    assert card_metadata(tmp_path) == {}
    source.write_text(
        "---\nlicense: other\nlicense_name: some\nlanguage: [en, de]\ntags: [chat]\n---\n# M\n"
    )
    head = yaml.safe_load(model_card(report(), card_metadata(tmp_path)).split("---")[1])
    assert (head["license"], head["license_name"]) == ("other", "some")
    assert head["language"] == ["en", "de"] and "chat" not in head["tags"]


@pytest.mark.parametrize(
    "card", [b"---\nnot: [metadata\n---\n", b"---\njust words\n---\n", b"---\na: \xff\n---\n"]
)
def test_a_card_that_makes_no_sense_costs_no_run(
    card: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert card_metadata(tmp_path) == {}
    assert f"{tmp_path / 'README.md'}: licence and language were not taken over" in caplog.text


@pytest.mark.parametrize("gguf", [False, True])
def test_a_checkpoint_is_complete_and_takes_only_what_is_the_models(
    gguf: bool,
    packed_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: object,
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("LICENSE", "model.safetensors", "README.md", "modeling.py"):
        (source / name).write_text("of the source")
    model, found = packed_model("llama"), report(after=measured(123.456))
    place = Source("m", source, "m.gguf" if gguf else None)
    model.save_pretrained(out)
    write_beside(out, place, tiny_tokenizer, found)
    written = {p.name for p in out.iterdir()}
    assert written >= {"config.json", "model.safetensors", "tokenizer.json", "report.json"}
    assert "123.5" in (out / "report.html").read_text()
    # a .gguf file lies in a folder that need not be its own
    assert ("LICENSE" in written) is not gguf and "modeling.py" not in written
    assert (out / "README.md").read_text() == model_card(found)
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    checkpoint.verify(out)


def test_peak_memory_is_in_bytes() -> None:
    assert 50 * 2**20 < peak_bytes() < 2**40
