"""KL divergences of next-token distributions and their gradients: the loss of distillation.

Compiled from divergence.c for bfloat16 on CPUs, where there is a C compiler; in torch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbq_kernels.paths import compiled


def divergence(
    student: Tensor, target: Tensor, gamma: float = 0.0, *, gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(KL(target || student) [tokens], entropy of the target [tokens], gradient [tokens, v]).

    student, target: logits [tokens, v]. KL and entropy in nats, float32; the gradient is that of
    each token's KL times entropy**gamma by the student's logits, in their dtype, or None where it
    is not wanted. Raises ValueError where the two do not fit.
    """
    if student.ndim != 2 or student.shape != target.shape:
        raise ValueError(f"student: {tuple(student.shape)}, target: {tuple(target.shape)}")
    library = compiled()
    on_cpu = student.device.type == target.device.type == "cpu"
    if library is None or not on_cpu or not student.dtype == target.dtype == torch.bfloat16:
        return divergence_naive(student, target, gamma, gradient=gradient)
    student, target = student.detach().contiguous(), target.detach().contiguous()
    kl, entropy = (student.new_empty(len(student), dtype=torch.float32) for _ in range(2))
    found = torch.empty_like(student) if gradient else None
    library.pbq_divergence(
        *(student.data_ptr(), target.data_ptr(), *student.shape, gamma),
        *(kl.data_ptr(), entropy.data_ptr(), None if found is None else found.data_ptr()),
        torch.get_num_threads() if student.numel() > 2**15 else 1,
    )
    return kl, entropy, found


def divergence_naive(
    student: Tensor,
    target: Tensor,
    gamma: float = 0.0,
    chunk: int | None = None,
    *,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`divergence` in torch, on any device, `chunk` tokens at a time.

    A vocabulary of 50,000 in float32 would otherwise take gigabytes, and on a CPU as few as stay in
    its cache.
    """
    chunk = chunk or (8 if student.device.type == "cpu" else 128)
    kl, entropy = (student.new_empty(len(student), dtype=torch.float32) for _ in range(2))
    found = torch.empty_like(student) if gradient else None
    for start in range(0, len(student), chunk):
        some = slice(start, start + chunk)
        log_q = student[some].float().log_softmax(-1)
        log_p = target[some].float().log_softmax(-1)
        p = log_p.exp()
        kl[some] = (p * (log_p - log_q)).sum(-1)
        entropy[some] = -(p * log_p).sum(-1)
        if found is not None:
            found[some] = (log_q.exp_() - p) * entropy[some, None].clamp(min=0) ** gamma
    return kl, entropy, found
