"""Calibration tokens from every source, exactly the ones asked for; channel statistics."""

import hashlib
import itertools
import json
import re
import sys
import types

import pytest
import torch
from torch import nn

from pbq.calibrate import (
    COMING_BACK,
    WORDS_BACK,
    Calibration,
    batches,
    channel_stats,
    load_calibration,
    made_up_words,
    words_that_return,
)
from pbq.errors import DataError, NumericalError


def load(source, tokenizer, nsamples=2, seqlen=8, model=None):
    return load_calibration(str(source), tokenizer, model, nsamples=nsamples, seqlen=seqlen, seed=0)


# --- text -------------------------------------------------------------------------------------


def test_a_text_file_gives_exactly_its_first_tokens(tmp_path, tiny_tokenizer):
    text = "Zwei Wörter, 3 Zeichen\n" * 4
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    calibration = load(tmp_path / "a.txt", tiny_tokenizer, nsamples=3, seqlen=11)
    expected = tiny_tokenizer(text, add_special_tokens=False).input_ids[:33]
    assert calibration.ids.dtype == torch.int64
    assert calibration.ids.shape == (3, 11)
    assert calibration.ids.flatten().tolist() == expected
    assert calibration.source == "a.txt"
    assert calibration.label() == "a.txt, 3 x 11 tokens"


def test_noise_replaces_its_share_of_the_tokens(tmp_path, tiny_tokenizer, tiny_model):
    (tmp_path / "a.txt").write_text("abcdefgh" * 2000)
    model = tiny_model("llama")
    given = {"nsamples": 100, "seqlen": 100, "seed": 3, "further": 50}

    def loaded(share, **other):
        arguments = (str(tmp_path / "a.txt"), tiny_tokenizer, model)
        return load_calibration(*arguments, **{**given, **other}, token_noise=share)

    plain, noisy = loaded(0.0), loaded(0.25)
    named = "a.txt with 25 % of other tokens for the blocks"
    assert noisy.label() == f"{named}, 100 x 100 tokens, distilled on 50 more"
    assert noisy.ids.shape == plain.ids.shape
    changed = noisy.ids[noisy.ids != plain.ids]
    assert len(changed) / plain.ids.numel() == pytest.approx(0.25, abs=0.03)
    special = torch.tensor(tiny_tokenizer.all_special_ids)
    assert not torch.isin(changed, special).any()
    assert len(changed.unique()) > 30  # any token of the vocabulary
    # a distillation has the text as it is
    assert noisy.noisy and not plain.noisy
    for found in (noisy, plain):
        assert torch.equal(found.clean, plain.ids)
        assert torch.equal(found.further, plain.further)
    assert torch.equal(noisy.ids, loaded(0.25).ids)
    assert not torch.equal(noisy.ids, loaded(0.25, seed=4).ids)


def test_the_models_own_text_has_no_noise(tmp_path, tiny_tokenizer, tiny_model):
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)

    def loaded(share):
        return load_calibration(
            f"self+{tmp_path / 'a.txt'}",
            tiny_tokenizer,
            tiny_model("llama"),
            nsamples=8,
            seqlen=16,
            seed=0,
            token_noise=share,
        )

    plain, noisy = loaded(0.0), loaded(0.5)
    same = (plain.ids == noisy.ids).all(1)
    assert same.sum() == 4
    assert torch.equal(noisy.clean, plain.ids)  # row for row, in one random order


