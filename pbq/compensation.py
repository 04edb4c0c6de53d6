"""A linear aimed at the original output given what quantized layers before it deliver.

Least squares over calibration tokens, in closed form: of the gaps between the two streams
(pbq.blocks) as much as their inputs can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from pbq import ranks
from pbq.errors import NumericalError
from pbq.hessian import cholesky, products_of

# Of `compensate`, times the mean of H's diagonal: beside what batches agree on, and without them.
LEAST_DAMPING, DAMPING = 1e-3, 0.3
# Eigenvectors of H that are judged together.
NEIGHBOURS = 15


@dataclass
class Gaps:
    """What quantized layers take from the original, seen against one shared input.

    cross = E[w (x_f - x_q) x_qᵀ]; by full name of a residual linear, residual =
    E[w (r_f - r_q) x_qᵀ] with r the residual stream its output is added to. x_f, r_f are of the
    original model, x_q, r_q behind quantized layers, w the weight of the token.
    """

    cross: Tensor
    residual: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.cross, *self.residual.values()]

    def each(self, change: Callable[..., Tensor], *others: Gaps) -> Gaps:
        """`change` of every tensor and those of others in its place; of the same linears."""
        return Gaps(
            change(self.cross, *(other.cross for other in others)),
            {
                name: change(own, *(other.residual[name] for other in others))
                for name, own in self.residual.items()
            },
        )

    def missing(self, W: Tensor, name: str) -> Tensor:
        """E[w (W (x_f - x_q) + r_f - r_q) x_qᵀ] [n, k] of the linear `name`."""
        return W @ self.cross + self.residual.get(name, torch.zeros((), device=W.device))


@dataclass
class Moments:
    """Token-weighted second moments of one shared input, per token.

    H = E[w x_q x_qᵀ]. chance: gaps with every other batch negated, which leaves of them what is
    noise; None where it is not wanted, or one batch is all there is. tokens: how many there were,
    those borrowed from other experts apart.
    """

    H: Tensor
    gaps: Gaps
    chance: Gaps | None = None
    tokens: int = 0
    borrowed: int = 0

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [k], rising, and eigenvectors, the columns of [k, k], of H."""
        values, vectors = torch.linalg.eigh(self.H)
        return values.clamp(min=0), vectors


class Sums:
    """Moments while they are summed up, batch by batch; in float64, as ranks.sum_up wants them."""

    def __init__(
        self, k: int, rows: Mapping[str, int], device: torch.device, *, chance: bool
    ) -> None:
        """rows: n of each residual linear. chance: is it wanted?"""
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)

        # gaps of all batches, or of those that `chance` takes as they are and of negated ones
        self.H, self.gaps = (
            zeros(k, k),
            [
                Gaps(zeros(k, k), {name: zeros(n, k) for name, n in rows.items()})
                for _ in range(2 if chance else 1)
            ],
        )
        # of the weights of all tokens, their number, and that of negated batches
        self.total = zeros(3)

    def add(
        self, x_f: Tensor, x_q: Tensor, w: Tensor, residual: Mapping[str, Tensor], *, negated: bool
    ) -> None:
        """x_f, x_q [tokens, k] in the model's dtype, w [tokens], residual: r_f - r_q [tokens, n].

        negated: in `chance`.
        """
        x = x_q.float()
        weighted, root = x * w[:, None], x * w.sqrt()[:, None]
        with products_of(x_q.dtype):
            _add(self.H, root.T @ root)
        # the gaps may be multiplied in the model's own dtype: unlike H nothing inverts them
        own = weighted.to(x_q.dtype)
        found = Gaps(
            (x_f.float() - x).to(own.dtype).T @ own,
            {name: gap.to(own.dtype).T @ own for name, gap in residual.items()},
        )
        self.gaps[-1 if negated else 0].each(_add, found)
        self.total += torch.stack([w.sum(), w.new_tensor(len(x)), w.new_tensor(negated)])

    def _all(self) -> list[Tensor]:
        return [self.H, *(x for gaps in self.gaps for x in gaps.tensors()), self.total]

    def over_ranks(self) -> Sums:
        ranks.sum_up(*self._all())
        return self

    def mean(self, name: str) -> Moments:
        """Raises NumericalError when a sum is not finite though its inputs are."""
        if not all(torch.isfinite(m).all() for m in self._all()):
            raise NumericalError(f"{name}: its inputs are too large to be squared in float32")
        weight, tokens, negated = self.total.tolist()

        first, *second = self.gaps
        gaps, chance = first, None
        if second:
            gaps = first.each(torch.add, *second)
            chance = first.each(Tensor.sub_, *second) if negated else None

        def per_token(x: Tensor) -> Tensor:
            return x.div_(weight).float()

        return Moments(
            per_token(self.H), gaps.each(per_token), chance and chance.each(per_token), int(tokens)
        )


def _add(total: Tensor, x: Tensor) -> Tensor:
    """total += x, float64 [n, k], some rows at a time: torch makes a float64 copy of x first."""
    for rows, part in zip(total.split(64), x.split(64), strict=True):
        rows += part
    return total


def compensate(W: Tensor, moments: Moments, name: str, percdamp: float) -> tuple[Tensor, float]:
    """The weight that best gives the original output from the quantized input, [n, k].

    argmin over W' of E[w |W x_f + r_f - W' x_q - r_q|²] + damping |W' - W|²
      = W + missing (H + damping)⁻¹.
    The first term is the asymmetric calibration of GPTAQ (Li et al. 2025); the residual term lets
    the linears that write to the residual stream undo the error that earlier blocks left there.
    percdamp 0: `compensate_where_batches_agree`, where there are two. Also returns the damping
    used: more than `percdamp` where H asks for it (hessian.cholesky).
    """
    if percdamp == 0:
        if moments.chance is not None:
            return compensate_where_batches_agree(W, moments, name), LEAST_DAMPING
        percdamp = DAMPING
    L, damping = cholesky(moments.H, percdamp, name)
    return W + torch.cholesky_solve(moments.gaps.missing(W, name).T, L).T, damping


def compensate_where_batches_agree(W: Tensor, moments: Moments, name: str) -> Tensor:
    """`compensate` with as much of each eigenvector of H as is no noise, whatever its eigenvalue.

    A component m of `missing`, [n], is the sum of what every token has and of chance, whose energy
    is that of the same component c of `chance`: 1 - |c|²/|m|² of it is to be believed (the factor
    of a Wiener filter), energies taken over neighbours in the spectrum. Damping alone must take one
    such factor for all eigenvectors of one eigenvalue, in all layers.
    """
    assert moments.chance is not None
    values, V = moments.spectrum
    missing, chance = (gaps.missing(W, name) @ V for gaps in (moments.gaps, moments.chance))
    noise, energy = (_over_neighbours(x.pow(2).sum(0)) for x in (chance, missing))
    believed = torch.where(energy > 0, 1 - noise / energy, 0.0).clamp(min=0)
    return (
        W + (missing * believed / (values + LEAST_DAMPING * values.mean()).clamp(min=1e-30)) @ V.T
    )


def _over_neighbours(x: Tensor) -> Tensor:
    """Sums of [k] over NEIGHBOURS places around each, those beyond an end being its own."""
    at = torch.arange(len(x), device=x.device)
    reach = torch.arange(-(NEIGHBOURS // 2), NEIGHBOURS // 2 + 1, device=x.device)
    return x[(at[:, None] + reach).clamp(0, len(x) - 1)].sum(1)
