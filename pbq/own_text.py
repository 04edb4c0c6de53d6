"""Text that a model writes by itself, many documents at a time: `--calib self`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from pbq.attention import Attention, attention_as
from pbq.bfloat16 import fast_products
from pbq.errors import NumericalError
from pbq.models import cache_name

Progress = Callable[[int, int], None]
# Tokens of a document: many short texts say more of the model than few long ones, and cost less
DOCUMENT = 256
# Documents at a time: with more, matmuls get no faster. Fewer where their keys and values would
# take more than this and more than half of what the model takes.
_BATCH = 128
_CACHE_BYTES = 2**30
# Tokens by which the room for keys and values grows
_ROOM = 64
# A token is drawn in two steps, a block of the vocabulary and one of its tokens, for so many rows
# at a time that their probabilities stay in a CPU's cache
_BLOCK = 128
_ROWS = 16


@torch.no_grad()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: Any,
    nsamples: int,
    seqlen: int,
    seed: int,
    progress: Progress | None = None,
    batch: int | None = None,
    document: int = DOCUMENT,
) -> Tensor:
    """Text the model writes by itself: random first token, four greedy ones, then sampling.

    Data-free calibration of LLM-QAT (Liu et al. 2023, 3.1), which DB-LLM follows too. int64
    [nsamples, seqlen]; a row is made of several documents where it is longer than one. batch: of
    documents, None for as many as `documents_at_once`. Deterministic for a seed; the global random
    state is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    ordinary, vocab = ordinary_tokens(model, tokenizer)
    length, count = _documents(nsamples, seqlen, document)
    batch = batch or documents_at_once(model, length)
    documents = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        pick = torch.randint(len(ordinary), (size, 1), generator=generator)
        ids = [ordinary[pick].to(device)]
        for step, logits in enumerate(_continued(model, ids, length), 1):
            logits = logits[:, :vocab]
            greedy = step <= 4
            ids.append(
                logits.argmax(-1, keepdim=True) if greedy else _draw(logits, generator, step)
            )
            if progress:
                progress(start * length + step * size, count * length)
        documents.append(torch.cat(ids, 1).cpu())
    return torch.cat(documents).view(nsamples, -1)[:, :seqlen].contiguous()


def ordinary_tokens(model: PreTrainedModel, tokenizer: Any) -> tuple[Tensor, int]:
    """Tokens that are not special, int64 [v], and how many there are of both kinds."""
    vocab = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    special = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(vocab) if i not in special]), vocab


