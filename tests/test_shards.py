"""A checkpoint written in parts is the one that save_pretrained writes whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pbq import checkpoint
from pbq.models import find_blocks
from pbq.shards import ShardWriter

Models = Callable[..., PreTrainedModel]


def write(model: PreTrainedModel, folder: Path, limit: int) -> list[str]:
    """In parts: what is around the blocks, then each block; the parts in the order written."""
    name, blocks = find_blocks(model)
    written: list[str] = []
    writer = ShardWriter(model, folder, limit, written.append)
    every = model.state_dict()
    writer.add("around", {n: t for n, t in every.items() if not n.startswith(f"{name}.")})
    for i in range(len(blocks)):
        inside = f"{name}.{i}."
        writer.add(str(i), {n: t for n, t in every.items() if n.startswith(inside)})
    writer.finish()
    return written


def test_one_shard_has_the_bytes_of_the_whole(
    architecture: str, packed_model: Models, tmp_path: Path
) -> None:
    for model in (packed_model(architecture), packed_model(architecture)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if folder.name == "0":
            model.save_pretrained(folder)
        else:
            write(model, folder, 10**9)
    whole, parts = (
        {p.name: p.read_bytes() for p in f.iterdir()} for f in sorted(tmp_path.iterdir())
    )
    assert whole == parts


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_many_shards_load_and_verify(
    architecture: str, packed_model: Models, tmp_path: Path
) -> None:
    model = packed_model(architecture)
    written = write(model, tmp_path, 1)
    assert written == ["around", "0", "1", "2"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored: dict[str, Tensor] = {}
    for i in range(1, 5):
        stored |= load_file(tmp_path / f"model-{i:05d}-of-00004.safetensors")
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    names = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert {p.name for p in tmp_path.iterdir()} - set(index["weight_map"].values()) == names
    assert not checkpoint.verify(tmp_path).unchecked
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_shard_takes_parts_up_to_the_limit(packed_model: Models, tmp_path: Path) -> None:
    model = packed_model("llama")
    name, blocks = find_blocks(model)
    one = sum(t.nbytes for t in blocks[0].state_dict().values())
    around = sum(
        t.nbytes
        for n, t in model.state_dict().items()
        if not n.startswith(name) and n != "lm_head.weight"
    )
    held = around + model.lm_head.weight.nbytes + one
    write(model, tmp_path, held)
    assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2
