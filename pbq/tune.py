"""Optimisation by gradient: scales (and signs) of a block against the original block.

Nothing here knows a model: a block is a function of weights and inputs, and the weights are made
from codes and scales on every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbq.grid import Factors, Grid, Quantized, QuantizedWeight, TierGrid, stored
from pbq.hessian import least_squares
from pbq.pack import pack, unpack
from pbq_kernels.layout import PackedWeight, WeightLayout

Progress = Callable[[int, int], None]
# Tokens of one step of distillation: the activations of the whole model are kept for as many.
STEP_TOKENS = 1024
# States along the way whose held-out loss is looked at, the last one among them.
LOOKS = 4
# Of the regressions that latent factors start from: a rank above n or k needs some.
LATENT_DAMPING = 0.01


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam and what they apply to.

    lr: of scales, offsets and column scales, relative to their size. norm_lr: of the norms.
    latent_lr: of latent weights, 0 freezes the codes. row_lr: of one more factor a row, on scale
    and offset together, and of column scales (PTQ1.61's alpha_r1 and alpha_r2); at 0 there is no
    such factor and column scales take lr. offsets: whether these train. only_planes: the tiers with
    so many planes train, the others stay as they are. constant: no warm-up, no decay, as the papers
    do. analytic: scales of one-plane tiers do not train, they are the mean size of the latent
    weights around the offset, anew at every step (PB-LLM's optimal scale).
    """

    lr: float = 5e-3
    norm_lr: float = 3e-3
    latent_lr: float = 0.0
    row_lr: float = 0.0
    offsets: bool = True
    only_planes: int | None = None
    constant: bool = False
    analytic: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockTuning(Rates):
    """Optimisation of one block against the original block.

    epochs: passes over the calibration rows. loss: "relative" (`relative_error`) or "mse-nlc"
    (PTQ1.61, eq. 8). dual: also meet the original block on the quantized inputs.
    """

    epochs: float
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
    linear at the original output given its quantized input (blocks.compensate), damped by
    compensate_damp. natural_order: columns are rounded in their own order, as papers do, not the
    least important first; joint: whole blocks of them, see gptq.reconstruct_jointly.
    hessian_tokens: calibration tokens behind each Hessian. batch: rows run at once.
    """

    feedback: bool = True
    sweeps: int = 1
    factors: int = 0
    compensate: bool = True
    compensate_damp: float = 0.3
    natural_order: bool = False
    joint: bool = False
    hessian_tokens: int = 32768
    batch: int = 2
    block: BlockTuning | None = None
    distillation: Distillation | None = None


class TunableWeight(nn.Module):
    """A QuantizedWeight whose numbers, and with `latent` whose codes, can be trained.

    Kept transposed, a tier being consecutive rows [c, n]: columns of W are rows here, so that
    putting them back in order copies whole rows. Scales train as factors around 1, which
    gives every row and plane the same relative step. `only_planes`: see Rates. dtype: of the weight
    that comes out, the model's own. analytic: see Rates, where there are latent weights.
    """

    def __init__(
        self,
        qw: QuantizedWeight,
        latent: Tensor | None = None,
        only_planes: int | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        analytic: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self.analytic = dtype, analytic
        self.tiers, self.tier_of = qw.tiers, qw.tier_of
        self._trained = [only_planes in (None, tier.planes) for tier in qw.tiers]
        order = torch.argsort(qw.tier_of, stable=True)
        self._order, self._inverse = order, torch.argsort(order)
        self._group_of = [t.group_of_column().to(order.device) for t in qw.tiers]
        self._scale0 = [g.scale.permute(1, 2, 0).contiguous() for g in qw.grids]  # [G, S, n]
        self._offset0 = [None if g.offset is None else g.offset.T.contiguous() for g in qw.grids]
        self.scale = nn.ParameterList([nn.Parameter(torch.ones_like(s)) for s in self._scale0])
        # an offset may be zero: it moves in units of the tier's largest scale instead
        self._unit = [s.abs().sum(1) for s in self._scale0]  # [G, n]
        self.offset = nn.ParameterList(
            [
                nn.Parameter(torch.zeros_like(u if o is not None else u[:0]))
                for o, u in zip(self._offset0, self._unit, strict=True)
            ]
        )
        # one more factor a row, on scale and offset together; trained where a recipe asks for it
        self.row = nn.Parameter(torch.ones(len(qw.codes), device=order.device))
        self._overlay = qw.overlay  # stays as it is
        self._column0 = qw.column_scale
        self.column: nn.Parameter | None = None
        if qw.column_scale is not None:
            self.column = nn.Parameter(torch.ones_like(qw.column_scale))
            trained = torch.tensor(self._trained, device=order.device)[qw.tier_of.long()]
            self.column.register_hook(lambda gradient: gradient * trained)
        codes = qw.codes[:, order].T
        self._codes = list(codes.split([t.columns for t in qw.tiers]))  # uint8 [c, n]
        self.latent = nn.ParameterList()
        if latent is not None:
            start = (latent if qw.column_scale is None else latent / qw.column_scale)[:, order].T
            self.latent.extend(
                nn.Parameter(self._where_it_rounds(t, part).contiguous())
                for t, part in enumerate(start.split([t.columns for t in qw.tiers]))
            )

    def _where_it_rounds(self, t: int, latent: Tensor) -> Tensor:
        """The latent weights, or the level itself where they would not round to the stored code."""
        with torch.no_grad():
            # a column scale of zero leaves no latent weight to start from
            same = (self._nearest(t, latent) == self._codes[t]) & latent.isfinite()
            return torch.where(same, latent, self.values(t, self._codes[t], *self._numbers(t)))

    def _numbers(self, t: int) -> tuple[Tensor, Tensor | None]:
        """Current scale [G, S, n] and offset [G, n] of a tier."""
        offset, row = self._offset0[t], self.row if self._trained[t] else torch.ones_like(self.row)
        moved = None if offset is None else (offset + self.offset[t] * self._unit[t]) * row
        if self.analytic and t < len(self.latent) and self.tiers[t].planes == 1:
            return self._mean_size(t, moved), moved
        return self._scale0[t] * self.scale[t] * row, moved

    @torch.no_grad()
    def _mean_size(self, t: int, offset: Tensor | None) -> Tensor:
        """Mean |latent - offset| of each group [G, 1, n], over the entries that are on the grid."""
        size = self.latent[t] if offset is None else self.latent[t] - self.per_column(t, offset)
        on_grid = torch.ones_like(size)
        if self._overlay is not None:
            on_grid -= self.split(self._overlay.mask)[t].float()
        total, count = (self.group_sums(t, x) for x in (size.abs() * on_grid, on_grid))
        return (total / count.clamp(min=1))[:, None]

    def per_column(self, t: int, numbers: Tensor) -> Tensor:
        """[G, ...] numbers of groups -> [c, ...], or [1, ...] where one group is all."""
        return numbers if self.tiers[t].groups == 1 else numbers[self._group_of[t]]

    def group_sums(self, t: int, x: Tensor) -> Tensor:
        """[c, n] -> [G, n]."""
        sums = x.new_zeros(self.tiers[t].groups, x.shape[1])
        return sums.index_add(0, self._group_of[t], x)

    def even(self, t: int) -> bool:
        """Are the tier's levels equally spaced: scale * (2 code - steps) + offset?"""
        return self.tiers[t].planes == 1 or (self.tiers[t].tied and self.tiers[t].planes > 1)

    def values(self, t: int, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Codes uint8 [c, n] -> weights float32 [c, n], on scale [G, S, n] and offset [G, n]."""
        scale = self.per_column(t, scale)
        if self.even(t):
            W = self.position(t, codes).mul_(scale[:, 0])
        else:
            W = torch.zeros(codes.shape, device=codes.device)
            for p in range(self.tiers[t].planes):
                W += torch.where(bit(codes, p), scale[:, p], -scale[:, p])
        return W if offset is None else W.add_(self.per_column(t, offset))

    def position(self, t: int, codes: Tensor) -> Tensor:
        """Of equally spaced levels, in half steps from the middle: odd numbers, float32 [c, n]."""
        return codes.float().mul_(2).sub_(2 ** self.tiers[t].planes - 1)

    @torch.no_grad()
    def _nearest(self, t: int, latent: Tensor) -> Tensor:
        """Nearest codes uint8 [c, n] of latent weights [c, n] on the current levels."""
        if self.even(t):
            return self._nearest_even(t, latent)
        codes = torch.zeros(latent.shape, dtype=torch.uint8, device=latent.device)
        for g in range(self.tiers[t].groups if self.tiers[t].planes else 0):
            rows = slice(None) if self.tiers[t].groups == 1 else self._group_of[t] == g
            level, code = self._grid(t, g).levels().sort(dim=1)
            middle = ((level[:, 1:] + level[:, :-1]) / 2).T
            rank = torch.zeros_like(codes[rows])
            for boundary in middle:
                rank += latent[rows] > boundary
            codes[rows] = code.T.gather(0, rank.long()).to(torch.uint8)
        return codes

    def _nearest_even(self, t: int, latent: Tensor) -> Tensor:
        scale, offset = self._numbers(t)
        half = self.per_column(t, scale)[:, 0]
        # levels that coincide all have the same value: which code is chosen does not matter
        step = torch.where(half == 0, 1.0, 2 * half)
        steps = 2 ** self.tiers[t].planes - 1
        x = latent / step if offset is None else (latent - self.per_column(t, offset)) / step
        return x.add_(steps / 2).round_().clamp_(0, steps).to(torch.uint8)

    def _grid(self, t: int, g: int) -> Grid:
        scale, offset = self._numbers(t)
        numbers = TierGrid(
            scale.permute(2, 0, 1).float(), None if offset is None else offset.T.float()
        )
        return numbers.grid(self.tiers[t], g)

    def forward(self) -> Tensor:
        """The weight [n, k] in `dtype`, differentiable in all that trains; computed in float32."""
        tiers = range(len(self.tiers))
        codes = [self._nearest(t, x) for t, x in enumerate(self.latent)] or self._codes
        scales, offsets = zip(*(self._numbers(t) for t in tiers), strict=True)
        W = _FromCodes.apply(self, codes, *scales, *offsets, *self.latent)
        if self._column0 is not None and self.column is not None:
            W = W * (self._column0 * self.column).to(self.dtype)
        if self._overlay is None:
            return W
        return torch.where(self._overlay.mask, self._overlay.dequantize().to(self.dtype), W)

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Tiers [c, n] -> the weight [n, k]."""
        return torch.cat(list(parts)).index_select(0, self._inverse).T

    def split(self, W: Tensor) -> Sequence[Tensor]:
        """Inverse of `assemble`."""
        # a transposed copy first: picking rows of memory is many times faster than columns
        return W.T.contiguous().index_select(0, self._order).split([t.columns for t in self.tiers])

    @torch.no_grad()
    def freeze(self) -> QuantizedWeight:
        """What would be stored now: codes, and scales rounded to float16."""
        grids, codes = [], []
        for t in range(len(self.tiers)):
            scale, offset = self._numbers(t)
            shape = scale.permute(2, 0, 1)
            grids.append(TierGrid(stored(shape), None if offset is None else stored(offset.T)))
            codes.append(self._nearest(t, self.latent[t]) if len(self.latent) else self._codes[t])
        column = None
        if self._column0 is not None and self.column is not None:
            column = stored(self._column0 * self.column)
        return self._quantized(codes, grids, column)

    def start(self) -> QuantizedWeight:
        """The weight that was given."""
        grids = [
            TierGrid(scale.permute(2, 0, 1), None if offset is None else offset.T)
            for scale, offset in zip(self._scale0, self._offset0, strict=True)
        ]
        return self._quantized(self._codes, grids, self._column0)

    def _quantized(
        self, codes: Sequence[Tensor], grids: list[TierGrid], column: Tensor | None
    ) -> QuantizedWeight:
        codes_nk = torch.cat(list(codes))[self._inverse].T.contiguous()
        return QuantizedWeight(self.tiers, self.tier_of, codes_nk, grids, column, self._overlay)

    def groups(self, tuning: Rates) -> list[tuple[list[nn.Parameter], float]]:
        """(parameters, learning rate). A latent moves in units of its tier's mean scale."""
        chosen = [t for t, trained in enumerate(self._trained) if trained]
        small: list[nn.Parameter] = [self.scale[t] for t in chosen]
        small += [self.offset[t] for t in chosen if tuning.offsets]
        column = [] if self.column is None else [self.column]
        out = [([p for p in small if p.numel()], tuning.lr)]
        out += [([self.row], tuning.row_lr), (column, tuning.row_lr or tuning.lr)]
        for t in chosen if len(self.latent) else []:
            if self.latent[t].numel() and self.tiers[t].planes:
                size = float(self._scale0[t].abs().sum(1).mean())
                out.append(([self.latent[t]], tuning.latent_lr * size))
        return out


class TunableFactors(nn.Module):
    """A product whose two factors train; arguments as of TunableWeight, latent being [n, k].

    Latent factors start where least squares puts one while the other stays as it is.
    """

    def __init__(
        self,
        qw: Factors,
        latent: Tensor | None = None,
        only_planes: int | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        analytic: bool = False,
    ) -> None:
        super().__init__()
        starts: tuple[Tensor | None, Tensor | None] = (None, None)
        if latent is not None:
            outer, inner = qw.outer.dequantize(), qw.inner.dequantize()
            starts = (
                least_squares(latent, inner, None, LATENT_DAMPING),
                least_squares(latent.T, outer.T, None, LATENT_DAMPING).T,
            )
        self.outer, self.inner = (
            TunableWeight(part, start, only_planes, dtype, analytic=analytic)
            for part, start in zip((qw.outer, qw.inner), starts, strict=True)
        )

    def forward(self) -> Tensor:
        """The weight [n, k], as of TunableWeight."""
        product: Tensor = self.outer() @ self.inner()
        return product

    def freeze(self) -> Factors:
        return Factors(self.outer.freeze(), self.inner.freeze())

    def start(self) -> Factors:
        return Factors(self.outer.start(), self.inner.start())

    def groups(self, tuning: Rates) -> list[tuple[list[nn.Parameter], float]]:
        return self.outer.groups(tuning) + self.inner.groups(tuning)


Tunable: TypeAlias = TunableWeight | TunableFactors


def tunable(
    weights: Mapping[str, Quantized],
    latent: Callable[[str], Tensor],
    rates: Rates,
    dtype: Callable[[str], torch.dtype],
) -> dict[str, Tunable]:
    """Weights as these rates train them. latent(name) [n, k]: asked only if codes are to move."""
    found: dict[str, Tunable] = {}
    for name, qw in weights.items():
        start = latent(name) if rates.latent_lr else None
        arguments = start, rates.only_planes, dtype(name)
        if isinstance(qw, Factors):
            found[name] = TunableFactors(qw, *arguments, analytic=rates.analytic)
        else:
            found[name] = TunableWeight(qw, *arguments, analytic=rates.analytic)
    return found


def bit(codes: Tensor, plane: int) -> Tensor:
    """Bool: is this plane +1."""
    return (codes & (1 << plane)).bool()


class _FromCodes(torch.autograd.Function):
    """Codes and numbers -> weight. Saves the codes alone, a byte a weight.

    Gradients: of a scale, the sum of ±dW over its columns; of an offset, the sum of dW; of a latent
    weight, dW itself (straight-through: Bengio et al. 2013).
    """

    @staticmethod
    def forward(ctx: Any, own: TunableWeight, codes: list[Tensor], *numbers: Any) -> Tensor:
        ctx.own, ctx.codes, ctx.count = own, codes, len(numbers) // len(codes)
        T = len(codes)
        parts = [own.values(t, codes[t], numbers[t], numbers[T + t]) for t in range(T)]
        parts = [part.to(own.dtype) for part in parts]
        return own.assemble(parts)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> Any:
        own, codes = ctx.own, ctx.codes
        parts = [part.float() for part in own.split(dW)]
        scales = [_scale_gradient(own, t, codes[t], parts[t]) for t in range(len(codes))]
        offsets = [
            _per_group(own, t, parts[t]) if tier.offset else None
            for t, tier in enumerate(own.tiers)
        ]
        latents = parts if ctx.count == 3 else []
        return (None, None, *scales, *offsets, *latents)


def _scale_gradient(own: TunableWeight, t: int, codes: Tensor, dW: Tensor) -> Tensor:
    """[G, S, n]."""
    planes = own.tiers[t].planes
    if not planes:
        return dW.new_zeros(own.tiers[t].groups, 0, dW.shape[1])
    if own.even(t):
        return _per_group(own, t, own.position(t, codes).mul_(dW))[:, None]
    signed = [_per_group(own, t, torch.where(bit(codes, p), dW, -dW)) for p in range(planes)]
    return torch.stack(signed, 1)


def _per_group(own: TunableWeight, t: int, x: Tensor) -> Tensor:
    """[c, n] summed over the columns of each group, [G, n]."""
    if own.tiers[t].groups == 1:
        return x.sum(0, keepdim=True)
    return own.group_sums(t, x)


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
        self._adam = torch.optim.Adam(used, betas=(0.9, 0.999 if constant else 0.95))
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
        steps=lambda train: round(tuning.epochs * train),
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


def forward_kl(logits: Tensor, target: Tensor, chunk: int = 128, *, gamma: float = 0.0) -> Tensor:
    """Mean over tokens of KL(target || logits), nats; gamma > 0 weighs ambiguous tokens more.

    The weight of a token is the entropy of its target to the power gamma, their mean being 1 (after
    DB-LLM's Deviation-Aware Distillation). `chunk` tokens at a time: a vocabulary of 50,000 in
    float32 would otherwise take gigabytes.
    """
    found = _ForwardKl.apply(logits.flatten(0, -2), target.flatten(0, -2), chunk, gamma)
    assert isinstance(found, Tensor)
    return found


class _ForwardKl(torch.autograd.Function):
    """The gradient, weight · (softmax(logits) - softmax(target)), is found along with the loss.

    It is kept in the dtype of the logits, and no float32 softmax is kept or made twice.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, chunk: int, gamma: float) -> Tensor:
        kl, weight = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        gradient = torch.empty_like(logits if ctx.needs_input_grad[0] else logits[:0])
        for start in range(0, len(logits), chunk):
            some = slice(start, start + chunk)
            log_q = logits[some].float().log_softmax(-1)
            log_p = target[some].float().log_softmax(-1)
            p = log_p.exp()
            kl[some] = (p * (log_p - log_q)).sum(-1)
            weight[some] = -(p * log_p).sum(-1)
            weight[some] **= gamma
            if ctx.needs_input_grad[0]:
                gradient[some] = (log_q.exp_() - p) * weight[some, None]
        total = weight.sum().clamp(min=1e-20)
        ctx.save_for_backward(gradient, total)
        return (weight * kl).sum() / total

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> Any:
        gradient, total = ctx.saved_tensors
        return gradient * (out / total).to(gradient.dtype), None, None, None
