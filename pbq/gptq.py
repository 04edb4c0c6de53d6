"""The one GPTQ loop: error feedback over tiers, coarse tier first; then scales and codes polished.

Frantar et al. 2022, Algorithm 1, with three changes that were measured on SmolLM2-135M (README):
the coarse tiers are rounded first, so that the precise columns absorb their error; the grid of a
tier is fitted when the sweep reaches it, on the weights as compensated by then; afterwards all
scales of a row are refitted together in the H metric and codes are revisited one column at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from pbq.grid import (
    Grid,
    Overlay,
    QuantizedWeight,
    TierGrid,
    plane_weights,
    signs,
    stored,
    stored_scale,
)
from pbq.hessian import damp, inverse_cholesky
from pbq_kernels.layout import Tier

# fit(W [n, c] of a tier, weight [c], tier, row [n, k]: all columns as compensated) -> Grid that is
# representable in float16. With an overlay, weight is [n, c] and zero where an entry is not on it.
Fit = Callable[[Tensor, Tensor, Tier, Tensor], Grid]
# Joint least squares solves one small system a row; formats with hundreds of groups keep their fit.
MAX_JOINT_SCALES = 24


@dataclass(frozen=True, eq=False)
class Run:
    """Columns that share one grid, as a slice of the processing order."""

    tier: int
    group: int
    columns: int


def processing_order(
    tiers: Sequence[Tier], tier_of: UInt8[Tensor, " k"], importance: Float[Tensor, " k"]
) -> tuple[Tensor, list[Run]]:
    """(order int64 [k], runs): coarse tiers first, and in a tier the most important column first.

    A tier with groups keeps its storage order, since a group is a run of stored columns.
    """
    order, runs = [], []
    for t in sorted(range(len(tiers)), key=lambda t: tiers[t].planes):
        columns = (tier_of == t).nonzero(as_tuple=True)[0]
        if len(columns) == 0:
            continue
        if tiers[t].groups == 1:
            columns = columns[torch.argsort(importance[columns], descending=True, stable=True)]
        order.append(columns)
        sizes = torch.bincount(tiers[t].group_of_column()).tolist()
        runs += [Run(t, group, size) for group, size in enumerate(sizes)]
    return torch.cat(order), runs


def reconstruct(
    W: Float[Tensor, "n k"],
    U: Float[Tensor, "k k"],
    tiers: Sequence[Tier],
    runs: Sequence[Run],
    fit: Fit,
    *,
    block_size: int = 128,
    overlay: Overlay | None = None,
) -> tuple[UInt8[Tensor, "n k"], list[Grid], Float[Tensor, "n k"]]:
    """One sweep of error feedback. Everything is in processing order, which `runs` partitions.

    Returns the codes, one grid per run, and the compensated weights as they were just before each
    was rounded. U is the upper Cholesky factor of the damped inverse Hessian, H⁻¹ = UᵀU. Updates to
    later columns are collected over `block_size` columns, which does not change the result. The
    values of the overlay are rounded along, in place.
    """
    W = W.clone()
    codes = torch.zeros(W.shape, dtype=torch.uint8, device=W.device)
    grids: list[Grid] = []
    start = 0
    for run in runs:
        stop = start + run.columns
        grids.append(_fitted(fit, W, U, slice(start, stop), tiers[run.tier], overlay))
        for i1 in range(start, stop, block_size):
            i2 = min(i1 + block_size, stop)
            part = overlay and overlay.columns(slice(i1, i2))
            Err = _round_block(W[:, i1:i2], U[i1:i2, i1:i2], grids[-1], codes[:, i1:i2], part)
            W[:, i2:] -= Err @ U[i1:i2, i2:]
        start = stop
    return codes, grids, W


def _fitted(
    fit: Fit, W: Tensor, U: Tensor, run: slice, tier: Tier, overlay: Overlay | None
) -> Grid:
    # 1/U_jj² is the loss per squared rounding error once later columns compensate for it
    weight = U.diagonal()[run] ** -2
    if overlay is not None:
        weight = weight * ~overlay.mask[:, run]
    return fit(W[:, run], weight, tier, W)


def _round_block(
    W_B: Tensor, U_BB: Tensor, grid: Grid, codes: Tensor, overlay: Overlay | None = None
) -> Tensor:
    """Round a block of columns in place, one by one with feedback; return Err = (W-Q) U_BB⁻¹."""
    columns = W_B.T.contiguous()  # [b, n]: the loop walks columns, which are rows in memory here
    U_jj = U_BB.diagonal()[:, None]
    # what column j leaves, (w - w_hat) / U_jj, takes U[j, i] of itself off column i
    codes_B, values = grid.nearest_in_turn(columns, -U_BB / U_jj, overlay=overlay)
    codes.copy_(codes_B.T)
    W_B.copy_(columns.T)
    return ((columns - values) / U_jj).T


def reconstruct_naive(
    W: Tensor,
    U: Tensor,
    tiers: Sequence[Tier],
    runs: Sequence[Run],
    fit: Fit,
    overlay: Overlay | None = None,
) -> tuple[Tensor, list[Grid]]:
    """One column at a time, nothing deferred: the slow truth for `reconstruct`."""
    W, codes, grids = W.clone(), torch.zeros_like(W, dtype=torch.uint8), []
    start = 0
    for run in runs:
        stop = start + run.columns
        weight = U.diagonal()[start:stop] ** -2
        if overlay is not None:
            weight = torch.where(overlay.mask[:, start:stop], 0.0, weight)
        grid = fit(W[:, start:stop], weight, tiers[run.tier], W)
        for j in range(start, stop):
            codes[:, j : j + 1] = grid.codes(W[:, j : j + 1])
            w_hat = grid.decode(codes[:, j : j + 1])[:, 0]
            if overlay is not None:
                for row in overlay.mask[:, j].nonzero()[:, 0]:
                    value = (W[row, j] / overlay.scale[row]).round().clamp(-127, 127)
                    overlay.value[row, j] = value.to(torch.int8)
                    w_hat[row] = value * overlay.scale[row]
            error = (W[:, j] - w_hat) / U[j, j]
            # spread the rounding error over the columns not yet rounded
            W[:, j + 1 :] -= torch.outer(error, U[j, j + 1 :])
        grids.append(grid)
        start = stop
    return codes, grids


def reconstruct_jointly(
    W: Float[Tensor, "n k"],
    U: Float[Tensor, "k k"],
    tiers: Sequence[Tier],
    tier_of: UInt8[Tensor, " k"],
    fit: Fit,
    *,
    block_size: int = 128,
) -> tuple[UInt8[Tensor, "n k"], list[Run], list[Grid], Float[Tensor, "n k"]]:
    """Blocks of columns in their own order, each rounded at once: Err = (W - Q) / diag(U).

    As BiLLM, ARB-LLM and HBLLM are coded. Columns rounded together should send (W - Q) U_BB⁻¹ to
    the rest, as `reconstruct` does; their formula leaves the block's own correlation out. A grid is
    fitted when the first block reaches it. Returns codes, groups, their grids, compensated weights.
    """
    W, codes = W.clone(), torch.zeros(W.shape, dtype=torch.uint8, device=W.device)
    group_of = torch.zeros_like(tier_of, dtype=torch.int64)
    for t, tier in enumerate(tiers):
        group_of[tier_of == t] = tier.group_of_column().to(W.device)
    found: dict[tuple[int, int], Grid] = {}
    for i1 in range(0, W.shape[1], block_size):
        i2 = min(i1 + block_size, W.shape[1])
        Q = W[:, i1:i2].clone()
        block = zip(tier_of[i1:i2].tolist(), group_of[i1:i2].tolist(), strict=True)
        for t, g in sorted(set(block)):
            mine = (tier_of == t) & (group_of == g)
            if (t, g) not in found:
                found[t, g] = fit(W[:, mine], U.diagonal()[mine] ** -2, tiers[t], W)
            here = mine[i1:i2]
            codes[:, i1:i2][:, here], Q[:, here] = found[t, g].nearest(W[:, i1:i2][:, here])
        Err = (W[:, i1:i2] - Q) / U.diagonal()[i1:i2]
        W[:, i2:] -= Err @ U[i1:i2, i2:]
    runs = [Run(t, g, int(((tier_of == t) & (group_of == g)).sum())) for t, g in sorted(found)]
    return codes, runs, [found[t, g] for t, g in sorted(found)], W


def quantize_weight(
    W: Float[Tensor, "n k"],
    H: Float[Tensor, "k k"],
    tiers: Sequence[Tier],
    tier_of: UInt8[Tensor, " k"],
    fit: Fit,
    *,
    percdamp: float = 0.01,
    block_size: int = 128,
    sweeps: int = 1,
    feedback: bool = True,
    natural_order: bool = False,
    joint: bool = False,
    salient: Bool[Tensor, "n k"] | None = None,
    column_scale: Float[Tensor, " k"] | None = None,
    scale_bits: int = 16,
    name: str = "weight",
) -> tuple[QuantizedWeight, Float[Tensor, "n k"], float]:
    """One linear from weight and Hessian to codes: sweep, joint scales, `sweeps` of descent.

    Returns the quantized weight, the compensated weights of the sweep (where a latent weight of a
    straight-through estimator should start), and the damping used. sweeps=0 leaves GPTQ's result,
    feedback=False rounds every column on its own, natural_order sorts no columns within a tier,
    joint is `reconstruct_jointly`. salient: entries for the overlay, on a scale taken from W.
    column_scale: what comes off the columns first, representable in float16 and above zero.
    scale_bits: see WeightLayout; the sweep itself rounds on scales of float16.
    """
    if salient is not None and (joint or column_scale is not None):
        raise ValueError("an overlay goes with neither a column scale nor blocks rounded at once")
    tier_of = tier_of.to(W.device)
    # E H Eᵀ of the scaled weight in the scaled metric is that of the weight itself
    unit = torch.ones_like(W[0]) if column_scale is None else column_scale
    W_s, H_s = W / unit, H * unit[:, None] * unit
    importance = H_s.diagonal() * W_s.pow(2).sum(0)
    if natural_order:
        importance = torch.zeros_like(importance)  # the sort is stable
    order, runs = processing_order(tiers, tier_of, importance)
    if joint:
        order = torch.arange(len(H), device=H.device)
    if feedback:
        U, damping = inverse_cholesky(H_s[order][:, order], percdamp, name)
    else:
        U, damping = torch.eye(len(H), device=H.device), 0.0
    overlay = None if salient is None else Overlay.of(W, salient).columns(order)
    if joint:
        codes, runs, grids, compensated = reconstruct_jointly(
            W_s, U, tiers, tier_of, fit, block_size=block_size
        )
    else:
        codes, grids, compensated = reconstruct(
            W_s[:, order], U, tiers, runs, fit, block_size=block_size, overlay=overlay
        )
    inverse = torch.argsort(order)
    qw = QuantizedWeight(
        tuple(tiers),
        tier_of,
        codes[:, inverse],
        _collect(tiers, runs, grids, W),
        column_scale,
        overlay and overlay.columns(inverse),
        scale_bits,
    )
    for grid in qw.grids:
        grid.scale = stored_scale(grid.scale, scale_bits)
    if sweeps:
        H_damped = damp(H, damping)
        refit_scales(W, H_damped, qw)
        for _ in range(sweeps):
            coordinate_descent(W, H_damped, qw, block_size=block_size)
            refit_scales(W, H_damped, qw)
    return qw, compensated[:, inverse] * unit, damping


def _collect(
    tiers: Sequence[Tier], runs: Sequence[Run], grids: Sequence[Grid], like: Tensor
) -> list[TierGrid]:
    """Grids of runs -> stored numbers of tiers, for a weight shaped and placed `like` [n, k]."""
    out = []
    for t, tier in enumerate(tiers):
        mine = [grid for run, grid in zip(runs, grids, strict=True) if run.tier == t]
        stored_planes = min(tier.planes, 1) if tier.tied else tier.planes
        scale, offset = like.new_zeros(len(like), 0, stored_planes), like.new_zeros(len(like), 0)
        tied = tier.tied and tier.planes > 0
        for grid in mine if tied else []:
            weights = plane_weights(tier, like.device)
            if not torch.equal(grid.scale, grid.scale[:, :1] / weights[0] * weights):
                raise ValueError(f"tier {t} ties its planes, but the grid fitted to it does not")
        if mine:
            scale = torch.stack([grid.scale[:, :stored_planes] for grid in mine], 1)
            scale = scale / tier.weights[0] if tied else scale
            offset = torch.stack([grid.offset for grid in mine], 1)
        out.append(TierGrid(scale, offset if tier.offset else None))
    return out


def refit_scales(W: Float[Tensor, "n k"], H: Float[Tensor, "k k"], qw: QuantizedWeight) -> None:
    """All scales and offsets of a row by joint least squares in the H metric, codes unchanged.

    minimise over θ  (w - Bθ)ᵀ H (w - Bθ),  B [k, S] the row's signs. In place, rounded to float16;
    a row that rounding made worse keeps its old numbers. The overlay stays as it is.
    """
    basis = _basis(qw)
    if qw.overlay is not None:
        W = W - qw.overlay.dequantize()  # what is left for the grids to do
    if not 0 < len(basis) <= MAX_JOINT_SCALES:
        return
    n, S = len(W), len(basis)
    A, y = W.new_zeros(n, S, S), W.new_zeros(n, S)
    for i, (columns, values) in enumerate(basis):
        HB = values @ H[columns]  # [n, k]
        y[:, i] = (HB * W).sum(1)
        for j, (other, other_values) in enumerate(basis[: i + 1]):
            A[:, i, j] = A[:, j, i] = (HB[:, other] * other_values).sum(1)
    ridge = 1e-5 * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20)
    A_ridge = A + ridge[:, None, None] * torch.eye(S, device=W.device)
    new = _stored(qw, torch.linalg.solve(A_ridge, y))
    old = _get(qw)
    better = _quadratic(A, y, new) < _quadratic(A, y, old)
    # again, since scales of a byte share an exponent over the rows
    _set(qw, _stored(qw, torch.where(better[:, None], new, old)))


def _stored(qw: QuantizedWeight, theta: Tensor) -> Tensor:
    """Every number of a row [n, S] as it will be stored, in `_basis` order."""
    scales = sum(grid.scale[0].numel() for grid in qw.grids)
    return torch.cat([stored_scale(theta[:, :scales], qw.scale_bits), stored(theta[:, scales:])], 1)


def _quadratic(A: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """The row's loss up to a constant, [n]."""
    return torch.einsum("ns,nst,nt->n", theta, A, theta) - 2 * (theta * y).sum(1)


