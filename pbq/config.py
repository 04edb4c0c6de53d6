"""QuantConfig: what was asked. Frozen, validated once, written into the checkpoint."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pbq.errors import UsageError

EFFORTS = ("fast", "default", "best")
EMBED_BITS = (0, 4, 8)
CRITERIA = ("damage", "absmax", "mean-abs", "hessian", "magnitude")
# Calibration segments, where nobody says how many.
NSAMPLES = 64


@dataclass(frozen=True)
class QuantConfig:
    """Every choice that changes the bytes of the result.

    method: a file of pbq/methods.
    bits: the promise, stored bits per quantized weight (docs/format.md says what counts).
    effort: how long to optimise, fast | default | best.
    nsamples, seqlen: calibration segments and tokens in each; nsamples -1: 64, and more of a longer
        text where the method gains from them (Recipe.rows).
    calib: text file, jsonl file, datasets id, or "self" (text sampled from the model).
    group_size: columns per group of scales; -1 leaves it to the method, which is the row for most.
    block_size: columns per lazy update of the GPTQ sweep; does not change the result.
    percdamp: damping of H, as a share of its mean diagonal (GPTQ's name).
    criterion: how salient channels or weights are ranked: damage (ours); of ptq161 absmax (the
        paper's code) and mean-abs (its text); of pb-llm hessian and magnitude (the paper's).
    salient_share: share of salient weights, at most; 0 is as many as the bits allow.
    faithful: the paper's own recipe, whatever bits it then stores.
    block_epochs: passes over the calibration rows that train each block; -1: as the effort says.
    distil_steps: steps of 1,024 tokens that train all blocks together; -1: as the effort says.
    token_noise: share of the tokens of a calibration text that are replaced by others of the
        vocabulary, <unk> by made-up words besides; -1 leaves it to the method.
    embed_bits: 8 or 4 pack the embeddings and the head, rounded to nearest, at so many bits and
        their scales, which `bits` does not count; 0 leaves them as they are.
    preprocess: a packed checkpoint of the same model; its weights, restored by LoRA, are quantized
        in place of the model's own, which stays the teacher (PTQ1.61's preprocessing).
    seed: of sampling, shuffling and held-out rows.
    """

    method: str = "waterfill"
    bits: float = 1.61
    effort: str = "default"
    nsamples: int = -1
    seqlen: int = 1024
    calib: str = "self"
    group_size: int = -1
    block_size: int = 128
    percdamp: float = 0.01
    criterion: str = "damage"
    salient_share: float = 0.0
    faithful: bool = False
    block_epochs: float = -1.0
    distil_steps: int = -1
    token_noise: float = -1.0
    preprocess: str = ""
    embed_bits: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bits", "percdamp", "salient_share", "block_epochs", "token_noise"):
            # bits=2 and bits=2.0 are one run: the same fingerprint, the same recipe.
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (math.isfinite(self.bits) and 0 < self.bits <= 8):
            raise UsageError(f"--bits {self.bits}: expected a number above 0 and at most 8")
        if self.effort not in EFFORTS:
            raise UsageError(f"--effort {self.effort}: expected one of {', '.join(EFFORTS)}")
        if self.criterion not in CRITERIA:
            raise UsageError(f"--criterion {self.criterion}: expected one of {', '.join(CRITERIA)}")
        if self.embed_bits not in EMBED_BITS:
            raise UsageError(f"--embed-bits {self.embed_bits}: expected 8, 4 or 0 (as they are)")
        if self.nsamples != -1 and self.nsamples < 1:
            raise UsageError(f"--nsamples {self.nsamples}: expected at least 1, or -1 (by method)")
        for name, least in (("seqlen", 8), ("block_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {getattr(self, name)}: expected at least {least}")
        for name in ("block_epochs", "distil_steps"):
            if not (getattr(self, name) == -1 or 0 <= getattr(self, name) < math.inf):
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option} {getattr(self, name)}: expected 0 or more, or -1 (by --effort)"
                )
        if self.group_size != -1 and self.group_size < 8:
            raise UsageError(f"--group-size {self.group_size}: expected -1 (row) or at least 8")
        if not 0 <= self.salient_share < 1:
            raise UsageError(f"--salient-share {self.salient_share}: expected a share from 0 to 1")
        if self.token_noise != -1 and not 0 <= self.token_noise < 1:
            raise UsageError(
                f"--token-noise {self.token_noise}: expected a share from 0 to 1, or -1 (by method)"
            )
        if not 0 < self.percdamp < 1:
            raise UsageError(f"--percdamp {self.percdamp}: expected a share between 0 and 1")

    @property
    def segments(self) -> int:
        """Calibration segments that there must be."""
        return NSAMPLES if self.nsamples == -1 else self.nsamples

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
