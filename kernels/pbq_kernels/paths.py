"""The path of a trellis (trellis.py) that is nearest to a column, by Viterbi's algorithm.

Compiled from trellis.c where there is a C compiler; in torch, far slower, where there is none.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pbq_kernels import cpu
from pbq_kernels.trellis import POLYNOMIALS


def nearest_path(x: Tensor, scale: Tensor, planes: int, memory: int) -> Tensor:
    """The path of levels nearest to each row of x [c, n], a column of the weight: codes uint8.

    Levels scale[r] * (2 code - steps) of `planes` planes, 2 to 8; scale [n]. Viterbi's algorithm by
    the compiled kernels, on the CPU wherever x is, or by torch where there are none (`compiled`).
    """
    library = compiled()
    if library is None:
        return nearest_path_naive(x, scale, planes, memory)
    x_cpu = x.detach().to("cpu", torch.float32).contiguous()
    scale_cpu = scale.detach().to("cpu", torch.float32).contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    threads = torch.get_num_threads() if codes.numel() > 2**15 else 1
    failed = library.pbq_trellis(
        *(x_cpu.data_ptr(), scale_cpu.data_ptr(), *x.shape, planes, memory),
        *(*POLYNOMIALS[memory], codes.data_ptr(), threads),
    )
    if failed:
        raise MemoryError(f"no memory for the paths of {x.shape[0]} columns")
    return codes.to(x.device)


def compiled() -> ctypes.CDLL | None:
    """The library that holds the fast search, if this machine has it."""
    found = cpu.compiled()
    return None if isinstance(found, cpu.LibraryError) else found


def nearest_path_naive(x: Tensor, scale: Tensor, planes: int, memory: int) -> Tensor:
    """`nearest_path` in torch, one row of the weight after the other: the slow truth."""
    h1, h0 = POLYNOMIALS[memory]
    states, steps, top = 2**memory, 2**planes - 1, 2 ** (planes - 2) - 1
    # a register: the path's last `memory` bits, the newest lowest, then the bit that enters
    register = torch.arange(2 * states)
    parity = torch.tensor([[(r & h).bit_count() & 1 for h in (h1, h0)] for r in register.tolist()])
    label = (2 * parity[:, 0] + parity[:, 1]).to(x.device)
    position = torch.where(scale != 0, x / scale, 0.0).float()
    q = torch.arange(4, device=x.device)
    rest = (((position[..., None] + steps) / 2 - q) / 4).round().clamp(0, top)
    found = (q + 4 * rest).long()  # [c, n, 4]: the nearest code of each label
    distance = (position[..., None] - (2 * found - steps)).pow(2) * scale[:, None].pow(2)
    cost = torch.full((len(x), states), torch.inf, device=x.device)
    cost[:, 0] = 0
    new = torch.arange(states, device=x.device)
    before = torch.stack([new >> 1, new >> 1 | states >> 1])  # [2, states]
    taken = label[before << 1 | (new & 1)]
    decisions = []
    for r in range(x.shape[1]):
        both = cost[:, before] + distance[:, r][:, taken]  # [c, 2, states]
        decisions.append(both[:, 1] < both[:, 0])
        cost = both.amin(1)
    state = cost.argmin(1)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for r in reversed(range(x.shape[1])):
        high = decisions[r].gather(1, state[:, None])[:, 0].long()
        came = before[high, state]
        chosen = label[came << 1 | (state & 1)]
        codes[:, r] = found[:, r].gather(1, chosen[:, None])[:, 0].to(torch.uint8)
        state = came
    return codes
