"""The experts of a MoE layer as linears of their own, in the place of fused 3-D parameters.

transformers 5 keeps all experts of a layer in `gate_up_proj` [E, 2i, h] and `down_proj` [E, h, i].
`unfuse` puts an `Experts` there, `fuse` is the way back. Expert 3 of `mlp.experts` has the linears
`mlp.experts.3.gate_up` and `mlp.experts.3.down`, so that whatever knows linears knows experts.
These are not the names of the original files (`gate_proj`, `up_proj`, `down_proj` or `w1`, `w3`,
`w2`): transformers would take packed tensors of such a name for experts that it has to fuse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# The fused parameter behind each linear of an expert.
_FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}


def is_fused(module: nn.Module) -> bool:
    """Does transformers keep gated experts here, in a form that can be taken apart?

    Nothing may come between `down_proj` and the routing weight.
    """
    parameters = (module._parameters.get(name) for name in _FUSED.values())
    return (
        all(p is not None and p.ndim == 3 for p in parameters)
        and hasattr(module, "_apply_gate")
        and not getattr(module, "has_post_expert_norm", False)
    )


class Expert(nn.Module):
    """The two linears of one expert."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down


class Experts(nn.ModuleList):
    """x [m, h], the experts of each token and their weights [m, top_k] -> [m, h].

    The same sum as in the fused module: weight · down(gate(gate_up(x))) over the token's experts,
    `gate` being the fused module's own. The linears hold views of its parameters, and may be
    replaced by others. borrow: while statistics are taken, an expert that fewer tokens than an even
    share are routed to is shown more of them; what it makes of these is dropped.
    """

    def __init__(self, fused: nn.Module) -> None:
        """Takes the parameters out of `fused`."""
        parts = (_meta_linears(fused, key) for key in _FUSED.values())
        super().__init__(Expert(*linears) for linears in zip(*parts, strict=True))
        self.borrow = False
        self.take(fused)

    def take(self, fused: nn.Module) -> None:
        """Let the linears hold views of the parameters of `fused`, which has none any more."""
        for name, key in _FUSED.items():
            weights, biases = fused.get_parameter(key), fused._parameters.get(f"{key}_bias")
            for e, expert in enumerate(self):
                linear = getattr(expert, name)
                W = _oriented(fused, weights.detach()[e])
                linear.weight = nn.Parameter(W, requires_grad=weights.requires_grad)
                if biases is not None:
                    linear.bias = nn.Parameter(biases.detach()[e], biases.requires_grad)
        fused._parameters.clear()
        # past nn.Module.__setattr__: without a tensor it is no part of the model
        self.__dict__["_fused"] = fused

    def expert(self, e: int) -> Expert:
        found = self[e]
        assert isinstance(found, Expert)
        return found

    def gated(self, e: int, x: Tensor) -> Tensor:
        """What reaches `down` of expert e, [m, i]."""
        fused: Any = self.__dict__["_fused"]
        gated: Tensor = fused._apply_gate(self.expert(e).gate_up(x))
        return gated

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        found = routed(top_k_index, len(self))
        for e, (tokens, places) in enumerate(found):
            if len(tokens):
                y = self.expert(e).down(self.gated(e, hidden_states[tokens]))
                y = y * top_k_weights[tokens, places, None]
                out.index_add_(0, tokens, y.to(out.dtype))
        if self.borrow:
            self._run_borrowed(hidden_states, [tokens for tokens, _ in found])
        return out

    def _run_borrowed(self, hidden_states: Tensor, tokens: list[Tensor]) -> None:
        even = -(-len(hidden_states) // len(self))
        for e, mine in enumerate(tokens):
            more = borrowed(mine, len(hidden_states), even)
            if len(more):
                self.expert(e).down(self.gated(e, hidden_states[more]))

    def fuse(self) -> nn.Module:
        """The fused module with its parameters again, from linears that are all dense."""
        fused: nn.Module = self.__dict__["_fused"]
        for name, key in _FUSED.items():
            linears: list[Any] = [getattr(expert, name) for expert in self]
            stacked = {key: torch.stack([_oriented(fused, linear.weight) for linear in linears])}
            if linears[0].bias is not None:
                stacked[f"{key}_bias"] = torch.stack([linear.bias for linear in linears])
            for parameter, tensor in stacked.items():
                value = nn.Parameter(tensor.detach(), requires_grad=False)
                fused.register_parameter(parameter, value)
        return fused


def _oriented(fused: nn.Module, W: Tensor) -> Tensor:
    """One expert's weight as a linear has it, from how the fused module has it, and back."""
    return W.T if getattr(fused, "is_transposed", False) else W


def _meta_linears(fused: nn.Module, key: str) -> list[nn.Linear]:
    """One linear per expert of the fused parameter `key`, on the meta device."""
    weights, biased = fused.get_parameter(key), f"{key}_bias" in fused._parameters
    n, k = _oriented(fused, weights[0]).shape
    return [nn.Linear(k, n, biased, device="meta") for _ in weights]


def routed(top_k_index: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, places) of each expert: the rows and columns of `top_k_index` that name it."""
    flat, top_k = top_k_index.flatten(), top_k_index.shape[1]
    counts = torch.bincount(flat, minlength=experts).tolist()
    parts = flat.argsort(stable=True).split(counts)[:experts]
    return [(part // top_k, part % top_k) for part in parts]


def borrowed(mine: Tensor, total: int, least: int) -> Tensor:
    """Of `total` tokens, evenly spread ones that are not `mine`: as many as `least` lacks."""
    others = torch.ones(total, dtype=torch.bool, device=mine.device)
    others[mine] = False
    free = others.nonzero()[:, 0]
    count = min(max(least - len(mine), 0), len(free))
    return free[torch.arange(count, device=mine.device) * len(free) // max(count, 1)]


def unfuse(model: nn.Module, only: Collection[str] | None = None) -> None:
    """Put `Experts` in the place of every fused experts module inside, or of those named `only`.

    No weight is copied, and modules on the meta device stay there.
    """
    for name in fused_names(model):
        if only is None or name in only:
            model.set_submodule(name, Experts(model.get_submodule(name)))


def fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_fused(module)]


def fuse(model: nn.Module) -> None:
    """Undo `unfuse`: plain transformers knows the model again. One layer is held twice."""
    for name, experts in find_experts(model).items():
        model.set_submodule(name, experts.fuse())


@contextmanager
def as_fused(module: nn.Module) -> Iterator[None]:
    """Fused modules in the place of the `Experts` inside, for code that loads parameters by name.

    Behind it the same `Experts` hold what was loaded.
    """
    experts = find_experts(module)
    fuse(module)
    try:
        yield
    finally:
        for name, found in experts.items():
            found.take(module.get_submodule(name))
            module.set_submodule(name, found)


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """Every `Experts` inside, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Experts)}


@contextmanager
def borrowing(model: nn.Module) -> Iterator[None]:
    """Every expert inside sees some tokens of every pass, whether any is routed to it or not."""
    experts = find_experts(model).values()
    for module in experts:
        module.borrow = True
    try:
        yield
    finally:
        for module in experts:
            module.borrow = False


def routers(model: nn.Module) -> set[str]:
    """Names of the modules beside `Experts` that decide on them: those with an output an expert.

    They stay in full precision: they are tiny, and a token sent elsewhere is lost to its expert.
    """
    found = set()
    for name, experts in find_experts(model).items():
        parent = name.rpartition(".")[0]
        for child, module in model.get_submodule(parent).named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, Experts):
                outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
                if outputs in (1, len(experts)):
                    found.add(f"{parent}.{child}".lstrip("."))
    return found
