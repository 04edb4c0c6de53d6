"""Trellis-coded tiers: the code, the search against brute force and torch, what kernels get."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pbq_kernels
from pbq_kernels import BACKENDS, dequant_matmul, paths, select
from pbq_kernels.layout import (
    PackedFormatError,
    PackedWeight,
    Tier,
    WeightLayout,
    padding_is_zero,
    stored_planes,
)
from pbq_kernels.paths import (
    nearest_path,
    nearest_path_naive,
    nearest_paths_in_turn,
    nearest_paths_in_turn_naive,
)
from pbq_kernels.reference import dequantize
from pbq_kernels.scales import encoded_scales
from pbq_kernels.trellis import (
    POLYNOMIALS,
    WEIGHTS,
    level_codes,
    plane_weights,
    stored_codes,
    sums,
)

MEMORIES = sorted(POLYNOMIALS)
needs_compiler = pytest.mark.skipif(paths.compiled() is None, reason="no compiled CPU kernels")


@pytest.fixture
def use() -> Iterator[Callable[[int], str | None]]:
    """use(i): the i-th of the compiled variants searches, fastest first. Its name, or None."""
    library = paths.compiled()
    assert library is not None
    library.pbq_trellis_use.restype = ctypes.c_char_p

    def use_variant(index: int) -> str | None:
        name = library.pbq_trellis_use(index)
        return name.decode() if name else None

    yield use_variant
    use_variant(0)


def levels(codes: Tensor, scale: Tensor, planes: int, uneven: bool = False) -> Tensor:
    """Plane after plane."""
    found = torch.zeros(codes.shape)
    for p, weight in enumerate(plane_weights(planes, uneven)):
        found += weight * (2.0 * (codes >> p & 1) - 1)
    return found * scale


def error(x: Tensor, codes: Tensor, scale: Tensor, planes: int, uneven: bool = False) -> Tensor:
    return (levels(codes, scale, planes, uneven) - x).pow(2).sum(1)


def test_the_code_by_hand() -> None:
    """Memory 2: plane 0 is the path a row ago, plane 1 the path now plus the path two rows ago."""
    path = torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)[:, None]
    assert level_codes(path, 2)[:, 0].tolist() == [2, 1, 0, 3, 3]
    # the other stored planes are planes of the levels as they are
    assert level_codes(path | 2, 2)[:, 0].tolist() == [6, 5, 4, 7, 7]


def test_uneven_levels_by_hand() -> None:
    """Planes of 2 and 3: -5, -1, 1 and 5 are planes 00, 01, 10 and 11, as evenly spaced ones are.

    Planes of 13, 21 and 27: -61 -35 -19 -7 7 19 35 61; 7 = -13 - 21 + 27 - ... is 13 + 21 - 27.
    """
    assert sums(2, True) == ((-5, 0), (-1, 1), (1, 2), (5, 3))
    levels, planes = zip(*sums(3, True), strict=True)
    assert levels == (-61, -35, -19, -7, 7, 19, 35, 61)
    assert planes == (0b000, 0b001, 0b010, 0b100, 0b011, 0b101, 0b110, 0b111)
    path = torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)[:, None]
    assert level_codes(path, 2, 3)[:, 0].tolist() == [0b010, 0b001, 0b000, 0b100, 0b100]


@pytest.mark.parametrize("planes", [2, 3, 4, 5])
def test_evenly_spaced_levels_are_the_codes_themselves(planes: int) -> None:
    every = [(2 * code - (2**planes - 1), code) for code in range(2**planes)]
    assert list(sums(planes, False)) == every


@pytest.mark.parametrize("planes", sorted(WEIGHTS))
def test_no_two_uneven_levels_are_alike_and_all_are_exact_in_float16(planes: int) -> None:
    found = [level for level, _ in sums(planes, True)]
    assert len(set(found)) == 2**planes and found == [-level for level in reversed(found)]
    # six significant bits of a scale times five of a plane's weight
    assert max(WEIGHTS[planes]) < 32


@pytest.mark.parametrize(
    "uneven, W",
    [
        (False, [[1, -3], [-1.03125, 1.03125], [-6, 6], [0, 0]]),
        (True, [[1, -5], [-1.03125, 1.03125], [-10, 10], [0, 0]]),
    ],
)
def test_the_examples_of_the_format(uneven: bool, W: list[list[float]]) -> None:
    """docs/format.md: a path of memory 2 on scales in a byte."""
    layout = WeightLayout(4, 2, (Tier(1, 2, tied=True, trellis=2, uneven=uneven),), scale_bits=8)
    tensors = {
        "weight": torch.tensor([[1], [2], [3], [1]], dtype=torch.uint8),
        "scale": torch.tensor([[0x20], [0x21], [0x40], [0]], dtype=torch.uint8),
        "scale_exponent": torch.tensor([-6], dtype=torch.int8),
    }
    assert dequantize(PackedWeight(layout, tensors)).tolist() == W


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(MEMORIES),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_stored_and_level_codes_are_inverse(
    memory: int, n: int, c: int, planes: int, uneven: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(2**planes, (n, c), generator=generator).to(torch.uint8)
    of_uneven = planes + 1 if uneven and planes + 1 in WEIGHTS else 0
    codes = level_codes(stored, memory, of_uneven)
    assert int(codes.max()) < 2 ** (planes + 1)
    assert torch.equal(stored_codes(codes, memory, of_uneven), stored)


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_is_no_path_is_refused(memory: int) -> None:
    codes = level_codes(torch.ones(20, 3, dtype=torch.uint8), memory)
    codes[9, 1] ^= 1
    with pytest.raises(ValueError, match="no path"):
        stored_codes(codes, memory)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("search", [nearest_path_naive, nearest_path])
def test_the_path_found_is_the_nearest_of_all(
    search: Callable[[Tensor, Tensor, int, int, bool], Tensor], memory: int
) -> None:
    torch.manual_seed(memory)
    x, scale = torch.randn(5, 9), torch.rand(9) * 0.5 + 0.1
    paths = torch.tensor(list(itertools.product((0, 1), repeat=9)), dtype=torch.uint8)
    for uneven in (False, True):
        every = level_codes(paths.T, memory, 2 * uneven).T  # [512, 9]
        least = torch.stack([error(row, every, scale, 2, uneven).min() for row in x])
        found = search(x, scale, 2, memory, uneven)
        torch.testing.assert_close(error(x, found, scale, 2, uneven), least)
        stored_codes(found.T.contiguous(), memory, 2 * uneven)  # a path


@needs_compiler
@pytest.mark.parametrize("c, n", [(1, 1), (1, 2), (3, 33), (17, 5), (16, 64), (40, 130)])
@pytest.mark.parametrize("planes", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("memory", MEMORIES)
def test_compiled_search_finds_what_torch_finds(memory: int, planes: int, c: int, n: int) -> None:
    torch.manual_seed(7)
    x, scale = torch.randn(c, n), torch.rand(n) * 0.3 + 0.02
    found = nearest_path(x, scale, planes, memory)
    slow = nearest_path_naive(x, scale, planes, memory)
    # two paths may be equally near but for the last bit
    torch.testing.assert_close(error(x, found, scale, planes), error(x, slow, scale, planes))
    assert (found != slow).float().mean() < 0.01
    # what stands beside a column does not change it
    assert torch.equal(nearest_path(x[c // 2 :][:1], scale, planes, memory)[0], found[c // 2])
    if planes in WEIGHTS:
        found, slow = (
            f(x, scale, planes, memory, True) for f in (nearest_path, nearest_path_naive)
        )
        torch.testing.assert_close(
            error(x, found, scale, planes, True), error(x, slow, scale, planes, True)
        )
        assert (found != slow).float().mean() < 0.01


def awkward(kind: str, c: int, n: int) -> tuple[Tensor, Tensor]:
    """x [c, n], scale [n]."""
    generator = torch.Generator().manual_seed(n)
    x, scale = torch.randn(c, n, generator=generator), torch.full((n,), 0.4)
    if kind == "random":
        scale = torch.rand(n, generator=generator) * 0.3 + 0.02
    elif kind == "all zero":  # labels cost the same two by two
        x.zero_()
    elif kind == "ties":  # between codes, between labels and between paths
        x, scale = (x * 4).round() / 2, torch.full((n,), 0.5)
    elif kind == "scales of zero":
        scale[::3] = 0
    elif kind == "huge":
        x, scale = x * 1e30, torch.full((n,), 1e25)
    return x, scale


@needs_compiler
@pytest.mark.parametrize("kind", ["random", "all zero", "ties", "scales of zero", "huge"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_variant_finds_the_same_path(
    memory: int, kind: str, use: Callable[[int], str | None]
) -> None:
    """So a seed gives the same file on every machine."""
    variants = [name for i in range(4) if (name := use(i))]
    assert variants[-1] == "plain"
    for planes, n in [(2, 1), (3, 2), (2, 13), (4, 33), (2, 200)]:
        x, scale = awkward(kind, 3, n)
        found = []
        for i in range(len(variants)):
            use(i)
            found.append(nearest_path(x, scale, planes, memory))
            assert torch.equal(found[i], found[0]), (variants[i], planes, n)
        stored_codes(found[0].T.contiguous(), memory)  # a path
        if kind != "huge" and n < 50:
            slow = nearest_path_naive(x, scale, planes, memory)
            torch.testing.assert_close(
                error(x, found[0], scale, planes), error(x, slow, scale, planes)
            )


InTurn = Callable[[Tensor, Tensor, Tensor | None, Tensor, int, int, bool], Tensor]


def check_in_turn(find: InTurn, c: int, n: int, uneven: bool, started: bool) -> None:
    """Every column is rounded to its nearest path once what those before it leave is made up for.

    Whatever the order of the sums: a last bit may turn a path and with it all columns behind.
    """
    generator = torch.Generator().manual_seed(c + n)
    x, start = torch.randn(2, c, n, generator=generator)
    A, scale = torch.randn(c, c, generator=generator) / c**0.5, torch.rand(n) * 0.3 + 0.02
    scale = scale / 8 if uneven else scale
    columns = x.T.contiguous().T  # as it may lie in memory
    codes = find(columns, A, start if started else None, scale, 3, 4, uneven)
    left = levels(codes, scale, 3, uneven) - (start if started else columns)
    expected = x.double() - torch.triu(A, 1).double().T @ left.double()
    torch.testing.assert_close(columns.double(), expected, atol=1e-5, rtol=1e-5)
    nearest = nearest_path_naive(columns, scale, 3, 4, uneven)
    torch.testing.assert_close(
        error(columns, codes, scale, 3, uneven), error(columns, nearest, scale, 3, uneven)
    )
    stored_codes(codes.T.contiguous(), 4, 3 * uneven)  # paths


IN_TURN = pytest.mark.parametrize("c, n", [(1, 1), (2, 3), (5, 63), (9, 64), (17, 130)])


@needs_compiler
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
@IN_TURN
def test_columns_in_turn(
    c: int, n: int, uneven: bool, started: bool, use: Callable[[int], str | None]
) -> None:
    variants = 0
    while use(variants):
        check_in_turn(nearest_paths_in_turn, c, n, uneven, started)
        variants += 1
    assert variants


@pytest.mark.parametrize("started", [False, True])
@IN_TURN
def test_columns_in_turn_in_torch(c: int, n: int, started: bool) -> None:
    check_in_turn(nearest_paths_in_turn_naive, c, n, started, started)


def test_polynomials_are_what_the_compiled_search_needs() -> None:
    for memory, (h1, h0) in POLYNOMIALS.items():
        assert h1 & 1 and h1 >> memory == 1
        assert not h0 & 1 and not h0 >> memory
        assert memory < 16  # EDGE of cpu.c, which reads so many rows above a tile


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_wild_numbers_leave_a_path(value: float) -> None:
    x = torch.randn(4, 50)
    x[1, 7] = value
    found = nearest_path(x, torch.full((50,), 0.3), 2, 4)
    stored_codes(found.T.contiguous(), 4)
    assert torch.equal(found[0], nearest_path(x[:1], torch.full((50,), 0.3), 2, 4)[0])


def test_rows_of_scale_zero_cost_nothing() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(3, 30), torch.full((30,), 0.4)
    scale[::3] = 0
    found, slow = (f(x, scale, 2, 4) for f in (nearest_path, nearest_path_naive))
    torch.testing.assert_close(error(x, found, scale, 2), error(x, slow, scale, 2))


@pytest.mark.parametrize("planes, plain", [(2, 0.3634), (3, 0.1188)])
def test_a_gaussian_loses_a_sixth_to_a_fifth_less(planes: int, plain: float) -> None:
    """Marcellin and Fischer 1990, table II: 4.99 dB at 1 bit for 4 states, against 4.40."""
    torch.manual_seed(0)
    x, half = torch.randn(200, 500), {2: 0.4, 3: 0.255}[planes]
    scale = torch.full((500,), half)
    left = [error(x, nearest_path(x, scale, planes, m), scale, planes).mean() / 500 for m in (2, 8)]
    assert left[0] < 0.88 * plain
    assert left[1] < 0.8 * plain


@needs_compiler
@pytest.mark.parametrize(
    "planes, start, share", [(2, 0.2464, 0.995), (3, 0.0309, 0.92), (4, 0.0275, 0.82)]
)
def test_a_gaussian_loses_less_on_uneven_levels(planes: int, start: float, share: float) -> None:
    torch.manual_seed(0)
    x, half = torch.randn(200, 500), {2: 0.395, 3: 0.25, 4: 0.147}[planes]
    even, uneven = (torch.full((500,), s) for s in (half, start))
    left = [
        error(x, nearest_path(x, scale, planes, 8, u), scale, planes, u).sum()
        for scale, u in ((even, False), (uneven, True))
    ]
    assert left[1] < share * left[0]


@needs_compiler
def test_more_states_leave_less() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(100, 600), torch.full((600,), 0.4)
    left = [
        float(error(x, nearest_path(x, scale, 2, m), scale, 2).mean()) / 600
        for m in sorted(POLYNOMIALS)
    ]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.985 * left[-3]


def packed(n: int, k: int, memory: int, uneven: bool = False) -> PackedWeight:
    """Tiers of 0, 1, 2 and 3 stored planes, two of them with a trellis; uneven: scales in bytes."""
    a, b, c = k // 4, k // 3, k // 5
    tiers = (
        Tier(0, a),
        Tier(1, b, tied=True, trellis=memory, uneven=uneven),
        Tier(2, c, tied=True, offset=True, trellis=memory, uneven=uneven),
        Tier(3, k - a - b - c, tied=True),
    )
    layout = WeightLayout(n, k, tiers, scale_bits=8 if uneven else 16)
    generator = torch.Generator().manual_seed(n * k)
    tier_of = torch.arange(4).repeat_interleave(torch.tensor([t.columns for t in tiers]))
    tensors = {
        "weight": torch.randint(256, (n, layout.row_bytes), generator=generator).byte(),
        "scale": torch.rand(n, 3, generator=generator).half() + 0.1,
        "offset": torch.randn(n, 1, generator=generator).half(),
        "tier": tier_of[torch.randperm(k, generator=generator)].byte(),
    }
    if uneven:
        tensors["scale"], tensors["scale_exponent"] = encoded_scales(tensors["scale"].float())
    return PackedWeight(layout, tensors)


@pytest.mark.parametrize("n, k", [(1, 20), (3, 65), (33, 63), (70, 300)])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("uneven", [False, True])
def test_the_plain_form_is_the_same_weight(n: int, k: int, memory: int, uneven: bool) -> None:
    pw = packed(n, k, memory, uneven)
    plain = pw.plain()
    assert [t.planes for t in plain.layout.tiers] == [0, 2, 3, 3]
    assert [t.tied for t in plain.layout.tiers] == [False, not uneven, not uneven, True]
    assert not plain.layout.has_trellis and plain.plain() is plain
    assert torch.equal(dequantize(plain), dequantize(pw))
    # padding is zero in what comes back, and nothing reads it
    stored = stored_planes(pw.layout, plain.tensors["weight"])
    again = PackedWeight(pw.layout, {**pw.tensors, "weight": stored})
    assert padding_is_zero(pw.layout, again.tensors)
    assert torch.equal(plain.tensors["weight"], again.plain().tensors["weight"])


def test_a_plane_that_float16_cannot_scale_is_refused() -> None:
    pw = packed(33, 63, 4, uneven=True)
    tensors = {**pw.tensors, "scale_exponent": torch.full_like(pw.tensors["scale_exponent"], 3)}
    with pytest.raises(PackedFormatError, match="too large for float16"):
        PackedWeight(pw.layout, {**tensors, "scale": tensors["scale"] | 224}).plain()


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "cpu-int8", "reference", "auto"])
def test_every_backend_multiplies_with_it(backend: str, uneven: bool, m: int) -> None:
    if backend.startswith("cpu") and paths.compiled() is None:
        pytest.skip("no compiled CPU kernels")
    pw = packed(70, 300, 4, uneven)
    x = torch.randn(m, 300, generator=torch.Generator().manual_seed(m))
    y, expected = dequant_matmul(x, pw, backend), x @ dequantize(pw).T
    tolerance = 0.02 if backend == "cpu-int8" else 1e-5
    assert (y - expected).norm() < tolerance * expected.norm()


class PlainOnly:
    """A backend that takes the plain form alone, and gives its planes back."""

    name = "plain only"

    def why_not(self, layout: WeightLayout, device: torch.device) -> str | None:
        return None if layout.is_plain else "it takes the plain form"

    def prepare(self, pw: PackedWeight) -> PackedWeight:
        assert pw.layout.is_plain
        return pw

    def planes(self, prepared: PackedWeight) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"weight": lambda rows: prepared.tensors["weight"][rows]}

    def matmul(self, x: Tensor, prepared: PackedWeight) -> Tensor:
        return x @ dequantize(prepared).T


@pytest.mark.parametrize("uneven", [False, True])
def test_a_backend_that_knows_no_trellis_gets_the_plain_form(
    uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "plain only", PlainOnly())
    pw = packed(33, 65, 4, uneven)
    rows = torch.arange(33)
    stored = stored_planes(pw.layout, pw.plain().tensors["weight"])  # with padding of zero
    for layout in (pw.layout, pw.layout.plain()):
        backend = select(layout, torch.device("cpu"), "plain only")
        assert isinstance(backend, PlainOnly) == layout.is_plain
    backend = select(pw.layout, torch.device("cpu"), "plain only")
    form = backend.prepare(pw)
    assert torch.equal(pbq_kernels.planes(backend, form)["weight"](rows[5:9]), stored[5:9])
    x = torch.ones(2, 65)
    assert torch.equal(backend.matmul(x, form), x @ dequantize(pw).T)


@pytest.mark.parametrize("name", ["cpu", "cpu-int8", "triton"])
def test_who_takes_a_trellis_as_it_is(name: str) -> None:
    layout, cpu = packed(33, 65, 4, uneven=True).layout, torch.device("cpu")
    if BACKENDS[name].why_not(layout.plain(), cpu):
        pytest.skip("it does not run here")
    assert select(layout, cpu, name) is BACKENDS[name]


@pytest.mark.parametrize(
    "tier, says",
    [
        (Tier(1, 8, tied=True, trellis=3), "memory 3"),
        (Tier(1, 8, tied=True, trellis=9), "memory 9"),
        (Tier(0, 8, tied=True, trellis=4), "1 to 7 tied planes"),
        (Tier(8, 8, tied=True, trellis=4), "1 to 7 tied planes"),
        (Tier(2, 8, trellis=4), "1 to 7 tied planes"),
        (Tier(2, 8, tied=True, uneven=True), "memory 0"),
        (Tier(1, 8, tied=True, trellis=4, uneven=True), "scales of a byte"),
        (Tier(4, 8, tied=True, trellis=4, uneven=True), "1 to 3 planes"),
    ],
)
def test_impossible_trellises_are_refused(tier: Tier, says: str) -> None:
    with pytest.raises(PackedFormatError, match=says):
        WeightLayout(4, 8, (tier,))


def test_a_row_does_not_stand_by_itself() -> None:
    with pytest.raises(PackedFormatError, match="trellis do not stand by themselves"):
        WeightLayout(4, 8, (Tier(1, 8, tied=True, trellis=4),)).check_rows()


def test_the_description_survives_json_and_old_ones_have_none() -> None:
    layout = packed(3, 65, 4, uneven=True).layout
    assert WeightLayout.from_dict(layout.to_dict()) == layout
    assert "trellis" not in str(layout.plain().to_dict())
    assert "uneven" not in str(layout.plain().to_dict()) + str(packed(3, 65, 4).layout.to_dict())
