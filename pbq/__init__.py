"""pbq binarizes Hugging Face causal LMs after training.

`import pbq` teaches transformers to load packed checkpoints: `AutoModelForCausalLM.from_pretrained`
then builds PackedLinears. `pbq.load(path)` is the same call with a check of what the path holds.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

# Registering takes transformers, seconds of imports that `pbq --help` must not cost. There is no
# plug-in group, so importing pbq has to do it, with one exception: the console script enters by
# the top-level module pbq_cli, and there whoever loads a packed model imports pbq.hf.
if "pbq_cli" not in sys.modules:
    import pbq.hf  # noqa: F401


def load(path: str, **kwargs: Any) -> PreTrainedModel:
    """The packed checkpoint at `path`; keywords as for AutoModelForCausalLM.from_pretrained.

    Raises pbq.errors.ModelError when it is not one that pbq packed, or is damaged.
    """
    from pbq import hf

    return hf.load(path, **kwargs)
