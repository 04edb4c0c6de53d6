"""`pbq bench`: how fast a packed model reads and writes, against the same model in bfloat16.

Every model runs in a process of its own, so that its peak memory is its own, on the same random
prompt and through transformers' `generate`, the way that users take.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from pbq.errors import UsageError
from pbq.models import load_model, most_positions, pick_device
from pbq.pipeline import Observer, Silent
from pbq.sources import Source, resolve_source

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Settings:
    """What is measured. static_cache: with transformers' static cache, which it compiles on GPUs.

    threads: 0 leaves the number to torch.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    repeats: int = 3
    threads: int = 0
    device: str = "auto"
    static_cache: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for sensible, option in (
            (self.prompt_tokens >= 1, "--prompt-tokens must be at least 1"),
            (self.new_tokens >= 2, "--new-tokens must be at least 2"),
            (self.repeats >= 1, "--repeats must be at least 1"),
            (self.threads >= 0, "--threads must not be negative"),
        ):
            if not sensible:
                raise UsageError(option)


@dataclass(frozen=True)
class Speed:
    """Medians over the repetitions, and the most memory that the process, or the GPU, held."""

    model: str
    device: str
    threads: int
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Benchmark:
    """Speeds under the same settings: the packed model, what it is compared with, peers."""

    settings: Settings
    speeds: list[Speed]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def grid(self) -> tuple[list[str], list[list[str]], str]:
        """Header, a row per figure and a column per model, title. Ratios are those of the first."""
        first, second, *_ = self.speeds
        rows = []
        for label, value, shown, better in _FIGURES:
            gain = (value(first) / value(second)) ** better
            cells = [shown.format(value(speed)) for speed in self.speeds]
            rows.append([label, f"{cells[0]} ({gain:.2f}x)", *cells[1:]])
        where = first.device if first.device != "cpu" else f"cpu, {first.threads} threads"
        title = (
            f"{self.settings.prompt_tokens} tokens read, {self.settings.new_tokens} written, "
            f"{where}; in brackets: times as good as {second.model}"
        )
        return ["", *(speed.model for speed in self.speeds)], rows, title


# label, value, its format, and 1 where more is better, -1 where less is
_FIGURES: tuple[tuple[str, Callable[[Speed], float], str, int], ...] = (
    ("prefill, tokens/s", lambda s: s.prefill_tokens_per_s, "{:.1f}", 1),
    ("decode, tokens/s", lambda s: s.decode_tokens_per_s, "{:.1f}", 1),
    ("first token, ms", lambda s: 1e3 * s.first_token_s, "{:.0f}", -1),
    ("peak memory, MB", lambda s: s.peak_memory_bytes / 1e6, "{:.0f}", -1),
)


def compare(
    model: str,
    baseline: str | None = None,
    gguf: Path | None = None,
    settings: Settings | None = None,
    observer: Observer | None = None,
) -> Benchmark:
    """Measure `model`, then the baseline in bfloat16, then `gguf` by llama.cpp where it is given.

    Without a baseline: random bfloat16 weights in the shapes of `model`, which are as fast as the
    real ones. All that can be refused is refused before loading.
    """
    settings, observer = settings or Settings(), observer or Silent()
    source = resolve_source(model)
    pick_device(settings.device)
    _check_room(source, settings)
    other = resolve_source(baseline) if baseline is not None else None
    if gguf is not None and importlib.util.find_spec("llama_cpp") is None:
        raise UsageError("--gguf needs llama.cpp: pip install llama-cpp-python, or leave it out")
    if gguf is not None and not gguf.is_file():
        raise UsageError(f"--gguf {gguf}: no such file")
    runs: list[tuple[str, Callable[..., Speed], Any]] = [(source.name, measure_packed, source)]
    if other is not None:
        runs.append((other.name, measure_packed, other))
    else:
        runs.append(("bf16, same shapes", measure_shapes, source))
    if gguf is not None:
        runs.append((gguf.name, measure_gguf, gguf))
    speeds = []
    with closing(observer):
        for name, measure, argument in runs:
            observer.stage(f"measure {name}", None)
            speeds.append(_in_new_process(measure, argument, settings))
    return Benchmark(settings, speeds)


