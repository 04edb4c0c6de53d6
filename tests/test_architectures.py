"""Architectures, each from its blocks to generated text: a few here, all of them with `-m slow`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

sys.path.append(str(Path(__file__).parent / "reliability"))
from architectures import STEPS, try_architectures

DENSE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "opt", "gpt_neox", "phi"]
MORE_DENSE = ["phi3", "bloom", "falcon", "gpt2", "smollm3"]
EXPERTS = ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "gpt_oss", "deepseek_v3"]
QUICK = ["gemma3_text", "gpt_oss"]


@pytest.mark.parametrize(
    "name",
    [
        n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
        for n in DENSE + MORE_DENSE + EXPERTS
    ],
)
def test_an_architecture_from_its_blocks_to_its_tokens(
    name: str, tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    found = try_architectures([name], tiny_model, tiny_tokenizer, tmp_path)
    assert found.faults == []
    assert found.passed == {name: dict.fromkeys(STEPS, True)}


def test_what_stops_an_architecture_is_told(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    def broken(name: str) -> PreTrainedModel:
        model = tiny_model(name)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        return model

    found = try_architectures(["llama"], broken, tiny_tokenizer, tmp_path)
    assert found.passed == {"llama": dict.fromkeys(STEPS, False)}
    assert found.faults == ["llama: AssertionError: blocks are not the model"]
