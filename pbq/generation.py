"""A model that writes: one prompt or many, and a conversation. Loads nothing that quantizes.

writer = Writer.load("OUT")
writer.write(writer.ids("The capital of France is"), Sampling(max_new_tokens=20))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from pbq.errors import DataError, UsageError
from pbq.models import compute_dtype, load_model, most_positions, pick_device
from pbq.sources import resolve_source

Show = Callable[[str], None]
"""Is given each piece of text as soon as it is written."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names and meanings are those of transformers.

    temperature 0 is greedy, and then top_p and top_k have no effect. top_k 0: no limit.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for sensible, option in (
            (self.max_new_tokens >= 1, "--max-new-tokens must be at least 1"),
            (self.temperature >= 0, "--temperature must not be negative"),
            (0 < self.top_p <= 1, "--top-p must be in (0, 1]"),
            (self.top_k >= 0, "--top-k must not be negative"),
            (self.repetition_penalty > 0, "--repetition-penalty must be above 0"),
        ):
            if not sensible:
                raise UsageError(option)

    def settings(self, room: int) -> GenerationConfig:
        """For at most `room` tokens. Everything is named: what is left out is the model's own."""
        chosen: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        if self.temperature > 0:
            chosen = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return GenerationConfig(
            max_new_tokens=min(self.max_new_tokens, room),
            repetition_penalty=self.repetition_penalty,
            num_beams=1,
            **chosen,
        )


class _Pieces(TextStreamer):
    """Hands the text on word by word, and keeps it: an interrupted answer is not lost."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self._show(text)


@dataclass
class Writer:
    """A loaded model and its tokenizer. name: as the user gave it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, device: str = "auto", trust_remote_code: bool = False) -> Writer:
        """A packed or any other causal LM. Raises PbqError."""
        source, where = resolve_source(name), pick_device(device)
        dtype = compute_dtype(source, where)
        model, tokenizer = load_model(source, dtype, where, trust_remote_code, packed=True)
        return cls(source.name, model, tokenizer)

    @property
    def positions(self) -> int | None:
        """Tokens the model was built for, None without a limit."""
        return most_positions(self.model.config)

    def ids(self, prompt: str) -> Tensor:
        """Token ids [1, t] of a plain prompt."""
        if not prompt.strip():
            raise UsageError(
                "the prompt is empty; give --prompt TEXT, --file FILE, or a text on stdin"
            )
        found: Tensor = self.tokenizer(prompt, return_tensors="pt").input_ids
        return found

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> Tensor:
        """Token ids [1, t] of a conversation that the model is to answer."""
        if not self.tokenizer.chat_template:
            raise UsageError(f"{self.name}: has no chat template; `pbq generate` needs none")
        found: Tensor = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        return found

    @torch.no_grad()
    def write(self, ids: Tensor, sampling: Sampling, show: Show = lambda text: None) -> str:
        """What follows `ids` [1, t], until the model ends it or its positions are full.

        The same seed gives the same text whatever was written before. Ctrl-C ends the text early:
        what there is of it is returned by raising Interrupted.
        """
        room = sampling.max_new_tokens
        if self.positions is not None:
            room = min(room, self.positions - ids.shape[1])
        if room < 1:
            raise UsageError(
                f"the prompt has {ids.shape[1]} tokens, and {self.name} {self.positions} positions"
            )
        settings = sampling.settings(room)
        settings.eos_token_id = self._ends()
        settings.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        pieces = _Pieces(self.tokenizer, show)
        torch.manual_seed(sampling.seed)
        ids = ids.to(self.model.device)
        try:
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=pieces,
            )
        except KeyboardInterrupt:
            raise Interrupted(pieces.text) from None
        return pieces.text

    def _ends(self) -> list[int] | None:
        """Tokens that end a text: the model's own, and the tokenizer's, which may end a turn."""
        own = self.model.generation_config.eos_token_id
        found = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        return sorted(found) or None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a text was written. text: what there was of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; of a .jsonl file the "prompt" of each. Raises DataError."""
    try:
        # not splitlines: JSON allows U+2028 and its like inside a string
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(f"{path}:{i}", line) for i, line in numbered]


def _prompt_of(where: str, line: str) -> str:
    try:
        found = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise DataError(f'{where}: expected an object with a "prompt"')
    return found


@dataclass
class Chat:
    """A conversation. system: instructions before it, if any."""

    writer: Writer
    sampling: Sampling
    system: str = ""

    def __post_init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.reset()
        self.writer.chat_ids([*self.messages, {"role": "user", "content": "a"}])  # has a template

    def reset(self) -> None:
        """Forget everything but the instructions."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str, show: Show) -> int:
        """Answer `text`. Returns how many of the oldest messages were dropped to make room.

        Raises UsageError when `text` alone is too long, and the conversation is as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        first, dropped = (1 if self.system else 0), 0
        positions = self.writer.positions
        ids = self.writer.chat_ids(messages)
        while positions is not None and ids.shape[1] >= positions and len(messages) > first + 1:
            del messages[first : first + 2]
            dropped += 2
            ids = self.writer.chat_ids(messages)
        try:
            answer = self.writer.write(ids, self.sampling, show)
        except Interrupted as interrupted:
            answer = interrupted.text
            show("\n[interrupted]")
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return dropped


def read_turns(read: Callable[[str], str]) -> Iterator[str]:
    """What a person says, turn by turn, until the input ends. read(prompt) gives one line.

    A line that ends in a backslash goes on in the next one; a line of three quotes starts a text of
    many lines that the next such line ends. Ctrl-C drops the lines of an unfinished turn.
    """
    while True:
        try:
            turn = _read_turn(read)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if turn.strip():
            yield turn


def _read_turn(read: Callable[[str], str]) -> str:
    line = read("> ")
    if line.strip() == '"""':
        lines = []
        while (line := read(". ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". "))
    return "\n".join(lines)
