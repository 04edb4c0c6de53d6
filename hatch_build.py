"""Build hook: compiles the C kernels into the wheel, or beside them for an editable install."""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Without a C compiler the package is still built, pure Python, and one warning says so."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        recipe = _load(Path(self.root) / "kernels" / "pbq_kernels" / "cpu_build.py")
        library = recipe.LIBRARY
        if version != "editable":
            self._folder = tempfile.TemporaryDirectory()  # kept until the wheel is written
            library = Path(self._folder.name) / library.name
        try:
            recipe.build(library)
        except recipe.BuildError as error:
            self.app.display_warning(f"built without the compiled CPU kernels: {error}")
            return
        # No CPython symbol is used, so one wheel serves every Python of this platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data.update(pure_python=False, tag=f"py3-none-{platform}")
        if version != "editable":
            build_data["force_include"][str(library)] = f"pbq_kernels/{library.name}"


def _load(path: Path) -> ModuleType:
    """The module at `path`, without its package: that needs torch, which is not here."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
