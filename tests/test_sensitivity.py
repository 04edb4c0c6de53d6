"""What each linear alone costs the model, against whole models with one weight changed."""

import copy
import math

import pytest
import torch
from torch import nn

from pbq import methods, sensitivity
from pbq.allocate import LayerPlan
from pbq.config import QuantConfig
from pbq.errors import NumericalError
from pbq.models import find_blocks, find_linears, weight_of
from pbq.sensitivity import sensitivities
from pbq_kernels.layout import Tier


@pytest.fixture
def ids():
    return torch.randint(0, 256, (9, 24), generator=torch.Generator().manual_seed(0))


def pruned(W):
    return W * (torch.arange(W.shape[1]) % 3 > 0)


@pytest.fixture
def rebuilt(monkeypatch):
    """Stands in for rounding: every third column is lost. What it is given, by name."""
    given = {}

    class Pruned:
        def __init__(self, W):
            self.W = W

        def dequantize(self):
            return pruned(self.W)

    def rebuild(method, recipe, config, plan, W, H, name):
        given[name] = plan, W, H
        return Pruned(W), W, 0.01

    monkeypatch.setattr(methods, "rebuild", rebuild)
    monkeypatch.setattr(sensitivity, "HESSIAN_TOKENS", 5 * 24)
    monkeypatch.setattr(sensitivity, "LENGTH", 20)
    return given


def every(model):
    """A plan for every layer, told from others by its columns."""
    tiers = [Tier(1, i + 1, tied=True, trellis=12) for i in range(len(names(model)))]
    return {
        name: LayerPlan((tier,), torch.zeros(tier.columns, dtype=torch.uint8))
        for name, tier in zip(names(model), tiers, strict=True)
    }


def measured(model, ids, progress=lambda done, total: None):
    config = QuantConfig()
    method = methods.get("waterfill", config)
    return sensitivities(model, ids, method, method.recipe(config), config, every(model), progress)


def names(model):
    prefix, blocks = find_blocks(model)
    return [f"{prefix}.{i}.{n}" for i, block in enumerate(blocks) for n in find_linears(block)]


@torch.no_grad()
def log_probabilities(model, ids):
    return model(ids, use_cache=False).logits.double().log_softmax(-1)


def test_it_is_the_divergence_of_a_model_with_one_layer_rounded(
    tiny_model, architecture, ids, rebuilt
):
    model = tiny_model(architecture)
    with torch.no_grad():  # an initial model hardly depends on its weights
        for block in find_blocks(model)[1]:
            for linear in find_linears(block).values():
                weight_of(linear).mul_(8)
    original = copy.deepcopy(model)
    found = measured(model, ids)
    judged = ids[:8, :20]
    target = log_probabilities(original, judged)
    assert list(found) == names(original)
    for name, nats in found.items():
        one = copy.deepcopy(original)
        with torch.no_grad():
            weight = weight_of(one.get_submodule(name))
            weight.copy_(pruned(weight))
        changed = log_probabilities(one, judged)
        exact = float((target.exp() * (target - changed)).sum(-1).mean())
        assert nats == pytest.approx(exact, rel=2e-3, abs=1e-7), name
    assert min(found.values()) > -1e-6
    assert max(found.values()) > 1e-5
    for (name, was), now in zip(
        original.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(was, now), name


def test_each_layer_is_rounded_as_planned_in_the_metric_of_its_own_inputs(
    tiny_model, ids, rebuilt, monkeypatch
):
    """Tokens count 1, 2, 3, ...; of nine segments the five that are spread evenly are taken."""
    model = tiny_model("llama")
    monkeypatch.setattr(
        sensitivity,
        "token_importance",
        lambda block, linears, call, hidden, generator: (
            sensitivity.run_block(block, hidden, call),
            {n: torch.arange(1.0, 25.0) for n in linears},
        ),
    )
    measured(model, ids)
    # with 256 states at most
    assert {name: plan.tiers for name, (plan, _, _) in rebuilt.items()} == {
        n: (Tier(1, i + 1, tied=True, trellis=8),) for i, n in enumerate(names(model))
    }
    seen = {n: [] for n in rebuilt}
    for n in rebuilt:
        module = model.get_submodule(n)
        assert isinstance(module, nn.Linear)
        module.register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0][0]))
    with torch.no_grad():
        for row in (0, 1, 3, 5, 7):
            model(ids[row : row + 1], use_cache=False)
    for n, (_, W, H) in rebuilt.items():
        exact = sum((x * torch.arange(1.0, 25.0)[:, None]).T @ x for x in seen[n]) / (5 * 24)
        torch.testing.assert_close(H, exact, rtol=1e-4, atol=1e-6)
        assert torch.equal(W, model.get_submodule(n).weight)


def test_predictions_that_are_not_finite_name_the_layer(tiny_model, ids, rebuilt, monkeypatch):
    model, rebuild = tiny_model("llama"), methods.rebuild

    def broken(method, recipe, config, plan, W, H, name):
        return rebuild(
            method, recipe, config, plan, W * math.nan if "1.mlp.up" in name else W, H, name
        )

    monkeypatch.setattr(methods, "rebuild", broken)
    with pytest.raises(NumericalError, match=r"^model\.layers\.1\.mlp\.up_proj: "):
        measured(model, ids)


def test_it_tells_how_far_it_is_and_does_with_less_text_than_it_would_take(
    tiny_model, ids, rebuilt
):
    steps = []
    found = measured(tiny_model("llama"), ids[:2, :7], lambda *at: steps.append(at))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert all(v > -1e-6 for v in found.values())
