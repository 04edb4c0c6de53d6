"""Causal attention by matrix products, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pbq import attention
from pbq.attention import (
    QUERIES,
    _torch_tells_sums,
    causal,
    causal_by_float32,
    causal_by_tiles,
    fast_attention,
)
from pbq.own_text import _attention_over_room
from pbq_kernels.attention import has_tiles

# before a fixture replaces it
OURS = attention._ours

# batch, heads, heads of keys, tokens, width, width of values
SHAPES = [
    (1, 1, 1, 1, 8, 8),
    (2, 4, 4, 7, 16, 16),
    (1, 6, 2, QUERIES, 8, 8),
    (1, 6, 2, QUERIES + 1, 8, 8),
    (2, 9, 3, 3 * QUERIES - 5, 64, 64),
    (1, 4, 1, 2 * QUERIES + 63, 24, 40),
]


def inputs(shape, dtype):
    b, h, g, length, d, e = shape
    generator = torch.Generator().manual_seed(0)
    # as models make them: [b, L, heads, d], transposed
    made = [
        torch.randn(b, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
        for heads, width in ((h, d), (g, d), (g, e), (h, e))
    ]
    return [x.requires_grad_() for x in made[:3]], made[3]


def relative(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-6))


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_torch(shape, scaling):
    x, back = inputs(shape, torch.float64)
    wanted = F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True, scale=scaling)
    found = causal(*x, scaling)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, x, back), torch.autograd.grad(wanted, x, back), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_bfloat16_is_as_near_to_the_truth_as_bfloat16_can_be(shape):
    x, back = inputs(shape, torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in x]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    found = causal(*x)
    assert found.dtype == torch.bfloat16 and relative(found, wanted) < 0.006
    for ours, theirs in zip(
        torch.autograd.grad(found, x, back),
        torch.autograd.grad(wanted, exact, back.double()),
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16 and relative(ours, theirs) < 0.012


@pytest.mark.parametrize("around", [fast_attention, _attention_over_room])
def test_a_mask_may_be_a_keyword(around):
    """As some models of transformers give it, and all may."""
    (query, key, value), _ = inputs((1, 2, 2, 5, 8, 8), torch.bfloat16)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16)
    for given in (None, mask):
        with around():
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            found, _ = attend(nn.Module(), query, key, value, attention_mask=given)
        causal_mask = given is None
        wanted = F.scaled_dot_product_attention(
            query, key, value, attn_mask=given, is_causal=causal_mask
        )
        assert relative(found, wanted.transpose(1, 2)) < 0.01


@pytest.mark.skipif(not has_tiles(), reason="needs a CPU with tiles")
def test_tiles_take_numbers_that_do_not_lie_side_by_side():
    x, back = inputs((1, 6, 2, 70, 16, 16), torch.bfloat16)
    apart = [each.detach().mT.contiguous().mT.requires_grad_() for each in x]
    assert all(each.stride(-1) != 1 for each in apart)
    one, other = causal_by_tiles(*x), causal_by_tiles(*apart)
    assert torch.equal(one, other)
    for a, b in zip(
        torch.autograd.grad(one, x, back), torch.autograd.grad(other, apart, back), strict=True
    ):
        assert torch.equal(a, b)


def test_no_token_sees_a_later_one():
    (query, key, value), _ = inputs((1, 2, 2, QUERIES + 9, 8, 8), torch.float64)
    for cut in (1, QUERIES - 1, QUERIES, QUERIES + 3):
        changed = [x.detach().clone() for x in (key, value)]
        for x in changed:
            x[:, :, cut:] = torch.nan
        found = causal(query, *changed)[:, :, :cut]
        # a weight of zero times nan would be nan: only whole parts of later tokens are not read
        part = cut // QUERIES * QUERIES
        torch.testing.assert_close(found[:, :, :part], causal(query, key, value)[:, :, :part])
        shifted = [x.detach().clone() for x in (key, value)]
        for x in shifted:
            x[:, :, cut:] += 100
        torch.testing.assert_close(
            causal(query, *shifted)[:, :, :cut], causal(query, key, value)[:, :, :cut]
        )


class Attending(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def called(monkeypatch, dtype=torch.bfloat16, mask=None, keys=None, module=None, **more):
    """Was ours asked, and what came of it? Inside `fast_attention`, as a model would call it."""
    asked = []
    monkeypatch.setattr(attention, "causal", lambda *x: asked.append(1) or causal(*x))
    (query, key, value), _ = inputs((1, 4, 2, 40, 8, 8), dtype)
    key, value = key[:, :, :keys], value[:, :, :keys]
    arguments = (module or Attending(), query, key, value, mask)
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **more)[0]
    with fast_attention():
        found = ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **more)[0]
    return bool(asked), found, usual


@pytest.fixture(autouse=True)
def multiplies(monkeypatch):
    """Whatever this machine has: torch multiplies bfloat16 everywhere, if slowly."""
    monkeypatch.setattr(attention, "_ours", lambda *x: attention.causal)


def test_a_model_gets_what_it_would_have_got(monkeypatch):
    asked, found, usual = called(monkeypatch, scaling=0.25)
    assert asked and found.shape == usual.shape
    assert relative(found, usual) < 0.006


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.float32},
        {"mask": torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(-3).logical_or(torch.eye(40) > 0)},
        {"is_causal": False},
        {"dropout": 1e-9},
        {"position_bias": torch.zeros(1, 4, 40, 40, dtype=torch.bfloat16)},
        {"keys": 39},
    ],
    ids=lambda case: next(iter(case)),
)
def test_all_else_is_left_to_torch(monkeypatch, case):
    asked, found, usual = called(monkeypatch, **case)
    assert not asked
    torch.testing.assert_close(found, usual, atol=0, rtol=0)


def test_attention_that_is_not_causal_is_left_to_torch(monkeypatch):
    encoder = Attending()
    encoder.is_causal = False
    asked, found, usual = called(monkeypatch, module=encoder)
    assert not asked and found.equal(usual)


def test_a_machine_where_torch_is_faster_is_left_to_it(monkeypatch):
    monkeypatch.setattr(attention, "_ours", lambda *x: None)
    assert not called(monkeypatch)[0]


@pytest.mark.parametrize(
    ("unit", "compiled", "trained", "widths", "wanted"),
    [
        ("bfloat16", True, True, (8, 8), "causal"),
        ("bfloat16", True, False, (8, 16), "causal"),
        ("tiles", True, True, (8, 8), "causal_by_tiles"),
        ("tiles", True, False, (8, 8), None),
        ("tiles", True, True, (8, 16), None),
        ("tiles", False, True, (8, 8), None),
        ("", True, True, (8, 8), "causal_by_float32"),
        ("", True, False, (8, 8), None),
        ("", True, True, (8, 16), None),
    ],
)
def test_what_is_fastest_is_chosen(unit, compiled, trained, widths, wanted, monkeypatch):
    monkeypatch.setattr(attention, "torch_has_tiles", lambda: unit == "tiles")
    monkeypatch.setattr(attention, "has_tiles", lambda: compiled)
    monkeypatch.setattr(attention, "multiplies_bfloat16", lambda: bool(unit))
    monkeypatch.setattr(attention, "_torch_tells_sums", lambda: True)
    (query, key, value), _ = inputs((1, 4, 2, 40, *widths), torch.bfloat16)
    with torch.set_grad_enabled(trained):
        found = OURS(query, key, value)
    assert found is (wanted and getattr(attention, wanted))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] == s[5]])
@pytest.mark.parametrize(
    "ours",
    [
        pytest.param(
            causal_by_tiles,
            marks=pytest.mark.skipif(not has_tiles(), reason="no AMX, or nothing compiled"),
        ),
        pytest.param(
            causal_by_float32,
            marks=pytest.mark.skipif(not _torch_tells_sums(), reason="torch before 2.10"),
        ),
    ],
)
def test_values_are_torchs_and_gradients_nearer_to_the_truth(ours, shape):
    x, back = inputs(shape, torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in x]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    torchs = F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
    found = ours(*x)
    assert found.equal(torchs)
    for own, theirs, true in zip(
        torch.autograd.grad(found, x, back),
        torch.autograd.grad(torchs, x, back),
        torch.autograd.grad(wanted, exact, back.double()),
        strict=True,
    ):
        assert relative(own, true) < 1.05 * relative(theirs, true) + 1e-4


def test_it_ends_with_an_error_too():
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ValueError, match="inside"), fast_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual
        raise ValueError("inside")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
