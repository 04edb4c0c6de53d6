"""levels.c against its twins in torch: awkward sizes, any thread count, bad input."""

import pytest
import torch

from pbq_kernels import levels
from pbq_kernels.paths import compiled

pytestmark = pytest.mark.skipif(compiled() is None, reason="the kernels are not compiled here")

SIZES = [(1, 1, 1), (3, 15, 2), (2, 16, 5), (5, 17, 16), (33, 63, 3), (257, 385, 5)]


def made(n, k, tiers):
    generator = torch.Generator().manual_seed(n + k)
    position = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    tier_of = torch.randint(0, tiers, (k,), generator=generator, dtype=torch.int32)
    scale = torch.randn(n, tiers, generator=generator) * 0.01
    gradient = torch.randn(n, k, generator=generator).bfloat16()
    return position, tier_of, scale, gradient


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_those_of_torch_to_the_bit(size):
    position, tier_of, scale, _ = made(*size)
    found = levels.weights(position, tier_of, scale)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, levels.weights_naive(position, tier_of, scale))


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_sums_over_tiers(size):
    position, tier_of, scale, gradient = made(*size)
    product = gradient.double() * position
    exact = torch.stack([product[:, tier_of == t].sum(1) for t in range(size[2])], 1)
    largest = float(product.abs().sum(1).max())
    for find in (levels.gradients, levels.gradients_naive):
        found = find(position, tier_of, gradient, size[2])
        assert found.dtype == torch.float32 and found.shape == scale.shape
        torch.testing.assert_close(found.double(), exact, atol=1e-6 * largest, rtol=0)


def test_a_gradient_may_lie_in_memory_as_it_likes():
    position, tier_of, _, gradient = made(33, 63, 3)
    turned = gradient.T.contiguous().T
    found = levels.gradients(position, tier_of, turned, 3)
    assert torch.equal(found, levels.gradients(position, tier_of, gradient, 3))


def test_results_do_not_depend_on_the_threads(with_any_threads):
    position, tier_of, scale, gradient = made(257, 385, 5)
    found = with_any_threads(
        lambda: (
            levels.weights(position, tier_of, scale),
            levels.gradients(position, tier_of, gradient, 5),
        )
    )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    "change",
    [
        lambda p, t, s, g: (p.float(), t, s, g),
        lambda p, t, s, g: (p[:, :-1], t, s, g),
        lambda p, t, s, g: (p, t.long(), s, g),
        lambda p, t, s, g: (p, t[:-1], s, g),
        lambda p, t, s, g: (p, t, s, g.float()),
        lambda p, t, s, g: (p, t, s, g[:-1]),
    ],
)
def test_what_does_not_fit_is_refused(change):
    position, tier_of, _, gradient = change(*made(33, 63, 3))
    with pytest.raises(ValueError, match="not"):
        levels.gradients(position, tier_of, gradient, 3)


def test_scales_that_do_not_fit_are_refused():
    position, tier_of, scale, _ = made(33, 63, 3)
    for bad in (scale.double(), scale[:-1], scale.T.contiguous().T):
        with pytest.raises(ValueError, match="scale"):
            levels.weights(position, tier_of, bad)
    with pytest.raises(ValueError, match="17 tiers, 16 at most"):
        levels.weights(position, tier_of, torch.ones(33, 17))
