"""The Triton kernels without a GPU: their numbers in Triton's interpreter, and their layout.

The interpreter is chosen when a kernel is defined, so a process of its own runs all cases at once:
it reads weights and inputs from a file and writes products to another. torch.empty gives NaN there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pbq_kernels
from pbq_kernels import PackedWeight, Tier, WeightLayout, select, triton_backend
from pbq_kernels.reference import dequantize
from pbq_kernels.trellis import POLYNOMIALS, sums
from pbq_kernels.triton_backend import (
    CONFIGS,
    GROUP_CONFIGS,
    TRELLIS_CONFIGS,
    Config,
    TritonBackend,
    config,
    splits,
)
from pbq_kernels.triton_layout import KINDS, ROWS, TritonWeight, repack, stored_rows

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
RandomPacked = Callable[..., PackedWeight]

INTERPRET = """
import sys, torch, triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder as Builder
multiply = Builder.create_dot
def create_dot(self, a, b, *rest):
    # the interpreter holds bfloat16 as integers, and would multiply those
    a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return multiply(self, a, b, *rest)
Builder.create_dot = create_dot
torch.use_deterministic_algorithms(True)  # torch.empty is NaN
from pbq_kernels import select
products = {}
for case, (pw, x) in torch.load(sys.argv[1], weights_only=False).items():
    x.requires_grad_(case.startswith("gradient"))
    backend = select(pw.layout, x.device, "triton")
    y = backend.matmul(x, backend.prepare(pw))
    if x.requires_grad:
        y.sum().backward()
    products[case] = y.detach(), x.grad
