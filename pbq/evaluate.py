"""How good is a model: token perplexity as in the GPTQ papers, and lm-eval tasks.

Both parts are split so that everything a user can get wrong is refused before weights are read:

    text = tokenize_file(tokenizer, path)          tasks = resolve_tasks(names, data_dir)
    check_window(config, 2048)                     (typos, missing files, an unreachable hub)
    text.count_windows(2048)
    perplexity(model, text)                        run_tasks(model, tokenizer, tasks)

Token perplexity depends on the tokenizer and on the window, so a `Perplexity` carries its protocol
and `label()` prints it. It is not lm-eval's `word_perplexity`, which divides by words.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbq.bfloat16 import fast_products
from pbq.errors import DataError, NumericalError, ResourceError, UsageError
from pbq.models import most_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WINDOW = 2048
"""Tokens per window of the published perplexities (GPTQ, PB-LLM, BiLLM, PTQ1.61)."""

LOSS_CHUNK = 256
"""Rows of logits raised to fp32 at a time: 250 MiB at a vocabulary of 256k, not 2 GiB a window."""

HUB_PROBE_SECONDS = 3.0
"""A hub that does not answer in this time is unreachable; its own client would try for 23 s."""

Progress = Callable[[int, int], None]
"""progress(done, total)"""


# Perplexity


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """A whole text file as the tokenizer sees it.

    ids: token ids, [t] int64 on the CPU.
    file: name of the file, without its folder.
    sha256: of the file's bytes.
    """

    ids: Int64[Tensor, " t"]
    file: str
    sha256: str

    def count_windows(self, window: int = WINDOW, max_windows: int | None = None) -> int:
        """Full windows that will be scored, at most `max_windows`. The tail of the text is dropped.

        Raises UsageError for a window or a limit that makes no sense, DataError if the text is
        shorter than one window.
        """
        if window < 2:
            raise UsageError(f"--window {window}: a window needs at least 2 tokens")
        if max_windows is not None and max_windows < 1:
            raise UsageError(f"--windows {max_windows}: at least one window must be scored")
        tokens = len(self.ids)
        if tokens < window:
            way_out = f", or ask for --window {tokens}" if tokens >= 2 else ""
            raise DataError(
                f"{self.file}: {tokens} tokens, and one window needs {window};"
                f" give a longer text{way_out}"
            )
        available = tokens // window
        return available if max_windows is None else min(available, max_windows)


@dataclass(frozen=True)
class Perplexity:
    """A token perplexity and the protocol it was measured under.

    ppl: exp(loss).
    loss: mean over the windows of the mean loss of a window, nats per predicted token.
    windows, window: how many windows of how many tokens; a window predicts window - 1 tokens.
    tokens: windows * window.
    tokens_in_file: tokens of the whole file, the unused rest included.
    file, sha256: name of the text file and the hash of its bytes.
    seconds: wall time of the scoring.
    """

    ppl: float
    loss: float
    windows: int
    window: int
    tokens: int
    tokens_in_file: int
    file: str
    sha256: str
    seconds: float

    def label(self) -> str:
        """The protocol in a few words, to be printed beside the number."""
        return f"{self.file}, {self.windows} \N{MULTIPLICATION SIGN} {self.window} tokens"


def tokenize_file(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> TokenizedText:
    """Tokenize a UTF-8 text file in one piece, line ends read as `\\n` whatever the file has.

    No special token is added by hand: the tokenizer is called as GPTQ's evaluation calls it, so one
    that starts every text with BOS does so once, in the first window only.

    Raises DataError for a file that is missing, unreadable, empty or not UTF-8 text.
    """
    import torch

    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not data.strip():
        raise DataError(f"{path}: the file is empty; give a text to score")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, or give another file"
        ) from error
    if "\0" in text:
        raise DataError(f"{path}: holds NUL bytes, so it is not a text file")
    # a copy of WikiText with CRLF ends would otherwise count 1 % more tokens than the original
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # verbose=False: a warning that the text is longer than the model would only mislead here
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return TokenizedText(
        ids=torch.tensor(ids, dtype=torch.int64),
        file=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def check_window(config: PretrainedConfig, window: int) -> None:
    """Refuse a window that is longer than the positions the model was built for (UsageError).

    Models without a limit in their config take any window.
    """
    positions = most_positions(config)
    if positions is not None and window > positions:
        raise UsageError(
            f"a window of {window} tokens is longer than the model's {positions} positions;"
            f" ask for --window {positions} (figures of different windows do not compare)"
        )


def perplexity(
    model: PreTrainedModel,
    text: TokenizedText,
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    progress: Progress | None = None,
    chunk: int = LOSS_CHUNK,
    logits_of: Callable[[int], Tensor] | None = None,
) -> Perplexity:
    """Perplexity over non-overlapping windows (Frantar et al. 2022, the `opt_eval` of their code).

    Every window starts with an empty context, its first token is not predicted, and the mean of the
    windows' mean losses is exponentiated. The model is scored in its own dtype, the loss in fp32,
    `chunk` rows of logits at a time: the loss equals the one of `model(ids, labels=ids)`.
    logits_of: the logits [window, v] of a window, by its number, where `model` is not to be run.

    Raises UsageError (window too long), DataError (text too short, or tokenized by another model's
    tokenizer), NumericalError (a loss that is not finite; names the window) and ResourceError.
    """
    import torch

    windows = text.count_windows(window, max_windows)
    check_window(model.config, window)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if (largest := int(text.ids.max())) >= vocabulary:
        raise DataError(
            f"{text.file}: token id {largest}, but the model knows {vocabulary} ids;"
            " it was tokenized by another model's tokenizer"
        )

    started = time.perf_counter()
    was_training = model.training
    model.eval()
    losses: list[float] = []
    try:
        for done in range(windows):
            ids = text.ids[done * window : (done + 1) * window]
            with torch.no_grad(), _out_of_memory_named("a smaller --window, or --device cpu"):
                if logits_of is None:
                    with fast_products():
                        logits = model(ids[None].to(model.device), use_cache=False).logits[0]
                else:
                    logits = logits_of(done)
                loss = _mean_loss(logits[:-1], ids[1:], chunk)
            # freed before the next forward allocates its own
            del logits
            if not math.isfinite(loss):
                raise NumericalError(
                    f"{text.file}: the loss of window {done + 1} of {windows} is {loss};"
                    " the model is broken, or its dtype overflows"
                )
            losses.append(loss)
            if progress is not None:
                progress(done + 1, windows)
    finally:
        model.train(was_training)

    mean = math.fsum(losses) / windows
    try:
        ppl = math.exp(mean)
    except OverflowError as error:
        raise NumericalError(
            f"{text.file}: mean loss of {mean:.4g} nats per token; the model is broken"
        ) from error
    return Perplexity(
        ppl=ppl,
        loss=mean,
        windows=windows,
        window=window,
        tokens=windows * window,
        tokens_in_file=len(text.ids),
        file=text.file,
        sha256=text.sha256,
        seconds=time.perf_counter() - started,
    )


def _mean_loss(logits: Float[Tensor, "t v"], targets: Int64[Tensor, " t"], chunk: int) -> float:
    """Mean cross-entropy in nats, with at most `chunk` rows of fp32 logits alive."""
    from torch.nn.functional import cross_entropy

    targets = targets.to(logits.device)
    total = 0.0
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        total += cross_entropy(logits[rows].float(), targets[rows], reduction="sum").item()
    return total / len(targets)


@contextmanager
def _out_of_memory_named(way_out: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"the device ran out of memory; use {way_out}") from error


# lm-eval tasks


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks whose data is already in memory, ready for `run_tasks`, for as many models as wanted.

    names: as asked for.
    tasks: lm-eval's own objects, in that order (a tag has become its tasks).
    local_files: the file that a task's items came from, for the tasks that did not use the hub.
    num_fewshot: examples in front of each item; None leaves it to the task.
    """

    names: tuple[str, ...]
    tasks: Sequence[Task | Group]
    local_files: Mapping[str, Path]
    num_fewshot: int | None = None


