"""Prompts are passages of the text, and what the model makes of them is greedy and bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pbq import samples
from pbq.evaluate import TokenizedText


def text_of(words: str, tokenizer: Any) -> TokenizedText:
    return TokenizedText(torch.tensor(tokenizer(words).input_ids), "text.txt", "0" * 64)


def test_passages_start_with_a_sentence_and_go_on_as_the_text_does(tiny_tokenizer: Any) -> None:
    words = "".join(f"This is sentence number {i} of a text. " for i in range(60))
    found = samples.passages(tiny_tokenizer, text_of(words, tiny_tokenizer))
    assert len(found) == samples.PASSAGES == len(set(found))
    for prompt, rest in found:
        # a token is a byte
        assert prompt.startswith("This is") and len(prompt) == samples.PROMPT_TOKENS
        assert len(rest) == samples.NEW_TOKENS and prompt + rest in words


@pytest.mark.parametrize("words", ["short", "no full stop in here " * 30, "a.\n"])
def test_any_text_has_a_passage(words: str, tiny_tokenizer: Any) -> None:
    found = samples.passages(tiny_tokenizer, text_of(words, tiny_tokenizer))
    assert 1 <= len(found) <= samples.PASSAGES
    assert all(prompt and prompt in words for prompt, _ in found)


@torch.no_grad()
def test_continuations_are_greedy_whatever_the_model_would_rather_do(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama", eos_token_id=None)
    model.generation_config.update(do_sample=True, temperature=5.0, eos_token_id=None)
    written = samples.continuation(model, tiny_tokenizer, "The")
    ids = tiny_tokenizer("The", return_tensors="pt").input_ids
    for _ in range(samples.NEW_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert written == tiny_tokenizer.decode(ids[0, 3:], skip_special_tokens=True)


def test_a_prompt_that_fills_the_positions_has_no_continuation(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    assert samples.continuation(model, tiny_tokenizer, "x" * 64) == ""
    assert 1 <= len(samples.continuation(model, tiny_tokenizer, "x" * 60)) <= 4
