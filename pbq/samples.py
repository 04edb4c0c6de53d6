"""The same prompts before and after quantization: what a person looks at first."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from pbq.evaluate import TokenizedText
from pbq.models import most_positions

PASSAGES = 3
PROMPT_TOKENS = 24
NEW_TOKENS = 40
# Samples are an extra: a model too large to write them in this time writes fewer words.
SECONDS = 10.0


def passages(tokenizer: Any, text: TokenizedText) -> list[tuple[str, str]]:
    """(prompt, how the text goes on), evenly spread over the text, each from a sentence's start."""
    length = 4 * (PROMPT_TOKENS + NEW_TOKENS)
    found = []
    for i in range(PASSAGES):
        start = max(0, (2 * i + 1) * len(text.ids) // (2 * PASSAGES) - length // 2)
        words = _from_sentence(tokenizer.decode(text.ids[start : start + length]))
        ids = tokenizer(words, add_special_tokens=False).input_ids
        prompt, rest = ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
        found.append((tokenizer.decode(prompt), tokenizer.decode(rest)))
    # a short text has fewer than that many places
    return list(dict.fromkeys(passage for passage in found if passage[0].strip()))


def _from_sentence(text: str) -> str:
    """The text behind its first full stop or line end, if enough of it is left."""
    start = re.search(r"[.!?]\s+|\n+", text)
    return text[start.end() :] if start and start.end() < len(text) // 2 else text


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy, NEW_TOKENS tokens or as many as fit into the time and the model's positions."""
    from transformers import GenerationConfig

    ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    positions = most_positions(model.config)
    room = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions - ids.shape[1])
    if room < 1:
        return ""
    # every setting that would change the words is named: what is left out is the model's own
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=room,
        max_time=SECONDS / PASSAGES,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
