"""recipe.yaml: every option of a run, so that `pbq quantize MODEL --recipe FILE` repeats it.

A flat list of options under their names on the command line. Those that have no option there
(block-size) can be set here too.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pbq.config import QuantConfig
from pbq.errors import DataError, UsageError

FILE_NAME = "recipe.yaml"
# Of a run beside those of QuantConfig: option and the type of its value. Not --trust-remote-code: a
# recipe that came with a model must not let the model's code run.
RUN_OPTIONS = {"ppl": str, "windows": int, "device": str}
# Options that may name a file or a directory, and how it is told from another value.
_PATHS = {
    "calib": Path.is_file,
    "ppl": Path.is_file,
    "method": Path.is_file,
    "preprocess": Path.is_dir,
}
# Not options but what the recipe was written for.
_ABOUT = ("model", "pbq")


def to_yaml(about: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """The recipe of a run. Paths are made absolute: OUT is not where the run was started."""
    lines = {name: _absolute(name, value) for name, value in options.items() if value is not None}
    written = {**about, **{name.replace("_", "-"): value for name, value in lines.items()}}
    head = "# Repeats this run: pbq quantize MODEL OUT --recipe recipe.yaml\n"
    return head + yaml.safe_dump(written, sort_keys=False)


def _absolute(name: str, value: Any) -> Any:
    is_path = _PATHS.get(name)
    if not is_path or not value:
        return value
    if is_path(Path(value)):
        return str(Path(value).resolve())
    parts = value.split("+") if name == "calib" else [value]  # texts joined, as in "wiki.txt+self"
    return "+".join(str(Path(p).resolve()) if is_path(Path(p)) else p for p in parts)


def read(path: Path) -> dict[str, Any]:
    """Options of a recipe by their Python names. Raises DataError, UsageError for unknown ones."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split()):.120})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a list of options, as `bits: 1.61`")
    given = {str(name): value for name, value in found.items() if name not in _ABOUT}
    return {name.replace("-", "_"): _checked(path, name, value) for name, value in given.items()}


def _checked(path: Path, name: str, value: Any) -> Any:
    kinds = {f.name: type(f.default) for f in dataclasses.fields(QuantConfig)} | RUN_OPTIONS
    kind = kinds.get(name.replace("-", "_"))
    if kind is None:
        near = difflib.get_close_matches(name, [n.replace("_", "-") for n in kinds], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{path}: {name} is no option{hint}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{path}: {name} is {value!r:.40}, expected {kind.__name__}")
    return value
