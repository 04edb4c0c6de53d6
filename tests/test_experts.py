"""Experts of a MoE as linears: the same model, the right tokens for each, packed and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pbq import checkpoint, contents, planning
from pbq.blocks import BlockQuantizer, Streams
from pbq.calibrate import channel_stats
from pbq.config import QuantConfig
from pbq.experts import (
    Experts,
    as_fused,
    borrowed,
    find_experts,
    fuse,
    routed,
    routers,
    unfuse,
)
from pbq.export import export
from pbq.hf import packed_linears
from pbq.linear import set_backend
from pbq.loader import BlockLoader
from pbq.models import (
    check_coverage,
    find_blocks,
    find_linears,
    record_calls,
    run_block,
    weight_of,
)
from pbq.pipeline import quantize
from pbq.routing import Routed, shares
from pbq.sources import resolve_source
from pbq.tune import Recipe

Models = Callable[..., PreTrainedModel]
Checkpoints = Callable[[str], Path]
IDS = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


# --- apart and together again ------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "qwen2_moe", "deepseek_v3"]
)
def test_experts_apart_are_the_same_model(architecture: str, tiny_model: Models) -> None:
    model = tiny_model(architecture)
    expected, before = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    storage = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    unfuse(model)
    found = find_experts(model)
    assert found and logits(model).sub(expected).abs().max() <= 1e-5
    for module in found.values():
        for parameter in module.parameters():
            assert parameter.untyped_storage().data_ptr() in storage  # nothing was copied
    coverage = check_coverage(model)
    routing = {f"{name}.weight" for name in routers(model)}
    assert coverage.skipped.keys() == routing and len(routing) >= len(found)
    assert "x router in full precision" in coverage.line()
    assert not routers(model) & find_linears(model).keys()
    fuse(model)
    assert torch.equal(logits(model), expected) and not find_experts(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_copies_do_not_share_experts(tiny_model: Models) -> None:
    model = tiny_model("qwen3_moe")
    unfuse(model)
    other, expected = copy.deepcopy(model), logits(model)
    for module in find_experts(other).values():
        for parameter in module.parameters():
            parameter.data.zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)


def test_some_may_stay_fused(tiny_model: Models) -> None:
    model = tiny_model("mixtral")
    unfuse(model, only=["model.layers.1.mlp.experts"])
    assert list(find_experts(model)) == ["model.layers.1.mlp.experts"]


def test_a_loader_that_knows_fused_experts_only(
    moe_architecture: str, tiny_checkpoint: Checkpoints, tiny_model: Models
) -> None:
    loader = BlockLoader(resolve_source(str(tiny_checkpoint(moe_architecture))), torch.float32)
    unfuse(loader.model)
    whole = tiny_model(moe_architecture)
    unfuse(whole)
    linears = find_linears(loader.blocks)
    for _ in range(2):  # the linears stay the same modules when a block comes and goes
        for i, block in enumerate(loader.blocks):
            expected = whole.get_submodule(loader.name)[i].state_dict()
            with loader.loaded(i):
                assert all(torch.equal(t, expected[n]) for n, t in block.state_dict().items())
            assert all(p.is_meta for p in block.parameters())
    assert all(linears[name] is module for name, module in find_linears(loader.blocks).items())


def test_as_fused_puts_the_experts_back_when_it_fails(tiny_model: Models) -> None:
    model = tiny_model("mixtral")
    unfuse(model)
    expected, modules = logits(model), find_experts(model)
    with pytest.raises(KeyError), as_fused(model):
        assert not find_experts(model)
        raise KeyError
    assert find_experts(model) == modules and torch.equal(logits(model), expected)


# --- which tokens each expert gets -------------------------------------------------------------


def test_routed_by_hand() -> None:
    index = torch.tensor([[2, 0], [0, 3], [3, 2]])
    found = [(tokens.tolist(), places.tolist()) for tokens, places in routed(index, 5)]
    assert found == [([0, 1], [1, 0]), ([], []), ([0, 2], [0, 1]), ([1, 2], [1, 0]), ([], [])]


@pytest.mark.parametrize("total", [1, 9, 63])
@pytest.mark.parametrize("own", [0, 1, 7, 63])
@pytest.mark.parametrize("least", [0, 5, 20, 100])
def test_borrowed_tokens_are_others_and_as_many_as_lack(total: int, own: int, least: int) -> None:
    mine = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:own]
    more = borrowed(mine, total, least).tolist()
    assert len(more) == len(set(more)) and not set(more) & set(mine.tolist())
    assert all(0 <= token < total for token in more)
    assert len(more) == min(max(least - len(mine), 0), total - len(mine))


def test_shares_count_routing_weights_squared_and_borrowed_ones_as_the_mean() -> None:
    x, weights = torch.zeros(3, 4), torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.6, 0.4]])
    batches = [
        Routed(x, torch.tensor([[0, 1], [1, 0], [0, 1]]), weights),
        Routed(x, torch.tensor([[0, 1], [0, 2], [1, 0]]), weights),
    ]
    found = shares(batches, 4, least=2)
    mean = float(weights.pow(2).mean())
    assert found[0].tokens.tolist() == [0, 1, 2, 3, 4, 5] and found[0].borrowed == 0
    squares = torch.tensor([0.75, 0.5, 0.6, 0.75, 0.5, 0.4]).pow(2)
    torch.testing.assert_close(found[0].weight, squares)
    assert (found[2].own, found[2].borrowed) == (1, 1)
    torch.testing.assert_close(found[2].weight, torch.tensor([0.25, mean]))
    assert (found[3].own, found[3].borrowed) == (0, 2)
    torch.testing.assert_close(found[3].weight, torch.tensor([mean, mean]))


def starve(model: PreTrainedModel, expert: int) -> None:
    """From here on no token is routed to this expert; those that were go to the first others."""
    for name, module in find_experts(model).items():
        gate = model.get_submodule(name.rpartition(".")[0]).gate
        kept = [e for e in range(len(module)) if e != expert]

        def never(m: nn.Module, args: Any, out: Any, kept: list[int] = kept) -> Any:
            scores, weights, index = out
            others = torch.tensor(kept)[: index.shape[1]].expand_as(index)
            return scores, weights, torch.where((index == expert).any(1, True), others, index)

        gate.register_forward_hook(never)


def test_statistics_of_an_expert_without_tokens(moe_architecture: str, tiny_model: Models) -> None:
    model = tiny_model(moe_architecture)
    unfuse(model)
    starve(model, 1)
    name, blocks = find_blocks(model)
    linears = {f"{name}.{n}": m for n, m in find_linears(blocks).items()}
    expected = logits(model)
    stats = channel_stats(model, linears, IDS, gradients=True)
    assert torch.equal(logits(model), expected)
    for found in stats.values():
        assert torch.isfinite(found.x_sq).all() and float(found.x_sq.max()) > 0
    starved = stats[f"{name}.0.mlp.experts.1.gate_up"]
    assert float(starved.g_sq.max()) == 0
    # what it is shown instead: an even share of all tokens of each row, evenly spread
    seen = []
    hook = blocks[0].mlp.experts.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for row in IDS:
        logits(model, row[None])
    hook.remove()
    shown = torch.cat([x[torch.arange(5) * 17 // 5] for x in seen])
    torch.testing.assert_close(starved.x_sq, shown.pow(2).mean(0))


class Scene:
    """The first block of a tiny MoE and two streams that differ."""

    def __init__(self, model: PreTrainedModel) -> None:
        unfuse(model)
        starve(model, 1)
        model.requires_grad_(False)
        name, blocks = find_blocks(model)
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(0, 250, (2, 9), generator=generator) for _ in range(3)]
        recording = record_calls(model, blocks, ids)
        self.name, self.block, self.call = f"{name}.0", blocks[0], recording.calls[0][0]
        noise = [0.05 * x.std() * torch.randn(x.shape) for x in recording.hidden]
        quant = [x + e for x, e in zip(recording.hidden, noise, strict=True)]
        self.streams = Streams(recording.hidden, quant)

    def quantize(self, recipe: Recipe) -> tuple[BlockQuantizer, Any]:
        from pbq import methods
        from pbq.allocate import ChannelStats, PlanInput

        linears = find_linears(self.block)
        config = QuantConfig("rtn", bits=3, nsamples=6, seqlen=9)
        method = methods.get("rtn", config)
        layers = {
            f"{self.name}.{n}": PlanInput(
                weight_of(m), ChannelStats(*torch.rand(3, weight_of(m).shape[1]))
            )
            for n, m in linears.items()
        }
        quantizer = BlockQuantizer(
            self.block, linears, self.call, method, recipe, config, self.name
        )
        return quantizer, quantizer.run(self.streams, method.plan(layers, config))


def experts_inputs(block: nn.Module, x: Tensor, call: Any) -> tuple[Tensor, Tensor, Tensor]:
    found: list[Any] = []
    hook = block.mlp.experts.register_forward_pre_hook(lambda m, args: found.append(args))
    with torch.no_grad():
        run_block(block, x, call)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("compensate", [False, True])
def test_each_experts_hessian_is_that_of_its_own_tokens(
    compensate: bool, moe_architecture: str, tiny_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow truth: copies of the block, one token after the other."""
    scene = Scene(tiny_model(moe_architecture))
    original = copy.deepcopy(scene.block)
    given: dict[str, Any] = {}
    real = BlockQuantizer._quantize

    def spy(self: BlockQuantizer, linear: str, moments: Any, plans: Any) -> Any:
        given[linear] = (moments, copy.deepcopy(self.block))
        return real(self, linear, moments, plans)

    monkeypatch.setattr(BlockQuantizer, "_quantize", spy)
    quantizer, done = scene.quantize(Recipe(compensate=compensate))
    inputs = [experts_inputs(original, x, scene.call) for x in scene.streams.fp]
    index, weights = (torch.cat([found[i] for found in inputs]) for i in (1, 2))
    targets = torch.cat(
        [run_block(original, x, scene.call).flatten(0, 1) for x in scene.streams.fp]
    )
    assert torch.equal(torch.cat(list(quantizer.targets)).flatten(0, 1), targets)
    least = max(
        weight_of(quantizer.linears[f"mlp.experts.0.{n}"]).shape[1] for n in ("gate_up", "down")
    )
    for e in range(4):
        own = (index == e).any(1).nonzero()[:, 0]
        others = borrowed(own, 54, least)
        assert (e == 1) == (len(own) == 0)
        moments, state = given[f"mlp.experts.{e}.down"]
        x_q = torch.cat([experts_inputs(state, x, scene.call)[0] for x in scene.streams.quant])
        x_f = torch.cat([found[0] for found in inputs])
        H, cross = (torch.zeros_like(moments.H, dtype=torch.float64) for _ in range(2))
        total = 0.0
        for t in [*own.tolist(), *others.tolist()]:
            square = weights[t][index[t] == e].pow(2) if t in own else weights.pow(2).mean()
            w = float(square / (targets[t].pow(2).mean() + 1e-6)) if compensate else 1.0
            q = state.mlp.experts.gated(e, x_q[t : t + 1])[0].double()
            f = original.mlp.experts.gated(e, x_f[t : t + 1])[0].double()
            H += w * torch.outer(q, q)
            cross += w * torch.outer(f - q, q)
            total += w
        for found, expected in ((moments.H, H / total), (moments.gaps.cross, cross / total)):
            atol = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=atol)
        for linear in ("gate_up", "down"):
            report = done.layers[f"mlp.experts.{e}.{linear}"]
            assert (report.tokens, report.borrowed) == (len(own), len(others))


