"""The path of a trellis (trellis.py) that is nearest to a column, by Viterbi's algorithm.

Compiled from trellis.c where there is a C compiler; in torch, far slower, where there is none.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pbq_kernels import cpu
from pbq_kernels.trellis import POLYNOMIALS, plane_codes, sums


def nearest_path(
    x: Tensor, scale: Tensor, planes: int, memory: int, uneven: bool = False
) -> Tensor:
    """The path of levels nearest to each row of x [c, n], a column of the weight: codes uint8.

    Levels scale[r] * (2 code - steps) of `planes` planes, 2 to 8, or the uneven ones of trellis.py;
    scale [n]. Viterbi's algorithm by the compiled kernels, on the CPU wherever x is, or by torch
    where there are none (`compiled`).
    """
    library = compiled()
    if library is None:
        return nearest_path_naive(x, scale, planes, memory, uneven)
    x_cpu, scale_cpu = _on_cpu(x), _on_cpu(scale)
    codes = x_cpu.new_empty(x.shape, dtype=torch.uint8)
    threads = torch.get_num_threads() if codes.numel() > 2**15 else 1
    table = _table(planes) if uneven else None
    failed = library.pbq_trellis(
        *(x_cpu.data_ptr(), scale_cpu.data_ptr(), *x.shape, planes, memory),
        *(*POLYNOMIALS[memory], table, codes.data_ptr(), threads),
    )
    return _found(failed, codes, planes, uneven, x)


def nearest_paths_in_turn(
    x: Tensor,
    A: Tensor,
    start: Tensor | None,
    scale: Tensor,
    planes: int,
    memory: int,
    uneven: bool = False,
) -> Tensor:
    """Codes [b, n] of columns x [b, n] rounded one after the other, errors made up for. In place.

    x[i] -= A[j, i] * (what x[j] became - start[j]) for all i behind j, start being x itself, as it
    is by then, where it is None; x is left as each was just before its path was searched. A [b, b].
    The rest as for `nearest_path`, one column at a time in torch where there is no compiler.
    """
    library = compiled()
    if library is None:
        return nearest_paths_in_turn_naive(x, A, start, scale, planes, memory, uneven)
    x_cpu, A_cpu, scale_cpu = _on_cpu(x), _on_cpu(A.T), _on_cpu(scale)
    start_cpu = None if start is None else _on_cpu(start)
    codes = x_cpu.new_empty(x.shape, dtype=torch.uint8)
    failed = library.pbq_trellis_in_turn(
        *(x_cpu.data_ptr(), A_cpu.data_ptr(), None if start_cpu is None else start_cpu.data_ptr()),
        *(scale_cpu.data_ptr(), *x.shape, planes, memory, *POLYNOMIALS[memory]),
        *(_table(planes) if uneven else None, codes.data_ptr()),
    )
    found = _found(failed, codes, planes, uneven, x)
    if x_cpu.data_ptr() != x.data_ptr():
        x.copy_(x_cpu)
    return found


def nearest_paths_in_turn_naive(
    x: Tensor,
    A: Tensor,
    start: Tensor | None,
    scale: Tensor,
    planes: int,
    memory: int,
    uneven: bool = False,
) -> Tensor:
    """`nearest_paths_in_turn` in torch."""
    level = torch.tensor([level for level, _ in sorted(sums(planes, uneven), key=lambda s: s[1])])
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for j, own in enumerate(x):
        codes[j] = nearest_path(own[None], scale, planes, memory, uneven)[0]
        became = level.to(x.device, torch.float32)[codes[j].long()] * scale
        x[j + 1 :] -= torch.outer(A[j, j + 1 :], became - (own if start is None else start[j]))
    return codes


def _on_cpu(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32).contiguous()


def _found(failed: int, codes: Tensor, planes: int, uneven: bool, like: Tensor) -> Tensor:
    """What a compiled search found, as codes of planes, on like's device."""
    if failed:
        raise MemoryError(f"no memory for the paths of {len(codes)} columns")
    if uneven:
        codes = plane_codes(planes, True, codes.device)[codes.long()]
    return codes.to(like.device)


@cache
def _table(planes: int) -> Any:
    """Uneven levels, rising, as the compiled search takes them."""
    return (ctypes.c_float * 2**planes)(*(level for level, _ in sums(planes, True)))


def compiled() -> ctypes.CDLL | None:
    """The library that holds the fast search, if this machine has it."""
    found = cpu.compiled()
    return None if isinstance(found, cpu.LibraryError) else found


def nearest_path_naive(
    x: Tensor, scale: Tensor, planes: int, memory: int, uneven: bool = False
) -> Tensor:
    """`nearest_path` in torch, one row of the weight after the other: the slow truth."""
    h1, h0 = POLYNOMIALS[memory]
    states, steps = 2**memory, 2**planes - 1
    level = torch.arange(-steps, steps + 1, 2, dtype=torch.float32, device=x.device)
    if uneven:
        level = torch.tensor([v for v, _ in sums(planes, True)], dtype=torch.float32).to(x.device)
    # a register: the path's last `memory` bits, the newest lowest, then the bit that enters
    register = torch.arange(2 * states)
    parity = torch.tensor([[(r & h).bit_count() & 1 for h in (h1, h0)] for r in register.tolist()])
    label = (2 * parity[:, 0] + parity[:, 1]).to(x.device)
    position = torch.where(scale != 0, x / scale, 0.0).float()
    labelled = level.view(-1, 4).T.contiguous()  # [4, levels of each label]
    found = torch.stack(
        [
            4 * torch.searchsorted((own[1:] + own[:-1]) / 2, position.contiguous()) + q
            for q, own in enumerate(labelled)
        ],
        -1,
    )  # [c, n, 4]: the nearest code of each label, the lower of two equally near
    distance = (position[..., None] - level[found]).pow(2) * scale[:, None].pow(2)
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
    return plane_codes(planes, True, x.device)[codes.long()] if uneven else codes
