"""QuantConfig: validated once, frozen, and JSON in and out."""

import dataclasses
import json
import math

import pytest

from pbq.config import CRITERIA, EFFORTS, QuantConfig
from pbq.errors import UsageError


def test_the_promise_is_the_default():
    assert QuantConfig().bits == 1.61
    assert QuantConfig().method == "waterfill"


@pytest.mark.parametrize(
    ("field", "bad", "option"),
    [
        ("bits", 0.0, "--bits"),
        ("bits", -1.0, "--bits"),
        ("bits", 8.001, "--bits"),
        ("bits", math.nan, "--bits"),
        ("bits", math.inf, "--bits"),
        ("effort", "heroic", "--effort"),
        ("criterion", "mean_abs", "--criterion"),
        ("nsamples", 0, "--nsamples"),
        ("seqlen", 7, "--seqlen"),
        ("block_size", 0, "--block-size"),
        ("seed", -1, "--seed"),
        ("group_size", 0, "--group-size"),
        ("group_size", 7, "--group-size"),
        ("group_size", -2, "--group-size"),
        ("block_epochs", -0.5, "--block-epochs"),
        ("block_epochs", math.inf, "--block-epochs"),
        ("distil_steps", -2, "--distil-steps"),
        ("embed_bits", 2, "--embed-bits"),
        ("token_noise", -0.1, "--token-noise"),
        ("token_noise", 1.0, "--token-noise"),
        ("percdamp", 0.0, "--percdamp"),
        ("percdamp", 1.0, "--percdamp"),
        ("percdamp", math.nan, "--percdamp"),
    ],
)
def test_a_bad_value_is_refused_by_its_option_name(field, bad, option):
    with pytest.raises(UsageError, match=rf"^{option} {bad}: expected") as caught:
        QuantConfig(**{field: bad})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "edge",
    [
        {"bits": 8.0},
        {"bits": 1e-9},
        {"nsamples": 1, "seqlen": 8, "block_size": 1},
        {"group_size": -1},
        {"group_size": 8},
        *({"effort": effort} for effort in EFFORTS),
        *({"criterion": criterion} for criterion in CRITERIA),
    ],
)
def test_values_on_the_edge_are_taken(edge):
    config = QuantConfig(**edge)
    assert {name: getattr(config, name) for name in edge} == edge


def test_a_whole_number_is_the_same_run_as_its_float():
    assert json.dumps(QuantConfig(bits=2).to_dict()) == json.dumps(QuantConfig(bits=2.0).to_dict())


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().bits = 2.0


def test_json_round_trip_is_equal_and_complete():
    config = QuantConfig(bits=1.7, calib="text.txt", group_size=64, faithful=True, seed=3)
    data = json.loads(json.dumps(config.to_dict()))
    assert QuantConfig(**data) == config
    assert set(data) == {f.name for f in dataclasses.fields(QuantConfig)}
