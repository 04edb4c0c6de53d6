"""Packed sub-2-bit weights: the layout, its reference, and the kernels that multiply with it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pbq_kernels import reference
from pbq_kernels.cpu import CpuBackend
from pbq_kernels.layout import (
    FORMAT_VERSION,
    INNER,
    PackedFormatError,
    PackedWeight,
    Tier,
    WeightLayout,
    stored_planes,
)
from pbq_kernels.triton_backend import TritonBackend

__all__ = [
    "BACKENDS",
    "FORMAT_VERSION",
    "Backend",
    "PackedFormatError",
    "PackedWeight",
    "PlaneBackend",
    "Tier",
    "WeightLayout",
    "dequant_matmul",
    "planes",
    "select",
]

log = logging.getLogger(__name__)


class Backend(Protocol):
    """One way to multiply with a packed weight. Repacks once in `prepare`, then only multiplies."""

    name: str

    def why_not(self, layout: WeightLayout, device: torch.device) -> str | None:
        """None when it can serve this layout on this device, otherwise the reason."""

    def prepare(self, pw: PackedWeight) -> Any:
        """The backend's own form of `pw`, on pw's device."""

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """x [*b, k] @ W_hat.T -> [*b, n] in x's dtype."""


@runtime_checkable
class PlaneBackend(Backend, Protocol):
    """A backend whose form holds the stored planes in another order, so these need not be kept."""

    def planes(self, prepared: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        """By name of a stored tensor: rows int64 [r] -> exactly those rows of it."""


class ReferenceBackend:
    """Unpacks to a dense weight on every call. Slow, exact, runs anywhere torch runs."""

    name = "reference"

    def why_not(self, layout: WeightLayout, device: torch.device) -> str | None:
        return None

    def prepare(self, pw: PackedWeight) -> PackedWeight:
        return pw

    def matmul(self, x: Tensor, prepared: PackedWeight) -> Tensor:
        return reference.matmul(x, prepared)


class InARow:
    """A product of two factors: x goes through the inner one, then through the outer one.

    In between lies [*b, rank] in x's dtype. Each factor has the backend that serves it.
    """

    def __init__(self, outer: Backend, inner: Backend) -> None:
        self.outer, self.inner, self.name = outer, inner, outer.name

    def why_not(self, layout: WeightLayout, device: torch.device) -> str | None:
        outer, inner = layout.factors()
        return self.outer.why_not(outer, device) or self.inner.why_not(inner, device)

    def prepare(self, pw: PackedWeight) -> tuple[Any, Any]:
        outer, inner = pw.factors()
        return self.outer.prepare(outer), self.inner.prepare(inner)

    def planes(self, prepared: tuple[Any, Any]) -> dict[str, Callable[[Tensor], Tensor]]:
        outer, inner = prepared
        of_inner = planes(self.inner, inner)
        return {**planes(self.outer, outer), **{INNER + name: of_inner[name] for name in of_inner}}

    def matmul(self, x: Tensor, prepared: tuple[Any, Any]) -> Tensor:
        outer, inner = prepared
        return self.outer.matmul(self.inner.matmul(x, inner), outer)


class Expanded:
    """A weight that a backend does not take as it is: it gets the plain form, which is larger."""

    def __init__(self, backend: Backend, layout: WeightLayout) -> None:
        self.backend, self.layout, self.name = backend, layout, backend.name

    def why_not(self, layout: WeightLayout, device: torch.device) -> str | None:
        return self.backend.why_not(layout.plain(), device)

    def prepare(self, pw: PackedWeight) -> Any:
        return self.backend.prepare(pw.plain())

    def planes(self, prepared: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        of_plain = planes(self.backend, prepared)
        rows = {name: of_plain[name] for name in ("weight",) if name in of_plain}
        return {name: self._stored(rows[name]) for name in rows}

    def _stored(self, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def rows(chosen: Tensor) -> Tensor:
            # a path can only be told from all of its rows
            every = plain(torch.arange(self.layout.n, device=chosen.device))
            return stored_planes(self.layout, every)[chosen]

        return rows if self.layout.has_trellis else plain

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        return self.backend.matmul(x, prepared)


def planes(backend: Backend, prepared: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """What `PlaneBackend.planes` says; nothing for a backend that has the planes no more."""
    return backend.planes(prepared) if isinstance(backend, PlaneBackend) else {}


# Fastest first; `select` takes the first that serves the layout and the device. The reference
# serves all, so what stands behind it is only taken when asked for by name.
BACKENDS: dict[str, Backend] = {
    "cpu": CpuBackend("cpu"),
    "triton": TritonBackend(),
    "reference": ReferenceBackend(),
    "cpu-int8": CpuBackend("cpu-int8", mode="int8"),
}


def select(layout: WeightLayout, device: torch.device, name: str = "auto") -> Backend:
    """The backend for this layout on this device. A backend asked for by name serves or raises."""
    if layout.rank:
        outer, inner = layout.factors()
        return InARow(select(outer, device, name), select(inner, device, name))
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"unknown kernel backend {name!r}; there are {', '.join(BACKENDS)}")
        backend = _as_it_serves(BACKENDS[name], layout, device)
        reason = backend.why_not(layout, device)
        if reason:
            raise ValueError(f"kernel backend {name!r} cannot be used here: {reason}")
        return backend
    reasons: list[str] = []
    for named in BACKENDS.values():
        backend = _as_it_serves(named, layout, device)
        reason = backend.why_not(layout, device)
        if reason is None:
            if device.type == "cuda" and backend.name == "reference":
                _warn_once(f"packed weights run by the slow reference on the GPU: {reasons[-1]}")
            return backend
        log.debug("backend %s passed over: %s", backend.name, reason)
        reasons.append(f"{backend.name}: {reason}")
    raise AssertionError("the reference backend serves every layout")


def _as_it_serves(backend: Backend, layout: WeightLayout, device: torch.device) -> Backend:
    """The backend itself, or what gives it the plain form of a weight that it takes only so."""
    if layout.is_plain or backend.why_not(layout, device) is None:
        return backend
    return Expanded(backend, layout)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def dequant_matmul(x: Tensor, pw: PackedWeight, backend: str = "auto") -> Tensor:
    """x [*b, k] @ W_hat.T -> [*b, n] in x's dtype, by the named backend."""
    chosen = select(pw.layout, x.device, backend)
    return chosen.matmul(x, chosen.prepare(pw))
