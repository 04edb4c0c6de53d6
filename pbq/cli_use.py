"""Commands that try a model: generate, chat, demo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pbq.cli_options import Activations, Device, Model, Trust
from pbq.console import hush_libraries

if TYPE_CHECKING:
    from pbq.generation import Chat

app = typer.Typer()

MaxNewTokens = Annotated[int, typer.Option(help="tokens to write at most")]
Temperature = Annotated[float, typer.Option(help="0: greedy")]
TopP = Annotated[float, typer.Option(help="nucleus sampling")]
TopK = Annotated[int, typer.Option(help="among so many tokens, 0: among all")]
RepetitionPenalty = Annotated[float, typer.Option(help="above 1: fewer repetitions")]
Seed = Annotated[int, typer.Option(help="of sampling")]


@app.command(epilog='Example: pbq generate out --prompt "The capital of France is"')
def generate(
    model: Model,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="the prompt; without it and --file, stdin is one prompt"),
    ] = None,
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help='a prompt a line, or .jsonl with a "prompt" in each'),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option(help="wrap each prompt in the chat template")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="an object a prompt: prompt and text")
    ] = False,
    activations: Activations = "exact",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue one prompt or many; the text goes to stdout as it is written."""
    hush_libraries()
    from pbq.errors import UsageError
    from pbq.generation import Sampling, Writer, read_prompts

    if prompt is not None and file is not None:
        raise UsageError("give --prompt or --file, not both")
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    if file is not None:
        prompts = read_prompts(file)
    else:
        prompts = [sys.stdin.read() if prompt is None else prompt]
    writer = Writer.load(model, device, trust_remote_code)
    for each in prompts:
        turn = [{"role": "user", "content": each}]
        ids = writer.chat_ids(turn) if chat else writer.ids(each)
        if as_json:
            print(json.dumps({"prompt": each, "text": writer.write(ids, sampling)}), flush=True)
            continue
        if len(prompts) > 1:
            print(each, end="", flush=True)
        writer.write(ids, sampling, _print_piece)
        print()


@app.command(epilog="Example: pbq chat out --temperature 0.7")
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="instructions before the conversation")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.1,
    seed: Seed = 0,
    activations: Activations = "exact",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a model. /reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer."""
    hush_libraries()
    from pbq.generation import Chat, Sampling, Writer

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    talk(Chat(Writer.load(model, device, trust_remote_code), sampling, system))


def talk(conversation: Chat) -> None:
    """Read turns from stdin and answer them, until it ends or says /exit."""
    import contextlib

    from pbq.errors import UsageError
    from pbq.generation import read_turns

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has a history and can be edited
    _note(
        f'{conversation.writer.name}. /reset forgets, /exit ends; \\ at a line\'s end, or """ '
        "around them, for several lines."
    )
    for turn in read_turns(_ask):
        if turn.strip() == "/exit":
            return
        if turn.strip() == "/reset":
            conversation.reset()
            _note("forgotten")
            continue
        try:
            dropped = conversation.say(turn, _print_piece)
        except UsageError as error:
            _note(str(error))
            continue
        print(flush=True)
        if dropped:
            _note(f"{dropped} oldest messages dropped: the model's positions are full")


def _ask(prompt: str) -> str:
    """A line of stdin; the prompt is shown to people only."""
    return input(prompt if sys.stdin.isatty() else "")


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


@app.command(epilog="Example: pbq demo && pbq quantize ~/.cache/pbq/SmolLM2-135M-Instruct out")
def demo() -> None:
    """Find the model for trying pbq offline, or say how to install it; prints its directory."""
    hush_libraries()
    from pbq.demo import demo_model

    path = demo_model()
    print(path)
    _note(f"next: pbq quantize {path} out --effort fast, then pbq chat out")
