"""A plain checkpoint with the same values: exact, loadable without pbq, never half there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pbq
from pbq import hf, linear
from pbq.errors import UsageError
from pbq.export import export
from pbq.models import weight_of


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "bfloat16"), ("gpt2", "bfloat16"), ("gpt2", "float32"), ("opt", "float32")],
)
def test_the_dense_model_has_the_packed_values(
    architecture: str,
    dtype: str,
    packed_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gpt2 keeps its weights transposed, and adds a bias before it rounds to bfloat16."""
    out, dense = packed_checkpoint(architecture), tmp_path / "dense"
    done = export(out, dense, dtype)
    monkeypatch.setattr(linear, "_backend_name", "reference")
    target = getattr(torch, dtype)
    packed = pbq.load(str(out), dtype=target)
    plain = AutoModelForCausalLM.from_pretrained(dense)
    assert plain.dtype == target and not list(hf.packed_linears(plain))
    for name, module in hf.packed_linears(packed):
        assert torch.equal(weight_of(plain.get_submodule(name)), module.dequantize(target)), name
    ids = torch.arange(40)[None]
    loose = {"atol": 0.02, "rtol": 0.05} if dtype == "bfloat16" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(plain(ids).logits, packed(ids).logits, **loose)
    assert done.nbytes == (dense / "model.safetensors").stat().st_size
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(dense)("Hi").input_ids
    assert "packed" in (dense / "README.md").read_text()


def test_it_loads_without_pbq(packed_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    export(packed_checkpoint("llama"), dense)
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "m, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "print(info['missing_keys'], info['unexpected_keys'], 'pbq' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(dense)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.endswith("False\n") and "{'" not in done.stdout, done.stderr


def test_what_describes_the_packed_model_stays_with_it(
    packed_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(packed_checkpoint("llama"), out)
    for name in ("report.json", "report.html", "recipe.yaml", "LICENSE"):
        (out / name).write_text("{}")
    export(out, tmp_path / "dense")
    found = {p.name for p in (tmp_path / "dense").iterdir()}
    assert "LICENSE" in found and not found & {"report.json", "report.html", "recipe.yaml"}


def test_an_unfinished_run_beside_it_is_left_alone(
    packed_checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`pbq quantize MODEL dense` works in dense.partial, for hours."""
    (tmp_path / "dense.123-0.tmp").mkdir()
    block = tmp_path / "dense.partial" / "block-0.safetensors"
    block.parent.mkdir()
    block.write_text("hours")
    export(packed_checkpoint("llama"), tmp_path / "dense")
    assert block.read_text() == "hours"
    assert f"{tmp_path / 'dense.123-0.tmp'} is there" in caplog.text
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"dense", "dense.partial", "dense.123-0.tmp"}


def test_refusals_leave_nothing(
    packed_checkpoint: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, dense = packed_checkpoint("llama"), tmp_path / "dense"
    with pytest.raises(UsageError, match="--dtype int4"):
        export(out, dense, "int4")
    with pytest.raises(UsageError, match="exists"):
        export(out, tmp_path)
    with pytest.raises(Exception, match="not a checkpoint that pbq packed"):
        export(tiny_checkpoint("llama"), dense)
    monkeypatch.setattr("pbq.export.copy_auxiliary", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(out, dense)
    assert list(tmp_path.iterdir()) == []


def _interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt
