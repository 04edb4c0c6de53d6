"""Optimisation by gradient: a block against the original block, all against the original model.

Nothing here knows a model: a block is a function of weights (pbq.tunable) and inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbq.grid import Quantized
from pbq.heap import freed_memory_kept
from pbq.pack import pack, unpack
from pbq.tunable import Rates, Tunable
from pbq_kernels.divergence import divergence
from pbq_kernels.layout import PackedWeight, WeightLayout

Progress = Callable[[int, int], None]
# Tokens of one step of distillation: the activations of the whole model are kept for as many.
STEP_TOKENS = 1024
# States along the way whose held-out loss is looked at, the last one among them.
LOOKS = 4


@dataclass(frozen=True, kw_only=True)
class BlockTuning(Rates):
    """Optimisation of one block against the original block.

    epochs: passes over the calibration rows. steps: at least so many, in more passes where rows are
    few. loss: "relative" (`relative_error`) or "mse-nlc" (PTQ1.61, eq. 8). dual: also meet the
    original block on the quantized inputs.
    """

    epochs: float
    steps: int = 0
    loss: str = "relative"
    dual: bool = False


@dataclass(frozen=True, kw_only=True)
class Distillation(Rates):
    """End-to-end training against the original model's next-token distribution.

    steps: of STEP_TOKENS tokens of calibration text each. gamma: see `forward_kl`.
    """

    steps: int
    gamma: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How a method is reconstructed and for how long it is optimised.

    feedback: GPTQ error feedback. sweeps: coordinate-descent sweeps after it. factors: weights are
    products of two, whose signs are found in so many steps of ADMM. compensate: aim each
    linear at the original output given its quantized input (pbq.compensation), damped by
    compensate_damp, or at 0 by as much as its batches disagree. natural_order: columns are rounded
    in their own order, as papers do, not the most important first; joint: whole blocks of them, see
    gptq.reconstruct_jointly.
    importance: weigh tokens for each linear by what reaches the block's output (pbq.importance),
    not all linears alike by the inverse norm of that output.
    sensitivity: measure first what each linear costs the model, see pbq.sensitivity; like the
    distillation, with the whole model in memory.
    hessian_tokens: calibration tokens behind each Hessian. rows: segments of a given text that
    blocks are fitted to where it has as many, though fewer were asked for. batch: rows run at
    once. token_noise: see calibrate.with_noise.
    """

    feedback: bool = True
    sweeps: int = 1
    factors: int = 0
    compensate: bool = True
    compensate_damp: float = 0.3
    importance: bool = False
    sensitivity: bool = False
    natural_order: bool = False
    joint: bool = False
    hessian_tokens: int = 32768
    rows: int = 0
    batch: int = 2
    token_noise: float = 0.0
    block: BlockTuning | None = None
    distillation: Distillation | None = None

    @property
    def moves_signs_at_the_end(self) -> bool:
        """Does the distillation need the weights as they were before they were rounded?"""
        return self.distillation is not None and self.distillation.latent_lr > 0


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of log(1 + |y - t|²/|t|²): no token decides alone.

    Neither one of huge norm, nor one that the quantized model mistakes for such a token (an
    attention sink, Sun et al. 2024), whose relative error is in the thousands.
    """
    y, target = y.float(), target.float()
    error = (y - target).pow(2).mean(-1) / (target.pow(2).mean(-1) + 1e-6)
    return error.log1p().mean()


def mse_nlc(y: Tensor, target: Tensor) -> Tensor:
    """MSE - log of the mean cosine (PTQ1.61 eq. 8, cosines averaged before the log as coded)."""
    y, target = y.float(), target.float()
    cosine = F.cosine_similarity(y, target, dim=-1).mean()
    return F.mse_loss(y, target) - torch.log(cosine.clamp(min=1e-6))


LOSSES = {"relative": relative_error, "mse-nlc": mse_nlc}


class Schedule:
    """Adam over parameter groups; 5 % warm-up and a cosine to zero unless `constant`."""

    def __init__(
        self,
        groups: Sequence[tuple[list[nn.Parameter], float]],
        total: int,
        *,
        constant: bool = False,
    ) -> None:
        used = [{"params": p, "lr": lr, "base": lr} for p, lr in groups if p and lr]
        self._adam = torch.optim.Adam(used, betas=(0.9, 0.999 if constant else 0.95), fused=True)
        self._total, self._step, self._constant = max(total, 1), 0, constant

    def step(self, loss: Tensor) -> None:
        warm = min(1.0, (self._step + 1) / max(0.05 * self._total, 1))
        decay = 0.5 * (1 + math.cos(math.pi * self._step / self._total))
        for group in self._adam.param_groups:
            group["lr"] = group["base"] * (1.0 if self._constant else warm * decay)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        self._adam.step()
        self._step += 1

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and counts: "parameter.name", parameters by their number."""
        found = self._adam.state_dict()["state"]
        return {f"{i}.{name}": t for i, state in found.items() for name, t in state.items()}

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on behind `step` steps with what `state` gave then."""
        by_number: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            number, name = key.split(".")
            by_number.setdefault(int(number), {})[name] = tensor
        self._adam.load_state_dict({**self._adam.state_dict(), "state": by_number})
        self._step = step


@dataclass(frozen=True)
class Tuned:
    """Loss on held-out rows before and after, and whether the result was kept.

    curve: (step, held-out loss) of the states that were looked at; `after` is the best of them.
    """

    before: float
    after: float
    kept: bool
    curve: list[tuple[int, float]] = field(default_factory=list)

    def in_words(self) -> str:
        """Of a distillation."""
        kept = "" if self.kept else ", not kept"
        return f"held-out KL {self.before:.4f} -> {self.after:.4f} nats{kept}"


class Keep(Protocol):
    """Keeps the state of a long training now and then: a killed one goes on from the last."""

    def load(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """The state kept last, (tensors, what JSON holds), if there is one."""

    def offer(self, state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Told after every step; asks for the state when it is time to keep it."""