def documents_at_once(model: PreTrainedModel, length: int) -> int:
    """From shapes alone, so that a seed gives the same text wherever it is made."""
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(1, min(_BATCH, max(_CACHE_BYTES, dense // 2) // (length * _cache_bytes(model))))


def sampling_bytes(model: PreTrainedModel, nsamples: int, seqlen: int) -> int:
    """What `sample_from_model` takes beside the model, which may be on the meta device."""
    length, count = _documents(nsamples, seqlen, DOCUMENT)
    logits = 2 * model.get_input_embeddings().weight.shape[0] * model.dtype.itemsize
    return min(count, documents_at_once(model, length)) * (length * _cache_bytes(model) + logits)


def _documents(nsamples: int, seqlen: int, document: int) -> tuple[int, int]:
    """Tokens of each document, at most `document`, and how many of them make the segments."""
    per_row = math.ceil(seqlen / document)
    return math.ceil(seqlen / per_row), nsamples * per_row


def _cache_bytes(model: PreTrainedModel) -> int:
    """Of a token's keys and values in all layers, or more where these are kept compressed."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    sizes = (getattr(config, name, None) for name in ("head_dim", "qk_head_dim", "v_head_dim"))
    size = max((s for s in sizes if s), default=config.hidden_size // heads)
    heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def _continued(model: PreTrainedModel, ids: list[Tensor], length: int) -> Iterator[Tensor]:
    """Logits [b, vocabulary] behind the last of `ids` [b, 1], to which the caller adds one each."""
    name = cache_name(model)
    cache = None
    while len(ids) < length:
        with _attention_over_room(), fast_products():
            out = model(ids[-1], use_cache=True, **{name: cache})
        if cache is None:
            cache = out[name]
            _make_room(cache, length)
        yield out.logits[:, -1]


def _draw(logits: Tensor, generator: torch.Generator, step: int) -> Tensor:
    """A token [b, 1] of each row's distribution, by inversion: two numbers and searches a row.

    torch.multinomial draws a number for each entry of the vocabulary; a cumulative sum over all of
    them is as slow.
    """
    return torch.cat([_draw_rows(rows, generator, step) for rows in logits.split(_ROWS)])


def _draw_rows(logits: Tensor, generator: torch.Generator, step: int) -> Tensor:
    padded = F.pad(logits, (0, -logits.shape[1] % _BLOCK), value=-math.inf)
    p = padded.float().softmax(-1).unflatten(-1, (-1, _BLOCK))
    of_blocks = p.sum(-1)
    if not torch.isfinite(of_blocks).all():
        raise NumericalError(f"the model's logits at token {step} are not finite")
    numbers = torch.rand(len(p), 2, generator=generator).to(p.device)
    block = _invert(of_blocks, numbers[:, :1])
    within = p.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    return block * _BLOCK + _invert(within, numbers[:, 1:])


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The entry [b, 1] of `weights` [b, n] in which `numbers` [b, 1], in [0, 1), of the sum lie.

    Never one of weight 0: a float32 below 1 of the sum is below the sum, rounded too.
    """
    total = weights.cumsum(-1)
    return torch.searchsorted(total, numbers * total[:, -1:], right=True)


class _Roomy(DynamicLayer):
    """Keys and values as views of the filled part of larger tensors, their `whole`.

    Every new token would be concatenated to all before it otherwise.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _appended(self.keys, key_states)
        self.values = _appended(self.values, value_states)
        return self.keys, self.values


def _appended(held: Tensor, new: Tensor) -> Tensor:
    """[b, h, t + n, d]: `held` and `new`, in the room behind `held` while there is any."""
    start, end = held.shape[2], held.shape[2] + new.shape[2]
    whole = getattr(held, "whole", held)
    if end > whole.shape[2]:
        room = math.ceil(end / _ROOM) * _ROOM
        whole = new.new_zeros(*new.shape[:2], room, new.shape[3])
        whole[:, :, :start] = held
    whole[:, :, start:end] = new
    filled: Any = whole[:, :, :end]
    filled.whole = whole
    return filled


def _make_room(cache: Cache, length: int) -> None:
    """Let the layers on a CPU that keep all `length` tokens grow in place; others stay theirs."""
    for i, layer in enumerate(getattr(cache, "layers", [])):
        kind = type(layer)
        if kind is not DynamicLayer and kind is not DynamicSlidingWindowLayer:
            continue
        if not layer.is_initialized or layer.keys.device.type != "cpu":
            continue
        if getattr(layer, "sliding_window", length) >= length:
            cache.layers[i] = room = _Roomy()
            room.is_sliding = layer.is_sliding
            room.update(layer.keys, layer.values)


@contextmanager
def _attention_over_room() -> Iterator[None]:
    """Calls of "sdpa" for one token read a roomy layer as it lies in memory.

    Of one query a head, torch's attention on CPUs makes full tiles, and a matmul over a view with
    gaps a copy: together they took two thirds of the time.
    """

    def instead_of(usual: Attention) -> Attention:
        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            **more: Any,
        ) -> tuple[Tensor, Tensor | None]:
            plain = attention_mask is more.get("position_bias") is more.get("softcap") is None
            if plain and query.shape[2] == 1 and hasattr(key, "whole") and hasattr(value, "whole"):
                return _attend(query, key, value, more.get("scaling")), None
            return usual(module, query, key, value, attention_mask, **more)

        return attend

    with attention_as(instead_of):
        yield


def _attend(query: Tensor, key: Any, value: Any, scaling: float | None) -> Tensor:
    """[b, 1, h, d] of query [b, h, 1, d] over all of key and value; their heads may be fewer."""
    b, h, _, d = query.shape
    scale = d**-0.5 if scaling is None else scaling
    grouped = query.reshape(b, key.shape[1], -1, d)
    scores = torch.matmul(grouped, key.whole.transpose(2, 3)).float() * scale
    scores[..., key.shape[2] :] = -math.inf
    return torch.matmul(scores.softmax(-1).to(value.dtype), value.whole).view(b, 1, h, -1)
