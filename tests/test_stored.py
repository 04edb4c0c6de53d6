"""A packed module in use holds its planes once, and whoever reads its buffers does not notice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pbq_kernels
from pbq import linear as linear_module
from pbq import stored
from pbq.embedding import PackedEmbedding
from pbq.linear import PackedLinear, set_backend
from pbq.stored import StoredTensors, unmap_pages
from pbq_kernels import PackedWeight, Tier, planes, reference
from pbq_kernels.triton_backend import TritonBackend

N, K = 33, 97
MIX = (Tier(1, 50), Tier(3, -1, tied=True, offset=True, group_size=32))
RandomPacked = Callable[..., PackedWeight]


class DecodedTriton(TritonBackend):
    """Triton's form without its kernels, so that it runs anywhere."""

    name = "decoded triton"

    def why_not(self, layout: pbq_kernels.WeightLayout, device: torch.device) -> str | None:
        return "a product" if layout.rank else None

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        rows = self.planes(prepared)["weight"](torch.arange(prepared.n))
        return x.sum(-1, keepdim=True) * rows.sum(1)


@pytest.fixture(params=["cpu", "decoded triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(pbq_kernels.BACKENDS, "decoded triton", DecodedTriton())
    monkeypatch.setattr(linear_module, "_backend_name", request.param)
    layout = pbq_kernels.WeightLayout(1, 1, (Tier(1, 1),))
    reason = pbq_kernels.BACKENDS[request.param].why_not(layout, torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def used(random_packed: RandomPacked, backend: str) -> tuple[PackedLinear, PackedWeight]:
    """A linear after a product, and its weight, of which it shares nothing."""
    packed = random_packed(N, K, MIX, column_scale=True, overlay=0.05)
    linear = PackedLinear.from_packed(copy.deepcopy(packed))
    linear(torch.ones(K))
    return linear, packed


def is_held(linear: nn.Module, name: str = "weight") -> bool:
    assert isinstance(linear._buffers, StoredTensors)
    return isinstance(linear._buffers.held(name), Tensor)


READERS: dict[str, Callable[[PackedLinear], Any]] = {
    "attribute": lambda m: m.weight,
    "get_buffer": lambda m: m.get_buffer("weight"),
    "buffers": lambda m: next(iter(m.buffers())),
    "named_buffers": lambda m: dict(nn.Sequential(m).named_buffers())["0.weight"],
    "state_dict": lambda m: m.state_dict()["weight"],
    "packed": lambda m: m.packed().tensors["weight"],
    "get": lambda m: m._buffers.get("weight"),
    "values": lambda m: next(iter(m._buffers.values())),
    "dict": lambda m: dict(m._buffers)["weight"],
    "unpacking": lambda m: {**m._buffers}["weight"],
    "copied buffers": lambda m: m._buffers.copy()["weight"],
    "pop": lambda m: m._buffers.pop("weight"),
    "deepcopy": lambda m: copy.deepcopy(m).weight,
    "copy": lambda m: copy.copy(m).weight,
    "deepcopy of buffers": lambda m: copy.deepcopy(m._buffers)["weight"],
    "half": lambda m: m.half().weight,
}


@pytest.mark.parametrize("reader", READERS)
def test_the_planes_are_held_once_and_back_when_read(
    reader: str, used: tuple[PackedLinear, PackedWeight]
) -> None:
    linear, packed = used
    assert not is_held(linear)
    assert is_held(linear, "scale") and is_held(linear, "overlay_value")
    assert torch.equal(READERS[reader](linear), packed.tensors["weight"])


def test_what_was_read_goes_again(used: tuple[PackedLinear, PackedWeight]) -> None:
    linear, packed = used
    x = torch.ones(2, K)
    before = linear(x)
    assert torch.equal(linear.dequantize(), reference.dequantize(packed))
    assert is_held(linear)
    form = linear.prepare().form
    assert not is_held(linear) and linear.prepare().form is form
    assert torch.equal(linear(x), before)


def test_what_somebody_holds_stays_the_same_tensor(
    random_packed: RandomPacked, backend: str
) -> None:
    packed = random_packed(N, K, MIX)
    linear = PackedLinear.from_packed(packed)
    linear(torch.ones(K))
    assert linear.weight is packed.tensors["weight"]


@pytest.mark.parametrize("forget", [False, True])
def test_writing_into_a_buffer_that_was_rebuilt(
    forget: bool, used: tuple[PackedLinear, PackedWeight]
) -> None:
    linear, packed = used
    before = linear(torch.ones(K))
    linear.weight.zero_()
    if forget:
        linear.forget_prepared()
    after = linear(torch.ones(K))
    assert not torch.equal(after, before)
    assert not linear.weight.any()
    fresh = PackedLinear.from_packed(
        PackedWeight(packed.layout, {**packed.tensors, "weight": torch.zeros_like(linear.weight)})
    )
    assert torch.equal(fresh(torch.ones(K)), after)


def test_a_buffer_rebuilt_in_inference_mode_can_be_written_into(
    used: tuple[PackedLinear, PackedWeight],
) -> None:
    linear, packed = used
    with torch.inference_mode():
        linear(torch.ones(K))
        linear.state_dict()
    linear.weight.add_(0)
    assert torch.equal(linear.weight, packed.tensors["weight"])


def test_another_backend_begins_with_the_stored_planes(
    used: tuple[PackedLinear, PackedWeight],
) -> None:
    linear, packed = used
    set_backend("reference")  # which keeps them
    dense = nn.functional.linear(torch.ones(K), reference.dequantize(packed))
    assert torch.equal(linear(torch.ones(K)), dense)
    assert is_held(linear)


def test_both_factors_go(random_packed: RandomPacked) -> None:
    packed = random_packed(N, K, MIX, rank=13)
    linear = PackedLinear.from_packed(copy.deepcopy(packed))
    y = linear(torch.ones(K))
    if not planes(linear.prepare().backend, linear.prepare().form):
        pytest.skip("no kernel runs here")
    assert not is_held(linear) and not is_held(linear, "inner_weight")
    assert all(torch.equal(linear.get_buffer(name), t) for name, t in packed.tensors.items())
    assert torch.equal(linear(torch.ones(K)), y)
    assert not is_held(linear) and not is_held(linear, "inner_weight")


@pytest.mark.parametrize("uneven", [False, True])
def test_the_planes_of_a_trellis_go(
    uneven: bool, random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_backend_name", "auto")
    tiers = (Tier(1, 50, tied=True, trellis=12, uneven=uneven), Tier(2, -1, tied=True, trellis=8))
    packed = random_packed(N, K, tiers)
    linear = PackedLinear.from_packed(copy.deepcopy(packed))
    y = linear(torch.ones(K))
    if not planes(linear.prepare().backend, linear.prepare().form):
        pytest.skip("no kernel runs here")
    assert not is_held(linear)
    assert torch.equal(linear.weight, packed.tensors["weight"])
    assert torch.equal(linear(torch.ones(K)), y)


@pytest.mark.parametrize("rank", [0, 13])
def test_planes_with_other_padding_are_kept(
    rank: int, random_packed: RandomPacked, backend: str
) -> None:
    """They are a valid file, which must be written as it was read."""
    packed = random_packed(N, K, MIX, rank=rank)
    name = "inner_weight" if rank else "weight"
    packed.tensors[name][-1, 50 // 8] |= 128
    if rank:
        set_backend("auto")
    linear = PackedLinear.from_packed(packed)
    linear(torch.ones(K))
    assert is_held(linear, name) and is_held(linear)


def test_what_is_read_all_the_time_stays(used: tuple[PackedLinear, PackedWeight]) -> None:
    linear, packed = used
    for _ in range(stored.MOST_REBUILDS):
        linear(torch.ones(K))
        assert not is_held(linear)
        linear.dequantize()
    linear(torch.ones(K))
    assert is_held(linear)
    kept = linear.weight
    linear(torch.ones(K))
    assert linear.weight is kept and torch.equal(kept, packed.tensors["weight"])


def test_rows_are_looked_up_without_the_planes(random_packed: RandomPacked, backend: str) -> None:
    packed = random_packed(N, K, MIX)
    embedding = PackedEmbedding(packed.layout, torch.float32).hold(copy.deepcopy(packed))
    embedding(torch.ones(K))
    ids = torch.tensor([[N - 1, 0], [7, -2]])
    assert torch.equal(embedding(ids), reference.dequantize(packed)[ids])
    assert not is_held(embedding)
    for missing in (N, -N - 1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([missing]))


def test_threads_never_see_half_a_state(used: tuple[PackedLinear, PackedWeight]) -> None:
    linear, packed = used
    x = torch.ones(2, K)
    expected, wrong, ended = linear(x), [], threading.Event()

    def run(act: Callable[[], Tensor], expected: Tensor) -> None:
        while not ended.is_set():
            try:
                if not torch.equal(act(), expected):
                    raise AssertionError("another value")
            except Exception as error:
                wrong.append(error)
                return

    def forget() -> Tensor:
        linear.forget_prepared()
        return linear(x)

    acts = [(lambda: linear(x), expected)] * 2 + [(forget, expected)]
    acts += [(lambda: linear.state_dict()["weight"], packed.tensors["weight"])]
    threads = [threading.Thread(target=run, args=act) for act in acts]
    for thread in threads:
        thread.start()
    ended.wait(0.5)
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_compiled_graph_and_its_gradient(used: tuple[PackedLinear, PackedWeight]) -> None:
    linear, packed = used
    torch.compiler.reset()
    graph = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, K)
    assert torch.equal(graph(x), linear(x))
    assert not is_held(linear)
    x.requires_grad_()
    graph(x).sum().backward()
    expected = reference.dequantize(packed).sum(0).expand(2, K)
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# --- mapped files --------------------------------------------------------------------------------


def resident(tensor: Tensor) -> int:
    """Pages of the tensor in this process's memory."""
    first = tensor.data_ptr() // 4096
    count = (tensor.data_ptr() + tensor.nbytes) // 4096 + 1 - first
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(8 * first)
        entries = torch.frombuffer(bytearray(pagemap.read(8 * count)), dtype=torch.int64)
    return int((entries < 0).sum())


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    """262,144 bytes of a file, read once."""
    if not Path("/proc/self/pagemap").exists():
        pytest.skip("no page map on this system")
    save_file({"weight": torch.arange(2**18).to(torch.uint8)}, tmp_path / "file")
    weight = load_file(tmp_path / "file")["weight"]
    if weight.untyped_storage().resizable():
        pytest.skip("this safetensors copies files")
    assert int(weight.long().sum()) == 2**18 // 256 * 255 * 128
    return weight


def test_pages_of_a_file_leave_memory_and_come_back(mapped: Tensor) -> None:
    before = resident(mapped)
    unmap_pages(mapped)
    assert resident(mapped) <= 2 < 60 < before
    assert torch.equal(mapped, torch.arange(2**18).to(torch.uint8))


def test_pages_that_were_written_into_stay(mapped: Tensor) -> None:
    mapped[100_000] = 7
    before = resident(mapped)
    unmap_pages(mapped)
    assert resident(mapped) == before and mapped[100_000] == 7


def test_memory_of_torchs_own_stays() -> None:
    own = torch.arange(2**18).to(torch.uint8)
    shared = torch.from_numpy(own.numpy().copy())
    for tensor in (own, shared):
        unmap_pages(tensor)
        assert torch.equal(tensor, torch.arange(2**18).to(torch.uint8))