@dataclass
class _Training:
    """How far a training is. Not kept: the order of the rows, which follows from the seed.

    best, gains: the state with the least loss so far, `after`, as it would be stored.
    """

    weights: Mapping[str, Tunable]
    masters: Mapping[str, nn.Parameter]
    schedule: Schedule
    best: dict[str, Quantized]
    gains: dict[str, Tensor]
    before: float = math.nan
    after: float = math.nan
    curve: list[tuple[int, float]] = field(default_factory=list)
    step: int = 0

    def look(self, found: dict[str, Quantized], gains: dict[str, Tensor], loss: float) -> None:
        """Note the held-out loss of the present state; take it when it is the best."""
        self.curve.append((self.step, loss))
        if loss < self.after:
            self.best, self.gains, self.after = found, gains, loss

    def tuned(self) -> Tuned:
        """What is kept is judged by the best state; a training that never helped by its last."""
        better = self.after < self.before
        after = self.after if better else self.curve[-1][1]
        return Tuned(self.before, after, kept=better, curve=self.curve)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        packed = {name: pack(qw) for name, qw in self.best.items()}
        tensors = {f"adam.{key}": t for key, t in self.schedule.state().items()}
        for name, weight in self.weights.items():
            tensors |= {f"weight.{name}.{key}": t for key, t in weight.state_dict().items()}
            tensors |= {f"best.{name}.{key}": t for key, t in packed[name].tensors.items()}
        for name, master in self.masters.items():
            tensors |= {f"norm.{name}": master.detach(), f"gain.{name}": self.gains[name]}
        meta = {
            "layouts": {name: pw.layout.to_dict() for name, pw in packed.items()},
            **{name: getattr(self, name) for name in ("before", "after", "curve", "step")},
        }
        return tensors, meta

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        for name, weight in self.weights.items():
            own = weight.state_dict()
            weight.load_state_dict({key: tensors[f"weight.{name}.{key}"] for key in own})
            layout = WeightLayout.from_dict(meta["layouts"][name])
            device = next(weight.parameters()).device
            stored = {key: tensors[f"best.{name}.{key}"].to(device) for key in layout.tensors()}
            self.best[name] = unpack(PackedWeight(layout, stored))
        for name, master in self.masters.items():
            master.copy_(tensors[f"norm.{name}"])
            self.gains[name] = tensors[f"gain.{name}"].to(master.device)
        adam = {k.removeprefix("adam."): t for k, t in tensors.items() if k.startswith("adam.")}
        self.schedule.restore(adam, meta["step"])
        self.before, self.after, self.step = meta["before"], meta["after"], meta["step"]
        self.curve = [(step, loss) for step, loss in meta["curve"]]


