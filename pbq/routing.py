"""Which calibration tokens each expert of a MoE layer is fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbq.experts import borrowed, routed
from pbq.models import before_forward


@dataclass(frozen=True, eq=False)
class Routed:
    """What reaches an `Experts`: x [m, h], each token's experts and their weights [m, top_k]."""

    x: Tensor
    index: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """Tokens that one expert is fitted on: rows of all batches one after the other.

    tokens int64 [t]; weight float32 [t]: how much an error of the expert counts in the sum of
    experts, the square of the routing weight. The last `borrowed` tokens went to other experts.
    """

    tokens: Tensor
    weight: Tensor
    borrowed: int

    @property
    def own(self) -> int:
        return len(self.tokens) - self.borrowed


@contextmanager
def watch_routing(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Routed]]:
    """Collect what reaches the named `Experts` of the block during the forwards inside."""
    seen: dict[str, Routed] = {}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        seen[name] = Routed(*(arg.detach() for arg in args[:3]))

    with before_forward({n: block.get_submodule(n) for n in names}, note):
        yield seen


def shares(batches: Sequence[Routed], experts: int, least: int) -> list[Share]:
    """The tokens routed to each expert; where these are fewer than `least`, also some of others.

    Without as many tokens as inputs a Hessian is singular, and of none at all there is none. What a
    rarely used expert would make of other tokens of the same text is the best guess there is; they
    count with the mean weight of all.
    """
    index, weights = (torch.cat([getattr(b, n) for b in batches]) for n in ("index", "weights"))
    squares = weights.float().pow(2)
    found = []
    for tokens, places in routed(index, experts):
        more = borrowed(tokens, len(index), least)
        weight = torch.cat([squares[tokens, places], squares.mean().expand(len(more))])
        found.append(Share(torch.cat([tokens, more]), weight, len(more)))
    return found
