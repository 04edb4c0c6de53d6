"""A recipe says every option of a run, and reads back as it was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pbq import recipes
from pbq.config import QuantConfig

RUN = {"ppl": None, "windows": 40, "device": "cpu"}


def test_every_option_is_written_and_read_back(tmp_path: Path) -> None:
    config = QuantConfig(bits=2, calib="self", seed=3, faithful=True, block_size=64).to_dict()
    text = recipes.to_yaml({"pbq": "0.1.0", "model": "some/one"}, {**config, **RUN})
    (tmp_path / "recipe.yaml").write_text(text)
    written = yaml.safe_load(text)
    assert written["group-size"] == -1 and written["model"] == "some/one"
    found = recipes.read(tmp_path / "recipe.yaml")
    assert found == {**config, **{k: v for k, v in RUN.items() if v is not None}}
    assert found.keys() >= {field.name for field in dataclasses.fields(QuantConfig)}


def test_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki.txt").write_text("a")
    (tmp_path / "out").mkdir()
    joined = yaml.safe_load(recipes.to_yaml({}, {"calib": "wiki.txt+self+gone.txt"}))
    assert joined == {"calib": f"{tmp_path / 'wiki.txt'}+self+gone.txt"}
    given = {"calib": "wiki.txt", "ppl": "gone.txt", "device": "wiki.txt", "preprocess": "out"}
    assert yaml.safe_load(recipes.to_yaml({}, given)) == {
        **given, "calib": str(tmp_path / "wiki.txt"), "preprocess": str(tmp_path / "out"),
    }  # fmt: skip


@settings(deadline=None)
@given(st.text(), st.floats(min_value=0.5, max_value=8))
@example("caf\N{LATIN SMALL LETTER E WITH ACUTE} \x85 \u2028", 1.61)
def test_any_value_survives(
    tmp_path_factory: pytest.TempPathFactory, calib: str, bits: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(recipes.to_yaml({}, {"bits": bits, "device": calib}), encoding="utf-8")
    assert recipes.read(path) == {"bits": bits, "device": calib}
