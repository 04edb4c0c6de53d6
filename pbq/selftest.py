"""One forward pass, recorded when a model is packed and repeated by `pbq verify`.

Checksums say that the bytes are those that were written; this says that they still make the same
model: the tokenizer gives the same tokens, and the model, loaded anew, the same logits.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from pbq.disk import CheckpointError, read_json, reading, size_text
from pbq.errors import ResourceError, is_out_of_memory
from pbq.models import compute_dtype, load_model, most_positions, pick_device
from pbq.sources import resolve_source

log = logging.getLogger(__name__)

FILE_NAME = "selftest.json"
TEXT = "The quick brown fox jumps over the lazy dog; 3 x 14 = 42."
POSITIONS, TOP = 16, 8
# Allowed root mean square difference of the recorded logits, in standard deviations of all logits.
# Backends and devices sum in another order; a layer that is read wrongly changes logits by about a
# standard deviation.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}


@dataclass(frozen=True)
class Outcome:
    """difference: root mean square over the recorded logits, in standard deviations of all."""

    positions: int
    difference: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.positions} positions, logits within {self.difference:.1e} of their spread "
            f"({self.tolerance:g} allowed)"
        )


def record(
    out: Path,
    device: str = "auto",
    trust_remote_code: bool = False,
    memory: int | None = None,
) -> None:
    """Load the packed model in `out`, run it, and write OUT/selftest.json.

    Holds the tokens of TEXT and the TOP logits at each of them. Not written, with a warning, when
    the packed model does not fit into `memory`, the bytes that may be used if not all there are: no
    run may be lost to its own check.
    """
    needed = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    available = psutil.virtual_memory().available
    if needed > (available if memory is None else min(memory, available)):
        log.warning("%s: no logits recorded, %s do not fit into memory", out, size_text(needed))
        return
    try:
        model, tokenizer = _load(out, device, trust_remote_code)
        ids = _ids(tokenizer, model)
        logits = _logits(model, ids)
    except Exception as error:
        if not isinstance(error, ResourceError) and not is_out_of_memory(error):
            raise
        log.warning("%s: no logits recorded, memory ran out (%s)", out, error)
        return
    top = logits.topk(min(TOP, logits.shape[-1]))
    recorded = {
        "text": TEXT,
        "ids": ids,
        "dtype": _name(model.dtype),
        "spread": float(logits.std()),
        "tokens": top.indices.tolist(),
        "logits": [[float(f"{x:.7g}") for x in row] for row in top.values.tolist()],
    }
    (out / FILE_NAME).write_text(json.dumps(recorded) + "\n", encoding="utf-8")


def _load(out: Path, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    source, where = resolve_source(str(out)), pick_device(device)
    dtype = compute_dtype(source, where)
    return load_model(source, dtype, where, trust_remote_code, packed=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ids(tokenizer: Any, model: Any) -> list[int]:
    most = min(POSITIONS, most_positions(model.config) or POSITIONS)
    found: list[int] = tokenizer(TEXT).input_ids[:most]
    return found


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:
    """float32 [positions, vocabulary]."""
    device = model.get_input_embeddings().weight.device
    found: Tensor = model(torch.tensor([ids], device=device), use_cache=False).logits
    return found[0].float().cpu()


def check(out: Path | str, device: str = "auto", trust_remote_code: bool = False) -> Outcome | None:
    """Load OUT and repeat the pass; None where none was recorded.

    Raises CheckpointError when tokens or logits are others, ModelError when OUT cannot be loaded.
    """
    out = Path(out)
    path = out / FILE_NAME
    if not path.exists():
        return None
    recorded = read_json(path)
    model, tokenizer = _load(out, device, trust_remote_code)
    with reading(path):
        ids = _ids(tokenizer, model)
        if ids != recorded["ids"]:
            raise CheckpointError(
                f"{out}: the tokenizer gives other tokens than when it was packed"
            )
        tokens, values = torch.tensor(recorded["tokens"]), torch.tensor(recorded["logits"])
        if not (
            tokens.shape == values.shape and len(tokens) == len(ids) and recorded["spread"] > 0
        ):
            raise CheckpointError(f"{path}: not a record of {len(ids)} positions")
        found = _logits(model, ids).gather(1, tokens)
        difference = float((found - values).pow(2).mean().sqrt()) / recorded["spread"]
        tolerance = max(TOLERANCE[_name(model.dtype)], TOLERANCE[recorded["dtype"]])
    if not difference <= tolerance:
        raise CheckpointError(
            f"{out}: logits differ by {difference:.3g} of their spread from those recorded when it "
            f"was packed, {tolerance:g} is allowed: the model's code or a kernel computes otherwise"
        )
    return Outcome(len(ids), difference, tolerance)
