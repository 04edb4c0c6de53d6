"""A .gguf file with the packed values: what other programs read back, and what was lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import pbq
from pbq import hf, linear
from pbq.config import QuantConfig
from pbq.errors import ModelError, UsageError
from pbq.gguf_export import export_gguf
from pbq.hf import PbqConfig, install
from pbq.models import find_blocks, find_linears, weight_of
from pbq_kernels.layout import Tier

gguf = pytest.importorskip("gguf")

# What transformers reads back from each architecture: qwen3's head_dim it takes to be 128.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {"layer_types": None, "use_sliding_window": False},
    "qwen3": {"head_dim": 128},
}
TEXT = "Once upon a midnight dreary,  in 1845:\nnevermore!</s> 🐦"


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, a few merges, tokens that are special or only added; 272 - 263 ids are no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "n"), ("Ġ", "m"), ("o", "n")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens(["<think>"])
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return fast


@pytest.fixture
def packed(packed_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """packed(architecture, **config changes): a checkpoint that can be written as GGUF."""

    def write(architecture: str, **changes: Any) -> Path:
        out = tmp_path / f"{architecture}-out"
        model = packed_model(architecture, **{**ARCHITECTURES.get(architecture, {}), **changes})
        model.save_pretrained(out)
        bpe_tokenizer().save_pretrained(out)
        return out

    return write


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(5, 45)[None]).logits
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_same_model_back(
    architecture: str,
    packed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = packed(architecture)
    done = export_gguf(out, tmp_path / "model.gguf", "float32")
    assert all(tensor.error == 0 for tensor in done.tensors) and "exact" in str(done.rows())
    monkeypatch.setattr(linear, "_backend_name", "reference")
    ours = pbq.load(str(out), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert not list(hf.packed_linears(plain)) and plain.dtype == torch.float32
    for name, module in hf.packed_linears(ours):
        assert torch.equal(plain.get_submodule(name).weight, module.dequantize()), name
    torch.testing.assert_close(logits(plain), logits(ours), atol=1e-5, rtol=1e-5)
    before = AutoTokenizer.from_pretrained(out)
    after = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert after(TEXT).input_ids == before(TEXT).input_ids
    whole = after("<think>in</s>").input_ids
    assert whole == before("<think>in</s>").input_ids and len(whole) == 3
    assert after.eos_token == before.eos_token and after.chat_template == before.chat_template


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_packed_embeddings_are_written_dense(
    dtype: str, tied: bool, tiny_model: Callable[..., Any], tmp_path: Path, text: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    sizes = {"hidden_size": 64, "intermediate_size": 96}  # whole blocks of Q8_0
    tiny_model("llama", tie_word_embeddings=tied, **sizes).save_pretrained(source)
    bpe_tokenizer().save_pretrained(source)
    config = QuantConfig("rtn", bits=6, calib=str(text), nsamples=4, seqlen=16, embed_bits=8)
    pbq.quantize(str(source), out, config)
    ours = pbq.load(str(out), dtype=torch.float32)
    assert {"model.embed_tokens"} < {name for name, _ in hf.packed_modules(ours)}
    done = export_gguf(out, tmp_path / "model.gguf", dtype, max_error=0.02)
    kinds = {tensor.name: tensor.type for tensor in done.tensors}
    assert kinds["token_embd.weight"] == {"float32": "F32", "q8_0": "BF16"}[dtype]
    assert ("output.weight" in kinds) == (not tied)
    assert all(name.endswith((".weight", ".bias")) for name in kinds)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert plain.config.tie_word_embeddings == tied
    close = {"float32": 0.0, "q8_0": 0.01}[dtype]
    for name, module in hf.packed_modules(ours):
        found, wanted = plain.get_submodule(name).weight.detach(), module.dequantize()
        assert float((found - wanted).norm() / wanted.norm()) <= close, name


def test_errors_are_those_of_what_is_read_back(packed: Callable[..., Path], tmp_path: Path) -> None:
    """hidden and intermediate sizes are multiples of 32, whole blocks of Q8_0."""
    out = packed("llama", hidden_size=64, intermediate_size=96)
    done = export_gguf(out, tmp_path / "model.gguf", "q8_0")
    kinds = {tensor.type for tensor in done.tensors if tensor.name.endswith("attn_k.weight")}
    assert kinds == {"Q8_0"} and 0 < done.worst.error < 0.01
    ours = pbq.load(str(out), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    stored = {tensor.name: tensor for tensor in done.tensors}
    for i in range(3):
        for name, short in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
            full = f"model.layers.{i}.{name}"
            before = ours.get_submodule(full).dequantize()
            lost = plain.get_submodule(full).weight.detach() - before
            error = float(lost.norm() / before.norm())
            assert error == pytest.approx(stored[f"blk.{i}.{short}.weight"].error, rel=1e-4)
    size = (tmp_path / "model.gguf").stat().st_size
    weights = sum(tensor.nbytes for tensor in done.tensors)
    assert weights < size < weights + 20_000
    assert done.to_dict()["tensors"][0].keys() == {"name", "type", "shape", "nbytes", "error"}


@pytest.mark.parametrize(
    ("planes", "down", "q"), [(1, "TQ1_0", "Q4_1"), (2, "Q4_1", "Q4_1"), (3, "Q8_0", "Q8_0")]
)
def test_a_simple_layer_fits_a_small_type(
    planes: int,
    down: str,
    q: str,
    tiny_model: Callable[..., Any],
    random_packed: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """One tier of even levels: two are ternary, and two or four are among sixteen even ones."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=256)
    name, blocks = find_blocks(model)
    tiers = [Tier(planes, -1, tied=True)]
    packed = {
        f"{name}.{layer}": (random_packed(*weight_of(module).shape, tiers, seed=seed), None)
        for seed, (layer, module) in enumerate(find_linears(blocks).items())
    }
    out = tmp_path / "out"
    install(model, packed, PbqConfig("random", 6.0, provenance={})).save_pretrained(out)
    bpe_tokenizer().save_pretrained(out)
    done = export_gguf(out, tmp_path / "model.gguf", "smallest")
    found = {tensor.name: tensor for tensor in done.tensors}
    assert found["blk.1.ffn_down.weight"].type == down
    assert found["blk.1.attn_q.weight"].type == q
    # where the levels fit, only the block's float16 scale is rounded
    assert found["blk.1.attn_q.weight"].error < (0.01 if q == "Q8_0" else 5e-4)
    assert (found["blk.1.ffn_down.weight"].error == 0) == (down == "TQ1_0")
    assert found["token_embd.weight"].type == "F32" and found["token_embd.weight"].error == 0