def _basis(qw: QuantizedWeight) -> list[tuple[Tensor, Tensor]]:
    """(columns, values [n, c]) that each stored number multiplies; none for big groupings."""
    if sum(t.scales + t.offsets for t in qw.tiers) > MAX_JOINT_SCALES:
        return []
    out = []
    for t, tier in enumerate(qw.tiers):
        columns, group_of = qw.columns(t), tier.group_of_column().to(qw.codes.device)
        for group in range(tier.groups):
            chosen = columns[group_of == group]
            sigma = signs(tier.depth, qw.codes.device)[qw.codes[:, chosen].long()]  # [n, c, p]
            if qw.column_scale is not None:
                sigma = sigma * qw.column_scale[chosen, None]
            if tier.tied and tier.planes:
                sigma = (sigma * plane_weights(tier, sigma.device)).sum(-1, keepdim=True)
            out += [(chosen, sigma[..., s]) for s in range(sigma.shape[-1])]
    for t, tier in enumerate(qw.tiers):
        columns, group_of = qw.columns(t), tier.group_of_column().to(qw.codes.device)
        for group in range(tier.offsets):
            chosen = columns[group_of == group]
            one = torch.ones(len(qw.codes), len(chosen), device=qw.codes.device)
            out.append((chosen, one if qw.column_scale is None else one * qw.column_scale[chosen]))
    if qw.overlay is None:
        return out
    on_grid = ~qw.overlay.mask
    return [(chosen, values * on_grid[:, chosen]) for chosen, values in out]


