"""H = XᵀX / m, its damping ladder, its inverse factor, and the metric it defines."""

import logging

import numpy as np
import pytest
import torch

from pbq.errors import NumericalError
from pbq.hessian import Hessian, damp, inverse_cholesky, products_of, proxy_loss

SIZES = [1, 2, 33, 96, 577]


def inputs(m, k, spread=2.0, seed=0):
    """Correlated inputs whose channels differ in energy, as those of a language model do."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.3 * torch.randn(k, k, generator=g) / k**0.5
    return torch.randn(m, k, generator=g) @ mix * torch.exp(spread * torch.randn(k, generator=g))


def hessian_of(X):
    H = Hessian(X.shape[-1])
    H.update(X)
    return H.mean()


@pytest.mark.parametrize("k", SIZES)
def test_mean_equals_numpy_in_float64(k):
    X = inputs(100, k, spread=1.0)
    accumulated = Hessian(k)
    for part in X.split([1, 32, 67]):
        accumulated.update(part)
    expected = X.double().numpy().T @ X.double().numpy() / 100
    assert accumulated.tokens == 100
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.abs((accumulated.mean().numpy() - expected) / scale).max() < 2e-6


def test_mean_by_hand():
    H = Hessian(2)
    H.update(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    assert H.mean().tolist() == [[5.0, -5.0], [-5.0, 10.0]]


def test_every_leading_dimension_is_a_token():
    X = inputs(24, 7)
    H = Hessian(7)
    H.update(X.view(2, 3, 4, 7))
    assert H.tokens == 24
    torch.testing.assert_close(H.mean(), hessian_of(X))


def test_bfloat16_inputs_are_summed_in_float32():
    X = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    H = Hessian(1)
    for _ in range(8):
        H.update(X)
    assert H._sum.item() == 32768.0  # bfloat16 would stop counting at 256
    assert H.mean().item() == 1.0


def test_the_order_of_the_tokens_does_not_matter():
    X = inputs(200, 63)
    shuffled = X[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(hessian_of(X), hessian_of(shuffled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_refused(bad):
    H = Hessian(3)
    H.update(torch.tensor([[1.0, bad, 0.0]]))
    with pytest.raises(NumericalError, match="non-finite"):
        H.mean()


def test_no_tokens_is_zero_not_nan():
    assert Hessian(2).mean().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_damping_by_hand():
    H = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(damp(H, 0.1), torch.tensor([[3.15, 1.0], [1.0, 0.15]]))
    assert torch.equal(damp(H, 0.0), H)
    assert damp(torch.zeros(2, 2), 0.01).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("tokens", [8, 4000])
def test_factor_is_upper_and_squares_to_the_inverse(k, tokens):
    H = hessian_of(inputs(tokens, k))
    U, damping = inverse_cholesky(H, 0.01)
    assert damping == 0.01
    assert U.dtype == torch.float32
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    exact = torch.linalg.cholesky(torch.linalg.inv(damp(H.double(), 0.01)), upper=True)
    torch.testing.assert_close(U.diagonal().double(), exact.diagonal(), rtol=1e-3, atol=0)
    assert (U.double() - exact).norm() < 2e-4 * exact.norm()


def test_factor_by_hand():
    # H = diag(4, 1), damping 0.4 of the mean diagonal 2.5 is 1: H⁻¹ = diag(1/5, 1/2)
    U, _ = inverse_cholesky(torch.diag(torch.tensor([4.0, 1.0])), 0.4)
    torch.testing.assert_close(U, torch.diag(torch.tensor([0.2, 0.5])).sqrt())


def test_dead_channels_and_all_dead_channels_have_a_factor():
    X = inputs(50, 9)
    X[:, [0, 4, 8]] = 0
    assert torch.isfinite(inverse_cholesky(hessian_of(X), 0.01)[0]).all()
    assert torch.equal(inverse_cholesky(torch.zeros(3, 3), 0.01)[0], torch.eye(3))


def test_a_rank_deficient_hessian_climbs_the_ladder_and_says_so(caplog):
    X = inputs(3, 64, spread=0.0)
    H = hessian_of(X)
    # an eigenvalue of -5 % of the mean diagonal, as lossy accumulation leaves behind
    H -= 0.05 * H.diagonal().mean() * torch.eye(64)
    with caplog.at_level(logging.WARNING, "pbq.hessian"):
        U, damping = inverse_cholesky(H, 0.001, "layers.3.mlp.down_proj")
    assert damping == pytest.approx(0.1)
    message = "layers.3.mlp.down_proj: H needed damping 0.1 instead of 0.001"
    assert [record.getMessage() for record in caplog.records] == [message]
    exact = torch.linalg.inv(damp(H.double(), damping))
    torch.testing.assert_close(U.double().T @ U.double(), exact, rtol=1e-3, atol=1e-4)


def test_float64_is_tried_before_more_damping(caplog):
    """A condition number of 4e8 is beyond float32, and no reason to change the metric."""
    X = inputs(4000, 48, spread=0.0).double()
    X[:, -1] = X[:, 0] + 1e-4 * X[:, -1]
    X = X * torch.logspace(0, 3, 48, dtype=torch.float64)
    H = X.T @ X / 4000
    U, damping = inverse_cholesky(H, 1e-9)
    assert damping == 1e-9
    assert not caplog.records
    identity = U.double() @ damp(H, 1e-9) @ U.double().T
    torch.testing.assert_close(identity, torch.eye(48, dtype=torch.float64), atol=1e-3, rtol=0)


def test_nan_and_hopelessly_indefinite_raise_with_the_name():
    H = torch.eye(4)
    H[1, 2] = H[2, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"blocks\.0\.q: H is not positive definite"):
        inverse_cholesky(H, 0.01, "blocks.0.q")
    with pytest.raises(NumericalError, match=r"blocks\.0\.q.*damping 1;"):
        inverse_cholesky(torch.diag(torch.tensor([1.0, -3.0])), 0.01, "blocks.0.q")


@pytest.mark.parametrize(("n", "m", "k"), [(1, 5, 1), (7, 40, 33), (3, 200, 96)])
def test_proxy_loss_is_the_relative_output_error(n, m, k):
    X, g = inputs(m, k), torch.Generator().manual_seed(1)
    W = torch.randn(n, k, generator=g)
    W_hat = W + 0.1 * torch.randn(n, k, generator=g)
    Y, Y_hat = X.double() @ W.double().T, X.double() @ W_hat.double().T
    expected = float((Y - Y_hat).pow(2).sum() / Y.pow(2).sum())
    assert proxy_loss(W, W_hat, hessian_of(X)) == pytest.approx(expected, rel=1e-4)


def test_proxy_loss_of_nothing_is_zero():
    assert proxy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0.0


@pytest.mark.parametrize("tokens,k", [(1, 1), (7, 33), (1024, 96)])
def test_products_of_bfloat16_are_summed_in_float32(tokens, k):
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(k)).bfloat16().float()
    with products_of(torch.bfloat16):
        found = x.T @ x
    truth = x.T.double() @ x.double()
    # a sum that was itself rounded to bfloat16 would be off by a thousandth
    assert float((found - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


def test_products_of_other_dtypes_stay_as_they_are():
    before = torch.get_float32_matmul_precision()
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    exact = x.T @ x
    with products_of(torch.float32):
        assert torch.get_float32_matmul_precision() == before
        assert torch.equal(x.T @ x, exact)
    with pytest.raises(KeyError), products_of(torch.bfloat16):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(x.T @ x, exact)
