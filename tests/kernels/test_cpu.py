"""cpu.c: every variant against float64, any thread count, bad input, sanitizers, the library."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pbq_kernels
from pbq_kernels import PackedFormatError, PackedWeight, Tier, WeightLayout, cpu, cpu_build
from pbq_kernels.attention import has_tiles
from pbq_kernels.cpu import CpuBackend, LibraryError, load_library, repack, variants
from pbq_kernels.reference import dequantize
from pbq_kernels.trellis import POLYNOMIALS

RandomPacked = Callable[..., PackedWeight]

NAMES = ["avx512vnni", "avx512", "avx2", "neon", "portable"]
CPU = torch.device("cpu")

# (n, k, tiers): one row, rows beside a tile, a column alone, k that fills no word and no byte,
# groups that divide neither the tier nor a word, tiers of no columns and of no planes.
SHAPES: dict[str, tuple[int, int, tuple[Tier, ...]]] = {
    "one weight": (1, 1, (Tier(1, 1),)),
    "one column": (192, 1, (Tier(4, 1, tied=True, offset=True),)),
    "one row": (1, 577, (Tier(1, 477), Tier(4, 100))),
    "1 bit": (33, 63, (Tier(1, 63),)),
    "nothing but offsets": (33, 63, (Tier(0, 40), Tier(0, 23, offset=True))),
    "1 and 4": (192, 1536, (Tier(1, 1236), Tier(4, 300, tied=True, offset=True))),
    "waterfill": (192, 577, (Tier(0, 31), Tier(1, 400), Tier(2, 0), Tier(2, 97), Tier(4, 49))),
    "groups": (33, 577, (Tier(1, 300, group_size=64), Tier(2, 277, offset=True, group_size=33))),
    "two free planes": (33, 1536, (Tier(2, 1536, offset=True, group_size=128),)),
    "many planes": (33, 63, (Tier(8, 33, tied=True, offset=True), Tier(5, 30))),
    "bytes": (
        130,
        577,
        (
            Tier(8, 500, tied=True, offset=True, group_size=33),
            Tier(2, 20),
            Tier(8, 30, tied=True),
            Tier(8, 27),
        ),
    ),
    "even trellises": (
        130,
        577,
        (
            Tier(1, 460, tied=True, trellis=12),
            Tier(3, 77, tied=True, trellis=8, offset=True, group_size=33),
            Tier(7, 40, tied=True, trellis=2),
        ),
    ),
    "a large tile": (1090, 63, (Tier(1, 50), Tier(3, 13))),
}
TOKENS = (1, 3, 17, 64)


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed library, or one built for these tests."""
    try:
        load_library(cpu.LIBRARY)
        return cpu.LIBRARY
    except LibraryError:
        try:
            return cpu_build.build(tmp_path_factory.mktemp("cpu") / "_cpu.so")
        except cpu_build.BuildError as error:
            pytest.skip(str(error))


@pytest.fixture(autouse=True)
def use(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """use(path): the backend finds its library there, as in a process that has just started."""

    def find_at(path: Path) -> None:
        monkeypatch.setattr(cpu, "LIBRARY", path)
        cpu.compiled.cache_clear()

    find_at(library_path)
    threads = torch.get_num_threads()
    yield find_at
    torch.set_num_threads(threads)
    cpu.compiled.cache_clear()


@pytest.fixture
def library() -> ctypes.CDLL:
    found = cpu.compiled()
    assert isinstance(found, ctypes.CDLL)
    return found


@pytest.fixture(params=NAMES)
def variant(request: pytest.FixtureRequest, library: ctypes.CDLL) -> str:
    if request.param not in variants(library):
        pytest.skip(f"this CPU does not run {request.param}")
    return str(request.param)


def random_x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / (exact.norm() + 1e-12))