@dataclass(frozen=True)
class _LocalTask:
    """How the files of a task's authors become the data set that lm-eval expects.

    folder: of the official task, below lm_eval/tasks.
    split: the split that the official task scores.
    file, train_file: below the data folder; the second is needed for few-shot examples only.
    read: file -> items with the fields of the hub's data set.
    """

    folder: str
    split: str
    file: str
    train_file: str
    read: Callable[[Path], list[dict[str, Any]]]


def resolve_tasks(
    names: Sequence[str],
    data_dir: str | Path | None = None,
    *,
    num_fewshot: int | None = None,
) -> TaskSet:
    """Find lm-eval tasks and load their data, so that nothing can fail for their sake later.

    Tasks of `LOCAL_TASKS` whose file lies below `data_dir` are read from there, with the prompts of
    the installed lm-eval and no network. The others come from the hub, or from its local cache
    where the hub cannot be reached. Any task, group or tag of lm-eval can be named.

    Raises UsageError (no such task: near matches are listed; the same task named twice; lm-eval not
    installed) and DataError (files missing or not in their format; hub unreachable).
    """
    asked = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not asked:
        raise UsageError("--tasks: no task is named")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"--num-fewshot {num_fewshot}: cannot be negative")
    local_files = _local_files(asked, data_dir)

    with _lm_eval_errors_only():
        manager = _task_manager(asked)
        for name in asked:
            if name not in manager.task_index:
                raise _unknown_task(name, manager.task_index)
        tasks: list[Task | Group] = []
        for name in asked:
            if name in local_files:
                tasks.append(_load_local(name, local_files[name], manager, num_fewshot or 0))
            else:
                tasks.extend(_load_from_hub(name, manager))
        try:
            leaves = manager.load(tasks)["tasks"]
        except ValueError as error:
            raise UsageError(f"--tasks {','.join(asked)}: {error}") from error
    for name, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"task {name} executes code written by the model; if that is wanted, run it by"
                " `python -m pbq.lm_eval run --confirm_run_unsafe_code ...`"
            )
    return TaskSet(asked, tuple(tasks), local_files, num_fewshot)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskSet,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a loaded model with lm-eval's `simple_evaluate`; progress goes to stderr.

    limit: items per task, the first ones; None is all of them.
    max_length: tokens that the model sees at once; None is what its config says.

    Returns, for each task (and group), its metrics under lm-eval's names, `acc`, `acc_norm`, ...,
    each with its `_stderr` (None where lm-eval gives none), and `n` (items scored), `n_total`,
    `num_fewshot`, `version` (lm-eval's, of the task), `source` (file or hub data set) and, where a
    number is easily taken for another, `note`. Log-probabilities are summed in fp32, so that a bf16
    model has no ties; lm-eval's own command line sums them in the model's dtype. As a side effect
    lm-eval seeds random, numpy and torch.

    Raises UsageError, NumericalError (a log-probability is NaN) and ResourceError.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least one item must be scored")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: must be at least 1")
    if max_length is not None:
        check_window(model.config, max_length)

    was_training = model.training
    manager = TaskManager(include_defaults=False)
    with _lm_eval_errors_only():
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
    try:
        with _out_of_memory_named("a smaller --batch-size"), fast_products():
            outcome = simple_evaluate(
                model=lm,
                tasks=list(tasks.tasks),
                num_fewshot=tasks.num_fewshot,
                batch_size=batch_size,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                # bootstrapped errors (perplexities, F1) at lm-eval's 100,000 draws take minutes
                bootstrap_iters=1000,
            )
    finally:
        model.train(was_training)

    leaves = manager.load(list(tasks.tasks))["tasks"]
    for name, task in leaves.items():
        _refuse_nan(name, task)
    results: dict[str, dict[str, Any]] = {}
    for name, row in outcome["results"].items():
        result = _metrics(row)
        if name in leaves:
            counts = outcome["n-samples"][name]
            result |= {
                "n": counts["effective"],
                "n_total": counts["original"],
                "num_fewshot": outcome["n-shot"][name],
                "version": outcome["versions"][name],
                "source": str(tasks.local_files.get(name, leaves[name].DATASET_PATH)),
            }
        if "word_perplexity" in result:
            result["note"] = (
                "word_perplexity is per word of the detokenized text,"
                f" {lm.max_length} tokens at a time: not a token perplexity"
            )
        results[name] = result
    return results


