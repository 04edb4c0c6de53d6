"""`pbq export`: a packed checkpoint as a plain one, for tools that know nothing of pbq."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pbq import hf
from pbq.checkpoint import copy_auxiliary
from pbq.disk import check_space, size_text, unused, writing
from pbq.errors import UsageError

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Exported:
    """dense: the directory that was written; nbytes: of its weight files."""

    dense: Path
    dtype: str
    nbytes: int

    def rows(self) -> dict[str, str]:
        return {"values": self.dtype, "weights": size_text(self.nbytes)}

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dense": str(self.dense)}


def export(
    out: Path | str,
    dense: Path | str,
    dtype: str = "bfloat16",
    *,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the model at `out` with dense weights, rounded once to `dtype`, into `dense`.

    float32 holds the packed values exactly; bfloat16 is what the packed model itself multiplies
    with in bfloat16. The whole dense model is held in memory. `dense` appears when it is whole.
    Raises UsageError when it exists, CheckpointError, ResourceError.
    """
    out, dense = Path(out), Path(dense)
    if dtype not in DTYPES:
        raise UsageError(
            f"--dtype {dtype}: expected one of {', '.join(DTYPES)}; others are for FILE.gguf"
        )
    if dense.exists():
        raise UsageError(f"{dense} exists; choose another directory or remove it")
    target = getattr(torch, dtype)
    model = hf.load(str(out), dtype=target, trust_remote_code=trust_remote_code).dequantize(target)
    check_space(dense, sum(p.numel() * p.element_size() for p in model.parameters()))
    staging = unused(dense)
    try:
        with writing(staging):
            model.save_pretrained(staging)
            copy_auxiliary(out, staging, trust_remote_code=trust_remote_code)
            (staging / "README.md").write_text(_card(out, dtype), encoding="utf-8")
            staging.rename(dense)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Exported(dense, dtype, sum(p.stat().st_size for p in dense.glob("*.safetensors")))


def _card(out: Path, dtype: str) -> str:
    return (
        f"# {out.name}, dense\n\nThe values of a checkpoint that pbq packed, in {dtype}, for tools "
        "that cannot read packed weights.\nIt is as large as the unquantized model and no better "
        "than the packed one.\n"
    )
