"""Calibration text as token ids, and the channel statistics of the unquantized model."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbq import ranks
from pbq.allocate import ChannelStats
from pbq.bfloat16 import fast_products
from pbq.config import QuantConfig
from pbq.errors import DataError, NumericalError, UsageError
from pbq.experts import borrowing
from pbq.models import most_positions, weight_of
from pbq.own_text import Progress, ordinary_tokens, sample_from_model
from pbq.tune import Recipe

# What stands in old corpora for every word outside of their vocabularies.
PLACEHOLDER = "<unk>"
# Of the words made up for it, this share stands there again, among the next so many of them.
COMING_BACK, WORDS_BACK = 2 / 3, 30

# Calibration segments that the channel statistics are taken from, evenly spread.
STATISTICS_ROWS = 16


@dataclass(frozen=True, eq=False)
class Calibration:
    """ids int64 [N, seqlen] and where they came from; their sha256 names the set.

    clean: the same segments without the noise that ids may have, and with made-up words that come
    back where those of ids do not; a distillation sees these.
    further: other segments [M, seqlen] of the same text, for the distillation alone.
    """

    ids: Tensor
    source: str
    further: Tensor
    clean: Tensor

    @property
    def sha256(self) -> str:
        every = [self.ids, self.further] + [self.clean] * self.noisy
        return hashlib.sha256(torch.cat(every).numpy().tobytes()).hexdigest()

    @property
    def noisy(self) -> bool:
        return not torch.equal(self.ids, self.clean)

    def label(self) -> str:
        n, length = self.ids.shape
        more = f", distilled on {len(self.further)} more" if len(self.further) else ""
        return f"{self.source}, {n} x {length} tokens{more}"


def check_seqlen(seqlen: int, model: Any) -> None:
    """Raise UsageError for segments that are longer than any text the model can read."""
    positions = most_positions(model.config)
    if positions is not None and seqlen > positions:
        raise UsageError(
            f"--seqlen {seqlen} is more than the model's {positions} positions; "
            f"ask for --seqlen {positions}, or less"
        )


def load_calibration(
    source: str,
    tokenizer: Any,
    model: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    more: int = 0,
    further: int = 0,
    token_noise: float = 0.0,
    progress: Progress | None = None,
) -> Calibration:
    """nsamples x seqlen tokens of a text file, a datasets id, or of the model's own text.

    source: "self"; a path (.jsonl: one object a line with a "text", anything else: plain text);
    or a datasets id `name[:config[:split]]`. Several, joined by "+", share the segments evenly: a
    model calibrated on one kind of text loses more on the others. more: at most so many segments
    beyond nsamples, as far as the texts go; further: at most so many behind those. There are none
    of the model's own text, which would have to be made first. Without `more` they are the first of
    a text; with it they are evenly spread among those of `further`, so that both hold all that it
    is about. token_noise: see `with_noise`; with any, PLACEHOLDER gives way to `made_up_words`,
    another one each time but, in the segments without noise, for `words_that_return`.
    Neither is done to the model's own text, whose documents begin with any token of the vocabulary.
    Raises DataError when there is too little text.
    """
    parts = [source] if Path(source).exists() else source.split("+")
    if len(parts) > nsamples:
        raise DataError(f"{source}: {len(parts)} sources need at least as many --nsamples")
    if len(parts) > 1:
        given = [part for part in parts if part != "self"]
        found = [
            load_calibration(
                part,
                tokenizer,
                model,
                nsamples=nsamples * (i + 1) // len(parts) - nsamples * i // len(parts),
                seqlen=seqlen,
                seed=seed + i,
                more=more // max(1, len(given)),
                further=further,
                token_noise=token_noise,
                progress=progress,
            )
            for i, part in enumerate(parts)
        ]
        # a batch, and a subset that is evenly spread, should hold every kind
        generator = torch.Generator().manual_seed(seed)
        ids, clean = _shuffled(generator, [c.ids for c in found], [c.clean for c in found])
        (behind,) = _shuffled(generator, [c.further for c in found])
        name = " + ".join(each.source for each in found)
        return Calibration(ids, name, behind[:further], clean)
    if source == "self":
        ids = sample_from_model(model, tokenizer, nsamples, seqlen, seed, progress)
        return Calibration(ids, f"sampled from the model itself, seed {seed}", ids[:0], ids)
    path = Path(source)
    looks_local = path.exists() or path.suffix in {".txt", ".jsonl", ".json", ".raw", ".md"}
    texts = _read_file(path) if looks_local else _read_dataset(source)
    name = path.name if looks_local else source
    needed, fill = nsamples * seqlen, _Filler(tokenizer, seed)
    texts = map(fill, texts) if token_noise else texts
    ids = _tokenize(texts, tokenizer, needed + (more + further) * seqlen)
    if len(ids) < needed:
        rows = len(ids) // seqlen
        raise DataError(
            f"{name}: {len(ids)} tokens, but {nsamples} x {seqlen} = {needed} are needed; "
            f"use a longer text{f', --nsamples {rows}' if rows else ''} or a smaller --seqlen"
        )
    clean = ids
    if fill.count:
        coming_back = _tokenize(fill.coming_back, tokenizer, needed + (more + further) * seqlen)
        # as long where every word has as many tokens as the one it stands for, in any context
        clean = coming_back if len(coming_back) == len(ids) else ids
    noisy, segments = (
        x[: len(x) // seqlen * seqlen].view(-1, seqlen)[: nsamples + more + further]
        for x in (ids, clean)
    )
    count = min(nsamples + more, len(segments))
    chosen = torch.zeros(len(segments), dtype=torch.bool)
    chosen[evenly(len(segments), count) if more else slice(count)] = True
    fitted = noisy[chosen]
    if token_noise:
        name += f" with {100 * token_noise:g} % of other tokens for the blocks"
        name += f" and words for {PLACEHOLDER}" * (fill.count > 0)
        ordinary, _ = ordinary_tokens(model, tokenizer)
        fitted = with_noise(fitted, token_noise, ordinary, seed)
    return Calibration(fitted, name, segments[~chosen], segments[chosen])


def evenly(total: int, count: int) -> list[int]:
    """So many of `total` indices, at most all of them, from the first on at equal distances."""
    return [i * total // count for i in range(count)]


def most_rows(config: QuantConfig, recipe: Recipe) -> int:
    """Segments that blocks are fitted to: fewer where a given text is shorter."""
    asked = config.nsamples != -1 or config.calib == "self"
    return config.segments if asked else max(config.segments, recipe.rows)


def with_noise(ids: Tensor, share: float, tokens: Tensor, seed: int) -> Tensor:
    """`ids` with about that share of them replaced by others, drawn evenly from `tokens`.

    A text of 65,000 tokens holds a fraction of a vocabulary, and what is fitted to it loses most
    where the others occur. What the original model makes of them is as good a target as any, for
    linears that are rebuilt one by one; a model that is trained as a whole learns more without.
    """
    generator = torch.Generator().manual_seed(seed)
    replaced = torch.rand(ids.shape, generator=generator) < share
    others = tokens[torch.randint(len(tokens), ids.shape, generator=generator)]
    return torch.where(replaced, others, ids)


def made_up_words(tokenizer: Any, seed: int) -> Iterator[str]:
    """Capitalised words without end, of one to three of the vocabulary's pieces: as good as names.

    A placeholder says nothing of the names it stands for, and models of a text that is full of them
    are fitted to predict its pieces. From a vocabulary that has no pieces of words it comes back.
    """
    pieces = sorted(set(map(str, tokenizer.convert_ids_to_tokens(range(len(tokenizer))))))
    starts = [p[1:] for p in pieces if p[:1] in "Ġ▁" and p[1:].isalpha() and p[1].isupper()]
    ends = [p for p in pieces if p.isalpha() and p.islower()]
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    while True:
        if not starts or not ends:
            yield PLACEHOLDER
            continue
        start, more = starts[drawn(len(starts))], drawn(3)
        yield start + "".join(ends[drawn(len(ends))] for _ in range(more))


def words_that_return(
    words: Iterable[str], tokens: Callable[[str], int], seed: int
) -> Iterator[tuple[str, str]]:
    """Each word, and what stands there in a text where words come back, as names do in an article.

    That is one of as many tokens from among the last of its kind, or the word itself.
    """
    generator = torch.Generator().manual_seed(seed)
    before: deque[tuple[int, str]] = deque(maxlen=WORDS_BACK)
    for word in words:
        size, found = tokens(word), word
        alike = [other for count, other in before if count == size]
        if alike and float(torch.rand((), generator=generator)) < COMING_BACK:
            found = alike[int(torch.randint(len(alike), (), generator=generator))]
        before.append((size, found))
        yield word, found


class _Filler:
    """Texts with made-up words for PLACEHOLDER.

    count: of these so far. coming_back: the same texts so far, with words that come back.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.count, self.coming_back = 0, list[str]()

        def tokens(word: str) -> int:
            return len(tokenizer(f" {word}", add_special_tokens=False).input_ids)

        self._words = words_that_return(made_up_words(tokenizer, seed), tokens, seed)

    def __call__(self, text: str) -> str:
        start, *parts = text.split(PLACEHOLDER)
        pairs = list(itertools.islice(self._words, len(parts)))
        self.count += len(parts)
        once, again = (
            start + "".join(pair[i] + part for pair, part in zip(pairs, parts, strict=True))
            for i in (0, 1)
        )
        self.coming_back.append(again)
        return once