def _metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of lm-eval's results, `{"acc,none": .5, "acc_stderr,none": "N/A"}`, made plain.

    The name of a filter is kept unless it is "none", the only one of most tasks.
    """
    plain: dict[str, Any] = {}
    for key, value in row.items():
        # name, alias and sample_len carry no filter: they are not metrics
        if "," in key:
            plain[key.removesuffix(",none")] = None if value == "N/A" else value
    return plain


def _refuse_nan(name: str, task: Task) -> None:
    """lm-eval takes the argmax over NaN without a word, and reports an accuracy."""
    for instance in task.instances:
        for response in instance.resps:
            value = response[0] if isinstance(response, tuple) else response
            if isinstance(value, float) and math.isnan(value):
                raise NumericalError(
                    f"task {name}: a log-probability of item {instance.doc_id} is NaN;"
                    " the model is broken, or its dtype overflows"
                )


def _task_manager(names: Sequence[str]) -> TaskManager:
    """lm-eval's index of at least these tasks, and of all of them only where it must be.

    The whole index takes about 10 s to build; the folders of the tasks that we know take none, and
    neither does a name that no task has (UsageError).
    """
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-eval ({error}): pip install 'pbq-llm[eval]'") from error

    root = Path(lm_eval.tasks.__file__).parent
    if all(name in LOCAL_TASKS for name in names):
        folders = sorted({str(root / LOCAL_TASKS[name].folder) for name in names})
        return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)

    # every name is written in one of the files, and reading them takes a tenth of parsing them
    text = "\n".join(file.read_text(encoding="utf-8") for file in root.glob("**/*.yaml"))
    for name in names:
        if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            raise _unknown_task(
                name, re.findall(r"^(?:task|group|tag): *['\"]?([\w-]+)", text, re.M)
            )
    log.info("building lm-eval's index of tasks, about 10 s")
    return lm_eval.tasks.TaskManager()


def _unknown_task(name: str, known: Iterable[str]) -> UsageError:
    near = difflib.get_close_matches(name, set(known), n=5)
    hint = f"near it: {', '.join(near)}" if near else "none has a name like it"
    return UsageError(f"unknown task {name!r}; {hint} (`python -m pbq.lm_eval ls tasks` lists all)")


def _local_files(names: Sequence[str], data_dir: str | Path | None) -> dict[str, Path]:
    """Task -> its file, for the tasks that the data folder holds. The folder must exist."""
    if data_dir is None:
        return {}
    if not Path(data_dir).is_dir():
        raise DataError(f"--data-dir {data_dir}: no such folder")
    files = {n: Path(data_dir) / LOCAL_TASKS[n].file for n in names if n in LOCAL_TASKS}
    for name, file in files.items():
        if not file.is_file():
            log.info("task %s: %s is not there, so its data comes from the hub", name, file)
    return {name: file for name, file in files.items() if file.is_file()}


def _load_local(name: str, file: Path, manager: TaskManager, num_fewshot: int) -> Task:
    """lm-eval's own task, prompts and metrics untouched, over items read from local files."""
    from datasets import Dataset

    local = LOCAL_TASKS[name]
    splits = {local.split: Dataset.from_list(local.read(file))}
    if num_fewshot:
        train_file = file.with_name(Path(local.train_file).name)
        if not train_file.is_file():
            # items of the scored split as examples would not compare with published figures
            raise DataError(f"task {name}: few-shot examples come from {train_file}, not found")
        splits["train"] = Dataset.from_list(local.read(train_file))
    config = {
        **manager.task_index[name].cfg,
        "dataset_path": None,
        "dataset_name": None,
        "custom_dataset": lambda **_: splits,
        "training_split": "train" if num_fewshot else None,
        "validation_split": None,
        "test_split": None,
        f"{local.split}_split": local.split,
    }
    return manager.load([config])["tasks"][name]