torch.save(products, sys.argv[2])
"""


class Case(NamedTuple):
    n: int
    k: int
    tiers: list[Tier]
    extras: Mapping[str, Any] = MappingProxyType({})
    tokens: tuple[int, ...] = (3,)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)


HALVES = (torch.float16, torch.bfloat16)
PAPER = [Tier(1, 77), Tier(4, 19, tied=True, offset=True)]
WATERFILL = [Tier(0, 200), Tier(1, 720), Tier(2, 300), Tier(3, 120), Tier(4, 80)]
UNEVEN = {"tied": True, "uneven": True, "trellis": 12}
DEFAULT = [
    *(Tier(0, 50), Tier(1, 530, **UNEVEN), Tier(2, 200, **UNEVEN), Tier(3, 99, **UNEVEN)),
    Tier(4, 21, tied=True, trellis=12),
]
DENSE = [Tier(p, 30 + p, **UNEVEN) for p in (1, 2, 3)] + [Tier(4, 34, tied=True, trellis=12)]
EVEN = [Tier(p, 11 * p, tied=True, trellis=4, offset=p == 2) for p in range(1, 8)]
PRUNED = [Tier(0, 20), Tier(1, 40), Tier(0, 3, offset=True)]
BOTH = {"column_scale": True, "overlay": 0.1}
CASES = {
    "one bit": Case(33, 577, [Tier(1, 577)], tokens=(1, 3, 17), dtypes=HALVES),
    "paper": Case(33, 96, PAPER, tokens=(1, 17), dtypes=HALVES),
    "zero to four planes": Case(65, 1420, WATERFILL, tokens=(1,)),
    "k=63": Case(33, 63, [Tier(2, 40), Tier(3, 23, tied=True, offset=True)], tokens=(1, 3, 17)),
    "a single weight": Case(1, 1, [Tier(8, 1, offset=True)]),
    "tied planes": Case(
        7, 99, [Tier(p, 11, tied=True, offset=p == 5) for p in range(9)], dtypes=HALVES
    ),
    "free planes": Case(7, 99, [Tier(p, 11, offset=p == 5) for p in range(9)]),
    "groups of 128": Case(
        33,
        1100,
        [
            Tier(1, 900, group_size=128),
            Tier(4, 200, tied=True, offset=True, group_size=128),
        ],
    ),
    "groups of 64 with offsets": Case(33, 1000, [Tier(2, 1000, offset=True, group_size=64)]),
    "groups of 96 and a row": Case(9, 333, [Tier(1, 290, group_size=96), Tier(3, 43, offset=True)]),
    "groups of 32": Case(9, 75, [Tier(2, 75, tied=True, offset=True, group_size=32)]),
    "empty tiers": Case(5, 7, [Tier(0, 0), Tier(1, 7), Tier(3, 0), Tier(2, 0, offset=True)]),
    "pruned": Case(5, 63, PRUNED),
    "all pruned": Case(5, 7, [Tier(0, 7)]),
    "column scale": Case(33, 96, PAPER, {"column_scale": True}),
    "overlay": Case(33, 63, PRUNED, {"overlay": 0.1}, tokens=(1, 17)),
    "both": Case(33, 577, [Tier(0, 77), Tier(1, 500, offset=True)], BOTH),
    "trellises": Case(65, 900, DEFAULT, tokens=(1, 17)),
    "trellises in float16": Case(33, 900, DEFAULT, dtypes=(torch.float16,)),
    "trellises above few rows": Case(3, 100, [Tier(1, 100, **UNEVEN)]),
    "trellises of even levels": Case(33, 308, EVEN),
    "trellises with both": Case(70, 63, [Tier(2, 42, **UNEVEN), Tier(2, 21, offset=True)], BOTH),
    "dense trellises": Case(70, 130, DENSE, {"overlay": 0.05}, tokens=(65,)),
    "gradient through trellises": Case(33, 130, DENSE, dtypes=(torch.float16,)),
    "scales in a byte": Case(33, 63, [Tier(1, 40), Tier(2, 23, tied=True)], {"scale_bits": 8}),
    "small batch": Case(70, 96, PAPER, tokens=(33, 64)),
    "dense": Case(
        70,
        577,
        [Tier(0, 77), Tier(2, 500, offset=True, group_size=64)],
        tokens=(65,),
        dtypes=HALVES,
    ),
    "dense with both": Case(70, 96, PAPER, BOTH, tokens=(65,)),
    "dense float32": Case(33, 96, PAPER, tokens=(3,), dtypes=(torch.float32, torch.float64)),
    "product": Case(33, 577, [Tier(1, 577)], {"column_scale": True, "rank": 40}, tokens=(1, 17)),
    "gradient": Case(33, 96, PAPER, {"column_scale": True}, dtypes=HALVES),
}
RUNS = [
    f"{name}, {tokens}, {dtype}".replace("torch.", "")
    for name, case in CASES.items()
    for tokens in case.tokens
    for dtype in case.dtypes
]


def operands(run: str, random_packed: RandomPacked) -> tuple[PackedWeight, Tensor]:
    name, tokens, dtype = run.split(", ")
    case = CASES[name]
    pw = random_packed(case.n, case.k, case.tiers, seed=len(name), **case.extras)
    generator = torch.Generator().manual_seed(int(tokens))
    x = torch.randn(int(tokens), case.k, generator=generator, dtype=torch.float64)
    return pw, x.to(getattr(torch, dtype))


@pytest.fixture(scope="session")
def interpreted(
    random_packed: RandomPacked, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(product, gradient of its sum) of each run."""
    path = tmp_path_factory.mktemp("triton")
    torch.save({run: operands(run, random_packed) for run in RUNS}, path / "in")
    paths = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, str(path / "in"), str(path / "out")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path / "out")


@pytest.mark.parametrize("run", RUNS)
def test_the_interpreted_product_is_the_dense_one(
    run: str, interpreted: dict[str, tuple[Tensor, Tensor | None]], random_packed: RandomPacked
) -> None:
    pw, x = operands(run, random_packed)
    W = dequantize(pw, torch.float64)
    expected, magnitude = x.double() @ W.T, x.double().abs() @ _size(pw).T
    product, _ = interpreted[run]
    assert product.dtype == x.dtype
    # sums in float32, the result rounded once; to bfloat16 the interpreter truncates
    rounding = torch.finfo(x.dtype).eps / (1 if x.dtype == torch.bfloat16 else 2)
    bound = rounding * expected.abs() + 1e-6 * magnitude
    if len(x) > 64 or pw.layout.column_scale:
        bound += rounding * magnitude  # W, or x times the column scale, is rounded to x's dtype
    if pw.layout.rank:
        bound += rounding * magnitude  # what lies between the factors
    if pw.layout.overlay:
        bound += 2**-11 * magnitude  # so are differences to float16
    assert ((product.double() - expected).abs() <= bound).all()


def _size(pw: PackedWeight) -> Tensor:
    """|W|; of a product, that of both factors."""
    if pw.layout.rank:
        outer, inner = (_size(factor) for factor in pw.factors())
        return outer @ inner
    return dequantize(pw, torch.float64).abs()


