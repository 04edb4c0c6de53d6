"""One decoder block: what reaches its linears, and their reconstruction in the order they run.

Two streams of hidden states go through the model side by side: `fp`, what the original model would
see, and `quant`, what the already quantized blocks before this one really deliver. A linear is
fitted to make the quantized stream meet the original one (`compensate`), then rounded with GPTQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pbq import ranks
from pbq.allocate import LayerPlan
from pbq.calibrate import evenly
from pbq.compensation import Moments, Sums, compensate
from pbq.config import QuantConfig
from pbq.errors import NumericalError
from pbq.experts import Experts, find_experts
from pbq.grid import Quantized
from pbq.hessian import proxy_loss
from pbq.importance import LEAST_ENERGY, token_importance
from pbq.methods import Method, rebuild
from pbq.models import before_forward, run_block, set_weight, shared_inputs, weight_of
from pbq.remembering import Memory
from pbq.routing import Routed, Share, shares, watch_routing
from pbq.spill import HiddenStates, Spill
from pbq.threads import at_once
from pbq.tune import Recipe, held_out

# Tokens of an expert that are worked on at once.
_PART = 4096


@dataclass
class Streams:
    """Hidden states before the current block, one tensor [b, L, d] per batch.

    fp: in the original model. quant: behind the quantized blocks so far.
    """

    fp: HiddenStates
    quant: HiddenStates

    def close(self) -> None:
        self.fp.close()
        self.quant.close()


@dataclass
class LayerReport:
    """How one linear fared: stored bits, relative proxy loss, and what its Hessian is made of.

    damping: used in rounding; compensation: used in `compensate`, 0 without it. tokens: calibration
    tokens that reached it; borrowed: those of other experts, for want of its own. dead: inputs that
    none of them was fed through.
    """

    bits: float
    error: float
    damping: float
    compensation: float = 0.0
    tokens: int = 0
    borrowed: int = 0
    dead: int = 0


@dataclass
class Rounded:
    """One linear after GPTQ."""

    weight: Quantized
    latent: Tensor
    report: LayerReport


@dataclass
class Reconstructed:
    """A block after GPTQ: weights, where latent weights would start, and what to report."""

    weights: dict[str, Quantized] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)


class _Stop(Exception):
    """Ends a forward pass once the input that was wanted has been seen."""


@contextmanager
def watch(
    block: nn.Module, names: Sequence[str], *, stop_at: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect the first positional input of the named submodules during the forwards inside."""
    seen: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        seen[name] = args[0].detach()
        if name == stop_at:
            raise _Stop

    with before_forward({n: block.get_submodule(n) for n in names}, note):
        yield seen


@torch.no_grad()
def residual_bases(
    block: nn.Module, linears: Sequence[str], hidden: Tensor, call: Any
) -> dict[str, str]:
    """Which linears write straight into the residual stream, and what they are added to.

    Found by looking, not by name: linear L has base B when (input of B) + (output of L) is, bit for
    bit, the input of a later module or the block's output. B is a submodule's name, "" the block.
    A linear whose output is normalised or scaled before it is added has no base.
    """
    inputs: dict[str, Tensor] = {"": hidden}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in block.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_pre_hook(_keep_input(inputs, name, hidden)))
        if name in linears:
            handles.append(module.register_forward_hook(_keep_output(outputs, name, hidden)))
    try:
        result = run_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    sums = [result, *(x for name, x in inputs.items() if name)]
    found = {}
    for name, out in outputs.items():
        for base, x in inputs.items():
            total = x + out
            if any(torch.equal(total, later) for later in sums):
                found[name] = base
                break
    return found


