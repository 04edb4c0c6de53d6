"""Any causal LM: loading it or refusing to, its blocks, its linears, one block at a time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    dynamic_module_utils,
)

from pbq.errors import ModelError, UsageError
from pbq.models import (
    Call,
    check_coverage,
    compute_dtype,
    coverage,
    find_blocks,
    find_linears,
    load_model,
    outline,
    pick_device,
    record_calls,
    run_block,
    run_tail,
    set_weight,
    shared_inputs,
    weight_of,
)
from pbq.sources import Source

Models = Callable[..., PreTrainedModel]
Checkpoints = Callable[[str], Path]

# Sequences longer than the sliding windows; the last batch is smaller than the others.
BATCHES = [
    torch.randint(0, 250, (rows, 11), generator=torch.Generator().manual_seed(seed))
    for seed, rows in enumerate((3, 3, 2))
]
GROUPS = {
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "phi3": [
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ],
    "opt": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ],
    # attention and mlp side by side behind one norm
    "falcon": [
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
    ],
}
LLAMA_GROUPS = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


# --- blocks and linears ------------------------------------------------------------------------


def test_blocks_hold_every_linear_but_the_head(architecture: str, tiny_model: Models) -> None:
    model = tiny_model(architecture)
    name, blocks = find_blocks(model)
    assert model.get_submodule(name) is blocks
    assert len(blocks) == model.config.num_hidden_layers
    inside = {f"{name}.{n}" for n in find_linears(blocks)}
    assert set(find_linears(model)) - inside == {"lm_head"}
    found = check_coverage(model, 1.0)
    assert found.share == 1 and found.skipped == {}
    assert found.total == sum(weight_of(m).numel() for m in find_linears(blocks).values())


def test_weights_are_read_and_written_as_n_by_k(architecture: str, tiny_model: Models) -> None:
    _, blocks = find_blocks(tiny_model(architecture))
    for linear in find_linears(blocks[0]).values():
        k = weight_of(linear).shape[1]
        x = torch.randn(5, k)
        bias = 0 if linear.bias is None else linear.bias
        assert torch.allclose(linear(x), x @ weight_of(linear).T + bias, atol=1e-5)
        W = torch.randn_like(weight_of(linear))
        set_weight(linear, W.double())
        assert torch.equal(weight_of(linear), W)
        assert torch.allclose(linear(x), x @ W.T + bias, atol=1e-5)


def test_experts_are_seen_and_refused(moe_architecture: str, tiny_model: Models) -> None:
    model = tiny_model(moe_architecture)
    found = coverage(model)
    layers = model.config.num_hidden_layers
    experts = [n for n, reason in found.skipped.items() if reason.startswith("fused experts, 4x")]
    assert len(experts) == 2 * layers
    assert sum("not a linear layer" in reason for reason in found.skipped.values()) == layers
    weights = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim >= 2]
    assert found.total == sum(p.numel() for p in weights)
    assert found.quantized == layers * (48 * 48 * 2 + 24 * 48 * 2)
    with pytest.raises(ModelError, match=rf"only {found.share:.1%} of the .*fused experts"):
        check_coverage(model)
    assert check_coverage(model, 0.1).share < 0.3


def test_no_blocks_no_run() -> None:
    class Flat(nn.Module):
        _no_split_modules = None

    with pytest.raises(ModelError, match="Flat: no list of decoder blocks"):
        find_blocks(Flat())  # type: ignore[arg-type]


# --- running blocks ------------------------------------------------------------------------------


def last_output(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> Tensor:
    """What the last block of the whole model returns."""
    seen: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@torch.no_grad()
def test_recorded_blocks_are_the_model(architecture: str, tiny_model: Models) -> None:
    model = tiny_model(architecture)
    _, blocks = find_blocks(model)
    before = list(blocks)
    recording = record_calls(model, blocks, BATCHES)
    assert list(blocks) == before
    assert len(recording.calls) == len(blocks)
    for i, ids in enumerate(BATCHES):
        hidden = recording.hidden[i]
        fewer = hidden[:2]
        for block, calls in zip(blocks, recording.calls, strict=True):
            hidden = run_block(block, hidden, calls[i])
            # one call serves every batch of its shape, and smaller ones
            fewer = run_block(block, fewer, calls[0])
        assert torch.equal(hidden, last_output(model, blocks, ids))
        assert torch.allclose(fewer, hidden[:2], atol=1e-5)
        assert torch.equal(run_tail(model, blocks, ids, hidden), model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"n_layer": 1}], ids=["llama", "bloom"])
def test_a_single_block_is_enough(changes: dict[str, int], tiny_model: Models) -> None:
    model = tiny_model("bloom" if changes else "llama", num_hidden_layers=1, **changes)
    _, blocks = find_blocks(model)
    assert len(blocks) == 1
    ids = BATCHES[0][:1]
    recording = record_calls(model, blocks, [ids])
    hidden = run_block(blocks[0], recording.hidden[0], recording.calls[0][0])
    assert torch.equal(run_tail(model, blocks, ids, hidden), model(ids).logits)


@torch.no_grad()
def test_no_block_is_executed_or_even_loaded(architecture: str, tiny_model: Models) -> None:
    model = tiny_model(architecture)
    _, blocks = find_blocks(model)
    expected = record_calls(model, blocks, BATCHES[:1])
    blocks.to("meta")
    recording = record_calls(model, blocks, BATCHES[:1])
    assert torch.equal(recording.hidden[0], expected.hidden[0])
    for calls, wanted in zip(recording.calls, expected.calls, strict=True):
        assert calls[0].kwargs.keys() == wanted[0].kwargs.keys()


def test_layers_have_masks_of_their_own(tiny_model: Models) -> None:
    model = tiny_model("gemma3_text")
    _, blocks = find_blocks(model)
    calls = record_calls(model, blocks, BATCHES[:1]).calls
    sliding, full = (calls[i][0].kwargs for i in (0, 1))
    assert sliding["attention_mask"].shape == (3, 1, 11, 11) and full["attention_mask"] is None
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


def test_equal_masks_are_held_once(tiny_model: Models) -> None:
    model = tiny_model("gemma2")
    _, blocks = find_blocks(model)
    calls = record_calls(model, blocks, BATCHES).calls
    masks = {id(call.kwargs["attention_mask"]) for per_block in calls for call in per_block}
    # sliding and full, for the first two batches together and for the smaller third
    assert len(masks) == 4


def test_a_call_is_cut_to_fewer_rows() -> None:
    mask, alibi, positions = torch.ones(4, 1, 6, 6), torch.ones(8, 1, 6), torch.ones(1, 6)
    call = Call((alibi,), {"mask": mask, "rope": (positions, None), "cache": False}, batch=4)
    cut = call.first(3)
    assert cut.args[0].shape == (6, 1, 6) and cut.kwargs["mask"].shape == (3, 1, 6, 6)
    assert cut.kwargs["rope"][0] is positions and cut.kwargs["rope"][1] is None
    assert call.first(4) is call


class _Skipping(nn.Module):
    """A model whose second block gets something else than what the first returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        hidden = torch.ones(1, 2, 4)
        for layer in self.layers:
            hidden = layer(hidden) + 1
        return hidden


