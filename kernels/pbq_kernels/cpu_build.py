"""Compiles the C files beside it into the library that cpu.py loads. Standard library only.

The wheel's build hook runs this file where neither torch nor pbq_kernels is installed. In a source
checkout: `python -m pbq_kernels.cpu_build`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")
# Flags of a file's own: without these, what is chosen by comparing numbers is not vectorized.
SOURCES = {
    SOURCE: (),
    SOURCE.with_name("products.c"): (),
    SOURCE.with_name("floats.c"): (),
    SOURCE.with_name("attention.c"): (),
    SOURCE.with_name("levels.c"): (),
    SOURCE.with_name("divergence.c"): ("-fno-trapping-math",),
    SOURCE.with_name("trellis.c"): ("-ffinite-math-only", "-fno-signed-zeros"),
}
HEADERS = SOURCE.with_name("weight.h"), SOURCE.with_name("tiles.h")
LIBRARY = Path(__file__).with_name("_cpu.so")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fvisibility=hidden")


class BuildError(RuntimeError):
    """There is no C compiler, or it refused a source. The message says which."""


def source_hash() -> str:
    """Identifies the sources: 16 hex digits. Built into the library, so a stale one is noticed."""
    text = b"".join(source.read_bytes() for source in (*HEADERS, *SOURCES))
    return hashlib.sha256(text).hexdigest()[:16]


def compiler() -> list[str]:
    """$CC, or the first of cc, gcc and clang on the path. Raises BuildError."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C compiler was found (cc, gcc or clang; $CC names another)")


def build(library: Path = LIBRARY) -> Path:
    """Compile the sources into `library`, replacing it in one step. Raises BuildError."""
    command = compiler()
    with tempfile.TemporaryDirectory() as folder:
        linked = _compile(command, Path(folder))
        # the folder may be on another file system, and a process may have the old library open
        beside = library.with_name(f"{library.name}.{os.getpid()}.tmp")
        shutil.copyfile(linked, beside)
        os.replace(beside, library)
    return library


def _compile(command: Sequence[str], folder: Path) -> Path:
    """OpenMP is compiled in but not linked: its symbols resolve to the runtime torch has loaded, so
    there is never a second pool of threads. clang's OpenMP calls another runtime: it goes without.
    """
    define = f'-DPBQ_SOURCE_HASH="{source_hash()}"'
    linked = folder / "cpu.so"
    openmp = [] if _is_clang(command) else ["-fopenmp"]
    objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
    for (source, own), compiled in zip(SOURCES.items(), objects, strict=True):
        flags = [*FLAGS, *own, *openmp, define]
        _run([*command, *flags, "-c", str(source), "-o", compiled])
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    _run([*command, "-shared", *undefined, *objects, "-o", str(linked), "-lm"])
    return linked


def _is_clang(command: Sequence[str]) -> bool:
    return "clang" in _run([*command, "--version"])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise BuildError(f"the C compiler {command[0]!r} does not run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr.strip()}") from error
    return done.stdout


if __name__ == "__main__":
    try:
        print(f"built {build()}")
    except BuildError as error:
        sys.exit(f"pbq_kernels: {error}")
