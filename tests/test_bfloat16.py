"""bfloat16 products by way of float32, against float64 and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pbq import bfloat16
from pbq.bfloat16 import fast_products, product


@pytest.fixture(autouse=True)
def no_unit(monkeypatch):
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda: False)


def drawn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("part", [2**24, 2**16, 1])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 63, 33), (3, 1, 1), (300, 70, 515), (257, 2, 260)])
def test_a_product_is_the_rounded_sum_however_it_is_cut(m, k, n, part, bias, monkeypatch):
    monkeypatch.setattr(bfloat16, "ROWS", part)
    monkeypatch.setattr(bfloat16, "COLUMNS", part)
    a, b, c = drawn(m, k), drawn(n, k, seed=1).T, drawn(n, seed=2) if bias else None
    found, exact = product(a, b, c), a.double() @ b.double()
    if c is not None:
        exact = exact + c.double()
    assert found.dtype == torch.bfloat16
    # half a unit of the last place, and what a float32 sum is off by
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_no_more_than_a_part_is_held_in_float32(monkeypatch):
    monkeypatch.setattr(bfloat16, "ROWS", 2**14)
    monkeypatch.setattr(bfloat16, "COLUMNS", 2**14)
    held, wide = [], torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: held.append(x.numel()) or wide(x))
    product(drawn(1000, 64), drawn(64, 3000))
    assert max(held) <= 2**14 and sum(held[1:]) >= 64 * 3000


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 24), (17, 24), (1, 24), (24,)])
def test_a_linear_and_its_gradients_are_as_near_to_the_truth_as_bfloat16(shape, bias):
    linear = nn.Linear(24, 40, bias=bias).bfloat16()
    x, back = drawn(*shape).requires_grad_(), drawn(*shape[:-1], 40, seed=1)
    exact = nn.Linear(24, 40, bias=bias).double()
    exact.load_state_dict(linear.state_dict())
    true = x.detach().double().requires_grad_()
    exact(true).backward(back.double())
    with fast_products():
        y = linear(x)
    y.backward(back)
    assert relative(y.detach(), exact(true).detach()) < 0.003
    assert x.grad.dtype == linear.weight.grad.dtype == torch.bfloat16
    assert relative(x.grad, true.grad) < 0.004
    for name, parameter in linear.named_parameters():
        assert relative(parameter.grad, exact.get_parameter(name).grad) < 0.004


def test_only_what_trains_gets_a_gradient():
    x, weight = drawn(5, 24).requires_grad_(), drawn(8, 24, seed=1)
    with fast_products():
        F.linear(x, weight).sum().backward()
    assert weight.grad is None and x.grad is not None
    frozen, trained = x.detach(), weight.requires_grad_()
    with fast_products():
        F.linear(frozen, trained).sum().backward()
    assert frozen.grad is None and trained.grad is not None


A, B, C = drawn(7, 33), drawn(33, 20, seed=1), drawn(20, seed=2)
BATCH, OTHER = drawn(3, 7, 33), drawn(3, 33, 20, seed=1)
PRODUCTS = {
    "@": lambda w: w(A) @ w(B),
    "matmul": lambda w: torch.matmul(w(BATCH), w(B)),
    "method": lambda w: w(A).mm(w(B)),
    "addmm": lambda w: torch.addmm(w(C), w(A), w(B), beta=2),
    "keyword": lambda w: torch.addmm(w(C), mat1=w(A), mat2=w(B)),
    "bmm": lambda w: torch.bmm(w(BATCH), w(OTHER)),
    "baddbmm": lambda w: w(C).expand(3, 7, 20).baddbmm(w(BATCH), w(OTHER), alpha=0.5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_other_products_are_summed_in_float32(name):
    with fast_products():
        found = PRODUCTS[name](lambda x: x)
    assert found.dtype == torch.bfloat16
    assert found.equal(PRODUCTS[name](torch.Tensor.float).bfloat16())


def test_gradients_of_other_products_arrive_in_bfloat16():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    with fast_products():
        (a @ b).sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.bfloat16
    torch.testing.assert_close(a.grad, B.float().sum(1).bfloat16().expand(7, 33))


def test_other_dtypes_and_given_places_are_left_to_torch():
    out = torch.empty(7, 20, dtype=torch.bfloat16)
    wide, narrow = A.double(), A.half()
    with fast_products():
        torch.mm(A, B, out=out)
        assert (wide @ B.double()).dtype == torch.float64
        assert F.linear(wide, B.T.double()).dtype == torch.float64
        assert (narrow @ B.half()).dtype == torch.float16
    assert out.equal(torch.mm(A, B))


def test_mistakes_are_told_by_torch():
    with fast_products(), pytest.raises(RuntimeError, match="shape"):
        F.linear(A, A[:, :5])
    with fast_products(), pytest.raises(RuntimeError, match="dtype"):
        F.linear(A, B.T.float())


@pytest.mark.parametrize("cuda", [False, True])
def test_it_does_nothing_where_a_cpu_multiplies_bfloat16_or_a_gpu_does(cuda, monkeypatch):
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda: not cuda)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    monkeypatch.setattr(bfloat16, "_linear", None)
    with fast_products():
        assert F.linear(A, B.T).shape == (7, 20)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "bloom"])
def test_a_model_says_the_same(architecture, tiny_model):
    model = tiny_model(architecture).bfloat16()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        exact = model.float()(ids).logits.double()
        plain = model.bfloat16()(ids).logits
        with fast_products():
            found = model(ids).logits
    assert found.dtype == torch.bfloat16
    assert relative(found, exact) < 1.1 * relative(plain, exact)