def test_models_that_cannot_be_recorded_are_refused() -> None:
    model = _Skipping()
    before = list(model.layers)
    with pytest.raises(ModelError, match="_Skipping: its decoder blocks do not hand"):
        record_calls(model, model.layers, BATCHES)  # type: ignore[arg-type]
    assert list(model.layers) == before
    with pytest.raises(ModelError, match="does not run all of its blocks"):
        record_calls(model, nn.ModuleList(before), BATCHES)  # type: ignore[arg-type]


def test_the_models_own_error_is_told(tiny_model: Models) -> None:
    model = tiny_model("gpt2")
    _, blocks = find_blocks(model)
    with pytest.raises(ModelError, match="GPT2LMHeadModel: its forward fails: index out of range"):
        record_calls(model, blocks, [torch.tensor([[10**6]])])


def test_linears_that_share_an_input(architecture: str, tiny_model: Models) -> None:
    model = tiny_model(architecture)
    _, blocks = find_blocks(model)
    recording = record_calls(model, blocks, BATCHES[:1])
    found = shared_inputs(blocks[1], recording.hidden[0], recording.calls[1][0])
    if architecture in ("bloom", "gpt_neox"):
        assert [len(group) for group in found] == [1, 1, 1, 1]
    else:
        assert found == GROUPS.get(architecture, LLAMA_GROUPS)


