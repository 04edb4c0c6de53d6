"""One decoder block: what reaches its linears, and their reconstruction in the order they run.

Two streams of hidden states go through the model side by side: `fp`, what the original model would
see, and `quant`, what the already quantized blocks before this one really deliver. A linear is
fitted to make the quantized stream meet the original one (`compensate`), then rounded with GPTQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pbq.allocate import LayerPlan
from pbq.config import QuantConfig
from pbq.errors import NumericalError
from pbq.gptq import quantize_weight
from pbq.grid import QuantizedWeight
from pbq.hessian import damp, proxy_loss
from pbq.methods import Method, placement
from pbq.models import run_block, set_weight, shared_inputs, weight_of
from pbq.spill import HiddenStates
from pbq.tune import Recipe, held_out


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
    """How one linear fared: stored bits, relative proxy loss, damping used."""

    bits: float
    error: float
    damping: float


@dataclass
class Reconstructed:
    """A block after GPTQ: weights, where latent weights would start, and what to report."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
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

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach()
            if name == stop_at:
                raise _Stop

        return note

    handles = [block.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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
class Moments:
    """Token-weighted second moments of one shared input, per token.

    H = E[w x_q x_qᵀ]; cross = E[w (x_f - x_q) x_qᵀ]; and by full name of a residual linear,
    residual = E[w (r_f - r_q) x_qᵀ] with r the residual stream its output is added to. x_f, r_f are
    of the original model, x_q, r_q behind quantized layers, w the weight of the token.
    """

    H: Tensor
    cross: Tensor
    residual: dict[str, Tensor]


def compensate(W: Tensor, moments: Moments, name: str, percdamp: float) -> Tensor:
    """The weight that best gives the original output from the quantized input, [n, k].

    argmin over W' of E[w |W x_f + r_f - W' x_q - r_q|²] + damping |W' - W|²
      = W + (W cross + residual)(H + damping)⁻¹.
    The first term is the asymmetric calibration of GPTAQ (Li et al. 2025); the residual term lets
    the linears that write to the residual stream undo the error that earlier blocks left there.
    """
    rhs = W @ moments.cross + moments.residual.get(name, torch.zeros((), device=W.device))
    L, failed = torch.linalg.cholesky_ex(damp(moments.H, percdamp))
    if failed:
        raise NumericalError(f"{name}: H is not positive definite; use more calibration text")
    return W + torch.cholesky_solve(rhs.T, L).T


@dataclass
class BlockQuantizer:
    """Reconstructs the linears of one block, in the order in which they run."""

    block: nn.Module
    linears: Mapping[str, nn.Module]
    call: Any
    method: Method
    recipe: Recipe
    config: QuantConfig
    name: str
    index: int = 0
    targets: HiddenStates = field(default_factory=HiddenStates)
    second: HiddenStates = field(default_factory=HiddenStates)

    def run(self, streams: Streams, plans: Mapping[str, LayerPlan]) -> Reconstructed:
        """Quantize every linear in place (dense, rounded values) and return what was chosen.

        Fills `targets`, the original block's outputs on the original inputs, one per batch, and
        `second`, those on the quantized inputs, where the recipe's loss wants them.
        """
        groups = shared_inputs(self.block, streams.fp[0], self.call, self.linears)
        bases = residual_bases(self.block, list(self.linears), streams.fp[0][:1], self.call)
        chosen = self._hessian_batches(len(streams.fp))
        firsts = [group[0] for group in groups]
        wanted = sorted({*firsts, *(b for b in bases.values() if b)})
        originals = self._original_pass(streams.fp, chosen, wanted)
        if self.recipe.block is not None and self.recipe.block.dual:
            with torch.no_grad():
                for x in streams.quant:
                    self.second.append(run_block(self.block, x, self.call))
        out = Reconstructed()
        for group in groups:
            mine = {f"{self.name}.{n}": bases[n] for n in group if n in bases}
            moments = self._moments(group[0], mine, streams, chosen, originals)
            for linear in group:
                self._quantize(linear, moments, plans[f"{self.name}.{linear}"], out)
        return out

    def _hessian_batches(self, count: int) -> list[int]:
        """Evenly spread batches with at least `hessian_tokens` tokens between them, or all.

        Never those that later stages are judged by (tune.held_out). Neighbouring blocks take other
        batches where there are enough: compensation fits the tokens it sees better than the rest,
        and must not go on from its own residues.
        """
        usable = sorted(set(range(count)) - set(held_out(count)))
        per_batch = self.config.nsamples * self.config.seqlen / count
        wanted = min(len(usable), max(1, math.ceil(self.recipe.hessian_tokens / per_batch)))
        turn = self.index % (len(usable) // wanted)
        return [usable[i * len(usable) // wanted + turn] for i in range(wanted)]

    @torch.no_grad()
    def _original_pass(
        self, hidden: Sequence[Tensor], chosen: Sequence[int], names: Sequence[str]
    ) -> dict[int, dict[str, Tensor]]:
        """Run the block as it came: fill `targets`, keep the named inputs of the chosen batches."""
        kept: dict[int, dict[str, Tensor]] = {}
        for i, x in enumerate(hidden):
            with watch(self.block, names if i in chosen else []) as seen:
                self.targets.append(run_block(self.block, x, self.call))
            if i in chosen:
                kept[i] = {**seen, "": x}
        return kept

    @torch.no_grad()
    def _moments(
        self,
        first: str,
        bases: Mapping[str, str],
        streams: Streams,
        chosen: Sequence[int],
        originals: Mapping[int, Mapping[str, Tensor]],
    ) -> Moments:
        """Moments of the input that `first` (and its group) sees behind all that is quantized."""
        k = weight_of(self.linears[first]).shape[1]
        H, cross = (torch.zeros(k, k, device=streams.fp[0].device) for _ in range(2))
        residual: dict[str, Tensor] = {}
        total = 0.0
        for i in chosen:
            names = [first, *(b for b in bases.values() if b)]
            with watch(self.block, names, stop_at=first) as seen, suppress(_Stop):
                run_block(self.block, streams.quant[i], self.call)
            seen[""] = streams.quant[i]
            # relative error per token: a few tokens of huge norm would otherwise be all that counts
            w = 1 / (_flat(self.targets[i]).pow(2).mean(1) + 1e-6)
            if not self.recipe.compensate:
                w = torch.ones_like(w)  # the papers' H = XᵀX
            x_f, x_q = _flat(originals[i][first]), _flat(seen[first])
            weighted = x_q * w[:, None]
            H.addmm_(weighted.T, x_q)
            # the gaps may be multiplied in the model's own dtype: unlike H nothing inverts them
            own = weighted.to(seen[first].dtype)
            cross += (x_f - x_q).to(own.dtype).T @ own
            for name, base in bases.items():
                gap = _flat(originals[i][base]) - _flat(seen[base])
                residual[name] = residual.get(name, 0) + (gap.to(own.dtype).T @ own).float()
            total += float(w.sum())
        if not all(torch.isfinite(moment).all() for moment in (H, cross, *residual.values())):
            raise NumericalError(f"{self.name}.{first}: non-finite inputs on the calibration text")
        return Moments(H / total, cross / total, {n: r / total for n, r in residual.items()})

    @torch.no_grad()
    def _quantize(self, linear: str, moments: Moments, plan: LayerPlan, out: Reconstructed) -> None:
        name, module = f"{self.name}.{linear}", self.linears[linear]
        W = weight_of(module).float()
        target = W
        if self.recipe.compensate:
            target = compensate(W, moments, name, self.recipe.compensate_damp)
        placed = placement(self.method, plan, target, moments.H)
        qw, latent, damping = quantize_weight(
            target,
            moments.H,
            placed.tiers,
            placed.tier_of,
            self.method.fit,
            salient=placed.salient,
            column_scale=placed.column_scale,
            joint=self.recipe.joint,
            percdamp=self.config.percdamp,
            block_size=self.config.block_size,
            sweeps=self.recipe.sweeps,
            feedback=self.recipe.feedback,
            natural_order=self.recipe.natural_order,
            name=name,
        )
        if plan.column_scale and qw.column_scale is None:
            qw.column_scale = torch.ones_like(W[0])  # for the tuning to move
        W_hat = qw.dequantize()
        error = proxy_loss(target, W_hat, moments.H)
        set_weight(module, W_hat)
        out.weights[linear], out.latents[linear] = qw, latent
        out.layers[linear] = LayerReport(qw.layout().bits_per_weight, error, damping)


def _flat(x: Tensor) -> Tensor:
    """[*b, k] -> float32 [tokens, k]."""
    return x.flatten(0, -2).float()