def _in_new_process(measure: Callable[..., Speed], argument: Any, settings: Settings) -> Speed:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, argument, settings).result()


def _check_room(source: Source, settings: Settings) -> None:
    config = AutoConfig.from_pretrained(
        source.path, trust_remote_code=settings.trust_remote_code, **source.file_argument
    )
    positions = most_positions(config)
    needed = settings.prompt_tokens + settings.new_tokens
    if positions is not None and needed > positions:
        raise UsageError(
            f"{source.name} has {positions} positions; --prompt-tokens and --new-tokens need "
            f"{needed}"
        )


# --- in the process of one model -----------------------------------------------------------------


def measure_packed(source: Source, settings: Settings) -> Speed:
    """A packed or any other checkpoint, its activations in bfloat16."""
    device = _prepare(settings)
    model, _ = load_model(source, DTYPE, device, settings.trust_remote_code, packed=True)
    return _measure(source.name, model, device, settings)


def measure_shapes(source: Source, settings: Settings) -> Speed:
    """An unquantized model of random weights in the shapes of `source`."""
    device = _prepare(settings)
    config = AutoConfig.from_pretrained(
        source.path, trust_remote_code=settings.trust_remote_code, **source.file_argument
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPE, trust_remote_code=settings.trust_remote_code
        )
    return _measure("bf16, same shapes", model.eval(), device, settings)


def measure_gguf(path: Path, settings: Settings) -> Speed:
    """A .gguf file by llama.cpp, all of it on the GPU where there is one."""
    from llama_cpp import Llama

    device = _prepare(settings)
    llama = Llama(
        str(path),
        n_ctx=settings.prompt_tokens + settings.new_tokens,
        n_batch=settings.prompt_tokens,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        n_gpu_layers=-1 if device.type == "cuda" else 0,
        verbose=False,
    )
    ids = _random_ids(llama.n_vocab(), settings)[0].tolist()

    def run() -> Iterator[float]:
        llama.reset()
        llama.eval(ids)
        for _ in range(settings.new_tokens):
            token = llama.sample(temp=0.0)
            yield time.perf_counter()
            llama.eval([token])

    return _speed(path.name, lambda: list(run()), torch.device("cpu"), settings)


def _prepare(settings: Settings) -> torch.device:
    from transformers.utils import logging

    logging.disable_progress_bar()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return pick_device(settings.device)


def _measure(name: str, model: PreTrainedModel, device: torch.device, settings: Settings) -> Speed:
    ids = _random_ids(model.config.get_text_config().vocab_size, settings).to(device)

    def run() -> list[float]:
        clock = _Clock()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.new_tokens,
            min_new_tokens=settings.new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            cache_implementation="static" if settings.static_cache else None,
        )
        return clock.times[1:]  # generate shows the prompt first

    return _speed(name, run, device, settings)


def _random_ids(vocabulary: int, settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, settings.prompt_tokens), generator=generator)


class _Clock(BaseStreamer):
    """Notes when each token arrives; generate hands it over on the CPU, so no GPU is still busy."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _speed(
    name: str, run: Callable[[], list[float]], device: torch.device, settings: Settings
) -> Speed:
    """Medians over `repeats` runs after one that warms up. run: when each new token was there."""
    run()
    first, decode = [], []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        times = run()
        first.append(times[0] - start)
        decode.append((len(times) - 1) / (times[-1] - times[0]))
    first_token = statistics.median(first)
    return Speed(
        name,
        device.type,
        torch.get_num_threads(),
        first_token,
        settings.prompt_tokens / first_token,
        statistics.median(decode),
        _peak_memory(device),
    )


def _peak_memory(device: torch.device) -> int:
    """Most bytes that torch held on the GPU, or that this process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count the process that started this one
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
