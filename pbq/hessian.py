"""H = XᵀX of a linear's inputs: accumulated, damped, inverted, and used as a metric."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from pbq.errors import NumericalError

log = logging.getLogger(__name__)


class Hessian:
    """Accumulates H = XᵀX / m over the inputs of one linear (or of several that share them).

    H is the proxy of a layer's loss: tr(E H Eᵀ) is the mean squared output error of E = W - W_hat
    (Frantar et al. 2022, eq. 1). Kept in float32: sums over 2**18 tokens in bfloat16 would keep
    eight significant bits.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, x: Float[Tensor, "*b k"]) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def mean(self) -> Float[Tensor, "k k"]:
        """H per token. Raises NumericalError on non-finite sums."""
        if not torch.isfinite(self._sum).all():
            raise NumericalError("non-finite activations in the calibration data")
        return self._sum / max(self.tokens, 1)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """float32 matmuls of numbers that were `dtype` before: products as exact, sums in float32.

    Of bfloat16 that takes half the time where a CPU has instructions for it (AMX). A number that
    was multiplied by a float32 since is rounded back, which averages out over tokens.
    """
    # the CPU's own setting: the one for all devices cannot be read where a caller has set another
    setting = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and later
    if dtype != torch.bfloat16 or setting is None:
        yield
        return
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def damp(H: Float[Tensor, "k k"], percdamp: float) -> Float[Tensor, "k k"]:
    """H + percdamp * mean(diag H) * I. A dead channel (no input ever) is damped like the others."""
    mean = H.diagonal().mean()
    # all inputs zero: any positive metric will do, and identity is the plain one
    damping = mean * percdamp if mean > 0 else mean + 1
    return H + damping * torch.eye(len(H), device=H.device, dtype=H.dtype)


def inverse_cholesky(
    H: Float[Tensor, "k k"], percdamp: float, name: str = "weight"
) -> tuple[Float[Tensor, "k k"], float]:
    """(U, damping used): U upper with (H + damping)⁻¹ = UᵀU, in float32.

    The damping is that of the first step of the ladder (`_climb`) that has such a factor.
    """
    U, damping = _climb(_inverse_cholesky, H, percdamp, name)
    return U.float(), damping


def cholesky(
    H: Float[Tensor, "k k"], percdamp: float, name: str = "weight"
) -> tuple[Float[Tensor, "k k"], float]:
    """(L, damping used): L lower with H + damping = LLᵀ, in H's dtype, by the same ladder."""
    L, damping = _climb(_cholesky, H, percdamp, name)
    return L.to(H.dtype), damping


def least_squares(
    W: Float[Tensor, "n k"],
    basis: Float[Tensor, "r k"],
    H: Float[Tensor, "k k"] | None,
    percdamp: float,
    name: str = "weight",
) -> Float[Tensor, "n r"]:
    """X of least tr(E H Eᵀ) + damping |X|² with E = W - X basis; H: the identity if None.

    The damping is that of `cholesky` for the metric basis H basisᵀ of X.
    """
    seen = basis if H is None else basis @ H
    L, _ = cholesky(seen @ basis.T, percdamp, name)
    return torch.cholesky_solve(seen @ W.T, L).T


def _climb(
    factor: Callable[[Tensor], Tensor | None], H: Tensor, percdamp: float, name: str
) -> tuple[Tensor, float]:
    """The damping ladder: (factor of the damped H, damping used).

    When H is not positive definite at `percdamp`, first float64 and then ten times the damping is
    tried, up to 1; a step is logged with the layer's name. Raises NumericalError after that.
    """
    damping = percdamp
    while True:
        for dtype in (H.dtype, torch.float64):
            found = factor(damp(H.to(dtype), damping))
            if found is not None:
                if damping != percdamp:
                    log.warning("%s: H needed damping %g instead of %g", name, damping, percdamp)
                return found, damping
        if damping >= 1:
            raise NumericalError(
                f"{name}: H is not positive definite even with damping {damping:g}; "
                "use more or other calibration text"
            )
        damping = min(1.0, damping * 10)


def _inverse_cholesky(H_damped: Tensor) -> Tensor | None:
    # H = RRᵀ with R upper, from the factor of H read backwards; then H⁻¹ = R⁻ᵀR⁻¹ and U = R⁻¹.
    # H⁻¹ is never formed: its factor would carry the square of this error.
    L = _cholesky(H_damped.flip(0, 1))
    if L is None:
        return None
    identity = torch.eye(len(L), device=L.device, dtype=L.dtype)
    U = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
    return U if torch.isfinite(U).all() else None


def _cholesky(H_damped: Tensor) -> Tensor | None:
    L, failed = torch.linalg.cholesky_ex(H_damped)
    return None if failed else L


def saliency(
    lost: Float[Tensor, "n k"], U: Float[Tensor, "k k"], *, to_come: bool = False
) -> Float[Tensor, "n k"]:
    """Loss of an error `lost` in each entry once other columns of its row make up for it.

    lost² / [H⁻¹]_jj, all other columns being free (optimal brain surgeon, Hassibi & Stork 1993).
    to_come: lost² / U_jj², only the columns behind j being free, as PB-LLM and BiLLM are coded.
    """
    # H⁻¹ = UᵀU
    return lost.pow(2) / (U.diagonal() ** 2 if to_come else U.pow(2).sum(0))


def proxy_loss(
    W: Float[Tensor, "n k"], W_hat: Float[Tensor, "n k"], H: Float[Tensor, "k k"]
) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ): the relative squared error of the layer's output."""
    E = W - W_hat
    energy = ((W @ H) * W).sum()
    return float(((E @ H) * E).sum() / energy) if energy > 0 else 0.0
