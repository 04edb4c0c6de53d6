"""The arithmetic of a run's seconds, by hand."""

import dataclasses

import pytest
import torch

from pbq import methods
from pbq.config import QuantConfig
from pbq.forecast import EFFICIENCY, TOGETHER, Speed, duration, seconds
from pbq.tune import BlockTuning, Distillation, Recipe

SHAPES = {"a": (10, 20), "b": (30, 10)}
SPEED = Speed(model=2000.0, single=1000.0)


def test_statistics_and_distillation_by_hand():
    config = QuantConfig(nsamples=4, seqlen=100)
    recipe = Recipe(hessian_tokens=1, distillation=Distillation(steps=7))
    found = seconds(SHAPES, 50, config, recipe, SPEED)
    assert found["statistics"] == pytest.approx(2 * 550 * 400 / 2000 / EFFICIENCY)
    step = 1024 * (6 * 500 + 8 * 50)
    assert found["distillation"] == pytest.approx(7 * step / 2000 / EFFICIENCY)
    assert set(found) == {"statistics", "blocks", "distillation"}
    # what tiles make of bfloat16 says nothing of float32, in which blocks are rounded
    tiles = seconds(SHAPES, 50, config, recipe, dataclasses.replace(SPEED, reached=EFFICIENCY / 2))
    assert tiles["distillation"] == pytest.approx(2 * found["distillation"])
    assert found["blocks"] < tiles["blocks"] < 2 * found["blocks"]
    text = seconds(SHAPES, 50, dataclasses.replace(config, calib="a.txt"), recipe, SPEED)
    gap = text["distillation"] - found["distillation"]
    further = 7 * 1024 / 100
    share = further / (4 + further)  # of the steps that are on text without kept hidden states
    assert gap == pytest.approx(share * 7 * 1024 * 2 * 500 / 2000 / EFFICIENCY, rel=1e-3)
    # blocks that are fitted to another text keep nothing that a distillation could use
    noisy = dataclasses.replace(recipe, token_noise=0.1)
    assert seconds(SHAPES, 50, config, noisy, SPEED) == found
    again = seconds(SHAPES, 50, dataclasses.replace(config, calib="a.txt"), noisy, SPEED)
    gap = again["distillation"] - found["distillation"]
    assert gap == pytest.approx(7 * 1024 * 2 * 500 / 2000 / EFFICIENCY)


def test_a_recipe_may_want_more_rows_of_a_given_text():
    recipe = Recipe(block=BlockTuning(epochs=1), rows=80)

    def cost(nsamples: int, calib: str) -> dict[str, float]:
        config = QuantConfig(nsamples=nsamples, seqlen=100, calib=calib)
        return seconds(SHAPES, 50, config, recipe, SPEED)

    assert cost(-1, "a.txt") == cost(80, "a.txt") == cost(-1, "a.txt+self")
    assert cost(-1, "self") == cost(64, "self") != cost(80, "self")
    assert cost(7, "a.txt")["blocks"] < cost(-1, "a.txt")["blocks"]


def test_few_rows_are_passed_over_more_often():
    config = QuantConfig(nsamples=4, seqlen=100)
    five, at_least = (
        seconds(SHAPES, 0, config, Recipe(block=block), SPEED)
        for block in (BlockTuning(epochs=5), BlockTuning(epochs=1, steps=10))
    )
    assert at_least == five  # of two rows each


def test_an_epoch_of_block_tuning_costs_a_pass_forth_and_back():
    config = QuantConfig(nsamples=4, seqlen=100)
    plain = seconds(SHAPES, 0, config, Recipe(), SPEED)
    tuned = seconds(SHAPES, 0, config, Recipe(block=BlockTuning(epochs=3)), SPEED)
    gap = tuned["blocks"] - plain["blocks"]
    assert gap == pytest.approx(3 * 6 * 500 * 400 / 2000 / EFFICIENCY)
    assert "distillation" not in plain


