"""How long a run will take, before it starts: its arithmetic over this machine's speed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pbq import methods, preprocessing
from pbq.allocate import ChannelStats, PlanInput
from pbq.attention import torch_has_tiles
from pbq.bfloat16 import fast_products
from pbq.calibrate import STATISTICS_ROWS, most_rows
from pbq.config import QuantConfig
from pbq.sensitivity import HESSIAN_TOKENS, LENGTH, SEGMENTS, quicker
from pbq.tune import STEP_TOKENS, Recipe

# Share of the speed of bare matmuls that whole stages reach, attention, rounding and optimiser
# included. Measured with SmolLM2-135M on two cores (docs/methods.md). Of bfloat16 on a CPU with
# AMX, whose tiles outrun what is around them, less.
EFFICIENCY = 0.6
EFFICIENCY_OF_TILES = 0.3
# Linears of a block that share their input share its second moments: 4 inputs for 7 linears.
INPUTS_PER_LINEAR = 4 / 7
# How many linears of a block are rounded at once, on average: those of one input are (threads.py).
TOGETHER = 1.4

# Two layers [n, k] that are rounded to learn what rounding takes, with at least so many bits: of
# layers this small the scales alone need more than is asked of a model.
TRIALS = (64, 256), (512, 256)
TRIAL_BITS = 2.5


@dataclass(frozen=True)
class Speed:
    """How fast this machine is.

    model, single: floating-point operations a second of a large matmul, in the model's dtype and
    in float32. reached: share of `model` that whole stages reach.
    column, entry: seconds that rounding takes beside its matmuls, for each column of a linear
    (calls to small operations, whose size hardly matters) and each weight. quicker: what is left of
    either as sensitivities round.
    """

    model: float
    single: float
    column: float = 0.0
    entry: float = 0.0
    quicker: float = 1.0
    reached: float = EFFICIENCY

    @staticmethod
    def measure(
        dtype: torch.dtype, device: torch.device, recipe: Recipe, config: QuantConfig
    ) -> Speed:
        """Takes about a second. Weights in the product form round no columns."""
        found = Speed(_matmul_rate(dtype, device), _matmul_rate(torch.float32, device))
        if device.type == "cpu" and dtype == torch.bfloat16 and torch_has_tiles():
            found = dataclasses.replace(found, reached=EFFICIENCY_OF_TILES)
        if recipe.factors:
            return found
        config = dataclasses.replace(config, bits=max(config.bits, TRIAL_BITS))
        (few, k), (many, _) = TRIALS

        def beside_matmuls(n: int, *, quick: bool = False) -> float:
            spent = _rounding_seconds(n, k, device, recipe, config, quick=quick)
            return spent - _rounding_operations(n, k) / found.single / EFFICIENCY

        small, large = beside_matmuls(few), beside_matmuls(many)
        entry = max(0.0, large - small) / (k * (many - few))
        column = max(0.0, small / k - entry * few)
        left = 1.0
        if recipe.sensitivity and large > 0:
            left = min(1.0, max(0.0, beside_matmuls(many, quick=True)) / large)
        return dataclasses.replace(found, entry=entry, column=column, quicker=left)


def _rounding_seconds(
    n: int, k: int, device: torch.device, recipe: Recipe, config: QuantConfig, *, quick: bool
) -> float:
    """Of one linear [n, k] of random weights and inputs. quick: as sensitivities round."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n, k, generator=generator).to(device)
    X = torch.randn(2 * k, k, generator=generator) * torch.linspace(0.2, 2, k)
    X = X.to(device)
    H = X.T @ X / len(X)
    stats = ChannelStats(H.diagonal(), X.abs().amax(0), X.abs().mean(0), torch.ones_like(W[:, 0]))
    method = methods.get(config.method, config)
    plan = method.plan({"trial": PlanInput(W, stats)}, config)["trial"]
    if quick:
        recipe, plan = quicker(recipe, plan)
    started = time.perf_counter()
    rebuilt, _, _ = methods.rebuild(method, recipe, config, plan, W, H)
    float(rebuilt.dequantize()[0, 0])  # waits for the device
    return time.perf_counter() - started


def _rounding_operations(n: int, k: int) -> float:
    """Closed form, error feedback, joint scales and a sweep over the codes: about 12 n k²."""
    return 12 * n * k * k + 3 * k**3


