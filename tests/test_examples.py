"""The examples run, as written, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import pbq
from pbq import checkpoint, methods
from pbq.errors import UsageError
from pbq_kernels.layout import Tier

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return path


def test_generate(
    packed_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(packed_checkpoint("llama"))
    monkeypatch.setattr(sys, "argv", ["generate.py", path, "Once"])
    runpy.run_path(str(EXAMPLES / "generate.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("Once")


def test_two_methods_side_by_side(tiny_checkpoint: Callable[[str], Path], text: Path) -> None:
    compare = example("compare_methods").compare
    options = {"bits": 4.0, "nsamples": 2, "seqlen": 16, "effort": "fast"}
    found = compare(str(tiny_checkpoint("llama")), str(text), str(text), **options)
    names = list(found)
    assert names[0] == "unquantized" and [n.split(",")[0] for n in names[1:]] == ["ptq161", "rtn"]
    assert all(float(name.split()[1]) <= 4 for name in names[1:])
    assert all(200 < ppl < 400 for ppl in found.values())  # random weights, 272 tokens


def test_a_method_of_your_own(
    tiny_checkpoint: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    own = str(EXAMPLES / "own_method.py")
    config = pbq.QuantConfig(own, bits=2.0, calib=str(text), nsamples=2, seqlen=16)
    out = pbq.quantize(tiny_checkpoint("llama"), tmp_path / "out", config)
    layouts = checkpoint.read_layers(out)
    assert len(layouts) == 21
    assert all(layout.tiers == (Tier(1, layout.k),) for layout in layouts.values())
    checkpoint.verify(out)
    assert pbq.load(str(out)).config.quantization_config.method == own
    assert f"method: {own}" in (out / "recipe.yaml").read_text()
    assert json.loads((out / "report.json").read_text())["paper_bits"] == 1


def test_a_file_that_is_no_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        methods.get(str(tmp_path / "gone.py"), pbq.QuantConfig())
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UsageError, match=r"defines no method\(config\)"):
        methods.get(str(tmp_path / "empty.py"), pbq.QuantConfig())
