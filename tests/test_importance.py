"""How much tokens count, against Jacobians written out in full."""

import pytest
import torch
from torch import nn

from pbq.importance import token_importance
from pbq.models import find_blocks, find_linears, record_calls, run_block

LENGTH = 7


class Chain(nn.Module):
    """y_s = Σ_t A_st B (C x_t): the Jacobian of an output by what C gives is A_st B."""

    def __init__(self, mixing: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixing = mixing
        self.C, self.B = nn.Linear(5, 300, bias=False), nn.Linear(300, 400, bias=False)
        self.idle = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.idle(x)
        return self.mixing @ self.B(self.C(x))


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr("pbq.importance.run_block", lambda block, x, call: block(x))

    def run(block, x, seed=0):
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        y, found = token_importance(block, linears, None, x, torch.Generator().manual_seed(seed))
        assert torch.equal(y, block(x)) and not y.requires_grad
        return found

    return run


def test_it_is_the_share_of_the_squared_jacobian(run):
    mixing = torch.rand(LENGTH, LENGTH).tril()
    mixing[:, 0] += 3  # a token that all others attend to
    block, x = Chain(mixing), torch.randn(1, LENGTH, 5)
    y = block(x)[0]
    size = y.pow(2).mean(-1).sqrt()
    exact = (mixing.pow(2) / size[:, None]).sum(0)
    found = run(block, x)
    for name in ("C", "B"):
        assert found[name].shape == (LENGTH,)
        assert found[name].mean() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found[name], exact / exact.mean(), rtol=0.35, atol=0.02)
    mean = torch.stack([run(block, x, seed)["B"] for seed in range(40)]).mean(0)
    torch.testing.assert_close(mean, exact / exact.mean(), rtol=0.06, atol=0.01)


def test_outputs_that_nothing_depends_on_count_alike(run):
    block = Chain(torch.eye(LENGTH))
    assert torch.equal(run(block, torch.randn(1, LENGTH, 5))["idle"], torch.ones(LENGTH))


def test_the_same_seed_gives_the_same(run):
    block, x = Chain(torch.ones(LENGTH, LENGTH).tril()), torch.randn(2, LENGTH, 5)
    first, again, other = (run(block, x, seed)["C"] for seed in (1, 1, 2))
    assert first.shape == (2 * LENGTH,)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_blocks_of_models(tiny_model, architecture):
    model = tiny_model(architecture).requires_grad_(False)
    _, blocks = find_blocks(model)
    ids = torch.randint(0, 250, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    recording = record_calls(model, blocks, [ids])
    linears = {n: m for n, m in find_linears(blocks[0]).items() if "expert" not in n}
    call, x = recording.calls[0][0], recording.hidden[0]
    y, found = token_importance(blocks[0], linears, call, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(y, run_block(blocks[0], x, call))
    assert found.keys() == linears.keys()
    for weights in found.values():
        assert weights.shape == (2 * LENGTH,)
        assert weights.isfinite().all()
        assert weights.mean() == pytest.approx(1, abs=1e-4)
    # nothing sees what comes after it: the last token's key reaches one output, the first's all
    if architecture == "llama":
        value = found["self_attn.v_proj"].view(2, LENGTH)
        assert (value[:, 0] > value[:, -1]).all()
