"""PackedLinear: the stored bytes survive whatever happens to a module; so does the product."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import pbq_kernels
from pbq import linear as linear_module
from pbq.errors import UsageError
from pbq.linear import PackedLinear, backend_name, set_backend
from pbq_kernels import PackedFormatError, PackedWeight, Tier, reference

N, K = 63, 97


@pytest.fixture
def packed(random_packed: Callable[..., PackedWeight]) -> PackedWeight:
    return random_packed(N, K, column_scale=True, overlay=0.05)


@pytest.fixture
def bias() -> Tensor:
    return torch.linspace(-1, 1, N)


class DoublingBackend:
    """A backend with a form of its own: counts its preparations, doubles the product."""

    name = "doubling"

    def __init__(self) -> None:
        self.prepared = 0

    def why_not(self, layout: pbq_kernels.WeightLayout, device: torch.device) -> str | None:
        return "needs an even n" if layout.n % 2 else None

    def prepare(self, pw: PackedWeight) -> Tensor:
        self.prepared += 1
        return 2 * reference.dequantize(pw)

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        return nn.functional.linear(x, prepared.to(x.dtype))


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Iterator[DoublingBackend]:
    backend = DoublingBackend()
    monkeypatch.setitem(pbq_kernels.BACKENDS, "doubling", backend)
    monkeypatch.setattr(linear_module, "_backend_name", "auto")
    yield backend


def assert_same_bytes(linear: PackedLinear, packed: PackedWeight) -> None:
    held = linear.packed()
    assert held.layout == packed.layout
    for name, tensor in packed.tensors.items():
        assert held.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(held.tensors[name].cpu(), tensor), name


def test_buffers_are_exactly_the_layout(packed: PackedWeight, bias: Tensor) -> None:
    linear = PackedLinear.from_packed(packed, bias)
    assert dict(linear.named_parameters()) == {}
    assert set(linear.state_dict()) == {*packed.layout.tensors(), "bias"}
    assert_same_bytes(linear, packed)
    assert (linear.in_features, linear.out_features) == (K, N)
    assert f"bits={packed.bits_per_weight:.3f}" in repr(linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3)], ids=str)
def test_forward_equals_the_dense_product(
    packed: PackedWeight, bias: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    linear = PackedLinear.from_packed(packed, bias.to(dtype))
    set_backend("reference")
    try:
        y = linear(x)
    finally:
        set_backend("auto")
    dense = nn.functional.linear(x, reference.dequantize(packed, dtype)) + bias.to(dtype)
    assert y.dtype == dtype
    assert torch.equal(y, dense)
    assert torch.equal(linear.dequantize(dtype), reference.dequantize(packed, dtype))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.bfloat16().float(),
        lambda m: m.type(torch.float32),
        lambda m: m.to("cpu", torch.bfloat16),
    ],
)
def test_no_cast_touches_what_is_stored(
    packed: PackedWeight, bias: Tensor, cast: Callable[[nn.Module], nn.Module]
) -> None:
    model = nn.Sequential(PackedLinear.from_packed(packed, bias))
    cast(model)
    assert_same_bytes(model[0], packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_bias_follows_the_model(packed: PackedWeight, bias: Tensor, dtype: torch.dtype) -> None:
    linear = PackedLinear.from_packed(packed, bias).to(dtype)
    assert linear.bias is not None and linear.bias.dtype == dtype


def test_the_callers_bias_is_not_shared(packed: PackedWeight, bias: Tensor) -> None:
    linear = PackedLinear.from_packed(packed, bias)
    bias.zero_()
    assert linear.bias is not None and float(linear.bias[0]) == -1


def test_meta_then_load(packed: PackedWeight, bias: Tensor) -> None:
    with torch.device("meta"):
        linear = PackedLinear(packed.layout, bias=True, dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in linear.state_dict().values())
    assert linear.to(torch.float32).packed().tensors["scale"].dtype == torch.float16
    source = PackedLinear.from_packed(packed, bias)
    linear.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_same_bytes(linear, packed)
    assert torch.equal(linear(torch.ones(K)), source(torch.ones(K)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(
    packed: PackedWeight, copied: Callable[[PackedLinear], PackedLinear]
) -> None:
    linear = PackedLinear.from_packed(packed)
    before = linear(torch.ones(K))
    twin = copied(linear)
    assert torch.equal(twin(torch.ones(K)), before)
    twin.weight.zero_()
    twin.forget_prepared()
    assert not torch.equal(twin(torch.ones(K)), before)
    assert torch.equal(linear(torch.ones(K)), before)


def test_a_backend_prepares_once_and_again_after_a_change(
    random_packed: Callable[..., PackedWeight], doubling: DoublingBackend
) -> None:
    first, second = random_packed(8, 48, seed=1), random_packed(8, 48, seed=2)
    linear, x = PackedLinear.from_packed(first), torch.ones(48)
    plain = linear(x)
    set_backend("doubling")
    assert torch.allclose(linear(x), 2 * plain)
    linear(x)
    assert doubling.prepared == 1
    assert "doubling" not in str(linear.state_dict().keys()) and len(linear.state_dict()) == 4

    linear.load_state_dict(PackedLinear.from_packed(second).state_dict())
    assert torch.equal(linear(x), nn.functional.linear(x, 2 * reference.dequantize(second)))
    assert doubling.prepared == 2
    linear.to(torch.bfloat16)(x)
    assert doubling.prepared == 3
    linear.weight = first.tensors["weight"]
    linear(x)
    assert doubling.prepared == 4


def test_a_backend_asked_for_serves_or_refuses(
    packed: PackedWeight, doubling: DoublingBackend
) -> None:
    set_backend("doubling")
    with pytest.raises(UsageError, match="needs an even n"):
        PackedLinear.from_packed(packed)(torch.ones(K))
    with pytest.raises(ValueError, match="unknown kernel backend 'fastest'"):
        set_backend("fastest")
    assert backend_name() == "doubling"


def test_hostile_values_are_refused_before_any_kernel(
    random_packed: Callable[..., PackedWeight], doubling: DoublingBackend
) -> None:
    set_backend("doubling")
    linear = PackedLinear.from_packed(random_packed(8, 48))
    linear.get_buffer("tier")[0] = 200
    with pytest.raises(PackedFormatError, match="tier: column counts"):
        linear(torch.ones(48))
    with pytest.raises(PackedFormatError, match=r"model\.layers\.3\.tier: column counts"):
        linear.check("model.layers.3")
    assert doubling.prepared == 0


def test_gradients_reach_the_input(packed: PackedWeight) -> None:
    x = torch.ones(2, K, requires_grad=True)
    PackedLinear.from_packed(packed)(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], reference.dequantize(packed).sum(0), atol=1e-5)


def test_a_layer_of_no_bits_still_stores_a_weight(
    random_packed: Callable[..., PackedWeight],
) -> None:
    linear = PackedLinear.from_packed(random_packed(5, 3, (Tier(0, 3, offset=True),)))
    assert linear.weight.shape == (5, 0)
    assert linear(torch.ones(3)).shape == (5,)


# --- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(
    backend: str, packed: PackedWeight, bias: Tensor, compiled_anew: None
) -> None:
    model = nn.Sequential(PackedLinear.from_packed(packed, bias), nn.ReLU())
    graph = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((1, K), (2, 3, K)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(graph(x), model(x))


def test_a_compiled_product_has_a_gradient(packed: PackedWeight, compiled_anew: None) -> None:
    graph = torch.compile(PackedLinear.from_packed(packed), fullgraph=True, backend="aot_eager")
    x = torch.ones(2, K, requires_grad=True)
    graph(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], reference.dequantize(packed).sum(0), atol=1e-5)


def test_tracing_prepares_and_a_compiled_module_still_sees_changes(
    random_packed: Callable[..., PackedWeight], doubling: DoublingBackend, compiled_anew: None
) -> None:
    set_backend("doubling")
    first, second = random_packed(8, 48, seed=1), random_packed(8, 48, seed=2)
    linear, x = PackedLinear.from_packed(first), torch.ones(48)
    graph = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(graph(x), linear(x))
    assert doubling.prepared == 1
    linear.load_state_dict(PackedLinear.from_packed(second).state_dict())
    assert torch.equal(graph(x), nn.functional.linear(x, 2 * reference.dequantize(second)))


def test_the_operator_is_well_formed(packed: PackedWeight) -> None:
    linear = PackedLinear.from_packed(packed)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.library.opcheck(torch.ops.pbq.packed_linear.default, (x, linear._key, N))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_compiles_with_inductor(packed: PackedWeight, bias: Tensor, compiled_anew: None) -> None:
    model = nn.Sequential(PackedLinear.from_packed(packed, bias), nn.ReLU())
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_a_lookup_copies_nothing_to_the_device_twice(
    random_packed: Callable[..., PackedWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph can record no such copy; what it replays has run before."""
    tiers = [Tier(2, 40, tied=True), Tier(2, 23, tied=True, uneven=True, trellis=4)]
    pw = random_packed(65, 63, tiers)
    linear, ids = PackedLinear(pw.layout), torch.tensor([3, 1])
    linear.load_state_dict(pw.tensors)
    with torch.inference_mode():
        first = linear.gather(ids, torch.float32)
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(linear.gather(ids, torch.float32), first)


def test_generates_with_a_static_cache(
    packed_model: Callable[..., PreTrainedModel], compiled_anew: None
) -> None:
    model = packed_model("llama")
    ids = torch.tensor([[257, 10, 20, 30, 40]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