class Pieces:
    """A tokenizer, here of characters, whose vocabulary is said to be another."""

    def __init__(self, tokenizer, vocabulary):
        self.tokenizer, self.vocabulary = tokenizer, vocabulary

    def __len__(self):
        return len(self.vocabulary)

    def __call__(self, *texts, **options):
        return self.tokenizer(*texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def convert_ids_to_tokens(self, ids):
        return [self.vocabulary[i] for i in ids]


@pytest.mark.parametrize("marker", ["Ġ", "▁"])
def test_words_are_made_of_pieces_as_names_are(tiny_tokenizer, marker):
    known = ["<s>", "", marker, "7", "...", "Kow", f"{marker}the", f"{marker}X2", f"{marker}-A"]
    vocabulary = [*known, f"{marker}Kow", f"{marker}Ada", "alski", "ing"]

    def made(seed):
        words = made_up_words(Pieces(tiny_tokenizer, vocabulary), seed)
        return list(itertools.islice(words, 900))

    words = made(0)
    starts, ends = ("Kow", "Ada"), ("", "alski", "ing", *map("".join, PAIRS))
    assert set(words) == {start + end for start in starts for end in ends}
    for few in (words.count("Kow"), words.count("Ada")):
        assert few == pytest.approx(150, abs=45)
    assert words == made(0) != made(1)


PAIRS = list(itertools.product(("alski", "ing"), repeat=2))


def test_placeholders_become_words_where_there_is_noise(tmp_path, tiny_tokenizer, tiny_model):
    text = "of <unk> and <unk>, <unk>-<unk> et al. " * 9
    (tmp_path / "a.txt").write_text(text)
    tokenizer = Pieces(tiny_tokenizer, ["ĠKow", "ĠKow", "ing", "ing"])

    def loaded(share, tokenizer=tokenizer):
        return load_calibration(
            str(tmp_path / "a.txt"),
            tokenizer,
            tiny_model("llama"),
            nsamples=5,
            seqlen=40,
            seed=0,
            token_noise=share,
        )

    filled = loaded(1e-9)  # a share that no token happens to be in
    named = "a.txt with 1e-07 % of other tokens for the blocks and words for <unk>"
    assert filled.label() == f"{named}, 5 x 40 tokens"
    said = tiny_tokenizer.decode(filled.ids.flatten().tolist()).replace(" ", "")
    pattern = "of@and@,@-@etal.".replace("@", "Kow(ing){0,2}")
    assert re.match(f"({pattern}){{3}}", said), said
    # no noise, or no pieces of words in the vocabulary: as it was
    plain = tiny_tokenizer(text, add_special_tokens=False).input_ids[:200]
    for same in (loaded(0), loaded(1e-9, tiny_tokenizer)):
        assert same.ids.flatten().tolist() == plain


def test_words_that_come_back_are_of_the_last_and_as_long():
    words = ["".join(pair) for pair in itertools.product("Abcdefghijklmnop", repeat=2)] * 2
    words = [word + "x" * (i % 3) for i, word in enumerate(words)]

    def made(seed):
        return list(words_that_return(iter(words), len, seed))

    pairs = made(0)
    assert [word for word, _ in pairs] == words
    assert all(len(word) == len(found) for word, found in pairs)
    back = [i for i, (word, found) in enumerate(pairs) if word != found]
    assert len(back) / len(pairs) == pytest.approx(COMING_BACK, abs=0.07)
    stood = [found for _, found in pairs]
    assert all(stood[i] in stood[max(0, i - WORDS_BACK) : i] for i in back)
    assert pairs == made(0) != made(1)


def test_a_distillation_sees_words_come_back_in_the_same_places(
    tmp_path, tiny_tokenizer, tiny_model
):
    (tmp_path / "a.txt").write_text("of <unk> and <unk> . " * 60)
    tokenizer = Pieces(tiny_tokenizer, [f"Ġ{a}{b}" for a in "ABCD" for b in "uvwxyz"] + ["ing"])
    found = load_calibration(
        str(tmp_path / "a.txt"),
        tokenizer,
        tiny_model("llama"),
        nsamples=10,
        seqlen=40,
        seed=0,
        token_noise=1e-9,
    )
    once, again = (
        tiny_tokenizer.decode(x.flatten().tolist()).replace(" ", "")
        for x in (found.ids, found.clean)
    )
    assert found.ids.shape == found.clean.shape and once != again
    pattern = r"([A-D][u-z](?:ing)*)"
    names = [re.findall(pattern, text) for text in (once, again)]
    assert [len(name) for name in names[0]] == [len(name) for name in names[1]]
    assert len(set(names[1])) < 0.6 * len(set(names[0]))
    assert re.sub(pattern, "@", once) == re.sub(pattern, "@", again)


def test_the_hash_names_the_ids(tmp_path, tiny_tokenizer):
    for name, text in (("a.txt", "abcdefgh" * 4), ("b.md", "abcdefgh" * 9), ("c.txt", "x" * 32)):
        (tmp_path / name).write_text(text)
    a, b, c = (load(tmp_path / name, tiny_tokenizer) for name in ("a.txt", "b.md", "c.txt"))
    ids = b"".join(int(i).to_bytes(8, "little") for i in a.ids.flatten())
    assert a.sha256 == hashlib.sha256(ids).hexdigest()
    assert a.sha256 == b.sha256 != c.sha256


def test_jsonl_texts_are_joined_by_the_end_of_text_token(tmp_path, tiny_tokenizer):
    lines = [
        json.dumps({"text": "abc", "id": 1}),
        "",
        json.dumps("de"),
        json.dumps({"text": "f" * 20}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    ids = load(tmp_path / "a.jsonl", tiny_tokenizer, 1, 9).ids[0].tolist()
    eos = tiny_tokenizer.eos_token_id
    token = {c: tiny_tokenizer(c, add_special_tokens=False).input_ids[0] for c in "abcdef"}
    assert ids == [
        *(token[c] for c in "abc"),
        eos,
        *(token[c] for c in "de"),
        eos,
        *[token["f"]] * 2,
    ]


def test_reading_stops_when_there_is_enough(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 16}) + "\nnot json\n")
    assert load(tmp_path / "a.jsonl", tiny_tokenizer).ids.shape == (2, 8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: 0 tokens, but 2 x 8 = 16 are needed; use a longer text or a"),
        ("a.txt", b"only 15 letters", r"15 tokens.*16 are needed.*, --nsamples 1 or a smaller"),
        ("a.txt", b"seven..", r"7 tokens.*use a longer text or a smaller --seqlen"),
        ("a.txt", b"caf\xe9 " * 9, r"a\.txt: not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl: not UTF-8"),
        ("a.jsonl", b'{"text": "abc"}\n{"te', r"a\.jsonl: not one JSON object a line"),
        ("a.jsonl", b'{"text": "abc"}\n{"body": "x"}', r'line 2: expected an object with a "text"'),
        ("a.jsonl", b'{"text": 3}', r'line 1: expected an object with a "text"'),
        ("a.jsonl", b"[1, 2]", r"line 1: expected"),
        ("gone.txt", None, r"gone\.txt: No such file"),
    ],
)
def test_text_that_will_not_do_is_refused(tmp_path, tiny_tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name, tiny_tokenizer)
    assert caught.value.exit_code == 4


