"""PTQ1.61's preprocessing (Zhao et al., ACL 2025): weights that are easier to quantize.

What the paper does: the model is quantized once and made dense again; LoRA on all linears but the
attention's output is trained on the next token and merged; the result is quantized in place of the
original, which is discarded. Here the original stays: it is the teacher of what follows and what
the result is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbq import hf
from pbq.bfloat16 import fast_products
from pbq.errors import UsageError
from pbq.models import find_blocks, find_linears
from pbq.tune import STEP_TOKENS, Progress, Schedule, held_out

RANK, ALPHA, DROPOUT, RATE = 64, 16, 0.1, 1e-4
# Of STEP_TOKENS tokens; the paper takes 10,000 of two documents of up to 2,048 tokens.
STEPS = {"fast": 30, "default": 300, "best": 3000}
# Names that the attention's output projection has.
_LEFT_OUT = ("o_proj", "out_proj")


@dataclass(frozen=True)
class Restored:
    """blocks: for each, the tensors to start from. before, after: nats a held-out token."""

    blocks: list[dict[str, Tensor]]
    before: float
    after: float


def restored(
    packed: str,
    rows: Sequence[Tensor],
    blocks: nn.ModuleList,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    progress: Progress | None = None,
) -> Restored:
    """The weights of the packed checkpoint, LoRA trained on rows [b, L] of ids and merged.

    blocks: those of the original model, which the result must fit. Raises UsageError where it does
    not, or without peft.
    """
    peft = _peft()
    model = hf.load(packed, device_map={"": device}).dequantize()
    name, own = find_blocks(model)
    _check_fits(packed, own, blocks)
    linears = [n for n in find_linears(own) if not n.endswith(_LEFT_OUT)]
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=[f"{name}.{linear}" for linear in linears],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, lora)
        before, after = _train(wrapped, rows, steps, progress)
    merged = wrapped.merge_and_unload()
    _, own = find_blocks(merged)
    return Restored([{n: t.cpu() for n, t in b.state_dict().items()} for b in own], before, after)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            f"--preprocess needs peft ({error}): pip install 'pbq-llm[preprocess]'"
        ) from error
    return peft


def _check_fits(packed: str, own: nn.ModuleList, blocks: nn.ModuleList) -> None:
    found, wanted = ({n: t.shape for n, t in b.state_dict().items()} for b in (own, blocks))
    if found != wanted:
        raise UsageError(f"--preprocess {packed}: not made from this model; its blocks differ")


@fast_products()
def _train(
    model: Any, rows: Sequence[Tensor], steps: int, progress: Progress | None
) -> tuple[float, float]:
    """On the next token; the loss on held-out rows before and after."""
    unseen = held_out(len(rows))
    train = [row for i, row in enumerate(rows) if i not in unseen]
    judged = [rows[i] for i in unseen] or train
    schedule = Schedule([([p for p in model.parameters() if p.requires_grad], RATE)], steps)
    before = _score(model, judged)
    model.train()
    for step in range(steps):
        if step % len(train) == 0:
            order = torch.randperm(len(train)).tolist()
        row = train[order[step % len(train)]]
        schedule.step(model(row, labels=row, use_cache=False).loss)
        if progress:
            progress(step + 1, steps)
    return before, _score(model, judged)


@torch.no_grad()
def _score(model: Any, rows: Sequence[Tensor]) -> float:
    model.eval()
    return sum(float(model(row, labels=row, use_cache=False).loss) for row in rows) / len(rows)


def rows_of(ids: Tensor) -> list[Tensor]:
    """Calibration ids [N, L] in steps of STEP_TOKENS tokens."""
    return list(ids.split(max(1, STEP_TOKENS // ids.shape[1])))