@pytest.mark.parametrize("run", [run for run in RUNS if run.startswith("gradient")])
def test_the_gradient_reaches_x(
    run: str, interpreted: dict[str, tuple[Tensor, Tensor | None]], random_packed: RandomPacked
) -> None:
    pw, x = operands(run, random_packed)
    gradient = interpreted[run][1]
    assert gradient is not None and gradient.dtype == x.dtype
    expected = dequantize(pw, torch.float64).sum(0).expand_as(x)
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(x.dtype).eps


# --- the layout ---------------------------------------------------------------------------------


def decode(weight: TritonWeight) -> Tensor:
    """float64 [n, k] by the rules of docs/kernels.md, column after column, no column scale."""
    stored = torch.zeros(weight.rows, len(weight.column), dtype=torch.float64)
    columns = weight.step_columns
    assert columns == (16 if weight.trellis else 32)
    scales = weight.scales.double()
    for field in weight.fields[1:].tolist():
        block, blocks, step, scale, scale_steps, factor, offset, offset_steps, width, kind = field
        for c in range(blocks * 16 // width * columns):
            j, t, half = c // columns % (16 // width), c % columns // 2, c % 2
            first = block + c // (16 // width * columns)
            planes = [
                weight.words[first + p * blocks, :, t].long() >> (width * j + 16 * half)
                for p in range(max(1, len(KINDS[kind][1]) - 1))
            ]
            level = 2 * (planes[0] & (2**width - 1)) - (2**width - 1)
            if KINDS[kind][1]:
                level = made_levels([plane & 1 for plane in planes], kind, weight.trellis)
            value = level * scales[scale + c // columns // scale_steps]
            stored[:, step * columns + c] += factor * value
            stored[:, step * columns + c] += scales[offset + c // columns // offset_steps]
    W = torch.zeros(weight.n, weight.k, dtype=torch.float64)
    valid = weight.column >= 0
    W[:, weight.column[valid].long()] = stored[weight.lead :][: weight.n, valid]
    return W


def made_levels(planes: list[Tensor], kind: int, memory: int) -> Tensor:
    """Bits of one column, a path and the planes above two -> its levels, by rows."""
    path, *others = (plane.tolist() for plane in planes)
    h1, h0 = POLYNOMIALS[memory]

    def tapped(r: int, h: int) -> int:
        return sum(path[r - i] for i in range(13) if h >> i & 1 and r >= i) % 2

    even, depth = KINDS[kind][1] == (1, 2), len(KINDS[kind][1])
    levels = [level for level, _ in sums(depth, not even)]
    places = [
        tapped(r, h0) + 2 * tapped(r, h1) + sum(4 * 2**p * bits[r] for p, bits in enumerate(others))
        for r in range(len(path))
    ]
    return torch.tensor([levels[place] for place in places])


@pytest.mark.parametrize(
    "name",
    [
        *("paper", "zero to four planes", "tied planes", "groups of 32", "trellises"),
        *("trellises of even levels", "scales in a byte"),
    ],
)
def test_the_layout_is_as_documented(name: str, random_packed: RandomPacked) -> None:
    case = CASES[name]
    pw = random_packed(case.n, case.k, case.tiers, **case.extras)
    torch.testing.assert_close(decode(repack(pw)), dequantize(pw).double(), rtol=1e-5, atol=1e-6)


def test_rows_are_repacked_in_chunks(
    random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    pw = random_packed(3 * ROWS + 1, 96, PAPER)
    whole = repack(pw)
    monkeypatch.setattr("pbq_kernels.triton_layout._MOST_UNPACKED", 1)
    assert torch.equal(repack(pw).words, whole.words)


@pytest.mark.parametrize("name", [name for name in CASES if "rank" not in CASES[name].extras])
def test_the_stored_rows_come_back(
    name: str, random_packed: RandomPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    pw = random_packed(case.n, case.k, case.tiers, **case.extras)
    weight, stored = repack(pw), pw.tensors["weight"]
    assert torch.equal(stored_rows(weight, torch.arange(case.n)), stored)
    monkeypatch.setattr("pbq_kernels.triton_layout._MOST_UNPACKED", case.k)
    some = torch.tensor([case.n - 1, 0, case.n // 2])
    assert torch.equal(stored_rows(weight, some), stored[some])
    assert stored_rows(weight, some[:0]).shape == (0, stored.shape[1])


@pytest.mark.parametrize("share", [0.82, 1.0])
def test_padding_costs_little(share: float, random_packed: RandomPacked) -> None:
    few = round(share * 4096)
    tiers = [Tier(1, few), *([Tier(4, 4096 - few, tied=True, offset=True)] if share < 1 else [])]
    pw = random_packed(64, 4096, tiers)
    weight = repack(pw)
    held = weight.words.nbytes + weight.scales.nbytes
    assert held < 1.08 * sum(pw.tensors[name].nbytes for name in ("weight", "scale"))


def test_a_trellis_is_held_as_it_is_stored(random_packed: RandomPacked) -> None:
    shares = (369, 1966, 983, 491)
    tiers = [Tier(p, c, **UNEVEN) if p else Tier(0, c) for p, c in enumerate(shares)]
    tiers.append(Tier(4, 4096 - sum(shares), tied=True, trellis=12))
    pw = random_packed(512, 4096, tiers)
    weight, plain = repack(pw), repack(pw.plain())
    assert weight.words.nbytes + weight.scales.nbytes < 0.72 * plain.words.nbytes


# --- what is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (WeightLayout(8, 64, (Tier(1, 64, group_size=31),)), "groups of 31 columns"),
        (WeightLayout(8, 64, (Tier(1, 64),), False, 400, 200), "overlay of 78%"),
        (
            WeightLayout(8, 64, tuple(Tier(1, 32, tied=True, trellis=m) for m in (4, 12))),
            "trellises of two memories",
        ),
        (
            WeightLayout(8, 64, (Tier(1, 64, tied=True, trellis=4, group_size=32),)),
            "trellises beside groups",
        ),
        (WeightLayout(8, 64, (Tier(1, 64),)), "the weight is on cpu"),
    ],
)
def test_says_why_not(layout: WeightLayout, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbq_kernels.triton_backend.INTERPRETED", "is on cpu" not in says)
    reason = TritonBackend().why_not(layout, torch.device("cpu"))
    assert reason is not None and says in reason


def test_is_first_choice_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pbq_kernels._warn_once.cache_clear()
    layout, gpu = WeightLayout(8, 64, (Tier(1, 64),)), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert select(layout, gpu).name == "triton"
    assert select(layout, torch.device("cpu")).name != "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select(layout, gpu).name == "reference" == select(layout, gpu).name
    (warning,) = caplog.messages
    assert "slow reference on the GPU: triton: it needs bfloat16 tensor cores" in warning
    with pytest.raises(ValueError, match=r"'triton' cannot be used here: it needs bfloat16"):
        select(layout, gpu, "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("pbq_kernels.triton_backend._triton_release", lambda: (3, 4))
    with pytest.raises(ValueError, match=r"takes Triton 3\.5"):
        select(layout, gpu, "triton")


def test_its_release_is_a_pair_of_numbers() -> None:
    assert triton_backend._triton_release() >= (3, 5)


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = TritonBackend().why_not(WeightLayout(8, 64, (Tier(1, 64),)), torch.device("cuda"))
    assert reason is not None and "pip install triton" in reason


@pytest.mark.parametrize("target", CONFIGS)
@pytest.mark.parametrize(
    ("flush", "trellis", "configs"),
    [(0, 0, CONFIGS), (2, 0, GROUP_CONFIGS), (0, 12, TRELLIS_CONFIGS)],
)
def test_every_number_of_tokens_has_a_tile(
    target: str, flush: int, trellis: int, configs: dict[str, tuple[Config, ...]]
) -> None:
    for tokens in range(1, 100):
        tile = config(tokens, target, flush, trellis)
        assert tile in configs[target]
        assert tile.tokens >= tokens or tile == configs[target][-1]
        assert ROWS % tile.rows == 0


def test_splits_fill_the_processors() -> None:
    tile = config(1, "cuda")
    assert splits(4096, 1, 13, 132, tile) == 6
    assert splits(14336, 1, 13, 132, tile) == 1
    assert splits(4096, 1, 3, 132, tile) == 1
    assert splits(64, 1, 1000, 132, tile) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run for minutes")
def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "bench_gpu.py")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "bench_gpu: torch sees no CUDA GPU here; nothing was measured\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("run", [run for run in RUNS if not run.startswith("gradient")])
def test_the_product_on_a_gpu(run: str, random_packed: RandomPacked) -> None:
    pw, x = operands(run, random_packed)
    y = pbq_kernels.dequant_matmul(x.cuda(), pw.to("cuda"), "triton").cpu()
    expected = x.double() @ dequantize(pw, torch.float64).T
    error = (y.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < 2 * torch.finfo(x.dtype).eps + (2**-11 if pw.layout.overlay else 1e-6)
