"""products.c and floats.c: weights decoded to the bit, by the reference; and when they are used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pbq_kernels import PackedWeight, Tier, cpu
from pbq_kernels.cpu import CpuBackend, CpuWeight
from pbq_kernels.reference import dequantize

RandomPacked = Callable[..., PackedWeight]
BFLOAT16 = torch.bfloat16


def trellises(memory: int, *columns: int) -> tuple[Tier, ...]:
    """Tiers of 0, 1, 2, ... stored planes, uneven up to 3, as waterfill makes them."""
    return (
        Tier(0, columns[0]),
        *(
            Tier(planes, c, tied=True, trellis=memory, uneven=planes < 4)
            for planes, c in enumerate(columns[1:], 1)
        ),
    )


# One weight, rows and columns that fill no block, every way to make a level: without planes, tied
# or not, with an offset, more planes than registers hold levels; groups that fill no word.
SHAPES: dict[str, tuple[int, int, tuple[Tier, ...]]] = {
    "one weight": (1, 1, (Tier(1, 1),)),
    "one column": (192, 1, (Tier(4, 1, tied=True, offset=True),)),
    "one row": (1, 577, (Tier(1, 477), Tier(4, 100))),
    "nothing but offsets": (33, 63, (Tier(0, 40), Tier(0, 23, offset=True))),
    "free planes": (65, 320, (Tier(1, 31), Tier(2, 97), Tier(3, 65), Tier(4, 50), Tier(5, 77))),
    "tied planes": (31, 150, tuple(Tier(p, 30, tied=True) for p in (1, 2, 3, 4, 5))),
    "offsets": (40, 160, tuple(Tier(p, 40, offset=True, group_size=33) for p in (1, 2, 3, 4))),
    "many planes": (33, 63, (Tier(8, 33, tied=True, offset=True), Tier(6, 30))),
    "bytes": (
        *(130, 577),
        (
            Tier(8, 500, tied=True, offset=True, group_size=33),
            Tier(2, 37),
            Tier(8, 40, tied=True),
        ),
    ),
    "trellises": (130, 577, trellises(12, 50, 277, 138, 70, 42)),
    "large": (1090, 63, trellises(8, 3, 60)),
}


def prepared(pw: PackedWeight, unit: str) -> CpuWeight:
    """Skips where the machine has no such unit. That of floats.c are registers of AVX2."""
    if unit == "floats":
        backend = CpuBackend("cpu", variant="avx2")
        if reason := backend.why_not(pw.layout, torch.device("cpu")):
            pytest.skip(reason)
        return backend.prepare(pw)
    weight = CpuBackend("cpu").prepare(pw)
    if weight.unit == "none" or (unit, weight.unit) == ("amx", "avx512bf16"):
        pytest.skip(f"this CPU or its library has no {unit}")
    weight.unit = unit
    return weight


def product(x: Tensor, weight: CpuWeight, dtype: torch.dtype | None = None) -> Tensor:
    y = torch.full((len(x), weight.n), torch.nan, dtype=dtype or x.dtype)
    if weight.floats:
        cpu._multiply_as_floats(x, weight, weight.address, y)
    else:
        cpu._multiply_by_unit(x, weight, len(x), y)
    return y


def dtype_of(unit: str) -> torch.dtype:
    """What weights are rounded to, if to anything."""
    return torch.float32 if unit == "floats" else BFLOAT16


def random_x(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["avx512bf16", "amx", "floats"])
def unit(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("column_scale, overlay", [(False, 0.0), (True, 0.0), (False, 0.07)])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_those_of_the_reference_to_the_bit(
    shape: str, column_scale: bool, overlay: float, unit: str, random_packed: RandomPacked
) -> None:
    """x of a single one gives a column of the weight, which y's dtype holds as it is."""
    n, k, tiers = SHAPES[shape]
    if unit == "floats" and overlay:
        pytest.skip("floats.c leaves overlays to others")
    pw = random_packed(n, k, tiers, column_scale=column_scale, overlay=overlay)
    weight, ones = prepared(pw, unit), torch.eye(k, dtype=dtype_of(unit))
    expected = dequantize(pw, dtype_of(unit))
    assert torch.equal(product(ones, weight).T, expected)
    # few tokens for the rows: x is put in the columns' order, not the weight in x's
    some = torch.arange(0, k, 1 + k // 40)
    few = torch.cat([product(row, weight) for row in ones[some].split(max(1, n // 3))])
    assert torch.equal(few.T, expected[:, some])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_sums_of_float32(
    dtype: torch.dtype, shape: str, random_packed: RandomPacked
) -> None:
    n, k, tiers = SHAPES[shape]
    pw = random_packed(n, k, tiers, column_scale=True)
    weight, dense = prepared(pw, "floats"), dequantize(pw).double()
    for m in (1, 2, 3, 4, 5, 6, 7, 50):
        x = random_x(m, k, dtype=dtype)
        exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
        wide = product(x, weight, torch.float32)
        assert ((wide.double() - exact).abs() <= 1e-6 * size).all(), m
        assert torch.equal(product(x, weight), wide.to(dtype)), m


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_rounded_once(shape: str, unit: str, random_packed: RandomPacked) -> None:
    n, k, tiers = SHAPES[shape]
    pw = random_packed(n, k, tiers)
    weight, dense = prepared(pw, unit), dequantize(pw, dtype_of(unit)).double()
    for m in (1, 5, 16, 17, 32, 50):
        x = random_x(m, k)
        exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
        error = (product(x, weight).double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 1e-6 * size).all(), m


def test_more_tokens_than_are_laid_out_at_once(unit: str, random_packed: RandomPacked) -> None:
    pw = random_packed(70, 100, (Tier(2, 100),))
    weight, x = prepared(pw, unit), random_x(2100, 100)
    assert torch.equal(
        product(x, weight), torch.cat([product(part, weight) for part in x.split(300)])
    )


def test_neither_threads_nor_neighbours_change_a_bit(
    unit: str, random_packed: RandomPacked
) -> None:
    weight = prepared(random_packed(1090, 577, trellises(12, 50, 277, 138, 70, 42)), unit)
    x = random_x(100, 577)
    torch.set_num_threads(1)
    alone = torch.cat([product(row, weight) for row in x.split(1)])
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for m in (1, 7, 33, 100):
            assert torch.equal(product(x[:m], weight), alone[:m]), (threads, m)


def test_what_is_not_finite_stays_in_its_row(unit: str, random_packed: RandomPacked) -> None:
    weight = prepared(random_packed(40, 97, (Tier(1, 97),)), unit)
    x = random_x(20, 97)
    x[3, 5], x[7, 96] = torch.inf, torch.nan
    y = product(x, weight)
    broken = torch.zeros(20, dtype=torch.bool)
    broken[[3, 7]] = True
    assert torch.equal(~y.isfinite().any(1), broken) and y[~broken].isfinite().all()


def test_torch_keeps_its_own_tiles(random_packed: RandomPacked) -> None:
    """AMX is configured by each thread: what torch has set must be there when it goes on."""
    weight = prepared(random_packed(64, 96, (Tier(2, 96),)), "amx")
    x, other, matrix = random_x(40, 96), random_x(40, 320), random_x(320, 200)
    y, expected = product(x, weight), other @ matrix
    for _ in range(20):
        assert torch.equal(other @ matrix, expected)
        assert torch.equal(product(x, weight), y)


def test_the_quickest_way_is_chosen(
    random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = CpuBackend("cpu").prepare(random_packed(64, 96, (Tier(1, 50), Tier(4, 46))))
    weight.variant, weight.floats = "avx512vnni", False
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    # of a weight: lookups of 2.44 planes at 135e9 a second, or decoding at 8.5e9 and 480e9
    planes = (50 + 4 * 46) / 96
    from_tokens = (1 / 8.5) / (planes / 135 - 1 / 480)
    weight.unit = "amx"
    chosen = [cpu._by_unit(weight, m, BFLOAT16) for m in range(1, 40)]
    assert chosen == [m >= from_tokens for m in range(1, 40)] and True in chosen
    assert not cpu._by_unit(weight, 4096, torch.float32)
    for m in range(100, 300):
        cpu._by_unit(weight, m, BFLOAT16)
    assert len(weight.by_unit) <= 64
    weight.unit = "none"
    assert not cpu._by_unit(weight, 4096, BFLOAT16)


@pytest.mark.parametrize(
    "mode, by_unit", [("exact", [False, True, True]), ("int8", [False, False, True])]
)
def test_which_products_the_unit_makes(
    mode: str,
    by_unit: list[bool],
    random_packed: RandomPacked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = CpuBackend("cpu", mode)
    weight = backend.prepare(random_packed(64, 96, (Tier(4, 96),)))
    monkeypatch.setattr(cpu, "_by_unit", lambda weight, m, dtype: dtype == BFLOAT16)
    asked: list[int] = []
    monkeypatch.setattr(cpu, "_multiply_by_unit", lambda x, weight, m, y: asked.append(m))
    for m in (4, 31, 32):
        backend.matmul(random_x(m, 96), weight)
        backend.matmul(random_x(m, 96).float(), weight)
    assert asked == [m for m, chosen in zip((4, 31, 32), by_unit, strict=True) if chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("planes", [0, 2, 3, 9])
def test_groups_of_few_planes_may_be_looked_up_beside(
    planes: int, dtype: torch.dtype, random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    pw = random_packed(300, 177, (Tier(0, 9, offset=True), Tier(1, 61), Tier(2, 70), Tier(4, 37)))
    weight, x = prepared(pw, "floats"), random_x(20, 177, dtype=dtype)
    monkeypatch.setattr(cpu, "_least_dense_planes", lambda *_: planes)
    y = cpu._multiply(x, weight, 0)
    exact = x.double() @ dequantize(pw).double().T
    error = float((y.double() - exact).norm() / exact.norm())
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


def test_floats_are_for_many_tokens_of_weights_without_overlay(
    random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = prepared(random_packed(64, 96, (Tier(4, 96),)), "floats")
    other = prepared(random_packed(64, 96, (Tier(4, 96),), overlay=0.05), "floats")
    assert weight.floats and not other.floats
    asked: list[int] = []
    monkeypatch.setattr(cpu, "_multiply_as_floats", lambda x, *_: asked.append(len(x)))
    for m in (1, 4, 16, 100):
        cpu._multiply(torch.zeros(m, 96), weight, 0)
        cpu._multiply(torch.zeros(m, 96), other, 0)
        cpu._multiply(torch.zeros(m, 96), weight, 1)  # int8
    cpu._multiply(torch.zeros(100, 96, dtype=torch.float64), weight, 0)
    assert asked == [16, 100]
