"""Every method, and every paper's recipe, from a tiny model to a checkpoint that loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pbq import checkpoint, methods
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.pipeline import quantize


def recipes() -> list[QuantConfig]:
    """Of every method: its own at 3.5 bits, and the paper's where there is one."""
    found = []
    for name in methods.names():
        found.append(QuantConfig(method=name, bits=3.5, effort="fast"))
        paper = QuantConfig(method=name, effort="fast", faithful=True)
        try:
            methods.get(name, paper)
        except UsageError:
            continue
        found.append(paper)
    # ptq161's own takes 20 epochs and is met in test_pipeline
    return [c for c in found if not (c.faithful and c.method == "ptq161")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return path


@pytest.mark.parametrize("config", recipes(), ids=lambda c: c.method + "-faithful" * c.faithful)
def test_a_model_is_quantized_and_loads(
    config: QuantConfig, text: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = {**config.to_dict(), "calib": str(text), "nsamples": 2, "seqlen": 16}
    report = quantize(str(tiny_checkpoint("llama")), tmp_path / "out", QuantConfig(**asked))
    found = checkpoint.verify(tmp_path / "out")
    assert found.stored_bits == pytest.approx(report.bits, abs=1e-6)
    assert found.asked_bits == (None if config.faithful else 3.5)
    errors = [layer["error"] for block in report.blocks for layer in block["layers"].values()]
    assert len(errors) == 21 and max(errors) < 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(16)[None]).logits).all()
    if config.method == "pb-llm":
        layers = checkpoint.read_layers(tmp_path / "out").values()
        assert all(layout.overlay for layout in layers)
    if config.method == "db-llm":
        assert "zeros in the two planes" in report.rows()


def test_the_noise_asked_for_takes_the_place_of_the_methods() -> None:
    def noise(**options: object) -> float:
        config = QuantConfig(**options)  # type: ignore[arg-type]
        return methods.recipe_of(methods.get(config.method, config), config).token_noise

    assert noise() == 0.1
    assert noise(token_noise=0) == 0
    assert noise(token_noise=0.25) == 0.25
    assert noise(method="ptq161") == 0
    assert noise(method="ptq161", token_noise=0.25) == 0.25


def test_sensitivities_are_measured_where_the_whole_model_is_wanted_anyway():
    def measured(**options):
        config = QuantConfig(**options)
        return methods.recipe_of(methods.get(config.method, config), config).sensitivity

    assert measured() and measured(effort="fast") and measured(effort="best")
    assert not measured(distil_steps=0) and not measured(effort="fast", distil_steps=0)
    assert not measured(method="ptq161", effort="best")


def test_the_training_asked_for_takes_the_place_of_the_efforts() -> None:
    def trained(**options: object) -> tuple[float | None, int | None]:
        config = QuantConfig(**options)  # type: ignore[arg-type]
        recipe = methods.recipe_of(methods.get(config.method, config), config)
        block, distillation = recipe.block, recipe.distillation
        return block and block.epochs, distillation and distillation.steps

    assert trained(block_epochs=0.5, distil_steps=7) == (0.5, 7)
    assert trained(block_epochs=0, distil_steps=0) == (None, None)
    assert trained(effort="fast")[0] is None
    assert trained(effort="fast", block_epochs=1) == (1, trained(effort="fast")[1])
    assert trained(method="ptq161") == (None, None)
    assert trained(method="ptq161", block_epochs=3) == (3, None)
    assert trained(method="rtn", bits=3.5, block_epochs=0, distil_steps=0) == (None, None)
    for option in ({"block_epochs": 1.0}, {"distil_steps": 5}):
        with pytest.raises(UsageError, match="rtn has no use for it"):
            trained(method="rtn", bits=3.5, **option)
