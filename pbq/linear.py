"""PackedLinear: the module that stands where an nn.Linear or Conv1D stood, for every method."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from pbq.errors import UsageError
from pbq.stored import Rebuilt, StoredTensors
from pbq_kernels import BACKENDS, Backend, PackedWeight, WeightLayout, planes, select
from pbq_kernels.layout import check_tensors, padding_is_zero
from pbq_kernels.reference import BY_ROW, dense_rows, dequantize

if TYPE_CHECKING:
    from typing_extensions import Self

_backend_name = os.environ.get("PBQ_BACKEND") or "auto"


def set_backend(name: str) -> None:
    """Choose the kernel of every PackedLinear of this process; `auto` is the fastest that serves.

    The start value is the environment variable PBQ_BACKEND, or auto. Raises ValueError.
    """
    global _backend_name
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown kernel backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    _backend_name = name


def backend_name() -> str:
    """The backend asked for, which may be `auto`."""
    return _backend_name


class PackedModule(nn.Module):
    """A packed weight as a module: holds its stored bytes, and multiplies with them.

    Its buffers are exactly the tensors of the layout, in their stored dtypes whatever the model is
    cast to. What the backend makes of them is kept outside the state dict and made anew after a
    move, a load or a copy. While it is kept, the planes are not, if it has their bits: a buffer
    that is read is rebuilt, and let go again by the next product. After writing into a buffer in
    place, call `forget_prepared`, before the next product. To torch.compile the product is one
    operator, `pbq::packed_linear`, and looking up rows another.
    """

    # WeightLayout names it; declared for the type checker and for code that reads `.weight`.
    weight: Tensor
    _buffers: StoredTensors

    def __init__(self, layout: WeightLayout) -> None:
        super().__init__()
        self._buffers = StoredTensors()
        self.layout = layout
        for name, spec in layout.tensors().items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype))
        self._prepared: _Prepared | None = None
        self._key = _register(self)

    def hold(self, pw: PackedWeight) -> Self:
        """Take pw's own tensors, not copies; returns itself."""
        for name, tensor in pw.tensors.items():
            setattr(self, name, tensor)
        return self

    def packed(self) -> PackedWeight:
        """The weight as stored, sharing this module's buffers."""
        return PackedWeight(self.layout, {n: self._stored(n) for n in self.layout.tensors()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [n, k] that this module multiplies with."""
        return dequantize(self.packed(), dtype)

    def check(self, name: str) -> None:
        """Raise PackedFormatError, naming layer and tensor, unless the weight is valid."""
        tensors = {key: self._stored(key) for key in self.layout.tensors()}
        check_tensors(self.layout, tensors, name, values=True)

    def product(self, x: Tensor) -> Tensor:
        """x [*b, k] @ W_hat.T -> [*b, n] in x's dtype."""
        if torch.compiler.is_compiling():
            return _packed_linear(x, _prepare_once(self._key), self.layout.n)
        return self.multiply(x)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """dequantize(dtype)[ids], from these rows alone; ids int [*b] -> [*b, k]."""
        if torch.compiler.is_compiling():
            return _packed_rows(ids, self._key, self.layout.k, dtype)
        return self.gather(ids, dtype)

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """`rows`, where nothing is compiled."""
        flat, n = ids.flatten().long(), self.layout.n
        flat = torch.where((flat < 0) & (flat >= -n), flat + n, flat)
        taken = {
            name: self._buffers.rows(name, flat) if name in BY_ROW else self._stored(name)
            for name in self.layout.tensors()
        }
        return dense_rows(self.layout, taken).to(dtype).view(*ids.shape, self.layout.k)

    def multiply(self, x: Tensor) -> Tensor:
        """`product`, where nothing is compiled."""
        prepared = self.prepare()
        return prepared.backend.matmul(x, prepared.form)

    def prepare(self) -> _Prepared:
        """What the chosen backend made of the weight; made now, if it was not before."""
        prepared = self._prepared
        if prepared is None or not prepared.serves(self._buffers, _backend_name):
            prepared = self._settle()
        return prepared

    def _settle(self) -> _Prepared:
        """Prepares if that is needed, and lets go of what the form has too."""
        with self._buffers.lock:  # another thread may be at it
            prepared = self._prepared
            if prepared is None or not prepared.may_serve(self._buffers, _backend_name):
                prepared = self._prepare()
            if self._is_offloaded():
                # the next product has other tensors: neither form nor way back would be used again
                self._prepared = None
                return prepared
            self._prepared = prepared
            prepared.let_go(self._buffers)
            return prepared

    def _is_offloaded(self) -> bool:
        """Whether accelerate brings the buffers anew for every call."""
        hook = getattr(self, "_hf_hook", None)
        return bool(getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False))

    def _prepare(self) -> _Prepared:
        # Kernels index memory by these values: a file that lies must not reach one.
        self.check(type(self).__name__)
        try:
            backend = select(self.layout, self.weight.device, _backend_name)
        except ValueError as error:
            raise UsageError(str(error)) from None
        packed = self.packed()
        form = backend.prepare(packed)
        exact = padding_is_zero(self.layout, packed.tensors)
        rebuilt = {
            name: Rebuilt(packed.tensors[name], rows)
            for name, rows in (planes(backend, form) if exact else {}).items()
        }
        held: dict[str, Tensor | Rebuilt] = {
            name: packed.tensors[name] for name in ("weight", *rebuilt)
        }
        return _Prepared(backend, form, _backend_name, rebuilt, held)

    def forget_prepared(self) -> None:
        """The next forward prepares the buffers again."""
        with self._buffers.lock:  # what another thread prepares now is to be forgotten too
            self._prepared = None

    def _stored(self, name: str) -> Tensor:
        tensor = self._buffers[name]
        assert isinstance(tensor, Tensor)
        return tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never cast, the stored tensors: `.to(bfloat16)` must not round their scales.

        `.to(dtype)`, `.half()` and `.float()` leave integers alone, so fn is shown the float16
        tensors as int16. `.type(dtype)` casts integers too; then only the device is taken over.
        """
        stored = {name: self._stored(name) for name in self.layout.tensors()}
        for name, tensor in stored.items():
            self._buffers[name] = _as_integers(tensor)
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            moved = self._stored(name)
            if moved.dtype != _as_integers(tensor).dtype:
                moved = _as_integers(tensor).to(moved.device)
            self._buffers[name] = moved.view(tensor.dtype)
        self.forget_prepared()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_prepared()

    def __getstate__(self) -> dict[str, Any]:
        # A copy prepares its own buffers; a backend's form need not survive copying or pickling.
        return {**self.__dict__, "_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not isinstance(self._buffers, StoredTensors):
            self._buffers = StoredTensors(self._buffers)
        self._key = _register(self)

    def extra_repr(self) -> str:
        tiers = "+".join(f"{tier.planes}x{tier.columns}" for tier in self.layout.tiers)
        rank = f", rank={self.layout.rank}" if self.layout.rank else ""
        return f"planes x columns={tiers}{rank}, bits={self.layout.bits_per_weight:.3f}"


class PackedLinear(PackedModule):
    """x [*b, k] -> x @ W_hat.T + bias [*b, n], in x's dtype, from the stored bytes.

    Beside those of the packed weight it has a buffer `bias` [n] in the model's dtype, or None.
    """

    bias: Tensor | None

    def __init__(
        self, layout: WeightLayout, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(layout)
        self.in_features, self.out_features = layout.k, layout.n
        self.register_buffer("bias", torch.zeros(layout.n, dtype=dtype) if bias else None)

    @classmethod
    def from_packed(cls, pw: PackedWeight, bias: Tensor | None = None) -> Self:
        """Holds pw's own tensors, not copies, and a copy of `bias` [n]."""
        with torch.device("meta"):
            linear = cls(pw.layout, bias is not None, bias.dtype if bias is not None else None)
        if bias is not None:
            linear.bias = bias.detach().clone()
        return linear.hold(pw)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {super().extra_repr()}"
        )