def _matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """The best of six: other jobs only ever slow it down, and the first one starts threads."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        with fast_products():
            found = a @ b
        float(found[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def seconds(
    shapes: Mapping[str, tuple[int, int]],
    head: int,
    config: QuantConfig,
    recipe: Recipe,
    speed: Speed,
) -> dict[str, float]:
    """Seconds of each stage. shapes: [n, k] of every quantized linear; head: weights of the head.

    A forward pass takes 2 operations a weight and token, a backward pass 4. Calibration text that
    is sampled from the model, and scoring, are not included.
    """
    speed = dataclasses.replace(
        speed, model=speed.model * speed.reached, single=speed.single * EFFICIENCY
    )
    weights = sum(n * k for n, k in shapes.values())
    rows = most_rows(config, recipe)
    tokens = rows * config.seqlen
    statistics = 2 * (weights + head) * min(STATISTICS_ROWS, rows) * config.seqlen
    fitted = min(tokens, recipe.hessian_tokens)
    # both streams once; the quantized one again for each input, which takes a block in all
    forwards = 2 * 2 * weights * tokens + 2 * weights * fitted
    if recipe.importance:  # backwards to the activations alone
        forwards += 2 * weights * fitted
    moments = sum(2 * k * k * fitted * INPUTS_PER_LINEAR for _, k in shapes.values())
    rounding = sum(_rounding_operations(n, k) for n, k in shapes.values())
    rounding += sum(_factoring(n, k, config.bits) for n, k in shapes.values()) * recipe.factors
    if recipe.compensate and recipe.compensate_damp == 0:  # eigenvectors of each input's moments
        rounding += sum(16 * k**3 * INPUTS_PER_LINEAR for _, k in shapes.values())
    blocks = (forwards + moments) / speed.model + (moments + rounding) / speed.single
    found = {"statistics": statistics / speed.model}
    if recipe.sensitivity:
        judged = SEGMENTS[config.effort] * LENGTH
        found["sensitivities"] = _sensitivities(shapes, head, tokens, judged, speed)
    found["blocks"] = blocks
    if recipe.block is not None:
        seen = max(recipe.block.epochs * rows, recipe.block.steps * recipe.batch) * config.seqlen
        found["blocks"] += 6 * weights * seen / speed.model
    if config.preprocess:
        # the frozen weights have no gradients of their own
        step = STEP_TOKENS * (4 * weights + 6 * head)
        found["preprocessing"] = preprocessing.STEPS[config.effort] * step / speed.model
    if recipe.distillation is not None:
        steps = recipe.distillation.steps
        operations = steps * STEP_TOKENS * (6 * weights + 8 * head)
        # the original model: its head alone, on kept hidden states, but the whole on further text
        # and, where blocks have seen another one, on all
        seen = steps * STEP_TOKENS
        if config.calib == "self":
            seen = 0
        elif not recipe.token_noise:
            seen = round(seen * seen / (tokens + seen))
        operations += 2 * weights * seen
        found["distillation"] = operations / speed.model
    columns = sum(k * speed.column + n * k * speed.entry for n, k in shapes.values())
    columns /= TOGETHER if torch.get_num_threads() > 1 else 1
    for stage, share in ("blocks", 1.0), ("sensitivities", speed.quicker):
        if stage in found:
            found[stage] += columns * share
    return found


def _sensitivities(
    shapes: Mapping[str, tuple[int, int]], head: int, tokens: int, judged: int, speed: Speed
) -> float:
    """Of pbq.sensitivity: each linear rounded alone, then on average half the model behind it."""
    weights, fitted = sum(n * k for n, k in shapes.values()), min(tokens, HESSIAN_TOKENS)
    compared = min(tokens, judged)
    forwards = 4 * weights * fitted + len(shapes) * (weights + 2 * head) * compared
    rounding = sum(2 * k * k * fitted + _rounding_operations(n, k) for n, k in shapes.values())
    return forwards / speed.model + rounding / speed.single


def _factoring(n: int, k: int, bits: float) -> float:
    """A step of ADMM on a product of the rank that the bits hold: two regressions."""
    rank = bits * n * k / (n + k)
    return 4 * n * k * rank + 4 * (n + k) * rank**2 + 2 * rank**3 / 3


def in_words(stages: Mapping[str, float]) -> str:
    """Of `seconds`: "12 min (statistics 26 s, blocks 11 min)"."""
    each = ", ".join(f"{stage} {duration(s)}" for stage, s in stages.items())
    return f"{duration(sum(stages.values()))} ({each})"


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
