"""One block at a time: equal to the whole load, bit for bit, and gone when it is dropped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pbq.errors import ModelError
from pbq.loader import BlockLoader
from pbq.models import load_model, record_calls, run_block, run_tail
from pbq.sources import Source, resolve_source

Checkpoints = Callable[[str], Path]
IDS = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(7))


def source_of(path: Path) -> Source:
    return resolve_source(str(path))


def is_meta(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters())


def by_blocks(loader: BlockLoader, ids: Tensor) -> Tensor:
    """Logits with one block in memory at a time."""
    recording = record_calls(loader.model, loader.blocks, [ids])
    hidden = recording.hidden[0]
    for i in range(len(loader.blocks)):
        with loader.loaded(i) as block, torch.no_grad():
            hidden = run_block(block, hidden, recording.calls[i][0])
    return run_tail(loader.model, loader.blocks, ids, hidden)


def check(path: Path, dtype: torch.dtype) -> None:
    loader = BlockLoader(source_of(path), dtype)
    whole, _ = load_model(str(path), dtype)
    blocks = whole.get_submodule(loader.name)
    assert is_meta(loader.blocks) and loader.streams
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    for i in range(len(loader.blocks)):
        with loader.loaded(i) as block:
            found = dict(block.named_parameters()) | dict(block.named_buffers())
            wanted = dict(blocks[i].named_parameters()) | dict(blocks[i].named_buffers())
            assert found.keys() == wanted.keys()
            for name, tensor in found.items():
                assert tensor.dtype == wanted[name].dtype, name
                assert torch.equal(tensor, wanted[name]), name
            others = [other for j, other in enumerate(loader.blocks) if j != i]
            assert all(is_meta(other) for other in others)
        assert is_meta(loader.blocks)
    around = {**dict(loader.model.named_parameters()), **dict(loader.model.named_buffers())}
    assert around.keys() == expected.keys()
    for name, tensor in around.items():
        assert tensor.is_meta or torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert torch.equal(by_blocks(loader, IDS), whole(IDS, use_cache=False).logits)


def test_blocks_are_those_of_the_whole_load(
    architecture: str, tiny_checkpoint: Checkpoints
) -> None:
    check(tiny_checkpoint(architecture), torch.float32)


def test_experts_are_fused_as_in_the_whole_load(
    moe_architecture: str, tiny_checkpoint: Checkpoints
) -> None:
    stored = load_file(tiny_checkpoint(moe_architecture) / "model.safetensors")
    assert any("experts.3." in name for name in stored)  # one by one on the disk
    check(tiny_checkpoint(moe_architecture), torch.float32)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_cast_is_that_of_the_whole_load(
    stored: torch.dtype, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model("gemma3_text").to(stored).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    check(tmp_path, torch.bfloat16)


def test_many_shards(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="50KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check(tmp_path, torch.float32)


def test_a_checkpoint_of_the_bare_decoder(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Without the prefix of the model that has a head: transformers adds it."""
    shutil.copytree(tiny_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    stored = {name.removeprefix("model."): t for name, t in load_file(file).items()}
    save_file(stored, file, {"format": "pt"})
    check(tmp_path, torch.float32)


def test_what_was_done_to_a_block_goes_with_it(tiny_checkpoint: Checkpoints) -> None:
    loader = BlockLoader(source_of(tiny_checkpoint("llama")), torch.float32)
    with loader.loaded(1) as block:
        before = block.mlp.up_proj.weight.clone()
        block.mlp.up_proj.weight.zero_()
        assert loader.load(1) is block and not block.mlp.up_proj.weight.any()
    with loader.loaded(1) as block:
        assert torch.equal(block.mlp.up_proj.weight, before)


def test_the_whole_model_and_back(tiny_checkpoint: Checkpoints) -> None:
    path = tiny_checkpoint("gpt2")
    loader = BlockLoader(source_of(path), torch.float32)
    expected, _ = load_model(str(path), torch.float32)
    with loader.whole() as model, torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert is_meta(loader.blocks)


def test_a_source_that_is_read_whole_stays_whole(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    loader = BlockLoader(source_of(tmp_path), torch.float32)
    assert not loader.streams
    with loader.loaded(0) as block:
        block.mlp.up_proj.weight.zero_()
    with loader.whole() as model:
        assert not any(p.is_meta for p in model.parameters())
        assert not model.get_submodule(loader.name)[0].mlp.up_proj.weight.any()


def test_faults_in_a_block_are_told_when_it_is_loaded(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    stored = load_file(file)
    for fault, message in (
        ({}, f"{name} is missing"),
        ({name: stored[name][1:].clone()}, f"{name} has another shape"),
    ):
        rest = {key: tensor for key, tensor in stored.items() if key != name}
        save_file({**rest, **fault}, file, {"format": "pt"})
        loader = BlockLoader(source_of(tmp_path), torch.float32)
        loader.load(0)
        with pytest.raises(ModelError, match=message):
            loader.load(1)
