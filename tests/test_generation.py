"""A model that writes: what transformers' generate gives, as it comes, and a conversation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pbq.errors import UsageError
from pbq.generation import Chat, Interrupted, Sampling, Writer, read_turns


@pytest.fixture
def writer(packed_checkpoint: Callable[[str], Path]) -> Writer:
    return Writer.load(str(packed_checkpoint("llama")), device="cpu")


def test_greedy_text_is_what_generate_gives(
    writer: Writer, packed_checkpoint: Callable[[str], Path]
) -> None:
    path, pieces = packed_checkpoint("llama"), list[str]()
    written = writer.write(writer.ids("Once"), Sampling(6), pieces.append)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Once", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert written == "".join(pieces) == tokenizer.decode(expected, True)


def test_the_models_own_settings_do_not_interfere(writer: Writer) -> None:
    greedy = writer.write(writer.ids("Once"), Sampling(12))
    writer.model.generation_config.update(
        do_sample=True, temperature=9.0, top_k=2, repetition_penalty=3.0, num_beams=2
    )
    assert writer.write(writer.ids("Once"), Sampling(12)) == greedy


def test_sampling_follows_its_seed_and_its_limits(writer: Writer) -> None:
    def sampled(**options: Any) -> str:
        return writer.write(writer.ids("Once"), Sampling(12, **{"temperature": 2.0, **options}))

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    greedy = writer.write(writer.ids("Once"), Sampling(12))
    # one token left to choose from
    assert sampled(top_k=1) == sampled(top_p=1e-6) == greedy != sampled()
    repeating = len(set(greedy)) / len(greedy)
    varied = writer.write(writer.ids("Once"), Sampling(12, repetition_penalty=50.0))
    assert len(set(varied)) / len(varied) > repeating


def test_a_text_ends_where_the_positions_do(writer: Writer) -> None:
    assert writer.positions == 64
    ids = writer.ids("x" * 60)
    assert 1 <= len(writer.write(ids, Sampling(50))) <= 4
    with pytest.raises(UsageError, match=r"has 64 tokens, and .* 64 positions"):
        writer.write(writer.ids("x" * 64), Sampling(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)


def test_an_empty_prompt_and_a_missing_template_are_refused(writer: Writer) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        writer.ids(" \n")
    writer.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template; `pbq generate` needs none"):
        Chat(writer, Sampling(3))


def test_a_chat_wraps_every_turn_in_the_template(writer: Writer) -> None:
    chat, end = Chat(writer, Sampling(3), system="Be brief"), writer.tokenizer.eos_token
    shown: list[str] = []
    assert chat.say("Hi", shown.append) == 0
    answer = chat.messages[-1]["content"]
    assert "".join(shown) == answer
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    # the template of the tests puts an end after every message
    prompt = writer.tokenizer(f"Be brief{end}Hi{end}", return_tensors="pt").input_ids
    assert torch.equal(writer.chat_ids(chat.messages[:2]), prompt)
    assert writer.write(prompt, Sampling(3)) == answer
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief"}]


def test_a_long_chat_forgets_its_oldest_turns_and_keeps_its_instructions(writer: Writer) -> None:
    chat = Chat(writer, Sampling(2), system="S")
    dropped = [chat.say("x" * 20, lambda text: None) for _ in range(4)]
    assert dropped[:2] == [0, 0] and dropped[2:] == [2, 2]
    assert chat.messages[0] == {"role": "system", "content": "S"} and len(chat.messages) == 5
    before = list(chat.messages)
    with pytest.raises(UsageError, match="64 positions"):
        chat.say("x" * 100, lambda text: None)
    assert chat.messages == before


def test_an_interrupted_answer_is_kept(writer: Writer) -> None:
    def stop(text: str) -> None:
        if not text.startswith("\n"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as interrupted:
        writer.write(writer.chat_ids([{"role": "user", "content": "a b"}]), Sampling(40), stop)
    chat = Chat(writer, Sampling(40))
    chat.say("a b", stop)
    assert chat.messages[-1] == {"role": "assistant", "content": interrupted.value.text}
    assert interrupted.value.text


def lines_of(*lines: str | type[BaseException]) -> tuple[Callable[[str], str], list[str]]:
    """A read function that gives these lines, and the prompts it was asked with."""
    rest, prompts = list(lines), list[str]()

    def read(prompt: str) -> str:
        prompts.append(prompt)
        if not rest:
            raise EOFError
        line = rest.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read, prompts


def test_turns_of_several_lines() -> None:
    read, prompts = lines_of("one", "", "a\\", "b\\", "c", '"""', "x", "", " y", '"""', "last")
    assert list(read_turns(read)) == ["one", "a\nb\nc", "x\n\n y", "last"]
    assert prompts == ["> "] * 3 + [". "] * 2 + ["> "] + [". "] * 4 + ["> "] * 2


def test_ctrl_c_drops_a_turn_and_an_end_ends() -> None:
    read, _ = lines_of("a\\", KeyboardInterrupt, "b", "unfinished\\")
    assert list(read_turns(read)) == ["b"]


@pytest.mark.real
def test_the_demo_model_answers(real_gguf: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from pbq.demo import demo_model

    monkeypatch.setenv("PBQ_CACHE", str(tmp_path))
    path = demo_model()
    assert demo_model() == path  # converted once
    writer = Writer.load(str(path), device="cpu")
    chat = Chat(writer, Sampling(24))
    chat.say("What is the capital of France? Answer in one word.", lambda text: None)
    assert "Paris" in chat.messages[-1]["content"]