def _get(qw: QuantizedWeight) -> Tensor:
    """Every stored number of a row, [n, S]: all scales, then all offsets, in `_basis` order."""
    parts = [grid.scale.flatten(1) for grid in qw.grids]
    parts += [grid.offset for grid in qw.grids if grid.offset is not None]
    return torch.cat(parts, 1)


def _set(qw: QuantizedWeight, theta: Tensor) -> None:
    start = 0
    for grid in qw.grids:
        size = grid.scale[0].numel()
        grid.scale = theta[:, start : start + size].reshape(grid.scale.shape)
        start += size
    for grid in qw.grids:
        if grid.offset is not None:
            size = grid.offset.shape[1]
            grid.offset = theta[:, start : start + size]
            start += size


def coordinate_descent(
    W: Float[Tensor, "n k"], H: Float[Tensor, "k k"], qw: QuantizedWeight, *, block_size: int = 128
) -> None:
    """Revisit every code once, all others fixed: the level nearest to the loss's minimum. In place.

    Never raises tr(E H Eᵀ). Updates of the gradient (W_hat - W)H outside a block are deferred.
    """
    W_hat = qw.dequantize()
    G = (W_hat - W) @ H
    # a column that is never fed, or is multiplied by zero, has no best code: it keeps its own
    alive = H.diagonal() > 0
    if qw.column_scale is not None:
        alive &= qw.column_scale != 0
    for t, tier in enumerate(qw.tiers):
        columns, group_of = qw.columns(t), tier.group_of_column().to(qw.codes.device)
        for group in range(tier.groups if tier.planes else 0):
            grid = qw.grids[t].grid(tier, group)
            chosen = columns[(group_of == group) & alive[columns]]
            for block in chosen.split(block_size):
                _descend_block(W_hat, G, H, grid, block, qw)


def _descend_block(
    W_hat: Tensor,
    G: Tensor,
    H: Tensor,
    grid: Grid,
    block: Tensor,
    qw: QuantizedWeight,
) -> None:
    H_BB, before = H[block][:, block], W_hat[:, block]
    overlay = qw.overlay and qw.overlay.columns(block)
    # [b, n], as in _round_block; a clone, since .contiguous() would share the memory of a vector
    start, H_jj = before.T.clone(memory_format=torch.contiguous_format), H_BB.diagonal()
    best = start - G[:, block].T.contiguous() / H_jj[:, None]
    scale = None if qw.column_scale is None else qw.column_scale[block]
    codes, values = grid.nearest_in_turn(
        best, H_BB / H_jj, start, column_scale=scale, overlay=overlay
    )
    qw.codes[:, block] = codes.T
    if overlay is not None and qw.overlay is not None:
        qw.overlay.value[:, block] = overlay.value
    W_hat[:, block] = values.T
    G += (values.T - before) @ H[block]