def _shuffled(generator: torch.Generator, *each: Sequence[Tensor]) -> list[Tensor]:
    """The rows of all parts in random order, the same for each list of parts."""
    rows = [torch.cat(list(parts)) for parts in each]
    order = torch.randperm(len(rows[0]), generator=generator)
    return [x[order] for x in rows]


def _tokenize(texts: Iterable[str], tokenizer: Any, needed: int) -> Tensor:
    """Token ids of the texts in order, separated by the end-of-text token, until `needed`."""
    parts: list[int] = []
    for text in texts:
        if parts and tokenizer.eos_token_id is not None:
            parts.append(tokenizer.eos_token_id)
        # verbose=False: a text longer than the model's context is what is wanted here
        parts += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(parts) >= needed:
            break
    return torch.tensor(parts, dtype=torch.int64)


def _read_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix not in {".jsonl", ".json"}:
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(json.loads(line), f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not one JSON object a line ({error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _text_of(item: Any, where: str) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise DataError(f'{where}: expected an object with a "text"')
    return text


def _read_dataset(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: no such file, and reading it as a dataset needs `pip install datasets`"
        ) from None
    name, config, split = ([*source.split(":"), "", ""])[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _text_of(row, f"{source}, row {number}")
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds for "not there" and "no network"
        raise DataError(
            f"{source}: neither a file nor a dataset that can be reached "
            f"({type(error).__name__}); give a local text file or --calib self"
        ) from None


def channel_stats(
    model: Any,
    linears: dict[str, nn.Module],
    ids: Tensor,
    *,
    gradients: bool,
    batch: int = 1,
    progress: Progress | None = None,
) -> dict[str, ChannelStats]:
    """Input statistics of every linear over `ids` [N, L], and E[g²] of its outputs if asked.

    The gradients are those of the next-token loss on the same text. An expert that few tokens are
    routed to is also shown others, for their inputs alone. Raises NumericalError naming the layer
    whose inputs are not finite, and the token.
    """
    taps = {name: _Tap(module, gradients) for name, module in linears.items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # the backward pass is for activations: it must not fill p.grad
    # the graph must start before the first block though no parameter asks for a gradient
    hook = model.get_input_embeddings().register_forward_hook(
        lambda m, a, out: out.requires_grad_(gradients)
    )
    device, done = next(model.parameters()).device, 0
    try:
        with torch.set_grad_enabled(gradients), borrowing(model), fast_products():
            every = batches(ids.to(device), batch)
            for rows in (every[i] for i in ranks.mine(len(every))):
                if gradients:
                    model(rows, use_cache=False, labels=rows).loss.backward()
                else:  # the head is a fifth of a small model's work, and no block needs it
                    model.base_model(rows, use_cache=False)
                done += len(rows)
                if progress:
                    progress(done * ranks.count(), len(ids))
    finally:
        hook.remove()
        for tap in taps.values():
            tap.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    return _checked(taps, ids, ranks.mine(len(every)).start * len(every[0]))


def input_stats(
    linears: Mapping[str, nn.Module], run: Callable[[], None], ids: Tensor | None = None
) -> dict[str, ChannelStats]:
    """Input statistics of every linear over all that `run` feeds them, which is of text `ids`.

    Raises NumericalError naming the layer whose inputs are not finite, and the token.
    """
    taps = {name: _Tap(module, gradients=False) for name, module in linears.items()}
    try:
        with torch.no_grad():
            run()
    finally:
        for tap in taps.values():
            tap.remove()
    return _checked(taps, ids, 0 if ids is None else ranks.mine(len(ids)).start)


def _checked(
    taps: Mapping[str, _Tap], ids: Tensor | None, first_row: int
) -> dict[str, ChannelStats]:
    """The statistics over the rows of all ranks, of which `first_row` is this rank's first."""
    for name, tap in taps.items():  # first: one bad input spoils the gradients of all layers
        tap.sum_over_ranks(0 if ids is None else first_row * ids.shape[1])
        tap.check_inputs(name, ids)
    return {name: tap.stats(name) for name, tap in taps.items()}


class _Tap:
    """Running statistics of one linear's inputs and output gradients."""

    def __init__(self, module: nn.Module, gradients: bool) -> None:
        W = weight_of(module)
        # [x², |x|] summed over the tokens, in float64 as ranks.sum_up wants it
        self.sums = torch.zeros(2, W.shape[1], dtype=torch.float64, device=W.device)
        self.x_max = torch.zeros(W.shape[1], device=W.device)
        self.g_sq = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
        self.tokens = 0
        self.bad: int | None = None  # the first token that is not finite
        self._gradients = gradients
        self._handles = [module.register_forward_pre_hook(self._input)]
        if gradients:
            self._handles.append(module.register_forward_hook(self._output))

    def _input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float().abs()
        sq = x.pow(2).sum(0)
        if self.bad is None and not torch.isfinite(sq).all():
            fine = torch.isfinite(x.pow(2)).all(1)
            self.bad = self.tokens + int(fine.int().argmin())
        self.tokens += len(x)
        self.sums += torch.stack([sq, x.sum(0)])
        self.x_max = torch.maximum(self.x_max, x.amax(0))

    def _output(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        out.register_hook(self._gradient)  # not called for an expert that no token was routed to

    def _gradient(self, g: Tensor) -> None:
        self.g_sq += g.flatten(0, -2).float().pow(2).sum(0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def sum_over_ranks(self, first_token: int) -> None:
        """first_token: of this rank's, in the whole text."""
        device, none = self.sums.device, torch.iinfo(torch.int64).max
        tokens = torch.tensor(self.tokens, dtype=torch.float64, device=device)
        ranks.sum_up(self.sums, self.g_sq, tokens)
        bad = none if self.bad is None else first_token + self.bad
        bad = -int(ranks.largest_of(torch.tensor(-bad, device=device)))
        self.bad = None if bad == none else bad
        self.x_max, self.tokens = ranks.largest_of(self.x_max), int(tokens)

    def check_inputs(self, name: str, ids: Tensor | None) -> None:
        if not self.tokens:
            raise NumericalError(f"{name}: no calibration token reached this layer")
        if self.bad is None:
            return
        said = f"{name}: non-finite inputs on the calibration text"
        if ids is not None and self.tokens == ids.numel():  # an expert sees a part of the text
            row, token = divmod(self.bad, ids.shape[1])
            said += f", first at token {token} (id {ids[row, token]}) of segment {row}"
        raise NumericalError(said)

    def stats(self, name: str) -> ChannelStats:
        if not torch.isfinite(self.g_sq).all():
            raise NumericalError(f"{name}: non-finite gradients on the calibration text")
        g_sq = (self.g_sq / self.tokens).float() if self._gradients else None
        x_sq, x_abs = (self.sums / self.tokens).float()
        return ChannelStats(x_sq, self.x_max, x_abs, g_sq)


def batches(ids: Tensor, size: int) -> Sequence[Tensor]:
    """Rows of ids [N, L] in equal batches: the largest divisor of N up to `size`.

    Equal shapes let one recorded call (masks, positions) of a block serve every batch.
    """
    while len(ids) % size:
        size -= 1
    return ids.split(size)