def _load_from_hub(name: str, manager: TaskManager) -> list[Task | Group]:
    """A task or a group, or the tasks of a tag, with the data in the hub's cache."""
    with _offline_if_unreachable() as reachable:
        try:
            loaded = manager.load([name])
        # what a data set's loader raises is not lm-eval's to limit: no access, no such file,
        # a missing package, a network that breaks off. None of it is an error of ours.
        except Exception as error:
            if reachable:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise DataError(f"task {name}: its data cannot be loaded ({reason})") from error
            known = LOCAL_TASKS.get(name)
            files = known.file if known else ", ".join(LOCAL_TASKS) + " only"
            raise DataError(
                f"task {name}: the Hugging Face hub cannot be reached and the data is not cached;"
                f" give local files with --data-dir DIR ({files})"
            ) from error
    group = loaded["groups"].get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


@contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """Switch the hub's client to offline mode, which reads its cache, if the hub does not answer.

    Yields whether it answered. Without this the client tries for 23 s a task before it gives up.
    """
    import datasets
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PROBE_SECONDS)
        reachable = True
    # the HTTP library, and so its errors, depends on the version of huggingface_hub
    except Exception as error:
        log.info("%s does not answer (%s)", constants.ENDPOINT, error)
        reachable = False
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not reachable:
        # the environment variable is read once, at import
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _lm_eval_errors_only() -> Iterator[None]:
    """Silence warnings about what is done here on purpose (a loaded model, a custom data set)."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """('file:line', object) for each line of a JSON-lines file; DataError if it is not one."""
    try:
        # not splitlines: it would also split at U+2028 and its like, which JSON allows in strings
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: the file is empty")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        yield f"{path}:{number}", item


def _read_piqa(path: Path) -> list[dict[str, Any]]:
    """PIQA (Bisk et al. 2020): goal, sol1, sol2 a line, and the labels 0/1 in NAME-labels.lst."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    try:
        labels = labels_path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{labels_path}: cannot be read ({error})") from error
    items = []
    for where, item in _read_jsonl(path):
        try:
            items.append({field: str(item[field]) for field in ("goal", "sol1", "sol2")})
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: not a PIQA item (needs goal, sol1, sol2)") from error
    if len(items) != len(labels):
        raise DataError(f"{path} holds {len(items)} items, {labels_path.name} {len(labels)} labels")
    if wrong := sorted(set(labels) - {"0", "1"}):
        raise DataError(f"{labels_path}: the label {wrong[0]!r} is neither 0 nor 1")
    return [{**item, "label": int(label)} for item, label in zip(items, labels, strict=True)]