def test_a_directory_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(DataError, match="Is a directory"):
        load(tmp_path, tiny_tokenizer)


# --- datasets ---------------------------------------------------------------------------------


def dataset_module(monkeypatch, rows=None, error=None):
    """A stand-in for `datasets` that records how it was called."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if error:
            raise error
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_dataset_is_streamed_by_name_config_and_split(monkeypatch, tiny_tokenizer):
    calls = dataset_module(monkeypatch, [{"text": "a" * 9}, {"text": "b" * 9}])
    ids = load("org/corpus:raw:validation", tiny_tokenizer).ids.flatten().tolist()
    assert calls == [(("org/corpus", "raw"), {"split": "validation", "streaming": True})]
    assert ids[9] == tiny_tokenizer.eos_token_id
    assert len(set(ids[:9])) == len(set(ids[10:])) == 1


def test_a_dataset_without_config_means_its_train_split(monkeypatch, tiny_tokenizer):
    calls = dataset_module(monkeypatch, [{"text": "a" * 16}])
    load("corpus", tiny_tokenizer)
    assert calls == [(("corpus", None), {"split": "train", "streaming": True})]


def test_an_unreachable_dataset_is_one_line_with_a_way_out(monkeypatch, tiny_tokenizer):
    dataset_module(monkeypatch, error=ConnectionError("long\nstory"))
    with pytest.raises(DataError) as caught:
        load("org/corpus", tiny_tokenizer)
    assert str(caught.value) == (
        "org/corpus: neither a file nor a dataset that can be reached (ConnectionError); "
        "give a local text file or --calib self"
    )


def test_a_dataset_without_text_is_refused(monkeypatch, tiny_tokenizer):
    dataset_module(monkeypatch, [{"sentence": "a"}])
    with pytest.raises(DataError, match=r"corpus, row 0: expected"):
        load("corpus", tiny_tokenizer)


def test_no_datasets_library_says_what_to_install(monkeypatch, tiny_tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("corpus", tiny_tokenizer)


# --- statistics -------------------------------------------------------------------------------


def linears_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n}


class Recorder(nn.Module):
    """Keeps its input, and adds a zero whose gradient is the one at the output of every token."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.x, self.zero = linear, None, None

    def forward(self, x):
        self.x, y = x.detach(), self.linear(x)
        self.zero = torch.zeros_like(y, requires_grad=True)
        return y + self.zero


def direct_stats(model, names, ids):
    """Every row on its own, by autograd on an added zero instead of hooks, in float64."""
    recorders = {name: Recorder(model.get_submodule(name)) for name in names}
    for name, recorder in recorders.items():
        model.set_submodule(name, recorder)
    xs, gs = {name: [] for name in names}, {name: [] for name in names}
    for row in ids:
        loss = model(row[None], labels=row[None], use_cache=False).loss
        gradients = torch.autograd.grad(loss, [r.zero for r in recorders.values()])
        for (name, recorder), g in zip(recorders.items(), gradients, strict=True):
            xs[name].append(recorder.x[0].double())
            gs[name].append(g[0].double())
    for name, recorder in recorders.items():
        model.set_submodule(name, recorder.linear)
    return {n: torch.cat(x) for n, x in xs.items()}, {n: torch.cat(g) for n, g in gs.items()}


