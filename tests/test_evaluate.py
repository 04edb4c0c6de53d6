"""Perplexity against the plain `labels=` loss, lm-eval tasks against log-likelihoods by hand."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import (
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pbq import evaluate
from pbq.errors import DataError, NumericalError, ResourceError, UsageError
from pbq.evaluate import (
    TaskSet,
    TokenizedText,
    check_window,
    perplexity,
    resolve_tasks,
    run_tasks,
    tokenize_file,
)

POSITIONS = 256
VOCABULARY = 300  # larger than the tokenizer's, as in most models

PIQA = [
    ("How do I open a jar?", "Twist the lid.", "Paint the lid with milk.", 0),
    ("dresser", "replace drawer with bobby pin ", "finish, woodgrain with  bobby pin ", 1),
    ("Keep bread fresh.", "Leave it in the rain\u2028all day.", "Put it in a bread box.", 1),
    ("Cut paper", "use a fork", "use scissors", 1),
    ("Say 'hi' to \"Bo\"", "wave", "whisper it into a well, at night", 0),
]
ARC = [
    ("Which one is a metal?", ["wood", "iron", "glass", "wool"], "ABCD", "B"),
    ("What do plants need?", ["light", "coal", "oil", "sand"], "1234", "1"),
    ("Ice is frozen", ["air", "water", "a very long and wrong answer"], "ABC", "B"),
    ("How many legs has an ant?", ["2", "4", "6", "8"], "1234", "3"),
]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,  # far from uniform, so that errors show
    )
    return LlamaForCausalLM(config).eval()


def random_text(tokens: int, seed: int = 0) -> TokenizedText:
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))
    return TokenizedText(ids=ids, file="random.txt", sha256="0" * 64)


def perplexity_naive(model: LlamaForCausalLM, ids: torch.Tensor, window: int) -> float:
    """The loss that transformers itself computes, window by window."""
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - window + 1, window):
            batch = ids[None, start : start + window]
            losses.append(model(batch, labels=batch).loss.item())
    return math.exp(sum(losses) / len(losses))


# Perplexity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 62, 63, 256])
def test_perplexity_equals_the_plain_labels_loss(
    model: LlamaForCausalLM, dtype: torch.dtype, chunk: int
) -> None:
    model = model.to(dtype)
    text = random_text(5 * 63 + 11)
    found = perplexity(model, text, window=63, chunk=chunk)
    assert found.windows == 5
    assert found.ppl == pytest.approx(perplexity_naive(model, text.ids, 63), rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(found.loss), rel=1e-12)


def test_uniform_logits_give_the_size_of_the_vocabulary(model: LlamaForCausalLM) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, random_text(200), window=50)
    assert found.ppl == pytest.approx(VOCABULARY, rel=1e-6)
    assert found.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_windows_are_averaged_before_exp(model: LlamaForCausalLM) -> None:
    text = random_text(128)
    halves = [
        perplexity(model, TokenizedText(ids, "half", ""), window=64).ppl
        for ids in (text.ids[:64], text.ids[64:])
    ]
    whole = perplexity(model, text, window=64).ppl
    # the geometric mean: neither half sees the other's tokens
    assert whole == pytest.approx(math.sqrt(halves[0] * halves[1]), rel=1e-6)


def test_never_more_than_a_chunk_of_logits_in_fp32(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, torch.dtype]] = []
    plain = torch.nn.functional.cross_entropy

    def spy(logits: torch.Tensor, targets: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append((len(logits), logits.dtype))
        return plain(logits, targets, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    perplexity(model.bfloat16(), random_text(64), window=64, chunk=20)
    assert seen == [(20, torch.float32)] * 3 + [(3, torch.float32)]


def test_accounting_label_and_progress(model: LlamaForCausalLM) -> None:
    calls: list[tuple[int, int]] = []
    text = random_text(5 * 32 + 31)
    found = perplexity(
        model,
        text,
        window=32,
        max_windows=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert (found.windows, found.window, found.tokens, found.tokens_in_file) == (3, 32, 96, 191)
    assert found.label() == "random.txt, 3 \N{MULTIPLICATION SIGN} 32 tokens"
    assert (found.file, found.sha256) == ("random.txt", "0" * 64)
    assert found.seconds > 0


def test_tail_and_windows_beyond_the_limit_do_not_count(model: LlamaForCausalLM) -> None:
    text = random_text(4 * 32 + 5)
    first_two = TokenizedText(text.ids[:64], "head", "")
    expected = perplexity(model, first_two, window=32).ppl
    assert perplexity(model, text, window=32, max_windows=2).ppl == expected


@pytest.mark.parametrize(
    ("tokens", "window", "limit", "windows"),
    [(64, 64, None, 1), (127, 64, None, 1), (128, 64, None, 2), (128, 64, 1, 1), (128, 64, 9, 2)],
)
def test_count_windows(tokens: int, window: int, limit: int | None, windows: int) -> None:
    assert random_text(tokens).count_windows(window, limit) == windows


@pytest.mark.parametrize("training", [True, False])
def test_scores_without_dropout_and_restores_the_mode(
    model: LlamaForCausalLM, training: bool
) -> None:
    expected = perplexity(model, random_text(64), window=32).ppl
    model.config.attention_dropout = 0.9
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.9
    model.train(training)
    assert perplexity(model, random_text(64), window=32).ppl == expected
    assert model.training is training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 1}, UsageError, "at least 2 tokens"),
        ({"window": 8, "max_windows": 0}, UsageError, "--windows 0"),
        ({"window": 101}, DataError, r"100 tokens, and one window needs 101.*--window 100"),
        ({}, DataError, "100 tokens, and one window needs 2048"),
    ],
)
def test_refuses_windows_it_cannot_fill(
    model: LlamaForCausalLM, arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        perplexity(model, random_text(100), **arguments)


def test_refuses_a_window_beyond_the_models_positions(model: LlamaForCausalLM) -> None:
    with pytest.raises(UsageError, match=r"257 tokens.*256 positions.*--window 256"):
        perplexity(model, random_text(1000), window=257)
    assert perplexity(model, random_text(256), window=256).windows == 1


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=100), 100),
        (GPT2Config(n_positions=100), 100),
        (Gemma3Config(text_config={"max_position_embeddings": 100}), 100),
        (BloomConfig(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_window_finds_the_limit_of_a_config(config: Any, positions: int | None) -> None:
    check_window(config, 100)
    if positions is None:
        check_window(config, 10**6)
    else:
        with pytest.raises(UsageError, match="101 tokens"):
            check_window(config, 101)


def test_names_the_window_whose_loss_is_not_finite(model: LlamaForCausalLM) -> None:
    text = random_text(96)
    text.ids[text.ids == 7] = 8
    text.ids[40] = 7  # in the second of three windows
    model.get_input_embeddings().weight.data[7] = math.nan
    model.train()
    with pytest.raises(NumericalError, match="window 2 of 3 is nan"):
        perplexity(model, text, window=32)
    assert model.training


def test_refuses_a_perplexity_beyond_floats(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data *= 1e6
    with pytest.raises(NumericalError, match="nats per token"):
        perplexity(model, random_text(64), window=32)


def test_refuses_ids_the_model_does_not_know(model: LlamaForCausalLM) -> None:
    text = TokenizedText(torch.full((64,), VOCABULARY), "other.txt", "")
    with pytest.raises(DataError, match="token id 300, but the model knows 300 ids"):
        perplexity(model, text, window=32)


def test_out_of_memory_names_the_way_out(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ResourceError, match="smaller --window"):
        perplexity(model, random_text(64), window=32)


def test_tokenize_file(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = " = Title = \n\nA line,\nä and \N{SNOWMAN}.\n"
    file = tmp_path / "wiki.txt"
    file.write_bytes(text.encode())
    found = tokenize_file(tiny_tokenizer, file)
    assert found.ids.dtype == torch.int64
    assert len(found.ids) == len(text.encode())
    assert tiny_tokenizer.decode(found.ids.tolist()) == text
    assert (found.file, found.sha256) == ("wiki.txt", hashlib.sha256(text.encode()).hexdigest())
    for same_text in (b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode()):
        file.write_bytes(same_text)
        again = tokenize_file(tiny_tokenizer, str(file))
        assert torch.equal(again.ids, found.ids)
        assert again.sha256 == hashlib.sha256(same_text).hexdigest()


def test_tokenizers_own_bos_comes_once(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tiny_tokenizer.bos_token_id)]
    )
    with_bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    file = tmp_path / "long.txt"
    file.write_text("abc\n" * 100)
    ids = tokenize_file(with_bos, file).ids
    assert ids[0] == tiny_tokenizer.bos_token_id
    assert torch.equal(ids[1:], tokenize_file(tiny_tokenizer, file).ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text\.txt: cannot be read \(No such file"),
        (b"", "the file is empty"),
        (b" \n\t\n", "the file is empty"),
        ("caf\xe9".encode("latin-1"), r"not UTF-8 text \(byte 3\)"),
        (b"GGUF\0\0\0\3", "NUL bytes"),
    ],
)
def test_refuses_files_that_are_no_text(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokenize_file(tiny_tokenizer, file)


def test_refuses_a_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        tokenize_file(tiny_tokenizer, tmp_path)


# lm-eval tasks


def write_piqa(folder: Path, split: str = "valid") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    before = "" if split == "valid" else "In training: "
    items = [{"goal": before + goal, "sol1": one, "sol2": two} for goal, one, two, _ in PIQA]
    file = folder / f"piqa.{split}.jsonl"
    file.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), "utf-8")
    (folder / f"piqa.{split}-labels.lst").write_text("".join(f"{item[3]}\n" for item in PIQA))
    return file


def write_arc(folder: Path, name: str = "ARC-Challenge-Test") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        {
            "id": f"item_{i}",
            "question": {
                "stem": stem,
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(texts, labels, strict=True)
                ],
            },
            "answerKey": key,
        }
        for i, (stem, texts, labels, key) in enumerate(ARC)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(item) for item in items))
    return file


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write_piqa(tmp_path / "piqa")
    write_arc(tmp_path / "arc")
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that refuses connections, and nothing in the cache, wherever the tests run."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # as for a user who does not know yet that the hub is out of reach
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two folders of our tasks stand for all of lm-eval's, which take 10 s to read."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    small = functools.partial(
        lm_eval.tasks.TaskManager,
        include_path=[str(root / "piqa"), str(root / "arc")],
        include_defaults=False,
    )
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)


def accuracies(
    model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    items: list[tuple[str, list[str], int]],
) -> tuple[float, float]:
    """acc and acc_norm of (prompt, choices, answer) from log-likelihoods, with no lm-eval."""
    hits = normalized_hits = 0
    for prompt, choices, answer in items:
        scores = []
        context = tiny_tokenizer(prompt)["input_ids"]
        for choice in choices:
            ids = tiny_tokenizer(f"{prompt} {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            where = range(len(context), len(ids))
            scores.append(sum(log_p[i - 1, ids[i]].item() for i in where))
        hits += scores.index(max(scores)) == answer
        normalized = [s / len(choice) for s, choice in zip(scores, choices, strict=True)]
        normalized_hits += normalized.index(max(normalized)) == answer
    return hits / len(items), normalized_hits / len(items)


PIQA_ITEMS = [(f"Question: {g}\nAnswer:", [one, two], label) for g, one, two, label in PIQA]
ARC_ITEMS = [(f"Question: {s}\nAnswer:", texts, labels.index(k)) for s, texts, labels, k in ARC]


def test_prompts_are_those_of_the_installed_tasks(data_dir: Path) -> None:
    import lm_eval.tasks
    import yaml

    write_arc(data_dir / "arc", "ARC-Easy-Test")
    tasks = resolve_tasks(["piqa", "arc_challenge", "arc_easy"], data_dir).tasks
    folder = Path(lm_eval.tasks.__file__).parent
    for task, file, items in zip(
        tasks,
        ["piqa/piqa.yaml", "arc/arc_easy.yaml", "arc/arc_easy.yaml"],  # arc_challenge includes it
        [PIQA_ITEMS, ARC_ITEMS, ARC_ITEMS],
        strict=True,
    ):
        official = yaml.safe_load((folder / file).read_text())
        for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type", "metric_list"):
            assert getattr(task.config, key) == official[key], key
        version = official["metadata"]["version"]
        assert version == task.VERSION
        docs = list(task.eval_docs)
        found = [(task.doc_to_text(d), task.doc_to_choice(d), task.doc_to_target(d)) for d in docs]
        assert found == items


def test_scores_equal_log_likelihoods_by_hand(
    model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = resolve_tasks(["arc_challenge", " piqa", "piqa"], data_dir)
    assert tasks.names == ("arc_challenge", "piqa")
    found = run_tasks(model, tiny_tokenizer, tasks, batch_size=3)
    json.dumps(found)
    assert capsys.readouterr().out == ""  # stdout belongs to --json
    assert list(found) == ["arc_challenge", "piqa"]
    seen = set()
    for name, items in [("piqa", PIQA_ITEMS), ("arc_challenge", ARC_ITEMS)]:
        acc, acc_norm = accuracies(model, tiny_tokenizer, items)
        n = len(items)
        assert found[name]["acc"] == acc
        assert found[name]["acc_norm"] == acc_norm
        assert found[name]["acc_stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / (n - 1)))
        assert (found[name]["n"], found[name]["n_total"], found[name]["num_fewshot"]) == (n, n, 0)
        assert found[name]["source"] == str(data_dir / evaluate.LOCAL_TASKS[name].file)
        seen |= {acc, acc_norm}
    # a task whose answers were all lost, or all ones, would not have told anything
    assert seen - {0.0, 1.0}
    # the same tasks serve a second model, and the batch size does not matter
    assert run_tasks(model, tiny_tokenizer, tasks, batch_size=1) == found


def test_limit_takes_the_first_items(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, data_dir: Path
) -> None:
    found = run_tasks(model, tiny_tokenizer, resolve_tasks(["arc_challenge"], data_dir), limit=1)
    acc, acc_norm = accuracies(model, tiny_tokenizer, ARC_ITEMS[:1])
    row = found["arc_challenge"]
    assert (row["acc"], row["acc_norm"], row["n"], row["n_total"]) == (acc, acc_norm, 1, 4)
    assert row["acc_stderr"] is None


def test_few_shot_examples_come_from_the_train_file(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, data_dir: Path
) -> None:
    with pytest.raises(DataError, match=r"few-shot examples come from .*piqa\.train\.jsonl"):
        resolve_tasks(["piqa"], data_dir, num_fewshot=1)
    write_piqa(data_dir / "piqa", "train")
    tasks = resolve_tasks(["piqa"], data_dir, num_fewshot=1)
    found = run_tasks(model, tiny_tokenizer, tasks, limit=2)
    assert found["piqa"]["num_fewshot"] == 1
    solved = {f"{prompt} {choices[label]}" for prompt, choices, label in PIQA_ITEMS}
    for instance in tasks.tasks[0].instances:
        shot, question = instance.args[0].split("\n\n")
        assert shot.replace("In training: ", "", 1) in solved
        assert "In training: " in shot
        assert question == PIQA_ITEMS[instance.doc_id][0]


def test_nan_is_refused_not_scored(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, data_dir: Path
) -> None:
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError, match="task piqa: a log-probability of item 0 is NaN"):
        run_tasks(model, tiny_tokenizer, resolve_tasks(["piqa"], data_dir), limit=1)


def test_word_perplexity_is_labelled(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    torch.nn.init.zeros_(model.lm_head.weight)
    page = "ten bytes " * 40
    config = {
        "task": "pages",
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"page": page}])},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "process_results": lambda doc, result: {
            "word_perplexity": (result[0], len(doc["page"].split()))
        },
        "metric_list": [{"metric": "word_perplexity"}],
    }
    task = TaskManager(include_defaults=False).load([config])["tasks"]["pages"]
    found = run_tasks(model, tiny_tokenizer, TaskSet(("pages",), (task,), {}))["pages"]
    # uniform logits: 5 tokens a word
    assert found["word_perplexity"] == pytest.approx(VOCABULARY**5, rel=1e-4)
    assert "256 tokens at a time: not a token perplexity" in found["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "--limit 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_length": POSITIONS + 1}, "256 positions"),
    ],
)
def test_run_tasks_refuses(
    model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        run_tasks(model, tiny_tokenizer, TaskSet((), (), {}), **arguments)


def test_unknown_task_lists_its_neighbours(data_dir: Path) -> None:
    # in seconds, from the files of the whole installed lm-eval: the index is not built for a typo
    with pytest.raises(UsageError, match="unknown task 'arc_chalenge'; near it: arc_challenge"):
        resolve_tasks(["piqa", "arc_chalenge"], data_dir)
    with pytest.raises(UsageError, match="unknown task 'xyzzy_plugh'; none has a name like it"):
        resolve_tasks(["xyzzy_plugh"], data_dir)


def test_word_of_a_task_file_that_is_no_task(small_index: None, data_dir: Path) -> None:
    with pytest.raises(UsageError, match="unknown task 'training_split'"):
        resolve_tasks(["piqa", "training_split"], data_dir)


@pytest.mark.parametrize(
    ("names", "num_fewshot", "message"),
    [([], None, "no task is named"), ([" ", ""], None, "no task"), (["piqa"], -1, "negative")],
)
def test_resolve_refuses_options(
    data_dir: Path, names: list[str], num_fewshot: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_tasks(names, data_dir, num_fewshot=num_fewshot)


def test_refuses_a_data_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        resolve_tasks(["piqa"], tmp_path / "nowhere")


@pytest.mark.parametrize("data", ["no folder", "empty folder"])
def test_unreachable_hub_is_one_line_at_once(no_hub: None, tmp_path: Path, data: str) -> None:
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    started = time.perf_counter()
    with pytest.raises(DataError) as caught:
        resolve_tasks(["piqa"], tmp_path if data == "empty folder" else None)
    assert time.perf_counter() - started < 10
    assert str(caught.value) == (
        "task piqa: the Hugging Face hub cannot be reached and the data is not cached;"
        " give local files with --data-dir DIR (piqa/piqa.valid.jsonl)"
    )
    # a later load may find the hub back
    after = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    assert after == before


def test_tag_without_local_files_names_the_tasks_that_have_them(
    no_hub: None, small_index: None, data_dir: Path
) -> None:
    with pytest.raises(DataError, match=r"task ai2_arc: .*\(piqa, arc_challenge, arc_easy only\)"):
        resolve_tasks(["piqa", "ai2_arc"], data_dir)


def test_group_is_scored_with_its_members(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, data_dir: Path
) -> None:
    from lm_eval.api.group import Group

    members = resolve_tasks(["piqa", "arc_challenge"], data_dir)
    group = Group.from_config(
        {
            "group": "both",
            "task": [],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        }
    )
    for task in members.tasks:
        group.add(task)
    found = run_tasks(model, tiny_tokenizer, TaskSet(("both",), (group,), members.local_files))
    weighted = (5 * found["piqa"]["acc"] + 4 * found["arc_challenge"]["acc"]) / 9
    assert found["both"]["acc"] == pytest.approx(weighted)
    assert found["piqa"]["n"] == 5


def test_lm_eval_not_installed(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"pip install 'pbq-llm\[eval\]'"):
        resolve_tasks(["piqa"], data_dir)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("piqa.valid.jsonl", "", "piqa.valid.jsonl: the file is empty"),
        ("piqa.valid.jsonl", '{"goal": "a", "sol1": "b"}\n', r"jsonl:1: not a PIQA item"),
        ("piqa.valid.jsonl", "[1]\n", r"jsonl:1: not a PIQA item"),
        ("piqa.valid.jsonl", '{"goal": "a"\n', r"jsonl:1: not JSON"),
        ("piqa.valid.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c"}\n', "1 items.*5 labels"),
        ("piqa.valid-labels.lst", "0\n1\n1\n2\n0\n", "label '2' is neither 0 nor 1"),
        ("piqa.valid-labels.lst", None, r"labels\.lst: cannot be read"),
    ],
)
def test_refuses_damaged_piqa_files(
    data_dir: Path, file: str, content: str | None, message: str
) -> None:
    path = data_dir / "piqa" / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        resolve_tasks(["piqa"], data_dir)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"question": {"stem": "s", "choices": []}}, r"jsonl:2: not an ARC item"),
        ({"question": "s", "answerKey": "A"}, r"jsonl:2: not an ARC item"),
        (
            {
                "question": {"stem": "s", "choices": [{"text": "t", "label": "A"}]},
                "answerKey": "1",
            },
            r"jsonl:2: answerKey '1' is not among the labels \['A'\]",
        ),
    ],
)
def test_refuses_damaged_arc_files(data_dir: Path, item: dict[str, Any], message: str) -> None:
    file = data_dir / "arc" / "ARC-Challenge-Test.jsonl"
    first = file.read_text().splitlines()[0]
    file.write_text(f"{first}\n{json.dumps(item)}\n")
    with pytest.raises(DataError, match=message):
        resolve_tasks(["arc_challenge"], data_dir)


def test_real_files(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, shared_data: Path
) -> None:
    tasks = resolve_tasks(["piqa", "arc_challenge"], shared_data)
    model.config.max_position_embeddings = 4096  # a byte a token makes long prompts
    found = run_tasks(model, tiny_tokenizer, tasks, limit=2, max_length=2048)
    for name, row in found.items():
        lines = (shared_data / evaluate.LOCAL_TASKS[name].file).read_bytes().splitlines()
        assert (row["n"], row["n_total"]) == (2, len(lines))
    piqa = tasks.tasks[0]
    assert piqa.doc_to_text(piqa.eval_docs[1]) == "Question: dresser\nAnswer:"
    assert piqa.doc_to_choice(piqa.eval_docs[1])[0] == "replace drawer with bobby pin "


# python -m pbq.lm_eval


def test_command_line_is_lm_evals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pbq import lm_eval as command

    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 0
    assert "--model_args" in capsys.readouterr().out


def test_command_line_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    from pbq import lm_eval as command

    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match=r"pip install 'pbq-llm\[eval\]'"):
        command.main()