def quantized_product(x: Tensor, pw: PackedWeight) -> Tensor:
    """The int8 mode in float64: x rounded per token, tier and group; offsets, and what is held as
    bytes, times x itself.
    """
    layout, order, begin = pw.layout, pw.permutation(), 0
    if layout.column_scale:
        x = x * pw.tensors["column_scale"].float()
    plain = WeightLayout(layout.n, layout.k, layout.tiers, scale_bits=layout.scale_bits)
    stored = {name: pw.tensors[name] for name in plain.tensors()}
    dense = dequantize(PackedWeight(plain, stored)).double()
    if "scale" in stored:
        stored["scale"] = torch.zeros_like(stored["scale"])
    offsets = dequantize(PackedWeight(plain, stored)).double()
    rounded = torch.zeros_like(x)
    for tier in (tier for tier in layout.tiers if tier.columns):
        for group in order[begin : begin + tier.columns].split(
            tier.columns if tier.group_size == -1 else tier.group_size
        ):
            most = x[:, group].abs().amax(1, keepdim=True)
            rounded[:, group] = (x[:, group] * (127 / most)).round() * (most / 127)
            if tier.tied and tier.planes == 8:
                rounded[:, group] = x[:, group]
        begin += tier.columns
    return rounded.double() @ (dense - offsets).T + x.double() @ offsets.T


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_equals_the_reference(variant: str, shape: str, random_packed: RandomPacked) -> None:
    n, k, tiers = SHAPES[shape]
    for column_scale, overlay in ((False, 0.0), (True, 0.05)):
        pw = random_packed(n, k, tiers, column_scale=column_scale, overlay=overlay)
        backend = CpuBackend("cpu", variant=variant)
        weight = backend.prepare(pw)
        dense = dequantize(pw).double()
        for m in TOKENS:
            x = random_x(m, k, seed=m)
            y = backend.matmul(x, weight)
            assert y.shape == (m, n) and y.dtype == x.dtype
            assert relative_error(y, x.double() @ dense.T) < 1e-6, (m, column_scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_equals_its_float64_twin(
    variant: str, shape: str, random_packed: RandomPacked
) -> None:
    n, k, tiers = SHAPES[shape]
    for column_scale in (False, True):
        pw = random_packed(n, k, tiers, column_scale=column_scale)
        backend = CpuBackend("cpu-int8", "int8", variant)
        weight = backend.prepare(pw)
        for m in (1, 3, 17):
            x = random_x(m, k, seed=m)
            expected = quantized_product(x, pw)
            assert relative_error(backend.matmul(x, weight), expected) < 2e-6, (m, column_scale)


def test_int8_rounding_costs_about_one_percent(random_packed: RandomPacked) -> None:
    pw = random_packed(192, 1536, (Tier(1, 1236), Tier(4, 300)))
    x = random_x(64, 1536)
    x[:, pw.permutation()[1236:]] *= 20  # salient columns are those of large x
    backend = CpuBackend("cpu-int8", "int8")
    error = relative_error(
        backend.matmul(x, backend.prepare(pw)), x.double() @ dequantize(pw).double().T
    )
    assert 0.001 < error < 0.015


tiers_of_any_kind = st.builds(
    Tier,
    planes=st.integers(0, 5),
    columns=st.integers(0, 150),
    tied=st.booleans(),
    offset=st.booleans(),
    group_size=st.sampled_from([-1, 1, 7, 31, 32, 64]),
)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.lists(tiers_of_any_kind, min_size=1, max_size=4).filter(
        lambda tiers: any(t.columns for t in tiers)
    ),
    st.integers(1, 6),
)
def test_any_tiers(random_packed: RandomPacked, n: int, tiers: list[Tier], m: int) -> None:
    k = sum(tier.columns for tier in tiers)
    pw = random_packed(n, k, tiers, column_scale=bool(n % 2), overlay=0.1 * (n % 3))
    x = random_x(m, k)
    for name in variants(load_library(cpu.LIBRARY)):
        backend = CpuBackend("cpu", variant=name)
        y = backend.matmul(x, backend.prepare(pw))
        # one output may cancel to nothing, so the error is measured by what was added up
        error = (y.double() - x.double() @ dequantize(pw).double().T).abs()
        assert (error <= 1e-6 * x.abs().sum(1, keepdim=True)).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_x_is_kept(
    variant: str, dtype: torch.dtype, random_packed: RandomPacked
) -> None:
    pw = random_packed(33, 577, (Tier(1, 477), Tier(4, 100)), column_scale=True, overlay=0.02)
    backend = CpuBackend("cpu", variant=variant)
    x = random_x(2, 3, 577).to(dtype)
    y = backend.matmul(x, backend.prepare(pw))
    expected = x.double() @ dequantize(pw).double().T
    assert y.dtype == dtype and y.shape == (2, 3, 33)
    # fp32 sums, so the only error that shows is the last rounding ...
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-6}[dtype]
    # ... but where x has 18 bits in a sum that cancels
    atol = 1e-4 if variant in cpu._SHORT and dtype != torch.float64 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=1.01 * ulp, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("largest", [1, 1000])