def some_ids(rows, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, length), generator=g)


def test_statistics_equal_a_direct_computation(tiny_model):
    """A llama with 4 query and 2 key-value heads: k_proj and v_proj have 24 outputs."""
    model, ids = tiny_model("llama"), some_ids(3, 9)
    linears = linears_of(model)
    assert len(linears) == 21
    stats = channel_stats(model, linears, ids, gradients=True)
    xs, gs = direct_stats(model, list(linears), ids)
    assert stats["model.layers.0.self_attn.k_proj"].g_sq.shape == (24,)
    for name, s in stats.items():
        x, g = xs[name], gs[name]
        expected = (x.pow(2).mean(0), x.abs().amax(0), x.abs().mean(0), g.pow(2).mean(0))
        found = (s.x_sq, s.x_absmax, s.x_absmean, s.g_sq)
        for value, exact in zip(found, expected, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4 * exact.max())


def test_a_batch_changes_the_statistics_by_its_loss_s_mean_only(tiny_model):
    """The loss is a mean: gradients of a batch of 3 are a third, and every batch has 3 rows."""
    model, ids = tiny_model("llama"), some_ids(6, 7)
    linears = linears_of(model)
    one = channel_stats(model, linears, ids, gradients=True, batch=1)
    three = channel_stats(model, linears, ids, gradients=True, batch=5)  # 6 rows: 5 becomes 3
    for name in linears:
        torch.testing.assert_close(one[name].x_sq, three[name].x_sq, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(one[name].x_absmax, three[name].x_absmax, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one[name].g_sq, 9 * three[name].g_sq, rtol=1e-3, atol=1e-9)


def test_without_gradients_nothing_is_differentiated(tiny_model):
    model, ids = tiny_model("llama"), some_ids(2, 8)
    linears = linears_of(model)
    plain = channel_stats(model, linears, ids, gradients=False)
    with_gradients = channel_stats(model, linears, ids, gradients=True)
    for name in linears:
        assert plain[name].g_sq is None
        assert torch.equal(plain[name].x_sq, with_gradients[name].x_sq)


def test_every_architecture_has_gradients_at_every_linear(architecture, tiny_model):
    model = tiny_model(architecture)
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D", "FalconLinear"} and "head" not in name
    }
    stats = channel_stats(model, linears, some_ids(2, 8), gradients=True)
    assert len(stats) >= 9
    for s in stats.values():
        assert torch.isfinite(s.x_sq).all()
        assert torch.isfinite(s.g_sq).all()
        assert float(s.g_sq.max()) > 0