def test_a_linear_that_never_runs_is_named(tiny_model: Models) -> None:
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    recording = record_calls(model, blocks, BATCHES[:1])
    blocks[0].spare = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="LlamaDecoderLayer: spare does not take part"):
        shared_inputs(blocks[0], recording.hidden[0], recording.calls[0][0])


# --- loading -----------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A dense llama that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "broken"))


def refusal(path: Path, **kwargs: Any) -> str:
    """The message of the ModelError, one line that names the source."""
    with pytest.raises(ModelError) as caught:
        load_model(str(path), torch.float32, **kwargs)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said and caught.value.exit_code == 3
    return said


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_model(dtype: torch.dtype, tiny_checkpoint: Checkpoints, tiny_model: Models) -> None:
    model, tokenizer = load_model(str(tiny_checkpoint("gpt2")), dtype)
    assert model.dtype == dtype and not model.training
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    if dtype == torch.float32:
        ids = BATCHES[0]
        assert torch.equal(model(ids).logits, tiny_model("gpt2")(ids).logits)


def test_packed_models_load_only_where_they_are_wanted(packed_checkpoint: Checkpoints) -> None:
    path = packed_checkpoint("llama")
    assert "already quantized with pbq; give the model it was made from" in refusal(path)
    model, _ = load_model(str(path), torch.float32, packed=True)
    assert find_linears(model).keys() == {"lm_head"}


def test_quantized_by_others(broken: Path) -> None:
    edit_json(broken / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantized with gptq; give the unquantized" in refusal(broken)
    assert "already quantized with gptq" in refusal(broken, packed=True)


def test_not_a_causal_model(tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    BertForMaskedLM(BertConfig(num_hidden_layers=1, **tiny)).save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM is not a causal language model" in refusal(tmp_path / "bert")
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    assert "t5 is not a causal language model" in refusal(tmp_path / "t5")


def test_unknown_architecture(broken: Path) -> None:
    edit_json(broken / "config.json", model_type="gpt9", architectures=["GPT9ForCausalLM"])
    assert "unreadable config" in refusal(broken) and "gpt9" in refusal(broken)


def test_code_that_comes_with_the_model_runs_only_when_trusted(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers copies such code to a cache, and adds that to the path: not to the user's
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (broken / "custom.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "custom.OwnConfig", "AutoModelForCausalLM": "custom.OwnForCausalLM"}
    edit_json(broken / "config.json", model_type="own", auto_map=auto_map)
    assert "custom code" in refusal(broken)
    assert compute_dtype(Source("m", broken), torch.device("cpu")) == torch.float32
    model, _ = load_model(str(broken), torch.float32, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert check_coverage(model).share == 1


def test_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(broken)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(keep: int, broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "cannot be loaded" in refusal(broken)


def test_missing_tensors(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing from its files, as model.layers.0.mlp.up_proj" in refusal(broken)


def test_no_tokenizer(broken: Path) -> None:
    for file in broken.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refusal(broken)


def test_a_broken_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{}")
    assert "no usable tokenizer" in refusal(broken)


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"device '{name}' cannot be used"):
            pick_device(name)


def test_the_dtype_to_compute_in(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    source = Source("m", broken)
    assert compute_dtype(source, cpu) == torch.float32
    edit_json(broken / "config.json", dtype="float16")
    assert compute_dtype(source, cpu) == torch.bfloat16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on, has=has: (7 + has, 5))
        assert compute_dtype(source, gpu) == dtype
    edit_json(broken / "config.json", dtype="float7")
    with pytest.raises(ModelError, match="m: unreadable config"):
        compute_dtype(source, cpu)


def test_an_outline_has_shapes_and_no_weights(tiny_checkpoint: Checkpoints) -> None:
    model = outline(Source("m", tiny_checkpoint("gpt2")))
    assert all(p.is_meta for p in model.parameters())
    assert coverage(model).share == 1


@pytest.mark.slow
@pytest.mark.real
def test_gguf(real_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gguf")
    model, tokenizer = load_model(str(real_gguf), torch.bfloat16)
    assert "was already quantized" in caplog.text
    assert coverage(model).quantized == 106_168_320
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
