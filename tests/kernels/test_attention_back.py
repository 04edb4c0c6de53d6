"""attention.c against float64: awkward sizes, any steps and threads, bad input."""

import pytest
import torch
import torch.nn.functional as F

from pbq_kernels.attention import attention_back, attention_back_naive, has_tiles

needs_tiles = pytest.mark.skipif(not has_tiles(), reason="no CPU with AMX, or nothing compiled")
# batch, heads, heads of keys, tokens, width
SIZES = [
    (1, 1, 1, 1, 8),
    (2, 4, 4, 7, 16),
    (1, 6, 2, 64, 1),
    (1, 6, 2, 65, 24),
    (2, 9, 3, 131, 64),
    (1, 4, 1, 300, 33),
    (1, 1, 1, 64, 128),
]


def problem(size, dtype, scaling=0.2):
    """What `attention_back` takes, as models make it ([b, L, heads, d], transposed), and what it
    should find: autograd's gradients, in float64, of the same numbers.
    """
    b, h, g, length, d = size
    generator = torch.Generator().manual_seed(length)
    query, key, value, back = (
        torch.randn(b, length, heads, d, generator=generator).to(dtype).transpose(1, 2)
        for heads in (h, g, g, h)
    )
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True, scale=scaling)
    wanted = torch.autograd.grad(out, exact, back.double())
    sums = sums_of(query, key, scaling)
    wide = torch.promote_types(dtype, torch.float32)
    return [query, key, value, out.detach().to(dtype), sums.to(wide), back], wanted


def sums_of(query, key, scaling):
    query, key = query.double(), key.double()
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling
    return (scores + torch.full_like(scores[0, 0], -torch.inf).triu(1)).logsumexp(-1)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-6))


@pytest.mark.parametrize("size", SIZES)
def test_the_slow_twin_is_the_definition(size):
    given, wanted = problem(size, torch.float64)
    for found, exact in zip(attention_back_naive(*given, 0.2), wanted, strict=True):
        torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-12)


@needs_tiles
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scaling", [0.2, 1.5])
def test_gradients_are_as_near_to_the_truth_as_bfloat16_can_be(size, scaling):
    given, wanted = problem(size, torch.bfloat16, scaling)
    for found, exact in zip(attention_back(*given, scaling), wanted, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == exact.shape
        assert relative(found, exact) < 0.01


@needs_tiles
def test_steps_between_tokens_do_not_matter():
    given, _ = problem((2, 6, 2, 70, 24), torch.bfloat16)
    found = attention_back(*given, 0.2)
    packed = attention_back(*(x.contiguous() for x in given), 0.2)
    apart = [x.repeat_interleave(2, -1)[..., ::2] for x in given[:4]]  # numbers, too
    assert apart[0].stride(-1) == 2
    for other in (packed, attention_back(*apart, *given[4:], 0.2)):
        assert all(map(torch.equal, found, other))


@needs_tiles
def test_results_do_not_depend_on_the_threads(with_any_threads):
    given, _ = problem((1, 9, 3, 200, 64), torch.bfloat16)
    found = with_any_threads(lambda: attention_back(*given, 0.2))
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@needs_tiles
def test_later_tokens_say_nothing_of_earlier_ones():
    given, _ = problem((1, 2, 2, 200, 64), torch.bfloat16)
    found = attention_back(*given, 0.2)
    for x in (given[1], given[2]):
        x[:, :, 150:] += 100
    given[4] = sums_of(*given[:2], 0.2).float()
    assert torch.equal(attention_back(*given, 0.2)[0][:, :, :128], found[0][:, :, :128])


@needs_tiles
@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_what_is_no_number_stays_none(place):
    given, _ = problem((1, 2, 1, 70, 24), torch.bfloat16)
    given[place][0, 0, 3, 5] = torch.nan
    found = attention_back(*given, 0.2)
    assert not torch.isfinite(found[0][0, 0, 3:]).all()


@needs_tiles
@pytest.mark.parametrize(
    ("place", "bad"),
    [
        (0, torch.zeros(1, 3, 70, 24)),
        (1, torch.zeros(1, 1, 71, 24)),
        (2, torch.zeros(1, 1, 70, 25)),
        (3, torch.zeros(1, 2, 70, 23)),
        (4, torch.zeros(1, 2, 69)),
        (5, torch.zeros(2, 2, 70, 24)),
        (0, torch.zeros(1, 2, 70, 24, dtype=torch.float64)),
    ],
)
def test_what_does_not_fit_is_refused(place, bad):
    given, _ = problem((1, 2, 1, 70, 24), torch.bfloat16)
    given[place] = bad if bad.dtype == torch.float64 else bad.to(given[place].dtype)
    with pytest.raises(ValueError, match=r"fit|sums|bfloat16"):
        attention_back(*given, 0.2)
