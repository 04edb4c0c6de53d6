"""Modules of a block that need not run again, for their weights and what reaches them stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from pbq.spill import HiddenStates, Spill


class Memory:
    """What the modules of a block whose linears are final made of each batch of one stream.

    A block runs once for every group of linears that is rounded, and once more behind the last.
    What comes before a group is the same each time: an attention whose linears are rounded is a
    third of a block.
    """

    def __init__(self, block: nn.Module, linears: Collection[str], spill: Spill) -> None:
        """linears: names of all that are to be rounded."""
        self._block, self._spill = block, spill
        # by module, those inside it that are still to be rounded
        self._left = {
            name: inside
            for name, _ in block.named_children()
            if (inside := {n for n in linears if n.startswith(f"{name}.")})
        }
        self._made: dict[str, _Made] = {}

    def settle(self, linears: Sequence[str]) -> None:
        """These have their final weights."""
        for inside in self._left.values():
            inside.difference_update(linears)

    @contextmanager
    def batch(self, i: int, watched: Sequence[str] = (), *, last: bool = False) -> Iterator[None]:
        """The forwards inside are of batch i. A module must run if `watched` ones are inside it.

        last: nothing that is made now will be asked for again.
        """
        with ExitStack() as stack:
            for name, left in self._left.items():
                if not left and not any(w.startswith(f"{name}.") for w in watched):
                    module = self._block.get_submodule(name)
                    stack.enter_context(_instead(module, partial(self._once, name, i, last)))
            yield

    def _once(
        self, name: str, i: int, last: bool, forward: Callable[..., Any], *args: Any, **more: Any
    ) -> Any:
        made = self._made.get(name)
        if made and i in made.places:
            # a copy: some models add to such tensors in place
            return made.wrapped(made.states[made.places[i]].clone())
        out = forward(*args, **more)
        first, *rest = out if isinstance(out, tuple) else (out,)
        if not last and isinstance(first, Tensor) and all(x is None for x in rest):
            if made is None:
                made = self._made[name] = _Made(self._spill.states())
            made.places[i] = len(made.states)
            made.rest = len(rest) if isinstance(out, tuple) else -1
            made.states.append(first.clone())
        return out

    def close(self) -> None:
        """Forget what was made, as when weights change after all."""
        for made in self._made.values():
            made.states.close()
        self._made.clear()


@dataclass
class _Made:
    """Outputs of one module: places[batch] in `states`. rest: Nones behind them, -1 if bare."""

    states: HiddenStates
    places: dict[int, int] = field(default_factory=dict)
    rest: int = -1

    def wrapped(self, x: Tensor) -> Any:
        return x if self.rest < 0 else (x, *[None] * self.rest)


@contextmanager
def _instead(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """The module's forward is call(its own forward, ...)."""
    own = module.__dict__.get("forward")  # accelerate's hooks set one
    module.forward = partial(call, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
