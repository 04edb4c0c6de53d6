"""The floors of the house: imports run down only, loading stays lean, `--help` stays instant."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import pbq modules of its own floor and of the floors below.
FLOORS: dict[str, int] = {
    "pbq_kernels.layout": 0,
    "pbq_kernels.scales": 0,
    "pbq_kernels.trellis": 0,
    "pbq_kernels.levels": 1,
    "pbq_kernels": 1,
    "pbq.errors": 2,
    "pbq.config": 2,
    "pbq.grid": 2,
    "pbq.hessian": 2,
    "pbq.gptq": 2,
    "pbq.allocate": 2,
    "pbq.pack": 2,
    "pbq.ranks": 2,
    "pbq.heap": 2,
    "pbq.threads": 2,
    "pbq.compensation": 3,
    "pbq.methods": 3,
    "pbq.tunable": 3,
    "pbq.tune": 3,
    "pbq.disk": 4,
    "pbq.work": 4,
    "pbq.sources": 4,
    "pbq.recipes": 4,
    "pbq.stored": 4,
    "pbq.linear": 4,
    "pbq.embedding": 4,
    "pbq.rounding": 4,
    "pbq.experts": 4,
    "pbq.routing": 4,
    "pbq.hf": 4,
    "pbq": 4,
    "pbq.models": 4,
    "pbq.loader": 4,
    "pbq.spill": 4,
    "pbq.remembering": 4,
    "pbq.shards": 4,
    "pbq.memory": 4,
    "pbq.finished": 4,
    "pbq.bfloat16": 4,
    "pbq.attention": 4,
    "pbq.own_text": 4,
    "pbq.calibrate": 4,
    "pbq.checkpoint": 4,
    "pbq.importance": 5,
    "pbq.sensitivity": 5,
    "pbq.blocks": 5,
    "pbq.blockwise": 5,
    "pbq.planning": 5,
    "pbq.preprocessing": 5,
    "pbq.pipeline": 5,
    "pbq.evaluate": 5,
    "pbq.scoring": 5,
    "pbq.compare": 5,
    "pbq.contents": 5,
    "pbq.forecast": 5,
    "pbq.report": 5,
    "pbq.html_report": 5,
    "pbq.plots": 5,
    "pbq.samples": 5,
    "pbq.selftest": 5,
    "pbq.distilling": 5,
    "pbq.finetune": 5,
    "pbq.export": 5,
    "pbq.gguf_export": 5,
    "pbq.benchmark": 5,
    "pbq.publish": 5,
    "pbq.generation": 5,
    "pbq.demo": 5,
    "pbq.console": 6,
    "pbq.__main__": 6,
    "pbq.cli": 6,
    "pbq.cli_options": 6,
    "pbq.cli_bench": 6,
    "pbq.cli_compare": 6,
    "pbq.cli_finetune": 6,
    "pbq.cli_share": 6,
    "pbq.cli_use": 6,
    "pbq.lm_eval": 6,
    "pbq_cli": 6,
}
# What loading a packed model and generating with it must not pull in.
NOT_FOR_LOADING = (
    "pbq.calibrate",
    "pbq.hessian",
    "pbq.gptq",
    "pbq.tune",
    "pbq.methods",
    "pbq.pipeline",
    "pbq.evaluate",
    "pbq.cli",
    "datasets",
    "lm_eval",
    "typer",
    "rich",
)


def modules() -> dict[str, Path]:
    """Every module of the project, by import name."""
    found = {"pbq_cli": ROOT / "pbq_cli.py"}
    for top in (ROOT / "pbq", ROOT / "kernels" / "pbq_kernels"):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def floor(module: str) -> int:
    """The floor of the module, else of the package it lies in."""
    while module not in FLOORS:
        module, _, last = module.rpartition(".")
        assert module, f"{last} stands on no floor: give it one in FLOORS"
        if module == "pbq":
            pytest.fail(f"pbq.{last} stands on no floor: give it one in FLOORS")
    return FLOORS[module]


def imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Import names of everything the code imports, inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in known else base


@pytest.mark.parametrize("module", modules())
def test_imports_run_down_only(module: str) -> None:
    known = modules()
    own = floor(module)
    for name in imported(ast.parse(known[module].read_text()), known):
        if name.split(".")[0] in ("pbq", "pbq_kernels", "pbq_cli"):
            assert floor(name) <= own, f"{module} (floor {own}) imports {name} ({floor(name)})"


@pytest.mark.parametrize("module", [m for m in modules() if floor(m) <= 3])
def test_the_lower_floors_are_tensors_only(module: str) -> None:
    known = modules()
    tree = ast.parse(known[module].read_text())
    outside = {name.split(".")[0] for name in imported(tree, known)} - sys.stdlib_module_names
    allowed = {"torch", "numpy", "triton", "jaxtyping", "pbq", "pbq_kernels"}
    if module.startswith("pbq_kernels"):
        allowed -= {"pbq"}
    if floor(module) == 0:  # the format
        allowed = {"torch", "pbq_kernels"}
    assert outside <= allowed


def test_every_floor_is_inhabited() -> None:
    assert FLOORS.keys() <= modules().keys()


def test_kernels_is_no_package() -> None:
    """transformers imports a PyPI package called kernels: a package here would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code: str) -> str:
    """Output of a fresh interpreter in the repository root."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_pbq_registers_and_loads_nothing_else() -> None:
    """From the repository root, where a careless folder name would break transformers itself."""
    out = run(
        "import sys, transformers, pbq\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        f"print('pbq' in known, [m for m in {NOT_FOR_LOADING!r} if m in sys.modules])"
    )
    assert out.split("\n")[0] == "True []"


def test_generation_loads_nothing_that_quantizes() -> None:
    out = run(
        f"import sys, pbq.generation\nprint([m for m in {NOT_FOR_LOADING!r} if m in sys.modules])"
    )
    assert out == "[]\n"


def test_the_command_does_not_wait_for_transformers() -> None:
    start = time.monotonic()
    out = run(
        "import sys, pbq_cli\n"
        "print([m for m in ('torch', 'transformers', 'pbq.hf') if m in sys.modules])"
    )
    assert out == "[]\n"
    # 0.2 s on an idle machine; with torch it would be several seconds
    assert time.monotonic() - start < 3