def _read_arc(path: Path) -> list[dict[str, Any]]:
    """ARC as AI2 publishes it: question.stem, question.choices (text, label), answerKey.

    Labels are A to E or 1 to 5; lm-eval looks the key up among them.
    """
    items = []
    for where, item in _read_jsonl(path):
        try:
            choices = item["question"]["choices"]
            text = [str(choice["text"]) for choice in choices]
            label = [str(choice["label"]) for choice in choices]
            stem, key = str(item["question"]["stem"]), str(item["answerKey"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: not an ARC item (needs question, answerKey)") from error
        if key not in label:
            raise DataError(f"{where}: answerKey {key!r} is not among the labels {label}")
        items.append(
            {
                "id": str(item.get("id", where)),
                "question": stem,
                "choices": {"text": text, "label": label},
                "answerKey": key,
            }
        )
    return items


LOCAL_TASKS: Mapping[str, _LocalTask] = {
    "piqa": _LocalTask(
        "piqa", "validation", "piqa/piqa.valid.jsonl", "piqa/piqa.train.jsonl", _read_piqa
    ),
    "arc_challenge": _LocalTask(
        "arc", "test", "arc/ARC-Challenge-Test.jsonl", "arc/ARC-Challenge-Train.jsonl", _read_arc
    ),
    "arc_easy": _LocalTask(
        "arc", "test", "arc/ARC-Easy-Test.jsonl", "arc/ARC-Easy-Train.jsonl", _read_arc
    ),
}
"""Tasks that need no hub: name -> the files of their authors, below --data-dir."""
