"""rtn and gptq: numbers by hand, and what their bits buy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbq import methods
from pbq.allocate import ChannelStats, LayerPlan, PlanInput
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.gptq import quantize_weight
from pbq.grid import QuantizedWeight
from pbq.methods.gptq import Gptq
from pbq.methods.rtn import Rtn
from pbq_kernels import Tier


def plan(name: str, n: int, k: int, bits: float, group_size: int = -1) -> LayerPlan:
    config = QuantConfig(method=name, bits=bits, group_size=group_size)
    one = torch.ones(k)
    layer = PlanInput(torch.randn(n, k), ChannelStats(one, one, one))
    return methods.get(name, config).plan({"a": layer}, config)["a"]


def quantized(
    name: str, W: Tensor, H: Tensor, tier: Tier, *, search: bool = False
) -> QuantizedWeight:
    config = QuantConfig(method=name, bits=4)
    method = {"rtn": Rtn, "gptq": Gptq}[name](search=search)
    recipe = method.recipe(config)
    assert not recipe.compensate and recipe.block is None and recipe.distillation is None
    qw, _, _ = quantize_weight(
        W,
        H,
        (tier,),
        torch.zeros(W.shape[1], dtype=torch.uint8),
        method.fit,
        sweeps=recipe.sweeps,
        feedback=recipe.feedback,
        natural_order=recipe.natural_order,
    )
    return qw


ROW = torch.tensor([[-1.0, 2.0, 0.4, 0.4]])
TWO_BITS = Tier(2, 4, tied=True, offset=True)


def test_rounding_to_nearest_by_hand() -> None:
    """From -1 to 2 in three steps of 1, zero point 1: the levels are -1, 0, 1, 2."""
    qw = quantized("rtn", ROW, torch.eye(4), TWO_BITS)
    assert qw.dequantize().tolist() == [[-1, 2, 0, 0]]
    assert qw.codes.tolist() == [[0, 3, 1, 1]]
    # every weight for itself: what the inputs are like does not matter
    H = torch.eye(4)
    H[2, 3] = H[3, 2] = 0.5
    assert torch.equal(quantized("rtn", ROW, H, TWO_BITS).dequantize(), qw.dequantize())


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_the_range_is_searched_where_an_outlier_would_spoil_it(name: str) -> None:
    """From -1 to 8 in three steps: -1 would be all that the small weights get."""
    torch.manual_seed(0)
    W = torch.cat([torch.randn(5, 32), torch.full((5, 1), 6.0)], 1)
    tier = Tier(2, 33, tied=True, offset=True)
    error = {
        search: (quantized(name, W, torch.eye(33), tier, search=search).dequantize() - W)
        .pow(2)
        .sum()
        for search in (True, False)
    }
    assert error[True] < 0.85 * error[False]


def test_gptq_by_hand() -> None:
    """The third weight loses .4; half of it goes to the fourth, .4 + .4 · .5 / 1.01 = .598."""
    H = torch.eye(4)
    H[2, 3] = H[3, 2] = 0.5
    assert quantized("gptq", ROW, H, TWO_BITS).dequantize().tolist() == [[-1, 2, 0, 1]]
    assert quantized("gptq", ROW, torch.eye(4), TWO_BITS).dequantize().tolist() == [[-1, 2, 0, 0]]


def test_gptq_takes_the_columns_as_they_come() -> None:
    """The third column matters least; the most important first would round the fourth before it."""
    H = torch.diag(torch.tensor([1.0, 1.0, 0.5, 1.0]))
    H[2, 3] = H[3, 2] = 0.5
    found = quantized("gptq", ROW, H, TWO_BITS).dequantize()
    # .4 + .4 · .5 / (1 + .00875) = .598 for the fourth, nothing for the third
    assert found.tolist() == [[-1, 2, 0, 1]]


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_bits_buy_planes_first_and_smaller_groups_with_the_rest(name: str) -> None:
    found = {bits: plan(name, 64, 512, bits).tiers[0] for bits in (2.0625, 2.5, 3.0, 3.25, 4.13)}
    # a group costs 32 bits a row, 1/16 of a bit a weight
    assert [(t.planes, t.groups) for t in found.values()] == [
        (2, 1),
        (2, 8),
        (2, 16),
        (3, 4),
        (4, 2),
    ]
    assert [t.group_size for t in found.values()] == [-1, 64, 32, 128, 256]


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_a_given_group_size_leaves_the_planes_to_the_bits(name: str) -> None:
    assert plan(name, 64, 512, 3.25, 128).tiers[0] == Tier(
        3, 512, tied=True, offset=True, group_size=128
    )
    assert plan(name, 64, 512, 3.24, 128).tiers[0].planes == 2
    with pytest.raises(UsageError, match=r"2\.2 bits cannot hold .* least is --bits 2\.250"):
        plan(name, 64, 512, 2.2, 128)