def test_too_great_an_error_is_refused_and_can_be_allowed(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    out, file = packed("llama", hidden_size=64, intermediate_size=96), tmp_path / "model.gguf"
    with pytest.raises(UsageError, match=r"as Q4_0: its relative error would be 0\.\d+, above"):
        export_gguf(out, file, "q4_0")
    with pytest.raises(UsageError, match=r"as TQ1_0: rows of 64 values are no multiple of its 256"):
        export_gguf(out, file, "tq1_0")
    assert not list(tmp_path.glob("model*"))
    done = export_gguf(out, file, "q4_0", max_error=0.5)
    assert 0.01 < done.worst.error < 0.5


def test_what_llama_cpp_would_compute_otherwise_is_refused(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for architecture, changes, message in (
        ("opt", {}, "knows llama, mistral, qwen2, qwen3, not opt"),
        ("mistral", {"sliding_window": 4}, "windows of 4"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"rope_parameters": scaled}, "rope of type linear"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
    ):
        out = packed(architecture, **changes)
        with pytest.raises(ModelError, match=message + ".*convert_hf_to_gguf"):
            export_gguf(out, tmp_path / "model.gguf")
        shutil.rmtree(out)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_has_no_name_is_refused(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    out, file = packed("llama"), tmp_path / "model.gguf"
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save_pretrained(out)
    with pytest.raises(ModelError, match=r"no name for its way to cut text.*Metaspace"):
        export_gguf(out, file)
    (out / "tokenizer.json").unlink()
    with pytest.raises(Exception, match=r"tokenizer"):
        export_gguf(out, file)


def test_an_interrupted_export_leaves_nothing(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = packed("llama"), tmp_path / "model.gguf"

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(out, file)
    assert list(tmp_path.iterdir()) == [out]
    file.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export_gguf(out, file)