@dataclass(eq=False)
class _Prepared:
    """What `backend`, chosen when `asked` was asked for, made of a module's buffers.

    rebuilt: by name, the buffers that the form can give back. held: what the module held of these,
    and of `weight`, when this was last looked at.
    """

    backend: Backend
    form: Any
    asked: str
    rebuilt: dict[str, Rebuilt]
    held: dict[str, Tensor | Rebuilt]

    def serves(self, buffers: StoredTensors, asked: str) -> bool:
        """Whether all is as it was."""
        # Identity: accelerate's offloading replaces the buffers without telling the module.
        for name, held in self.held.items():
            if buffers.held(name) is not held:
                return False
        return self.asked == asked

    def may_serve(self, buffers: StoredTensors, asked: str) -> bool:
        """Whether all is as it was, but for buffers that have been read."""
        now = {name: buffers.held(name) for name in self.held}
        return self.asked == asked and all(
            now[name] is held or (name in self.rebuilt and self.rebuilt[name].is_like(now[name]))
            for name, held in self.held.items()
        )

    def let_go(self, buffers: StoredTensors) -> None:
        for name, rebuilt in self.rebuilt.items():
            buffers.let_go(name, rebuilt)
        self.held = {name: buffers.held(name) for name in self.held}


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor


# --- for torch.compile ---------------------------------------------------------------------------

# An operator takes tensors and numbers: it finds its module by a number.
_modules: WeakValueDictionary[int, PackedModule] = WeakValueDictionary()
_keys = itertools.count()


def _register(module: PackedModule) -> int:
    key = next(_keys)
    _modules[key] = module
    return key


@torch.compiler.assume_constant_result
def _prepare_once(key: int) -> int:
    """The key. While a graph is traced the module is prepared: no CUDA graph may record that."""
    _modules[key].prepare()
    return key


@torch.library.custom_op(
    "pbq::packed_linear", mutates_args=(), schema="(Tensor x, int key, int n) -> Tensor"
)
def _packed_linear(x: Tensor, key: int, n: int) -> Tensor:
    """x [*b, k] @ W_hat.T -> [*b, n] by the module `key`."""
    return _modules[key].multiply(x)


@_packed_linear.register_fake
def _(x: Tensor, key: int, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op(
    "pbq::packed_rows",
    mutates_args=(),
    schema="(Tensor ids, int key, int k, ScalarType dtype) -> Tensor",
)
def _packed_rows(ids: Tensor, key: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows [*b, k] of the weight of the module `key`."""
    return _modules[key].gather(ids, dtype)


@_packed_rows.register_fake
def _(ids: Tensor, key: int, k: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


@torch.library.custom_op(
    "pbq::packed_linear_backward", mutates_args=(), schema="(Tensor grad, int key, int k) -> Tensor"
)
def _packed_linear_backward(grad: Tensor, key: int, k: int) -> Tensor:
    """grad [*b, n] @ W_hat -> [*b, k]."""
    return grad @ _modules[key].dequantize(grad.dtype)


@_packed_linear_backward.register_fake
def _(grad: Tensor, key: int, k: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    x, ctx.key, _ = inputs
    ctx.k = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _packed_linear_backward(grad, ctx.key, ctx.k), None, None


_packed_linear.register_autograd(_backward, setup_context=_keep_for_backward)