def test_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model("llama")
    model.model.norm.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(wanted.values()) == {True, False}
    linears = linears_of(model)
    channel_stats(model, linears, some_ids(2, 8), gradients=True)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    modules = [*linears.values(), model.get_input_embeddings()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize("gradients", [False, True])
def test_non_finite_inputs_name_the_layer(tiny_model, gradients):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("inf")
    linears = linears_of(model)
    expected = r"^model\.layers\.1\.mlp\.down_proj: non-finite inputs"
    with pytest.raises(NumericalError, match=expected):
        channel_stats(model, linears, some_ids(2, 8), gradients=gradients)
    assert not any(m._forward_pre_hooks for m in linears.values())


def test_non_finite_inputs_name_the_token(tiny_model):
    model, ids = tiny_model("llama", tie_word_embeddings=False), some_ids(3, 8)
    ids[ids == 259] = 0
    ids[1, 6] = 259
    model.get_input_embeddings().weight.data[259] = float("nan")
    said = r"^model\.layers\.0\.self_attn\.q_proj: .* first at token 6 \(id 259\) of segment 1$"
    with pytest.raises(NumericalError, match=said):
        channel_stats(model, linears_of(model), ids, gradients=False)


def test_non_finite_gradients_name_a_layer(tiny_model):
    model = tiny_model("llama")
    model.lm_head = nn.Linear(48, 272, bias=False)  # untied: only the loss sees it
    model.lm_head.weight.data[7, 7] = float("nan")
    with pytest.raises(NumericalError, match=r"^model\.layers\..*: non-finite gradients"):
        channel_stats(model, linears_of(model), some_ids(2, 8), gradients=True)


def test_a_linear_that_no_token_reaches_is_named(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(NumericalError, match=r"^spare: no calibration token"):
        channel_stats(model, {"spare": nn.Linear(3, 3)}, some_ids(1, 8), gradients=False)


def test_progress_counts_rows(tiny_model):
    seen = []
    channel_stats(
        tiny_model("llama"), {}, some_ids(4, 8), gradients=False, batch=2,
        progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(2, 4), (4, 4)]


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [(6, 4, [3, 3]), (6, 6, [6]), (6, 99, [6]), (7, 4, [1] * 7), (1, 8, [1]), (12, 5, [4, 4, 4])],
)
def test_batches_are_equal_and_complete(rows, size, expected):
    ids = some_ids(rows, 5)
    parts = batches(ids, size)
    assert [len(part) for part in parts] == expected
    assert torch.equal(torch.cat(list(parts)), ids)


def test_further_segments_go_on_where_the_others_end(tmp_path, tiny_tokenizer) -> None:
    text = "".join(chr(97 + i % 26) for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    found, plenty = (
        load_calibration(
            str(tmp_path / "a.txt"),
            tiny_tokenizer,
            None,
            nsamples=2,
            seqlen=8,
            seed=0,
            further=more,
        )
        for more in (3, 99)
    )
    assert found.ids.flatten().tolist() == ids[:16]
    assert found.further.flatten().tolist() == ids[16:40]
    assert plenty.further.flatten().tolist() == ids[16 : len(ids) // 8 * 8]
    assert found.sha256 != plenty.sha256
    assert found.label() == "a.txt, 2 x 8 tokens, distilled on 3 more"


def test_more_segments_are_spread_over_what_there_is(tmp_path, tiny_tokenizer) -> None:
    text = "".join(chr(97 + i % 26) for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids

    def loaded(more: int) -> Calibration:
        arguments = (str(tmp_path / "a.txt"), tiny_tokenizer, None)
        return load_calibration(*arguments, nsamples=2, seqlen=8, seed=0, more=more, further=2)

    found, plenty = loaded(3), loaded(99)
    segments = [ids[i : i + 8] for i in range(0, 56, 8)]
    spread = [0, 1, 2, 4, 5]  # i * 7 // 5
    assert found.ids.tolist() == [segments[i] for i in spread]
    assert found.further.tolist() == [segments[3], segments[6]]
    assert plenty.ids.flatten().tolist() == ids[: len(ids) // 8 * 8]
    assert plenty.further.shape == (0, 8)
    assert found.label() == "a.txt, 5 x 8 tokens, distilled on 2 more"


def test_given_texts_share_what_there_is_more(tmp_path, tiny_model, tiny_tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    three = f"{tmp_path / 'a.txt'}+self+{tmp_path / 'b.txt'}"
    model = tiny_model("llama")
    found = load_calibration(three, tiny_tokenizer, model, nsamples=6, seqlen=8, seed=0, more=5)
    a, b = (set(tiny_tokenizer(letter).input_ids) for letter in "ab")
    kinds = [set(row.tolist()) for row in found.ids]
    assert kinds.count(a) == kinds.count(b) == 4
    assert len(kinds) == 10


def test_further_segments_are_of_given_text_only(tmp_path, tiny_model, tiny_tokenizer) -> None:
    (tmp_path / "b.txt").write_text("b" * 100)
    both = f"{tmp_path / 'b.txt'}+self"
    found = load_calibration(
        both, tiny_tokenizer, tiny_model("llama"), nsamples=2, seqlen=8, seed=0, further=4
    )
    assert set(found.further.flatten().tolist()) == set(tiny_tokenizer("b").input_ids)
    assert found.further.shape == (4, 8)


def test_sources_joined_by_plus_share_the_segments(tmp_path, tiny_model, tiny_tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    both = f"{tmp_path / 'a.txt'}+{tmp_path / 'b.txt'}"
    found = load_calibration(both, tiny_tokenizer, None, nsamples=5, seqlen=8, seed=0)
    kinds = [set(row.tolist()) for row in found.ids]
    a, b = (set(tiny_tokenizer(letter).input_ids) for letter in "ab")
    assert kinds.count(a) == 2 and kinds.count(b) == 3
    assert found.source == "a.txt + b.txt"
    with pytest.raises(DataError, match="need at least"):
        load_calibration(both, tiny_tokenizer, None, nsamples=1, seqlen=8, seed=0)