def test_sums_lose_less_than_rounding_them_to_16_bits(
    variant: str, dtype: torch.dtype, largest: float, random_packed: RandomPacked
) -> None:
    pw = random_packed(33, 2577, (Tier(1, 2000), Tier(3, 577)))
    weight = CpuBackend("cpu", variant=variant).prepare(pw)
    x = random_x(4, 2577)
    x[:, 5] *= largest
    x, sums = x.to(dtype), torch.empty(4, 33)
    cpu._look_up(x, weight, weight.address, cpu._MODES["exact"], 4, sums)
    error = relative_error(sums, x.double() @ dequantize(pw).double().T)
    assert error < (1e-4 if largest > 1 else 5e-6 if dtype == torch.float16 else 1e-6)


def test_the_largest_x_is_not_rounded_up_to_a_bit_more(
    variant: str, random_packed: RandomPacked
) -> None:
    """Times the column scale all x are 2 - 2**-19; tables of integers have 18 bits for them."""
    pw = random_packed(33, 64, (Tier(1, 64),), column_scale=True)
    column_scale = torch.full_like(pw.tensors["column_scale"], 1023 / 512)
    pw = PackedWeight(pw.layout, {**pw.tensors, "column_scale": column_scale})
    weight = CpuBackend("cpu", variant=variant).prepare(pw)
    x, sums = torch.full((1, 64), 1025 / 1024, dtype=torch.float16), torch.empty(1, 33)
    cpu._look_up(x, weight, weight.address, cpu._MODES["exact"], 1, sums)
    expected = x.double() @ dequantize(pw).double().T
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_neither_threads_nor_neighbours_change_a_bit(
    variant: str, mode: str, random_packed: RandomPacked
) -> None:
    n, k = 1090, 577
    pw = random_packed(n, k, (Tier(1, 400), Tier(2, 177, offset=True, group_size=50)), overlay=0.01)
    backend = CpuBackend("cpu", mode, variant)
    x = random_x(50, k)
    torch.set_num_threads(1)
    weight = backend.prepare(pw)
    alone = torch.cat([backend.matmul(row, weight) for row in x.split(1)])
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        weight = backend.prepare(pw)
        # rows, rows with a shared preparation (5 threads), and tokens (m=50) are shared out
        for m in (1, 2, 7, 50, 7):
            assert torch.equal(backend.matmul(x[:m], weight), alone[:m]), (threads, m)


