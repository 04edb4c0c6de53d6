"""Modules of a block that run once, for their weights are final."""

import pytest
import torch
from torch import nn

from pbq.remembering import Memory
from pbq.spill import Spill


class Part(nn.Module):
    """Its linear times two, in the form that `wrap` gives it; counts its calls."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap, self.calls = nn.Linear(4, 4), wrap, 0

    def forward(self, x, *, scale=2):
        self.calls += 1
        return self.wrap(self.linear(x) * scale)


def bare(y):
    return y


def in_tuple(y):
    return y, None


def with_more(y):
    return y, torch.ones(1)


class Block(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(4), Part(wrap), Part(wrap)

    def forward(self, x):
        y = self.attention(self.norm(x), scale=3)
        y = y[0] if isinstance(y, tuple) else y
        y += x  # in place, as falcon does
        z = self.mlp(y)
        return y + (z[0] if isinstance(z, tuple) else z)


@pytest.fixture(params=["memory", "disk"])
def spill(request, tmp_path):
    return Spill(tmp_path if request.param == "disk" else None)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [bare, in_tuple, with_more])
def test_a_settled_module_runs_once_for_each_batch(wrap, spill):
    torch.manual_seed(0)
    block, batches = Block(wrap), torch.randn(3, 2, 4)
    memory = Memory(block, ["attention.linear", "mlp.linear"], spill)
    with memory.batch(0):
        block(batches[0])
    assert block.attention.calls == 1  # not settled: nothing is kept
    memory.settle(["attention.linear"])
    expected = [block(x) for x in batches]
    block.attention.calls = block.mlp.calls = 0
    for _ in range(3):
        for i in (0, 2):
            with memory.batch(i):
                assert torch.equal(block(batches[i]), expected[i])
    assert block.attention.calls == (6 if wrap is with_more else 2)
    assert block.mlp.calls == 6
    with memory.batch(1, last=True):
        assert torch.equal(block(batches[1]), expected[1])
    calls = block.attention.calls
    with memory.batch(1, ["attention.linear"]):  # who watches it wants it to run
        assert torch.equal(block(batches[1]), expected[1])
    assert block.attention.calls == calls + 1
    memory.close()
    with memory.batch(2):
        block(batches[2])
    assert block.attention.calls == calls + 2
    assert "forward" not in block.attention.__dict__


def test_a_forward_that_another_has_set_is_set_again():
    block = Block(bare)
    own = block.attention.forward = lambda x, scale: x * scale
    memory = Memory(block, ["attention.linear"], Spill())
    memory.settle(["attention.linear"])
    with pytest.raises(KeyError), memory.batch(0):
        assert torch.equal(block(torch.ones(2, 4)), block(torch.ones(2, 4)))
        raise KeyError
    assert block.attention.forward is own


def test_modules_without_linears_always_run():
    memory = Memory(block := Block(bare), [], Spill())
    with memory.batch(0):
        assert all("forward" not in module.__dict__ for module in block.children())