def held_out(rows: int) -> list[int]:
    """Rows that nothing is fitted to: one in sixteen, evenly spread; none of fewer than four."""
    count = max(1, rows // 16) if rows >= 4 else 0
    return [(2 * i + 1) * rows // (2 * count) for i in range(count)]


@freed_memory_kept()
def optimise(
    loss: Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    weights: Mapping[str, Tunable],
    norms: Mapping[str, Tensor],
    *,
    rows: int,
    unseen: Sequence[int],
    steps: Callable[[int], int],
    rates: Rates,
    seed: int,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> tuple[dict[str, Quantized], dict[str, Tensor], Tuned]:
    """Train weights and norms on `loss(row, dense weights, norm gains)`; keep the better state.

    The rows in `unseen` are only scored; `steps` says how many steps to take over the others, in
    shuffled epochs. What comes back is the state, of those looked at, with the least loss of what
    would be stored on the unseen rows (on all, where none are): as it was, if training never helps.
    With `keep` it goes on from the state kept last, to the same bits as in one piece.
    """
    # copies: norms in float32 would otherwise be trained themselves, and could not be taken back
    masters = {n: nn.Parameter(w.detach().to(torch.float32, copy=True)) for n, w in norms.items()}
    groups = [group for w in weights.values() for group in w.groups(rates)]
    groups.append((list(masters.values()), rates.norm_lr))
    generator = torch.Generator().manual_seed(seed)
    train = sorted(set(range(rows)) - set(unseen))

    @torch.no_grad()
    def score(W: Mapping[str, Quantized], gains: Mapping[str, Tensor]) -> float:
        dense = {name: qw.dequantize() for name, qw in W.items()}
        return float(torch.stack([loss(i, dense, gains) for i in unseen or train]).mean())

    total = max(1, steps(len(train)))
    training = _Training(
        weights,
        masters,
        Schedule(groups, total, constant=rates.constant),
        best={name: w.start() for name, w in weights.items()},
        gains=dict(norms),
    )
    kept = keep.load() if keep else None
    if kept is not None:
        training.restore(*kept)
    else:
        training.before = training.after = score(training.best, training.gains)
    looks = {math.ceil(total * (i + 1) / LOOKS) for i in range(LOOKS)}
    for step in range(total):
        if step % len(train) == 0:
            order = torch.randperm(len(train), generator=generator).tolist()
        if step < training.step:
            continue
        W = {name: w() for name, w in weights.items()}
        training.schedule.step(loss(train[order[step % len(train)]], W, masters))
        training.step = step + 1
        if step + 1 in looks:
            found = {name: w.freeze() for name, w in weights.items()}
            moved = {n: m.detach().to(norms[n].dtype, copy=True) for n, m in masters.items()}
            training.look(found, moved, score(found, moved))
        if progress:
            progress(step + 1, total)
        if keep:
            keep.offer(training.state)
    return training.best, training.gains, training.tuned()


# run({linear: weight [n, k]}, {norm: gain [d]}, x [b, L, d]) -> the block's output
RunBlock: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], Tensor]


def tune_block(
    run: RunBlock,
    weights: Mapping[str, Tunable],
    norms: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    tuning: BlockTuning,
    seed: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Quantized], dict[str, Tensor], Tuned]:
    """Train a block's scales (codes too where a latent is given) and norms, see `optimise`.

    inputs: hidden states behind the quantized blocks. targets: the original block on the original
    inputs. second: the original block on `inputs`, for the dual loss.
    """
    loss_of = LOSSES[tuning.loss]

    def loss(i: int, W: Mapping[str, Tensor], gains: Mapping[str, Tensor]) -> Tensor:
        y = run(W, gains, inputs[i])
        first = loss_of(y, targets[i])
        return first if second is None else first + loss_of(y, second[i])

    return optimise(
        loss,
        weights,
        norms,
        rows=len(inputs),
        unseen=held_out(len(inputs)),
        steps=lambda train: max(round(tuning.epochs * train), tuning.steps),
        rates=tuning,
        seed=seed,
        progress=progress,
    )


# logits({linear: weight}, {norm: gain}, row) -> [b, L, vocabulary]
Student: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], Tensor]


def distill(
    student: Student,
    teacher: Callable[[int], Tensor],
    weights: Mapping[str, Tunable],
    norms: Mapping[str, Tensor],
    rows: int,
    unseen: Sequence[int],
    distillation: Distillation,
    seed: int,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> tuple[dict[str, Quantized], dict[str, Tensor], Tuned]:
    """Train the whole model towards the original's next-token distribution, see `optimise`.

    teacher(row): the original model's logits on that row, [b, L, vocabulary]. unseen: rows that no
    earlier stage was fitted to either; what is kept is judged by them.
    """

    def loss(i: int, W: Mapping[str, Tensor], gains: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            target = teacher(i)
        return forward_kl(student(W, gains, i), target, gamma=distillation.gamma)

    return optimise(
        loss,
        weights,
        norms,
        rows=rows,
        unseen=unseen,
        steps=lambda train: distillation.steps,
        rates=distillation,
        seed=seed,
        progress=progress,
        keep=keep,
    )


def forward_kl(logits: Tensor, target: Tensor, *, gamma: float = 0.0) -> Tensor:
    """Mean over tokens of KL(target || logits), nats; gamma > 0 weighs ambiguous tokens more.

    The weight of a token is the entropy of its target to the power gamma, their mean being 1 (after
    DB-LLM's Deviation-Aware Distillation).
    """
    found = _ForwardKl.apply(logits.flatten(0, -2), target.flatten(0, -2), gamma)
    assert isinstance(found, Tensor)
    return found


class _ForwardKl(torch.autograd.Function):
    """The gradient is found along with the loss and kept in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, gamma: float) -> Tensor:
        kl, entropy, gradient = divergence(logits, target, gamma, gradient=ctx.needs_input_grad[0])
        weight = entropy.clamp(min=0) ** gamma
        total = weight.sum().clamp(min=1e-20)
        ctx.save_for_backward(gradient, total)
        return (weight * kl).sum() / total

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> Any:
        gradient, total = ctx.saved_tensors
        return gradient * (out / total).to(gradient.dtype), None, None