def test_repeated_rows_of_many_threads_agree(random_packed: RandomPacked) -> None:
    pw = random_packed(2048, 1536, (Tier(1, 1536),))
    backend = CpuBackend("cpu")
    weight, x = backend.prepare(pw), random_x(1, 1536)
    torch.set_num_threads(4)
    first = backend.matmul(x, weight)
    assert all(torch.equal(backend.matmul(x, weight), first) for _ in range(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_reference_to_the_bit(
    variant: str, shape: str, dtype: torch.dtype, random_packed: RandomPacked
) -> None:
    n, k, tiers = SHAPES[shape]
    pw = random_packed(n, k, tiers, column_scale=n == 33)
    torch.set_num_threads(3)
    weight = CpuBackend("cpu", variant=variant).prepare(pw)
    decoded = torch.cat(
        [tile.clone() for _, tile in cpu._decoded_tiles(weight, weight.whole, dtype)]
    )
    assert torch.equal(decoded, dequantize(pw, dtype))


@pytest.mark.parametrize("overlay", [0.0, 0.1])
@pytest.mark.parametrize("planes", [0, 1, 2, 3, 5])
def test_many_tokens_split_by_planes(
    planes: int, overlay: float, random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = (Tier(4, 37), Tier(0, 9, offset=True), Tier(1, 61), Tier(2, 70, group_size=32))
    pw = random_packed(700, 177, tiers, column_scale=True, overlay=overlay)
    backend = CpuBackend("cpu")
    weight, x = backend.prepare(pw), random_x(20, 177)
    monkeypatch.setattr(cpu, "_MOST_LOOKUP_TOKENS", 0)
    monkeypatch.setattr(cpu, "_MOST_LOOKUPS", 0)
    monkeypatch.setattr(cpu, "_least_dense_planes", lambda *_: planes)
    monkeypatch.setattr(cpu, "_by_unit", lambda *_: False)
    exact = x.double() @ dequantize(pw).double().T
    assert relative_error(backend.matmul(x, weight), exact) < 1e-6
    # bf16: the dense part of the weight is rounded, and its product before it is added
    rounded = backend.matmul(x.bfloat16(), weight)
    assert relative_error(rounded, exact) < 2**-7


def test_how_many_planes_are_worth_decoding(
    random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL
) -> None:
    weight = repack(random_packed(32, 64, (Tier(1, 40), Tier(4, 24))), library, 0)
    weight.variant, weight.floats = "avx512vnni", False
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    # 136 bits a row at 135e9 a second; decoded, 64 weights at 95e9 and, shared by m, at 2e9
    assert cpu._nanoseconds(weight, 5, 100, torch.bfloat16) == pytest.approx(32 * 136 / 135)
    assert cpu._nanoseconds(weight, 0, 100, torch.bfloat16) == pytest.approx(
        32 * 64 * (1 / 95 + 1 / 200)
    )
    split = 32 * 40 / 135 + 32 * 24 * (1 / 95 + 1 / 200) + 24 / 0.4 + 32
    assert cpu._nanoseconds(weight, 2, 100, torch.bfloat16) == pytest.approx(split)
    chosen = [cpu._least_dense_planes(weight, m, torch.bfloat16) for m in (8, 64, 4096)]
    assert chosen == [5, 5, 0]
    assert cpu._least_dense_planes(weight, 4096, torch.float64) == 0  # no lookups in float64
    for m in range(100, 300):
        cpu._least_dense_planes(weight, m, torch.bfloat16)
    assert len(weight.choices) <= 64
    assert cpu._nanoseconds(weight, 0, 100, torch.float32) == pytest.approx(
        32 * 64 * (1 / 40 + 1 / 200)
    )
    # float16 goes by way of float32, and bfloat16 where the CPU cannot multiply it
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    for dtype in (torch.float16, torch.bfloat16):
        assert cpu._nanoseconds(weight, 0, 100, dtype) == pytest.approx(
            32 * 64 * (1 / 40 + 1 / 200)
        )
    weight.variant, weight.floats = "avx2", True
    dense = 32 * 24 * (1 / 41 + 1 / 400)
    for dtype, rate in ((torch.float32, 48), (torch.float16, 1.2 * 48)):
        split = 32 * 40 / rate + dense
        assert cpu._nanoseconds(weight, 2, 100, dtype) == pytest.approx(split)


def test_few_multiplications_are_looked_up(
    random_packed: RandomPacked, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = repack(random_packed(256, 256, (Tier(2, 256),)), library, 0)
    weight.floats = False
    asked: list[int] = []
    monkeypatch.setattr(cpu, "_multiply_many", lambda x, weight, y: asked.append(len(x)))
    for m in (31, 32, 2048, 2049):  # 2048 tokens are 2**27 multiplications
        cpu._multiply(torch.zeros(m, 256), weight, 0)
    assert asked == [2049]


def test_many_overlay_entries_are_worth_decoding(random_packed: RandomPacked) -> None:
    few, many = (
        CpuBackend("cpu").prepare(random_packed(256, 512, (Tier(1, 512),), overlay=share))
        for share in (0.002, 0.1)
    )
    assert few.overlay_tokens > 100 and 5 < many.overlay_tokens < 30
    assert cpu._least_dense_planes(few, 64, torch.bfloat16) > 0
    assert cpu._least_dense_planes(many, 1, torch.bfloat16) > 0
    assert cpu._least_dense_planes(many, 64, torch.bfloat16) == 0


def test_the_gradient_of_x(random_packed: RandomPacked) -> None:
    pw = random_packed(300, 97, column_scale=True, overlay=0.05)
    backend = CpuBackend("cpu")
    weight, x = backend.prepare(pw), random_x(2, 3, 97).requires_grad_()
    y = backend.matmul(x, weight)
    grad = random_x(2, 3, 300, seed=1)
    y.backward(grad)
    assert x.grad is not None
    assert relative_error(x.grad, grad.double() @ dequantize(pw).double()) < 1e-6
    with torch.no_grad():
        assert not backend.matmul(x, weight).requires_grad


def test_a_view_and_no_tokens(random_packed: RandomPacked) -> None:
    pw = random_packed(33, 97)
    backend = CpuBackend("cpu")
    weight, wide = backend.prepare(pw), random_x(4, 2 * 97)
    assert torch.equal(
        backend.matmul(wide[:, ::2], weight), backend.matmul(wide[:, ::2].contiguous(), weight)
    )
    assert backend.matmul(wide[:0, ::2], weight).shape == (0, 33)
    assert backend.matmul(wide[0, ::2], weight).shape == (33,)


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(
    variant: str, mode: str, bad: float, random_packed: RandomPacked
) -> None:
    pw = random_packed(33, 577, (Tier(1, 477), Tier(4, 100)))
    backend = CpuBackend("cpu", mode, variant)
    weight, x = backend.prepare(pw), random_x(5, 577)
    clean = backend.matmul(x, weight)
    x[2, 70] = bad
    y = backend.matmul(x, weight)
    assert not torch.isfinite(y[2]).any()
    rest = [0, 1, 3, 4]
    assert torch.equal(y[rest], clean[rest])


def mixed(memory: int, uneven: bool, *columns: int) -> tuple[Tier, ...]:
    """So many columns at 0, 1, ... stored planes, as the default method has them."""
    return tuple(
        Tier(p, c, tied=True, trellis=memory, uneven=uneven and p < 4) if p else Tier(p, c)
        for p, c in enumerate(columns)
    )


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("n", [1, 3, 33, 63, 64, 65, 130])
def test_a_trellis_is_its_plain_form_to_the_bit(
    variant: str, mode: str, uneven: bool, n: int, random_packed: RandomPacked
) -> None:
    """More words than are made at once, too; memories in turn."""
    backend = CpuBackend("cpu", mode, variant)
    for memory in POLYNOMIALS:
        grouped = Tier(2, 65, tied=True, offset=True, group_size=33, trellis=memory, uneven=uneven)
        tiers = (*mixed(memory, uneven, 9, 1030, 77, 95, 35), grouped, Tier(2, 40))
        pw = random_packed(n, sum(t.columns for t in tiers), tiers, overlay=0.01, seed=memory)
        native, plain = backend.prepare(pw), backend.prepare(pw.plain())
        assert torch.equal(native.stored_rows(torch.arange(n)), pw.tensors["weight"])
        x = random_x(40, pw.layout.k)
        for threads, m in ((1, 1), (2, 3), (2, 40)):
            torch.set_num_threads(threads)
            y = backend.matmul(x[:m], native)
            assert torch.equal(y, backend.matmul(x[:m], plain)), (memory, m)


@pytest.mark.parametrize("planes", [0, 2, 3, 4])
def test_parts_of_a_weight_with_trellises(
    planes: int, variant: str, random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some groups are looked up and the others decoded."""
    pw = random_packed(700, 177, mixed(12, True, 9, 61, 37, 40, 30), column_scale=True, overlay=0.1)
    backend, x = CpuBackend("cpu", variant=variant), random_x(20, 177)
    monkeypatch.setattr(cpu, "_MOST_LOOKUP_TOKENS", 0)
    monkeypatch.setattr(cpu, "_MOST_LOOKUPS", 0)
    monkeypatch.setattr(cpu, "_least_dense_planes", lambda *_: planes)
    monkeypatch.setattr(cpu, "_by_unit", lambda *_: False)
    for dtype in (torch.float32, torch.bfloat16):
        native, plain = (
            backend.matmul(x.to(dtype), backend.prepare(form)) for form in (pw, pw.plain())
        )
        assert torch.equal(native, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", POLYNOMIALS)
def test_a_decoded_trellis_is_the_reference_to_the_bit(
    memory: int, dtype: torch.dtype, variant: str, random_packed: RandomPacked
) -> None:
    pw = random_packed(130, 577, mixed(memory, True, 31, 333, 77, 95, 41))
    weight = CpuBackend("cpu", variant=variant).prepare(pw)
    tiles = cpu._decoded_tiles(weight, weight.whole, dtype)
    assert torch.equal(torch.cat([tile.clone() for _, tile in tiles]), dequantize(pw, dtype))


@pytest.mark.parametrize(
    "n, k, tiers, most",
    [
        (1024, 4096, (Tier(1, 3360), Tier(4, 736)), 1.02),
        (2048, 2048, mixed(12, True, 184, 984, 491, 246, 143), 1.06),
        # five tiers of this few columns leave more of their last words empty
        (576, 1536, mixed(12, True, 138, 738, 369, 184, 107), 1.11),
    ],
)
def test_a_repacked_weight_is_hardly_larger_than_the_stored_one(
    n: int, k: int, tiers: tuple[Tier, ...], most: float, random_packed: RandomPacked
) -> None:
    pw = random_packed(n, k, tiers)
    weight = select_cpu(pw).prepare(pw)
    held = weight.data.nbytes + weight.scale.nbytes + weight.column.nbytes
    assert held < most * pw.stored_bits / 8


def select_cpu(pw: PackedWeight) -> CpuBackend:
    """What is chosen: the backend itself, whatever the tiers."""
    backend = pbq_kernels.select(pw.layout, CPU, "cpu")
    assert isinstance(backend, CpuBackend)
    return backend


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stored_rows_come_back(
    shape: str, variant: str, random_packed: RandomPacked, library: ctypes.CDLL
) -> None:
    n, k, tiers = SHAPES[shape]
    pw = random_packed(n, k, tiers, column_scale=True, overlay=0.05 if n * k > 1 else 0.0)
    weight, stored = repack(pw, library, variants(library).index(variant)), pw.tensors["weight"]
    assert torch.equal(weight.stored_rows(torch.arange(n)), stored)
    some = torch.tensor([n - 1, 0, n // 2, 0])[::2]
    assert torch.equal(weight.stored_rows(some), stored[some])
    for row in (-1, n):
        with pytest.raises(IndexError, match=f"one of the {n} "):
            weight.stored_rows(torch.tensor([0, row]))


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 96), ValueError, r"x has shape \(2, 96\); the weight has 97 columns"),
        (torch.zeros(97, 2), ValueError, "the weight has 97 columns"),
        (torch.tensor(1.0), ValueError, "the weight has 97 columns"),
        (torch.zeros(2, 97, dtype=torch.int64), TypeError, "x is torch.int64 on cpu"),
        (torch.zeros(2, 97, device="meta"), TypeError, "x is torch.float32 on meta"),
    ],
)
def test_an_x_that_does_not_fit(
    x: Tensor, error: type[Exception], message: str, random_packed: RandomPacked
) -> None:
    backend = CpuBackend("cpu")
    weight = backend.prepare(random_packed(33, 97))
    with pytest.raises(error, match=message):
        backend.matmul(x, weight)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tier", 200), ("scale", math.nan), ("offset", math.inf), ("overlay_count", 98)],
)
def test_a_damaged_weight(
    name: str, value: float, random_packed: RandomPacked, library: ctypes.CDLL
) -> None:
    pw = random_packed(33, 97, overlay=0.05)
    damaged = {key: tensor.clone() for key, tensor in pw.tensors.items()}
    damaged[name].view(-1)[0] = value
    with pytest.raises(PackedFormatError, match=name):
        repack(PackedWeight(pw.layout, damaged), library, 0)


def test_sizes_that_lie_never_reach_the_kernel(random_packed: RandomPacked) -> None:
    pw = random_packed(33, 97)
    for name, tensor in pw.tensors.items():
        with pytest.raises(PackedFormatError, match=name):
            PackedWeight(pw.layout, {**pw.tensors, name: tensor[:-1]})


def test_why_not() -> None:
    layout = WeightLayout(4, 8, (Tier(1, 8),))
    assert CpuBackend("cpu").why_not(layout, CPU) is None
    assert "the weight is on cuda" in str(CpuBackend("cpu").why_not(layout, torch.device("cuda")))
    unknown = CpuBackend("cpu", variant="mmx")
    assert unknown.why_not(layout, CPU) == "this CPU does not run the mmx variant"
    wide = WeightLayout(1, 2**23, (Tier(1, 2**23),))
    assert "overflow" in str(CpuBackend("cpu-int8", "int8").why_not(wide, CPU))
    assert CpuBackend("cpu").why_not(wide, CPU) is None


def test_auto_is_exact(random_packed: RandomPacked) -> None:
    layout = WeightLayout(4, 8, (Tier(1, 8),))
    assert pbq_kernels.select(layout, CPU).name == "cpu"
    assert pbq_kernels.select(layout, CPU, "cpu-int8").name == "cpu-int8"
    pw, x = random_packed(33, 97), random_x(2, 97)
    exact, rounded = (pbq_kernels.dequant_matmul(x, pw, name) for name in ("auto", "cpu-int8"))
    assert relative_error(exact, x.double() @ dequantize(pw).double().T) < 1e-6
    assert 1e-4 < relative_error(rounded, exact.double()) < 0.02


# --- the library -------------------------------------------------------------------------------


def test_without_a_library_the_reference_runs_and_that_is_said_once(
    use: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(tmp_path / "_cpu.so")
    layout = WeightLayout(4, 8, (Tier(1, 8),))
    with caplog.at_level(logging.WARNING, logger="pbq_kernels"):
        assert {pbq_kernels.select(layout, CPU).name for _ in range(3)} == {"reference"}
    assert len(caplog.messages) == 1
    assert "are missing" in caplog.text and "python -m pbq_kernels.cpu_build" in caplog.text
    with pytest.raises(ValueError, match=r"'cpu' cannot be used here: .* are missing"):
        pbq_kernels.select(layout, CPU, "cpu")


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="do not load"):
        load_library(broken)


def test_a_library_of_another_source(
    library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = tmp_path / "cpu.c"
    edited.write_bytes(cpu_build.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(cpu_build, "SOURCES", {edited: ()})
    with pytest.raises(LibraryError, match="built from other sources"):
        load_library(library_path)


def test_an_older_library_that_lacks_functions(tmp_path: Path) -> None:
    try:
        compiler = cpu_build.compiler()
    except cpu_build.BuildError as error:
        pytest.skip(str(error))
    source, library = tmp_path / "old.c", tmp_path / "_cpu.so"
    source.write_text('const char *pbq_source_hash(void) { return "older"; }\n')
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(LibraryError, match="built from other sources"):
        load_library(library)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cpu_build.BuildError, match="no C compiler was found"):
        cpu_build.build(tmp_path / "_cpu.so")
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(cpu_build.BuildError, match="does not run"):
        cpu_build.build(tmp_path / "_cpu.so")
    assert list(tmp_path.iterdir()) == []


def test_the_build_command(tmp_path: Path) -> None:
    command = [sys.executable, str(cpu_build.SOURCE.with_name("cpu_build.py"))]
    environment = {**os.environ, "CC": str(tmp_path / "cc")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("pbq_kernels: the C compiler ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_loading_brings_no_second_openmp_runtime(library_path: Path, tmp_path: Path) -> None:
    def runtimes() -> set[str]:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return {path for path in mapped if re.match(r"lib(g|i)?omp", Path(path).name)}

    copied = tmp_path / "_copy.so"
    shutil.copyfile(library_path, copied)
    before = runtimes()
    load_library(copied)
    assert runtimes() == before and before


def with_products(source: Path) -> list[str]:
    """What a program of the sanitizer is made of: it includes the file that it tests."""
    products = [str(cpu_build.SOURCE.with_name(name)) for name in ("products.c", "floats.c")]
    return [str(source), *(products if source.stem == "cpu_sanitize" else [])]


def skip_without(command: list[str], folder: Path) -> None:
    """Where this compiler makes no program of nothing."""
    empty = folder / "empty.c"
    empty.write_text("#include <math.h>\nint main(void) { return 0; }\n")
    built = subprocess.run(
        [*command, str(empty), "-o", str(folder / "empty")], capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"{command[0]} cannot: {built.stderr.splitlines()[:1]}")


@pytest.mark.parametrize(
    "name, least",
    [
        *(("cpu", 100), ("levels", 20), ("trellis", 60), ("divergence", 20)),
        ("attention", 15 * has_tiles()),
    ],
)
def test_sanitizers(tmp_path: Path, name: str, least: int) -> None:
    """The kernels over exactly sized buffers, built with -fsanitize=address,undefined."""
    try:
        compiler = cpu_build.compiler()
    except cpu_build.BuildError as error:
        pytest.skip(str(error))
    flags = "-g1 -Og -std=gnu11 -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all"
    command = [*compiler, *flags.split()]
    skip_without(command, tmp_path)
    program = tmp_path / f"{name}_sanitize"
    source = Path(__file__).with_name(f"{name}_sanitize.c")
    folder = f"-I{cpu_build.SOURCE.parent}"
    subprocess.run(
        [*command, folder, *with_products(source), "-o", str(program), "-lm"], check=True
    )
    # waiting threads must not spin where the tests share two cores
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= least  # of each variant


# neon and portable; what has one variant there
@pytest.mark.parametrize(
    "name, cases", [("cpu", 2 * 100), ("levels", 20), ("trellis", 540), ("divergence", 20)]
)
def test_arm_under_emulation(tmp_path: Path, name: str, cases: int) -> None:
    """The same cases on an emulated ARM CPU, with the flags of the wheel."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
    own = cpu_build.SOURCES[cpu_build.SOURCE.with_name(f"{name}.c")]
    command = [compiler, *cpu_build.FLAGS, *own, "-fopenmp", "-static"]
    skip_without(command, tmp_path)
    program = tmp_path / f"{name}_arm"
    source, folder = Path(__file__).with_name(f"{name}_sanitize.c"), f"-I{cpu_build.SOURCE.parent}"
    subprocess.run(
        [*command, folder, *with_products(source), "-o", str(program), "-lm"], check=True
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([emulator, str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) == cases
