"""torch's defaults are the caller's: what kernels make for themselves does not follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from pbq_kernels import cpu, levels, paths
from pbq_kernels.cpu import CpuBackend
from pbq_kernels.divergence import divergence
from pbq_kernels.layout import PackedWeight, Tier
from pbq_kernels.reference import dequantize

compiled = pytest.mark.skipif(
    isinstance(cpu.compiled(), cpu.LibraryError), reason="the CPU kernels are not compiled"
)
TIERS = (Tier(0, 5), Tier(1, 20), Tier(2, 12, offset=True), Tier(4, -1, tied=True))


@contextmanager
def bfloat16_by_default() -> Iterator[None]:
    """As generation scripts have it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def elsewhere_by_default() -> Iterator[None]:
    """As torch.set_default_device("cuda") has it."""
    with torch.device("meta"):
        yield


DEFAULTS = [bfloat16_by_default, elsewhere_by_default]


@pytest.fixture
def pw(random_packed: Callable[..., PackedWeight]) -> PackedWeight:
    return random_packed(65, 84, TIERS, column_scale=True, overlay=0.1)


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_the_reference(defaults: Callable[[], object], pw: PackedWeight) -> None:
    wanted = dequantize(pw)
    with defaults():
        found = dequantize(pw)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@compiled
@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_products(defaults: Callable[[], object], tokens: int, pw: PackedWeight) -> None:
    backend, rows = CpuBackend("cpu"), torch.arange(0, 65, 3)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, 84, generator=torch.Generator().manual_seed(0)).to(dtype)
        form = backend.prepare(pw)
        wanted, planes = backend.matmul(x, form), form.stored_rows(rows)
        with defaults():
            form = backend.prepare(pw)
            assert torch.equal(backend.matmul(x, form), wanted)
            assert torch.equal(form.stored_rows(rows), planes)


@compiled
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_training(defaults: Callable[[], object]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 1000, generator=generator).bfloat16()
    position = torch.randint(-3, 4, (9, 40), generator=generator, dtype=torch.int8)
    tier_of, scale = torch.arange(40, dtype=torch.int32) // 20, torch.rand(9, 2)
    x, plain = torch.randn(40, 9, generator=generator), torch.rand(9)

    def made() -> list[torch.Tensor]:
        weights = levels.weights(position, tier_of, scale)
        path = paths.nearest_path(x, plain, 2, 6, uneven=True)
        in_turn = paths.nearest_paths_in_turn(x.clone(), A, None, plain, 2, 6)
        gradients = levels.gradients(position, tier_of, weights, 2)
        return [*divergence(*logits), weights, gradients, path, in_turn]

    A = torch.rand(40, 40, generator=generator).triu(1) / 9
    wanted = made()
    with defaults():
        found = made()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@compiled
def test_what_inference_mode_made_can_be_used_outside(pw: PackedWeight) -> None:
    backend = CpuBackend("cpu")
    form, x = backend.prepare(pw), torch.ones(64, 84)
    cpu._kept.__dict__.clear()
    with torch.inference_mode():
        wanted = backend.matmul(x, form)
    assert torch.equal(backend.matmul(x, form), wanted)


@compiled
def test_ids_of_another_device_are_refused(pw: PackedWeight) -> None:
    form = CpuBackend("cpu").prepare(pw)
    for rows in (torch.arange(3, device="meta"), torch.arange(3, dtype=torch.int32)):
        with pytest.raises(TypeError, match="needed: int64 on cpu"):
            form.stored_rows(rows)