def _keep_input(into: dict[str, Tensor], name: str, like: Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            _keep(into, name, args[0], like)

    return hook


def _keep_output(into: dict[str, Tensor], name: str, like: Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        _keep(into, name, out, like)

    return hook


def _keep(into: dict[str, Tensor], name: str, x: Tensor, like: Tensor) -> None:
    """x as it is now: falcon adds to a linear's output in place, opt runs its MLP on [b*L, d]."""
    if x.numel() == like.numel() and x.shape[-1] == like.shape[-1]:
        into[name] = x.reshape(like.shape).clone()


@dataclass
class BlockQuantizer:
    """Reconstructs the linears of one block, in the order in which they run.

    start: tensors of another block, whose weights are quantized in place of this one's.
    """

    block: nn.Module
    linears: Mapping[str, nn.Module]
    call: Any
    method: Method
    recipe: Recipe
    config: QuantConfig
    name: str
    index: int = 0
    spill: Spill = field(default_factory=Spill)
    start: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.targets, self.second = HiddenStates(), HiddenStates()
        # by batch and linear, where the recipe asks for it
        self.importance: dict[int, dict[str, Tensor]] = {}
        # rows and tokens of a batch; the last one may have fewer rows
        self.shape = (0, 0)
        # of the quantized stream
        self.memory = Memory(self.block, list(self.linears), self.spill)

    def run(self, streams: Streams, plans: Mapping[str, LayerPlan]) -> Reconstructed:
        """Quantize every linear in place (dense, rounded values) and return what was chosen.

        Fills `targets`, the original block's outputs on the original inputs, one per batch, and
        `second`, those on the quantized inputs, where the recipe's loss wants them. Every rank runs
        some of the batches and quantizes some of the linears; all get everything.
        """
        self.shape = streams.fp[0].shape[0], streams.fp[0].shape[1]
        experts = find_experts(self.block)
        inside = tuple(f"{name}." for name in experts)
        common = {n: m for n, m in self.linears.items() if not n.startswith(inside)}
        groups = shared_inputs(self.block, streams.fp[0], self.call, common)
        bases = residual_bases(self.block, list(common), streams.fp[0][:1], self.call)
        chosen = self._hessian_batches(streams.fp)
        firsts = [group[0] for group in groups]
        wanted = sorted({*firsts, *(b for b in bases.values() if b)})
        originals, routed = self._original_pass(streams.fp, chosen, wanted, list(experts), common)
        if self.recipe.block is not None and self.recipe.block.dual:
            with torch.no_grad():
                x_q = streams.quant
                self.second = self.spill.filled(
                    x_q, lambda i: run_block(self.block, x_q[i], self.call)
                )
        if self.start is not None:
            self.block.load_state_dict(self.start)
        out = Reconstructed()
        for group in groups:
            mine = {f"{self.name}.{n}": bases[n] for n in group if n in bases}
            moments = self._moments(group, mine, streams, chosen, originals)
            own = group[ranks.rank() :: ranks.count()]
            if self.recipe.compensate and moments.chance is not None:
                _ = moments.spectrum  # here, or every thread would find its own
            rounded = at_once(partial(self._quantize, moments=moments, plans=plans), own)
            self._gather(group, dict(zip(own, rounded, strict=True)), out)
            self.memory.settle(group)
        for name in experts:
            originals_in = {i: seen[name] for i, seen in routed.items()}
            self._experts(name, originals_in, streams, chosen, plans, out)
        return out

    def _hessian_batches(self, hidden: Sequence[Tensor]) -> list[int]:
        """Evenly spread batches with at least `hessian_tokens` tokens between them, or all.

        Never those that later stages are judged by (tune.held_out). Neighbouring blocks take other
        batches where there are enough: compensation fits the tokens it sees better than the rest,
        and must not go on from its own residues.
        """
        usable = sorted(set(range(len(hidden))) - set(held_out(len(hidden))))
        per_batch = hidden[0].shape[0] * hidden[0].shape[1]
        wanted = min(len(usable), max(1, math.ceil(self.recipe.hessian_tokens / per_batch)))
        turn = self.index % (len(usable) // wanted)
        return [usable[i + turn] for i in evenly(len(usable), wanted)]

    @torch.no_grad()
    def _original_pass(
        self,
        hidden: Sequence[Tensor],
        chosen: Sequence[int],
        names: Sequence[str],
        experts: Sequence[str],
        linears: Mapping[str, nn.Module],
    ) -> tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Routed]]]:
        """Run the block as it came: fill `targets`, keep the named inputs of the chosen batches.

        There the recipe may want to know how much tokens count for `linears`. Of the batches of
        this rank, that is.
        """
        kept: dict[int, dict[str, Tensor]] = {}
        routed: dict[int, dict[str, Routed]] = {}

        def run(i: int) -> Tensor:
            x, watched = hidden[i], (names, experts) if i in chosen else ([], [])
            with watch(self.block, watched[0]) as seen, watch_routing(self.block, watched[1]) as to:
                if i in chosen and self.recipe.importance:
                    y = self._weigh_tokens(i, x, linears)
                else:
                    y = run_block(self.block, x, self.call)
            if i in chosen:
                kept[i], routed[i] = {**seen, "": x}, to
            return y

        self.targets = self.spill.filled(hidden, run)
        return kept, routed

    def _weigh_tokens(self, i: int, x: Tensor, linears: Mapping[str, nn.Module]) -> Tensor:
        """Fill `importance` for batch i; returns the block's output."""
        generator = torch.Generator().manual_seed((self.config.seed << 32) + (self.index << 16) + i)
        y, self.importance[i] = token_importance(self.block, linears, self.call, x, generator)
        self._check_finite(": non-finite outputs", i, y)
        return y

    @torch.no_grad()
    def _moments(
        self,
        group: Sequence[str],
        bases: Mapping[str, str],
        streams: Streams,
        chosen: Sequence[int],
        originals: Mapping[int, Mapping[str, Tensor]],
    ) -> Moments:
        """Moments of the input that a group of linears sees behind all that is quantized."""
        first = group[0]
        rows = {n: len(self._weight(n.removeprefix(f"{self.name}."))) for n in bases}
        k, device = self._weight(first).shape[1], streams.fp[0].device
        sums = Sums(k, rows, device, chance=self.recipe.compensate_damp == 0)
        for place, i in enumerate(chosen):
            if i not in originals:  # another rank's
                continue
            names = [first, *(b for b in bases.values() if b)]
            x = streams.quant[i]
            seen = {"": x, **self._reaching(names, first, i, x)}
            gaps = {n: _flat(originals[i][b]).float() - _flat(seen[b]) for n, b in bases.items()}
            inputs = (originals[i][first], seen[first], *gaps.values())
            self._check_finite(f".{first}: non-finite inputs", i, *inputs)
            x_f, x_q = _flat(originals[i][first]), _flat(seen[first])
            w = self._token_weights(i, group)
            sums.add(x_f, x_q, w, gaps, negated=place % 2 == 1)
        return sums.over_ranks().mean(f"{self.name}.{first}")

    def _reaching(self, names: Sequence[str], last: str, i: int, x: Tensor) -> dict[str, Tensor]:
        """Inputs of the named modules, none behind `last`, for batch i of the quantized stream."""
        watched = watch(self.block, names, stop_at=last)
        with watched as seen, suppress(_Stop), self.memory.batch(i, names):
            run_block(self.block, x, self.call)
        return seen

    @torch.no_grad()
    def through(self, hidden: HiddenStates) -> HiddenStates:
        """What the block, with its linears quantized, makes of every batch of that stream."""

        def run(i: int) -> Tensor:
            with self.memory.batch(i, last=True):
                return run_block(self.block, hidden[i], self.call)

        behind = self.spill.filled(hidden, run)
        self.memory.close()
        return behind

    def _weight(self, linear: str) -> Tensor:
        return weight_of(self.linears[linear])

    def _token_weights(self, i: int, group: Sequence[str] = ()) -> Tensor:
        """How much the error of each token of batch i counts for a group, float32 [tokens]."""
        if found := [self.importance[i][n] for n in group if i in self.importance]:
            return torch.stack(found).mean(0)
        self._check_finite(": non-finite outputs", i, self.targets[i])
        energy = _flat(self.targets[i]).float().pow(2).mean(1)
        if not self.recipe.compensate:
            return torch.ones_like(energy)  # the papers' H = XᵀX
        # relative error per token: a few tokens of huge norm would otherwise be all that counts
        return 1 / (energy + LEAST_ENERGY)

    def _check_finite(self, what: str, i: int, *tensors: Tensor) -> None:
        """Raise NumericalError with the first token of batch i at which a tensor is not finite."""
        rows, length = self.shape
        for x in tensors:
            # an entry that is not finite makes the sum so: ten times as fast as to look at each
            if torch.isfinite(x.sum(dtype=torch.float32)):
                continue
            bad = ~torch.isfinite(x).reshape(-1, length, x.shape[-1]).all(-1)
            if bad.any():
                row, token = bad.nonzero()[0].tolist()
                raise NumericalError(
                    f"{self.name}{what} on the calibration text, first at token {token} of its "
                    f"segment {i * rows + row}"
                )

    @torch.no_grad()
    def _experts(
        self,
        name: str,
        originals: Mapping[int, Routed],
        streams: Streams,
        chosen: Sequence[int],
        plans: Mapping[str, LayerPlan],
        out: Reconstructed,
    ) -> None:
        """Quantize the named experts one by one, each on its tokens as the original routes them.

        What is quantized on the way does not change what reaches the experts: one pass serves all.
        originals: of the batches of this rank.
        """
        experts = self.block.get_submodule(name)
        assert isinstance(experts, Experts)
        quantized = {}
        for i, original in originals.items():
            seen = self._reaching([name], name, i, streams.quant[i])
            self._check_finite(f".{name}: non-finite inputs", i, original.x, seen[name])
            quantized[i] = seen[name]
        by_batch, x_of = ranks.merged(dict(originals)), ranks.merged(quantized)
        routed = [by_batch[i] for i in chosen]
        x_f, x_q = torch.cat([r.x for r in routed]), torch.cat([x_of[i] for i in chosen])
        w = torch.cat([self._token_weights(i) for i in chosen])
        linears = ("gate_up", "down")
        least = max(self._weight(f"{name}.0.{linear}").shape[1] for linear in linears)
        found = shares(routed, len(experts), least)
        for start in range(0, len(experts), ranks.count()):
            these = range(start, min(start + ranks.count(), len(experts)))
            own: dict[str, Rounded] = {}
            for e in these[ranks.rank() :][:1]:
                own = self._expert(name, e, found[e], x_f, x_q, w, plans)
            self._gather([f"{name}.{e}.{linear}" for e in these for linear in linears], own, out)

    def _expert(
        self,
        name: str,
        e: int,
        share: Share,
        x_f: Tensor,
        x_q: Tensor,
        w: Tensor,
        plans: Mapping[str, LayerPlan],
    ) -> dict[str, Rounded]:
        """Quantize both linears of expert e of `name` on its share of the tokens."""
        experts, gate_up, down = (
            self.block.get_submodule(name),
            f"{name}.{e}.gate_up",
            f"{name}.{e}.down",
        )
        assert isinstance(experts, Experts)
        weight = w[share.tokens] * (share.weight if self.recipe.compensate else 1)
        f, q = x_f[share.tokens], x_q[share.tokens]
        gated = partial(experts.gated, e)
        gated_f = _in_parts(gated, f)  # of the original: gate_up is not rounded yet
        moments = self._expert_moments(gate_up, f, q, weight, share.borrowed)
        own = {gate_up: self._quantize(gate_up, moments, plans)}
        gated_q = _in_parts(gated, q)
        moments = self._expert_moments(down, gated_f, gated_q, weight, share.borrowed)
        return own | {down: self._quantize(down, moments, plans)}

    def _expert_moments(
        self, linear: str, x_f: Tensor, x_q: Tensor, w: Tensor, borrowed: int
    ) -> Moments:
        sums = Sums(x_q.shape[1], {}, x_q.device, chance=self.recipe.compensate_damp == 0)
        part = max(1, min(_PART, len(w) // 2))
        for i, (f, q, weight) in enumerate(
            zip(*(x.split(part) for x in (x_f, x_q, w)), strict=True)
        ):
            sums.add(f, q, weight, {}, negated=i % 2 == 1)
        return replace(sums.mean(f"{self.name}.{linear}"), borrowed=borrowed)

    def _quantize(self, linear: str, moments: Moments, plans: Mapping[str, LayerPlan]) -> Rounded:
        """In place (dense, rounded values), and what was chosen."""
        name = f"{self.name}.{linear}"
        plan, W = plans[name], self._weight(linear).float()
        target, compensation = W, 0.0
        if self.recipe.compensate:
            target, compensation = compensate(W, moments, name, self.recipe.compensate_damp)
        qw, latent, damping = rebuild(
            self.method, self.recipe, self.config, plan, target, moments.H, name
        )
        W_hat = qw.dequantize()
        error = proxy_loss(target, W_hat, moments.H)
        set_weight(self.linears[linear], W_hat)
        report = LayerReport(
            bits=qw.layout().bits_per_weight,
            error=error,
            damping=damping,
            compensation=compensation,
            tokens=moments.tokens - moments.borrowed,
            borrowed=moments.borrowed,
            dead=int((moments.H.diagonal() == 0).sum()),
        )
        return Rounded(qw, latent, report)

    def _gather(self, linears: Sequence[str], own: dict[str, Rounded], out: Reconstructed) -> None:
        """Put what all ranks have made of `linears` in place, and into `out`; own: of this one."""
        everyones = ranks.merged(own)
        for linear in linears:
            done = everyones[linear]
            if linear not in own:
                set_weight(self.linears[linear], done.weight.dequantize())
            out.weights[linear], out.latents[linear] = done.weight, done.latent
            out.layers[linear] = done.report


def _flat(x: Tensor) -> Tensor:
    """[*b, k] -> [tokens, k]."""
    return x.flatten(0, -2)


def _in_parts(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([run(part) for part in x.split(_PART)])