# --- packed ------------------------------------------------------------------------------------


def test_round_trip_of_packed_experts(
    moe_architecture: str, packed_checkpoint: Checkpoints, packed_model: Models, tmp_path: Path
) -> None:
    path, model = packed_checkpoint(moe_architecture), packed_model(moe_architecture)
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))
    experts = [n for n, _ in packed_linears(loaded) if ".experts." in n]
    assert len(experts) == 3 * 4 * 2 and "model.layers.2.mlp.experts.3.down" in experts
    loaded.save_pretrained(tmp_path)
    names = ("config.json", "model.safetensors")
    assert [(path / n).read_bytes() for n in names] == [(tmp_path / n).read_bytes() for n in names]
    assert checkpoint.verify(path).unchecked == ()
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 20)
    dense = {tuple(weight_of(m).shape) for m in find_linears(loaded).values()} - {(272, 48)}
    assert not dense


@pytest.fixture
def reference_backend() -> Any:
    set_backend("reference")
    yield
    set_backend("auto")


def test_dequantized_experts_are_fused_for_plain_transformers(
    moe_architecture: str,
    packed_checkpoint: Checkpoints,
    tiny_checkpoint: Checkpoints,
    reference_backend: None,
    tmp_path: Path,
) -> None:
    path = packed_checkpoint(moe_architecture)
    packed = AutoModelForCausalLM.from_pretrained(path)
    export(path, tmp_path / "dense", "float32")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values()) and not find_experts(dense)
    # experts' products are summed in another order
    assert torch.allclose(logits(dense), logits(packed), atol=1e-5)
    stored, plain = (
        load_file(p / "model.safetensors")
        for p in (tmp_path / "dense", tiny_checkpoint(moe_architecture))
    )
    assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in plain.items()}
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_a_whole_run(moe_architecture: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    config = QuantConfig("gptq", bits=3.5, group_size=-1, calib=str(text), nsamples=4, seqlen=16)
    source = str(tiny_checkpoint(moe_architecture))
    planned = planning.plan(source, config)
    report = quantize(source, out, config)
    assert planned.layers == len(contents.describe(out).errors) == 3 * (4 + 4 * 2)
    assert report.bits == pytest.approx(planned.bits) and report.bits <= 3.5
    assert "3 x router in full precision" in report.coverage in planned.rows()["quantized"]
    said = json.loads((out / "report.json").read_text())
    for block in said["blocks"]:
        layers = [v for n, v in block["layers"].items() if n.endswith(".down")]
        assert len(layers) == 4 and sum(layer["tokens"] for layer in layers) == 64 * 2
        assert all(layer["tokens"] + layer["borrowed"] >= 36 for layer in layers)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(logits(model)).all()
    assert checkpoint.verify(out).stored_bits == pytest.approx(report.bits)
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
