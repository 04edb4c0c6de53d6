"""divergence.c against float64: every variant, awkward sizes, any thread count, wild numbers."""

import pytest
import torch

from pbq_kernels.divergence import divergence, divergence_naive
from pbq_kernels.paths import compiled

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no compiled CPU kernels")
SIZES = [(1, 1), (3, 15), (2, 16), (5, 17), (9, 1025), (4, 49152)]


def logits(tokens, v, spread=3.0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens + v)
    return [(torch.randn(tokens, v, generator=generator) * spread).to(dtype) for _ in range(2)]


def exact(student, target, gamma):
    log_q, log_p = (x.double().log_softmax(-1) for x in (student, target))
    p = log_p.exp()
    kl, entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    return kl, entropy, (log_q.exp() - p) * entropy[:, None] ** gamma


@pytest.fixture
def use():
    """use(i): the i-th of the compiled variants from now on. Are there so many?"""
    library = compiled()
    yield library.pbq_divergence_use
    library.pbq_divergence_use(0)


def check(found, student, target, gamma):
    kl, entropy, gradient = exact(student, target, gamma)
    torch.testing.assert_close(found[0].double(), kl, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(found[1].double(), entropy, atol=3e-6, rtol=1e-5)
    assert found[2].dtype == student.dtype
    # of two shares that are nearly the same, the difference may be as wrong as they are
    torch.testing.assert_close(
        found[2].double(), gradient, atol=1e-6 * float(gradient.abs().max() + 1e-3), rtol=2**-8
    )


@needs_compiler
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_every_variant_is_the_definition(size, gamma, spread, use):
    student, target = logits(*size, spread)
    variants = 0
    while use(variants):
        check(divergence(student, target, gamma), student, target, gamma)
        variants += 1
    assert variants


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_slow_twin_is_the_definition(chunk, dtype):
    student, target = logits(9, 1025, dtype=dtype)
    check(divergence_naive(student, target, 0.5, chunk), student, target, 0.5)


def test_other_dtypes_are_left_to_torch():
    student, target = logits(5, 17, dtype=torch.float32)
    found, slow = divergence(student, target), divergence_naive(student, target)
    assert all(map(torch.equal, found, slow))


def test_a_gradient_that_is_not_wanted_is_not_made():
    for dtype in (torch.bfloat16, torch.float32):
        student, target = logits(5, 17, dtype=dtype)
        kl, entropy, none = divergence(student, target, gradient=False)
        assert none is None
        assert torch.equal(kl, divergence(student, target)[0]) and entropy.shape == kl.shape


@needs_compiler
def test_equal_distributions_are_no_distance_apart():
    student, _ = logits(3, 1025)
    kl, _, gradient = divergence(student, student + 0)
    assert float(kl.abs().max()) < 1e-6 and float(gradient.abs().max()) < 1e-7


@needs_compiler
def test_results_do_not_depend_on_the_threads(with_any_threads):
    student, target = logits(37, 1025)
    found = with_any_threads(lambda: divergence(student, target, 0.5))
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value):
    """Whoever sums the divergences sees that the model is broken; other tokens are as they were."""
    for wild in (0, 1):
        both = logits(3, 33)
        clean = divergence(*both)[0]
        both[wild][1, 7] = value
        kl = divergence(*both)[0]
        assert not torch.isfinite(kl[1]) and torch.equal(kl[::2], clean[::2])


def test_what_does_not_fit_is_refused():
    student, target = logits(3, 33)
    for bad in (target[:2], target[:, :-1], target[0]):
        with pytest.raises(ValueError, match="target"):
            divergence(student, bad)
