"""pbq binarizes Hugging Face causal LMs after training.

`import pbq` teaches transformers to load packed checkpoints: `AutoModelForCausalLM.from_pretrained`
then builds PackedLinears. `pbq.load(path)` is the same call with a check of what the path holds.
`pbq.quantize(model, out, pbq.QuantConfig(bits=1.61))` is `pbq quantize`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbq.config import QuantConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__version__ = "0.1.0"
__all__ = ["QuantConfig", "__version__", "load", "quantize"]

# Registering takes transformers, seconds of imports that `pbq --help` must not cost. There is no
# plug-in group, so importing pbq has to do it, with one exception: the console script enters by
# the top-level module pbq_cli, and there whoever loads a packed model imports pbq.hf.
if "pbq_cli" not in sys.modules:
    import pbq.hf  # noqa: F401


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The packed checkpoint at `path`; keywords as for AutoModelForCausalLM.from_pretrained.

    Raises pbq.errors.ModelError when it is not one that pbq packed, or is damaged.
    """
    from pbq import hf

    return hf.load(str(path), **kwargs)


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    ppl: str | Path | None = None,
    windows: int | None = 40,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Quantize a causal LM into the directory `out`, and return it: `pbq.load(out)` loads it.

    model: hub id, local directory or .gguf file. ppl: text file; perplexity before and after, over
    `windows` windows, goes into out/report.json, which says what else was stored and measured. A
    run that was interrupted goes on when it is called again. Raises pbq.errors.PbqError.
    """
    # by name: what quantizes is loaded when it is asked for, and by nothing that only loads models
    pipeline = importlib.import_module("pbq.pipeline")
    pipeline.quantize(
        str(model),
        Path(out),
        config or QuantConfig(),
        device=device,
        ppl_text=None if ppl is None else Path(ppl),
        ppl_windows=windows,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    return Path(out)
