"""Checkpoints through transformers: written, read, refused. All architectures, no hub."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import pbq
from pbq import hf
from pbq.checkpoint import verify
from pbq.errors import ModelError
from pbq.hf import CheckpointError, PackedLayer, PbqConfig, install, packed_linears
from pbq.linear import PackedLinear, set_backend
from pbq.models import find_blocks, find_linears, set_weight
from pbq_kernels import FORMAT_VERSION, PackedFormatError, PackedWeight, Tier, reference

IDS = torch.tensor([[257, 10, 20, 30, 40, 50, 60, 70, 80, 90], [257, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
Models = Callable[..., PreTrainedModel]
Checkpoints = Callable[[str], Path]


@pytest.fixture
def changed(packed_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A packed llama that the test may damage."""
    return Path(shutil.copytree(packed_checkpoint("llama"), tmp_path / "changed"))


@pytest.fixture
def reference_backend() -> Iterator[None]:
    set_backend("reference")
    yield
    set_backend("auto")


def load(path: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def file_bytes(path: Path) -> dict[str, bytes]:
    names = ("config.json", "generation_config.json", "model.safetensors.index.json")
    files = [*path.glob("*.safetensors"), *(path / n for n in names if (path / n).exists())]
    return {file.name: file.read_bytes() for file in files}


def edit_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


# --- what is saved is what is loaded -----------------------------------------------------------


def test_round_trip(
    architecture: str, packed_model: Models, packed_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = packed_checkpoint(architecture)
    model = packed_model(architecture)
    loaded, info = load(path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path)
    assert file_bytes(tmp_path) == file_bytes(path)
    assert verify(path).unchecked == ()
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 13)


def test_no_dense_weight_is_in_memory(architecture: str, packed_checkpoint: Checkpoints) -> None:
    model = load(packed_checkpoint(architecture))
    linears = dict(packed_linears(model))
    _, blocks = find_blocks(model)
    assert len(linears) >= 3 * len(blocks) and not find_linears(blocks)
    dense = {tuple(sorted((m.layout.n, m.layout.k))) for m in linears.values()}
    for tensor in [*blocks.parameters(), *blocks.buffers()]:
        assert not (tensor.is_floating_point() and tuple(sorted(tensor.shape)) in dense)
    held = sum(t.nbytes for m in linears.values() for k, t in m.named_buffers() if k != "bias")
    assert 8 * held == sum(m.layout.stored_bits for m in linears.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_a_dense_model_of_the_dequantized_weights(
    architecture: str,
    dtype: torch.dtype,
    tiny_checkpoint: Checkpoints,
    packed_checkpoint: Checkpoints,
    reference_backend: None,
) -> None:
    packed = load(packed_checkpoint(architecture), dtype=dtype)
    dense = load(tiny_checkpoint(architecture), dtype=dtype)
    biased = False
    for name, linear in packed_linears(packed):
        set_weight(dense.get_submodule(name), linear.dequantize(dtype))
        biased |= linear.bias is not None
    # a dense linear may add its bias before the last rounding, a packed one adds it after
    tolerance = 2 * torch.finfo(dtype).eps if biased else 0.0
    assert torch.allclose(logits(packed), logits(dense), atol=tolerance * 20, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"], ids=str)
def test_dtype_is_the_models_and_never_the_scales(
    dtype: torch.dtype | str, packed_checkpoint: Checkpoints
) -> None:
    path = packed_checkpoint("qwen2")
    model = load(path, dtype=dtype)
    stored = load_file(path / "model.safetensors")
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
    expected = model.dtype
    assert logits(model).dtype == expected
    model.to(torch.float32).to(expected)
    for name, linear in packed_linears(model):
        assert linear.bias is None or linear.bias.dtype == model.dtype
        for key, tensor in linear.packed().tensors.items():
            assert tensor.dtype == stored[f"{name}.{key}"].dtype
            assert torch.equal(tensor, stored[f"{name}.{key}"])


def test_files_hold_the_bits_they_claim(packed_checkpoint: Checkpoints) -> None:
    path = packed_checkpoint("gemma2")
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    stored = load_file(path / "model.safetensors")
    layouts = {n: PackedLayer.from_dict(n, d).layout for n, d in said["layers"].items()}
    nbytes = sum(
        stored[f"{n}.{key}"].nbytes for n, layout in layouts.items() for key in layout.tensors()
    )
    weights = sum(layout.n * layout.k for layout in layouts.values())
    assert said["stored_bits"] == 8 * nbytes / weights
    assert (said["method"], said["bits"], said["format"]) == ("random", 6.0, FORMAT_VERSION)
    assert said["provenance"] == {"source": "gemma2"}


def test_shards_round_trip(packed_model: Models, tmp_path: Path) -> None:
    model = packed_model("llama")
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    loaded = load(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    verify(tmp_path / "b")


def test_tied_embeddings_stay_tied(packed_checkpoint: Checkpoints) -> None:
    path = packed_checkpoint("llama")
    model = load(path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(path / "model.safetensors")


# --- what people do with a loaded model --------------------------------------------------------


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map: Any, packed_checkpoint: Checkpoints) -> None:
    path = packed_checkpoint("llama")
    model = load(path, device_map=device_map)
    if device_map == "auto":
        model.cpu()
    assert not any(t.is_meta for t in model.state_dict().values())
    assert torch.equal(logits(model), logits(load(path)))


OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_disk_offload(
    offload_buffers: bool, packed_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = packed_checkpoint("llama")
    model = load(
        path,
        device_map=OFFLOADED,
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
    )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta == offload_buffers
    expected = logits(load(path))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    # what is not in memory has no form there either
    assert (model.model.layers[1].mlp.up_proj._prepared is None) == offload_buffers
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    verify(tmp_path / "saved")


def test_text_generation_pipeline(packed_checkpoint: Checkpoints) -> None:
    path = packed_checkpoint("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    generate = pipeline("text-generation", model=load(path), tokenizer=tokenizer)
    said = generate("hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert said.startswith("hello")


def test_copies_and_dequantized_models(
    packed_checkpoint: Checkpoints, tmp_path: Path, reference_backend: None
) -> None:
    model = load(packed_checkpoint("llama"))
    model.save_pretrained(tmp_path / "packed")  # config.dtype is a string after this
    dense = copy.deepcopy(model).dequantize()
    assert torch.equal(logits(dense), logits(model))
    assert not list(packed_linears(dense)) and list(packed_linears(model))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "dense")), logits(model))


def test_a_changed_weight_is_saved_with_its_new_checksum(
    packed_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    model = load(packed_checkpoint("llama"))
    before = logits(model)
    linear = model.model.layers[0].self_attn.q_proj
    linear.scale.mul_(2)
    linear.forget_prepared()
    model.save_pretrained(tmp_path)
    after = logits(load(tmp_path))
    assert torch.equal(after, logits(model)) and not torch.equal(after, before)


def test_pbq_load(packed_checkpoint: Checkpoints, tiny_checkpoint: Checkpoints) -> None:
    model = pbq.load(str(packed_checkpoint("llama")), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="not a checkpoint that pbq packed"):
        pbq.load(str(tiny_checkpoint("llama")))


def test_pbq_load_refuses_missing_dense_tensors(changed: Path) -> None:
    rewrite(changed, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"1 tensors are missing .* model\.norm\.weight"):
        pbq.load(str(changed))


def test_pbq_load_refuses_dense_tensors_of_another_shape(changed: Path) -> None:
    """Their checksum is that of the bytes, which may be the same."""

    def reshape(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][None].clone()

    rewrite(changed, reshape)
    said = r"model\.norm\.weight is \[1, \d+\] in its files, the model has \[\d+\]"
    with pytest.raises(ModelError, match=said):
        pbq.load(str(changed))


# --- install -----------------------------------------------------------------------------------


def test_install_refuses_what_does_not_fit(
    tiny_model: Models, random_packed: Callable[..., PackedWeight]
) -> None:
    def refused(name: str, packed: PackedWeight, bias: Tensor | None = None) -> str:
        with pytest.raises(CheckpointError) as caught:
            install(tiny_model("qwen2"), {name: (packed, bias)}, PbqConfig())
        return str(caught.value)

    square, q_proj = random_packed(48, 48), "model.layers.0.self_attn.q_proj"
    assert "model.layers.9: Qwen2ForCausalLM has no such module" in refused(
        "model.layers.9", square
    )
    assert "not a linear layer" in refused("model.embed_tokens", square)
    assert "48x48 in Qwen2ForCausalLM, 63x48 in" in refused(q_proj, random_packed(63, 48))
    assert "has a bias" in refused(q_proj, square)


def test_a_bias_may_be_added(
    packed_model: Models, random_packed: Callable[..., PackedWeight], tmp_path: Path
) -> None:
    model, name = packed_model("llama"), "lm_head"
    model = packed_model("llama", tie_word_embeddings=False)
    packed = random_packed(272, 48, (Tier(2, 48),))
    install(model, {name: (packed, torch.arange(272.0))}, model.config.quantization_config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


# --- refusals ----------------------------------------------------------------------------------


def test_a_newer_format_says_how_to_go_on(changed: Path) -> None:
    edit_config(changed, lambda q: q.update(format=FORMAT_VERSION + 1))
    with pytest.raises(ModelError, match=f"format {FORMAT_VERSION + 1}.*install a newer pbq"):
        load(changed)


def test_unknown_keys_are_ignored_with_one_warning(changed: Path) -> None:
    edit_config(changed, lambda q: q.update(colour="blue", shape=1))
    with pytest.warns(UserWarning, match="colour, shape") as caught:
        load(changed)
    assert len([w for w in caught if "pbq" in str(w.message)]) == 1


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda layer: layer.update(n=2**40), "impossible shape"),
        (lambda layer: layer.update(n=-84), "impossible shape"),
        (lambda layer: layer.update(n=84.0), "field 'n' has type float"),
        (lambda layer: layer.update(k=47), "columns"),
        (lambda layer: layer.update(tiers=[{"planes": 1, "columns": 1}] * 65), "tiers"),
        (lambda layer: layer.update(tiers="1"), "tiers"),
        (lambda layer: layer["tiers"][1].update(planes=99), "99 planes"),
        (lambda layer: layer.update(bias="yes"), "bias is 'yes'"),
        (lambda layer: layer.update(surprise=1), "unknown field 'surprise'"),
        (lambda layer: layer.update(overlay=5, overlay_bytes=3), "overlay"),
        (lambda layer: layer.clear(), "tiers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_descriptions_name_the_layer(
    edit: Callable[[dict[str, Any]], object], said: str, changed: Path
) -> None:
    edit_config(changed, lambda q: edit(q["layers"][LAYER]))
    with pytest.raises((PackedFormatError, ModelError)) as caught:
        load(changed)
    assert isinstance(caught.value, CheckpointError)
    assert LAYER in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers", [1]), ("layers", {LAYER: 7}), ("checksums", "all fine"), ("format", "1")],
)
def test_hostile_configs(key: str, value: Any, changed: Path) -> None:
    edit_config(changed, lambda q: q.update({key: value}))
    with pytest.raises(CheckpointError):
        load(changed)


def test_layers_that_the_model_does_not_have(changed: Path) -> None:
    def rename(q: dict[str, Any]) -> None:
        q["layers"]["model.layers.7.mlp.up_proj"] = q["layers"].pop(LAYER)

    edit_config(changed, rename)
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.up_proj: LlamaForCausalLM"):
        load(changed)


def rewrite(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_one_flipped_bit_is_refused(changed: Path) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight"][3, 2] ^= 4

    rewrite(changed, flip)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight: missing from the files, or dam"):
        load(changed)


@pytest.mark.parametrize("key", ["weight", "scale", "tier"])
def test_a_missing_tensor_is_refused(key: str, changed: Path) -> None:
    rewrite(changed, lambda tensors: tensors.pop(f"{LAYER}.{key}"))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.{key}: missing"):
        load(changed)


def test_a_tensor_without_checksum_is_refused(changed: Path) -> None:
    edit_config(changed, lambda q: q["checksums"].pop(f"{LAYER}.scale"))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.scale: config\.json has no checksum"):
        load(changed)


def test_values_outside_the_format_are_refused_though_the_checksum_is_right(changed: Path) -> None:
    def lie(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.tier"][0] = 9

    rewrite(changed, lie)
    tier = load_file(changed / "model.safetensors")[f"{LAYER}.tier"]
    edit_config(changed, lambda q: q["checksums"].update({f"{LAYER}.tier": hf.checksum(tier)}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.tier: column counts"):
        load(changed)


def test_a_tensor_of_another_shape_is_refused(changed: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.scale"] = tensors[f"{LAYER}.scale"][:, 1:].contiguous()

    rewrite(changed, cut)
    # whoever looks first, transformers or pbq
    with pytest.raises((RuntimeError, CheckpointError), match=r"mismatched|\.scale is \[84, 3\]"):
        load(changed)


def test_a_dense_model_cannot_be_loaded_as_a_packed_one(tiny_checkpoint: Checkpoints) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tiny_checkpoint("llama"), quantization_config=PbqConfig())


def test_without_import_pbq_loading_fails(packed_checkpoint: Checkpoints) -> None:
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM
        for path in sys.argv[1:]:
            try:
                AutoModelForCausalLM.from_pretrained(path)
            except RuntimeError as error:
                assert "mismatched" in str(error), error
            else:
                raise SystemExit(f"{path} was loaded")
        AutoModelForCausalLM.from_pretrained(sys.argv[1])
    """
    paths = [str(packed_checkpoint(architecture)) for architecture in ("llama", "gpt2")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 1
    assert "\nRuntimeError: " in done.stderr


def test_registering_twice_is_harmless() -> None:
    hf.register()
    hf.register()


def test_the_shared_config_object_lists_every_packed_module(packed_model: Models) -> None:
    model = packed_model("gpt2")
    config = model.config.quantization_config
    assert config is model.hf_quantizer.quantization_config
    assert model.hf_quantizer.is_compileable
    assert set(config.layers) == {
        n for n, m in model.named_modules() if isinstance(m, PackedLinear)
    }
    for name, linear in packed_linears(model):
        assert torch.equal(linear.dequantize(), reference.dequantize(linear.packed())), name
