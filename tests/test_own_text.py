"""Text that a model writes by itself: what is drawn, what each token sees, what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pbq import own_text
from pbq.calibrate import load_calibration
from pbq.errors import NumericalError
from pbq.models import cache_name
from pbq.own_text import (
    _continued,
    _draw,
    documents_at_once,
    sample_from_model,
    sampling_bytes,
)

# Every kind of attention and of cache there is here: heads in groups, one each, one for all; layers
# that see four tokens; sinks; latent keys; positions in the scores.
ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3"]
ARCHITECTURES += ["bloom", "falcon", "gpt2", "mixtral"]


def test_self_is_sampled_deterministically_and_leaves_the_global_state(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = sample_from_model(model, tiny_tokenizer, 5, 12, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert torch.equal(sample_from_model(model, tiny_tokenizer, 5, 12, seed=1), one)
    assert not torch.equal(sample_from_model(model, tiny_tokenizer, 5, 12, seed=2), one)
    calibration = load_calibration("self", tiny_tokenizer, model, nsamples=5, seqlen=12, seed=1)
    assert torch.equal(calibration.ids, one)
    assert calibration.source == "sampled from the model itself, seed 1"


def test_self_starts_with_an_ordinary_token_and_four_greedy_ones(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    ids = sample_from_model(model, tiny_tokenizer, 40, 8, seed=0, batch=16)
    assert ids.shape == (40, 8)
    assert ids.dtype == torch.int64
    assert int(ids.max()) < len(tiny_tokenizer) == 259
    assert int(ids[:, 0].max()) < 256  # 256 to 258 are pad, bos and eos
    assert len(set(ids[:, 0].tolist())) > 20
    with torch.no_grad():
        greedy = model(ids[:, :4]).logits[:, :, :259].argmax(-1)
    assert torch.equal(ids[:, 1:5], greedy)
    # afterwards two rows that start alike go their own ways
    assert len({tuple(row) for row in ids[:, 5:].tolist()}) == 40


def test_a_long_row_of_self_is_several_documents(tiny_model, tiny_tokenizer):
    """23 tokens of documents of at most 8: three of 8, the last one cut by a token."""
    model = tiny_model("llama")
    ids = sample_from_model(model, tiny_tokenizer, 6, 23, seed=0, document=8)
    assert ids.shape == (6, 23)
    starts = ids[:, [0, 8, 16]]
    assert int(starts.max()) < 256
    assert len(set(starts.flatten().tolist())) > 10
    with torch.no_grad():
        greedy = model(ids[:, 8:12]).logits[:, :, :259].argmax(-1)
    assert torch.equal(ids[:, 9:13], greedy)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """Of 40,000 draws each share is within 5 standard errors; what cannot occur never does.

    300 tokens are two blocks and a part of a third; the second one is without any.
    """
    p = torch.zeros(300)
    p[[0, 3, 127, 256, 299]] = torch.tensor([0.5, 0.3, 0.05, 0.1, 0.05])
    generator = torch.Generator().manual_seed(0)
    drawn = _draw(p.log().expand(40000, -1), generator, 5)[:, 0]
    share = torch.bincount(drawn, minlength=300) / 40000
    assert share.shape == (300,)
    assert (share - p).abs().le(5 * (p * (1 - p) / 40000).sqrt()).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_token_sees_all_before_it(
    architecture: str, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits while writing are those of the finished text, also where the room grows: 4, 8, 12."""
    monkeypatch.setattr(own_text, "_ROOM", 4)
    model = tiny_model(architecture)
    text = torch.randint(250, (3, 11), generator=torch.Generator().manual_seed(1))
    found, ids = [], [text[:, :1]]
    with torch.no_grad():
        for logits in _continued(model, ids, 11):
            found.append(logits)
            ids.append(text[:, len(ids), None])
        expected = model(text, use_cache=False).logits[:, :10]
    torch.testing.assert_close(torch.stack(found, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("window", "calls"), [(4, 2 * 9), (10, 2)])
def test_attention_is_put_back_and_passed_on_for_what_it_does_not_know(
    window: int,
    calls: int,
    tiny_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first token, and layers that forget before the text of 10 ends, take the usual way."""
    usual, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[1].shape)
        return usual(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    model = tiny_model("mistral", sliding_window=window, num_hidden_layers=2)
    ids = [torch.tensor([[1], [2]])]
    with torch.no_grad():
        for logits in _continued(model, ids, 10):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counted
            ids.append(logits.argmax(-1, keepdim=True))
    assert len(seen) == calls


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
def test_the_memory_of_a_batch_is_that_of_its_keys_and_values(
    architecture: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(architecture)
    with torch.no_grad():
        cache = model(torch.ones(1, 7, dtype=torch.int64), use_cache=True)[cache_name(model)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert own_text._cache_bytes(model) * 7 == held
    # 3 segments of 300 tokens are six documents of 150; logits twice
    assert sampling_bytes(model, 3, 300) == 6 * (150 * held // 7 + 2 * 272 * 4)
    assert sampling_bytes(model, 90, 300) == 128 * (150 * held // 7 + 2 * 272 * 4)


def test_large_caches_make_small_batches(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    document = 256 * 2 * 3 * 24 * 4  # bytes: tokens, keys and values, layers, entries, float32
    assert documents_at_once(model, 256) == 128
    monkeypatch.setattr(own_text, "_CACHE_BYTES", 5 * document + 1)
    assert documents_at_once(model, 256) == 5
    monkeypatch.setattr(own_text, "_CACHE_BYTES", 0)
    dense = 4 * sum(p.numel() for p in model.parameters())
    assert dense > 2 * 12 * document // 256
    assert documents_at_once(model, 12) == dense // 2 // (12 * document // 256)
    assert documents_at_once(model, 10**6) == 1


def test_self_reports_progress_up_to_the_end(tiny_model, tiny_tokenizer):
    seen = []
    sample_from_model(
        tiny_model("llama"), tiny_tokenizer, 5, 8, 0, lambda done, of: seen.append((done, of)), 2
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {of for _, of in seen} == {40}
    assert seen[-1][0] == 39  # the first token of a row costs nothing


def test_self_refuses_a_model_that_computes_nan(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match="logits at token 5 are not finite"):
        sample_from_model(model, tiny_tokenizer, 2, 8, seed=0)