def test_importance_costs_a_pass_back_to_the_activations():
    config = QuantConfig(nsamples=4, seqlen=100)
    plain, weighed = (
        seconds(SHAPES, 0, config, Recipe(hessian_tokens=300, importance=on), SPEED)["blocks"]
        for on in (False, True)
    )
    assert weighed - plain == pytest.approx(2 * 500 * 300 / 2000 / EFFICIENCY)


def test_sensitivities_by_hand():
    """150 tokens are all there is, for the Hessians and for the comparison."""
    config = QuantConfig(nsamples=1, seqlen=150)
    slow = dataclasses.replace(SPEED, column=3, quicker=0.25)
    plain, found = (
        seconds(SHAPES, 50, config, Recipe(sensitivity=on), slow) for on in (False, True)
    )
    forwards = 4 * 500 * 150 + 2 * (500 + 2 * 50) * 150
    rounding = 2 * (20 * 20 + 10 * 10) * 150
    rounding += 12 * (10 * 20 * 20 + 30 * 10 * 10) + 3 * (20**3 + 10**3)
    together = TOGETHER if torch.get_num_threads() > 1 else 1
    expected = (forwards / 2000 + rounding / 1000) / EFFICIENCY + 0.25 * 3 * 30 / together
    assert found == {**plain, "sensitivities": pytest.approx(expected)}
    assert list(found) == ["statistics", "sensitivities", "blocks"]


def test_steps_of_admm_by_hand():
    """Of (10, 20) at 1.5 bits: rank 10, 4·200·10 + 4·30·100 + 2·1000/3; of (30, 10) rank 11.25."""
    config = QuantConfig(nsamples=4, seqlen=100, bits=1.5)
    plain, factored = (
        seconds(SHAPES, 0, config, Recipe(factors=steps), SPEED)["blocks"] for steps in (0, 7)
    )
    step = 8000 + 12000 + 2000 / 3 + 4 * 300 * 11.25 + 4 * 40 * 11.25**2 + 2 * 11.25**3 / 3
    assert factored - plain == pytest.approx(7 * step / 1000 / EFFICIENCY)


def test_columns_and_weights_cost_beside_their_arithmetic():
    config, slow = (
        QuantConfig(nsamples=4, seqlen=100),
        dataclasses.replace(SPEED, column=3, entry=5),
    )
    plain, found = (seconds(SHAPES, 50, config, Recipe(), speed) for speed in (SPEED, slow))
    together = TOGETHER if torch.get_num_threads() > 1 else 1
    assert found["blocks"] - plain["blocks"] == pytest.approx((3 * 30 + 5 * 500) / together)
    assert found["statistics"] == plain["statistics"]


def test_more_effort_takes_longer():
    found = []
    for effort in ("fast", "default", "best"):
        config = QuantConfig(effort=effort)
        recipe = methods.get(config.method, config).recipe(config)
        found.append(sum(seconds(SHAPES, 50, config, recipe, SPEED).values()))
    assert found[0] < found[1] < found[2]


@pytest.mark.usefixtures("measured_speed")
def test_the_speed_of_this_machine_is_one_a_machine_can_have():
    speed = measured("waterfill")
    assert 1e7 < speed.model < 1e16
    assert 1e7 < speed.single < 1e16
    assert 1e-7 < speed.column < 0.1
    assert 0 <= speed.entry < 1e-3
    assert 0 <= speed.quicker < 0.5  # no sweeps over the codes, and smaller trellises
    assert measured("nanoquant").column == 0.0


def measured(name: str) -> Speed:
    config = QuantConfig(name, bits=1.02)  # fewer than the scales of the trial's layers need
    recipe = methods.recipe_of(methods.get(name, config), config)
    return Speed.measure(torch.bfloat16, torch.device("cpu"), recipe, config)


@pytest.mark.parametrize(
    ("s", "text"), [(3.4, "3 s"), (89, "89 s"), (120, "2 min"), (5300, "88 min"), (9000, "2.5 h")]
)
def test_durations_are_as_exact_as_they_can_be(s, text):
    assert duration(s) == text
