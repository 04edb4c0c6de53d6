"""Training scales and codes: exact before the first step, right gradients, never a worse block."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from pbq.grid import QuantizedWeight, TierGrid
from pbq.pack import pack, unpack
from pbq.tunable import Rates, TunableWeight
from pbq.tune import (
    BlockTuning,
    Distillation,
    Schedule,
    distill,
    forward_kl,
    held_out,
    mse_nlc,
    relative_error,
    tune_block,
)
from pbq_kernels.layout import PackedWeight, Tier

RandomPacked = Callable[..., PackedWeight]

MIXED = (Tier(0, 5), Tier(1, 11), Tier(2, 7, offset=True), Tier(4, -1, tied=True))
KINDS = {
    "binary": (Tier(1, -1),),
    "mixed": MIXED,
    "tied with offset": (Tier(1, 20, offset=True), Tier(4, -1, tied=True, offset=True)),
    "groups": (Tier(2, -1, group_size=8, offset=True), Tier(1, 9, group_size=4)),
    "pruned to an offset": (Tier(0, 6, offset=True), Tier(3, -1)),
    "pruned and tied": (Tier(0, 6, tied=True), Tier(3, -1, tied=True)),
    "an empty tier": (Tier(2, 0, offset=True, group_size=8), Tier(1, -1)),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[Tier, ...]:
    return KINDS[request.param]


@pytest.fixture(params=[False, True], ids=["", "column_scale"])
def column_scale(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def drawn(
    random_packed: RandomPacked,
    tiers: tuple[Tier, ...],
    column_scale: bool = False,
    n: int = 7,
    k: int = 37,
) -> QuantizedWeight:
    """A random weight whose plane scales are so different that no two levels are equal."""
    qw = unpack(random_packed(n, k, tiers, column_scale=column_scale))
    for tier, grid in zip(qw.tiers, qw.grids, strict=True):
        if not tier.tied:
            grid.scale = grid.scale * 2.0 ** torch.arange(grid.scale.shape[2])
    return qw


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    packed_a, packed_b = pack(a), pack(b)
    assert packed_a.layout == packed_b.layout
    for name, tensor in packed_a.tensors.items():
        assert torch.equal(tensor, packed_b.tensors[name]), name


def near_its_levels(qw: QuantizedWeight, noise: float = 0.004) -> Tensor:
    """Latent weights that (nearly all) round to the stored codes: scales start at 0.02."""
    generator = torch.Generator().manual_seed(5)
    W = qw.dequantize()
    factor = 1.0 if qw.column_scale is None else qw.column_scale
    return W + factor * noise * torch.randn(W.shape, generator=generator)


# Before anything is trained


def test_starts_at_the_stored_weight(
    kind: tuple[Tier, ...], column_scale: bool, random_packed: RandomPacked
) -> None:
    for n, k in ((7, 37), (1, 29), (33, 63)):
        qw = drawn(random_packed, kind, column_scale, n, k)
        expected = qw.dequantize()
        for latent in (None, near_its_levels(qw)):
            W = TunableWeight(qw, latent)()
            assert W.dtype == torch.float32 and W.shape == (n, k)
            # the order of the additions may differ
            torch.testing.assert_close(W, expected, atol=1e-6, rtol=1e-5)


def test_comes_out_in_the_models_dtype_and_trains_in_float32(
    kind: tuple[Tier, ...], random_packed: RandomPacked
) -> None:
    qw = drawn(random_packed, kind)
    weight = TunableWeight(qw, near_its_levels(qw), dtype=torch.bfloat16)
    W = weight()
    assert W.dtype == torch.bfloat16
    torch.testing.assert_close(W, qw.dequantize().bfloat16(), atol=1e-6, rtol=8e-3)
    W.sum().backward()
    assert {p.grad.dtype for p in weight.parameters() if p.grad is not None} == {torch.float32}
    assert_same(weight.freeze(), qw)


def test_freeze_gives_back_what_was_never_trained(
    kind: tuple[Tier, ...], column_scale: bool, random_packed: RandomPacked
) -> None:
    qw = drawn(random_packed, kind, column_scale)
    assert_same(TunableWeight(qw).freeze(), qw)
    assert_same(TunableWeight(qw, near_its_levels(qw)).freeze(), qw)
    # latent weights that round to quite other codes give way to the stored levels
    wrong = torch.randn(qw.codes.shape, generator=torch.Generator().manual_seed(0))
    assert_same(TunableWeight(qw, wrong).freeze(), qw)


def test_a_latent_weight_is_kept_exactly_where_it_rounds_to_the_stored_code(
    random_packed: RandomPacked,
) -> None:
    qw = drawn(random_packed, (Tier(1, -1),))
    latent = qw.dequantize() * 0.5
    latent[0, :5] *= -1  # rounds to the other sign
    start = TunableWeight(qw, latent).latent[0].detach().T
    assert torch.equal(start[1:], latent[1:]) and torch.equal(start[0, 5:], latent[0, 5:])
    torch.testing.assert_close(start[0, :5], qw.dequantize()[0, :5])


def test_a_column_scale_of_zero_does_not_poison_the_latent_weights(
    random_packed: RandomPacked,
) -> None:
    qw = drawn(random_packed, MIXED, column_scale=True)
    assert qw.column_scale is not None
    qw.column_scale[3] = 0.0
    weight = TunableWeight(qw, qw.dequantize())
    assert torch.isfinite(weight()).all() and not weight()[:, 3].any()
    assert_same(weight.freeze(), qw)


# Gradients


def naive(qw: QuantizedWeight, p: Mapping[str, Tensor]) -> Tensor:
    """The weight one column and one plane at a time in float64, from the same parameters."""
    n, k = qw.codes.shape
    columns: list[Tensor] = [torch.empty(0)] * k
    for t, (tier, grid) in enumerate(zip(qw.tiers, qw.grids, strict=True)):
        for position, column in enumerate(qw.columns(t).tolist()):
            g = 0 if tier.group_size == -1 else position // tier.group_size
            w = torch.zeros(n, dtype=torch.float64)
            scale, unit = grid.scale[:, g].double(), grid.scale[:, g].double().abs().sum(1)
            for plane in range(tier.planes):
                sigma = ((qw.codes[:, column] >> plane) & 1).double() * 2 - 1
                s, power = (0, 2.0**plane) if tier.tied else (plane, 1.0)
                w = w + sigma * power * scale[:, s] * p[f"scale.{t}"][g, s]
            if grid.offset is not None:
                w = w + grid.offset[:, g].double() + unit * p[f"offset.{t}"][g]
            w = w * p["row"]
            if qw.column_scale is not None:
                w = w * qw.column_scale[column].double() * p["column"][column]
            columns[column] = w
    return torch.stack(columns, 1)


def test_gradients_equal_those_of_the_naive_form(
    kind: tuple[Tier, ...], column_scale: bool, random_packed: RandomPacked
) -> None:
    qw = drawn(random_packed, kind, column_scale)
    weight = TunableWeight(qw)
    with torch.no_grad():  # away from the start, where many terms vanish
        for parameter in weight.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    slow = {n: p.detach().double().requires_grad_() for n, p in weight.named_parameters()}
    W = naive(qw, slow)
    C = torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(weight().double(), W, atol=1e-6, rtol=1e-5)
    (C * W.sin()).sum().backward()
    (C.float() * weight().sin()).sum().backward()
    checked = 0
    for name, parameter in weight.named_parameters():
        if slow[name].grad is not None and parameter.numel():
            assert parameter.grad is not None
            torch.testing.assert_close(
                parameter.grad.double(), slow[name].grad, atol=1e-5, rtol=1e-4, msg=name
            )
            checked += 1
    assert checked >= 2


def test_a_latent_weight_gets_the_gradient_of_its_rounded_value(
    column_scale: bool, random_packed: RandomPacked
) -> None:
    qw = drawn(random_packed, MIXED, column_scale)
    weight = TunableWeight(qw, near_its_levels(qw))
    C = torch.randn(qw.codes.shape, generator=torch.Generator().manual_seed(2))
    (C * weight()).sum().backward()
    expected = C if qw.column_scale is None else C * qw.column_scale
    for t, latent in enumerate(weight.latent):
        assert latent.grad is not None
        torch.testing.assert_close(latent.grad, expected[:, qw.columns(t)].T)


@pytest.mark.parametrize("group_size", [-1, 8])
def test_codes_flip_when_their_latent_weights_are_pushed(
    group_size: int, random_packed: RandomPacked
) -> None:
    tiers = (Tier(0, 4), Tier(1, 20, group_size=group_size), Tier(2, -1))
    qw = drawn(random_packed, tiers)
    weight = TunableWeight(qw, qw.dequantize())
    with torch.no_grad():
        weight.latent[1].neg_()
    flipped, binary = weight.freeze(), qw.columns(1)
    assert torch.equal(flipped.codes[:, binary], 1 - qw.codes[:, binary])
    torch.testing.assert_close(weight()[:, binary], -qw.dequantize()[:, binary])
    rest = torch.cat([qw.columns(0), qw.columns(2)])
    assert torch.equal(flipped.codes[:, rest], qw.codes[:, rest])


def test_only_the_tiers_asked_for_move(random_packed: RandomPacked) -> None:
    """As the paper tunes PTQ1.61: 4-bit channels and the mean of the binary ones stay."""
    tiers = (Tier(1, 20, offset=True), Tier(4, -1, tied=True, offset=True))
    qw = drawn(random_packed, tiers, column_scale=True)
    rates = BlockTuning(epochs=1, lr=0.01, row_lr=0.02, offsets=False, only_planes=1)
    weight = TunableWeight(qw, rates=rates)
    schedule = Schedule(weight.groups(rates), 5, constant=True)
    for _ in range(5):
        schedule.step(weight().sum())
    end = weight.freeze()
    fine, binary = qw.columns(1), qw.columns(0)
    assert torch.equal(end.dequantize()[:, fine], qw.dequantize()[:, fine])
    assert torch.equal(end.grids[1].scale, qw.grids[1].scale)
    assert end.column_scale is not None and qw.column_scale is not None
    assert (end.column_scale[binary] != qw.column_scale[binary]).all()
    # the mean moves only with the factor of its row
    assert end.grids[0].offset is not None and qw.grids[0].offset is not None
    torch.testing.assert_close(
        end.grids[0].offset, qw.grids[0].offset * weight.row.detach()[:, None], rtol=1e-3, atol=0
    )
    assert (end.grids[0].scale != qw.grids[0].scale).all()


def test_learning_rates_reach_their_parameters(random_packed: RandomPacked) -> None:
    qw = drawn(random_packed, MIXED, column_scale=True)
    weight = TunableWeight(qw, qw.dequantize())
    rates = Rates(lr=0.5, latent_lr=0.25, row_lr=0.125)
    found = {id(p): lr for group, lr in weight.groups(rates) for p in group}
    assert found[id(weight.scale[1])] == found[id(weight.offset[2])] == 0.5
    assert found[id(weight.row)] == found[id(weight.column)] == 0.125
    # a latent weight's step is in units of its tier's scales
    size = float(qw.grids[2].scale.abs().sum(2).mean())
    assert found[id(weight.latent[2])] == pytest.approx(0.25 * size)
    assert id(weight.latent[0]) not in found  # no planes, no codes
    assert {lr for _, lr in weight.groups(Rates(lr=0.5)) if lr} == {0.5}


# Losses


def test_losses_on_examples_done_by_hand() -> None:
    y, target = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
    # squared error 1, cosine 24/25
    assert float(mse_nlc(y, target)) == pytest.approx(1 - math.log(24 / 25), abs=1e-6)
    assert float(mse_nlc(target, target)) == pytest.approx(0, abs=1e-6)
    # cosines are averaged before the log: (24/25 + 1) / 2
    two = torch.cat([y, target], 1), torch.cat([target, target], 1)
    assert float(mse_nlc(*two)) == pytest.approx(0.5 - math.log(49 / 50), abs=1e-6)
    # opposite directions have no logarithm: large, but finite
    assert 10 < float(mse_nlc(-target, target)) < 100
    # |y-t|² = 2 against |t|² = 25; the second token a hundred times as large counts the same
    expected = math.log(1 + 2 / 25)
    assert float(relative_error(y, target)) == pytest.approx(expected, rel=1e-5)
    big = torch.cat([y, 100 * y], 1), torch.cat([target, 100 * target], 1)
    assert float(relative_error(*big)) == pytest.approx(expected, rel=1e-5)


def test_a_token_mistaken_for_an_attention_sink_does_not_drown_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 8, 16, generator=generator)
    y = 1.1 * target
    y[0, 3] *= 100.0
    relative_error(y.requires_grad_(), target).backward()
    norms = y.grad.norm(dim=-1).flatten()
    assert float(norms[3]) < 2 * float(norms.median())


def test_forward_kl_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    target = 2 * torch.randn(3, 5, 11, generator=generator)
    p, q = target.double().softmax(-1), logits.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    found = forward_kl(logits, target)
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=1e-5)
    found.backward()
    slow = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(logits.grad, slow, atol=1e-6, rtol=1e-4)
    assert float(forward_kl(target, target)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_ambiguous_tokens_weigh_more_by_hand(gamma: float) -> None:
    """Deviation-aware: an undecided teacher, of entropy ln 2, and a surer one; a student of thirds.

    A token's KL is ln 3 less its teacher's entropy.
    """
    target = torch.tensor([[[0.5, 0.5, 1e-30], [0.9, 0.05, 0.05]]]).log()
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    entropy = [math.log(2), -0.9 * math.log(0.9) - 0.1 * math.log(0.05)]
    weight = [h**gamma for h in entropy]
    kl = [math.log(3) - h for h in entropy]
    expected = sum(w * x for w, x in zip(weight, kl, strict=True)) / sum(weight)
    found = forward_kl(logits, target, gamma=gamma)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    if gamma == 0:
        assert found.item() == pytest.approx(sum(kl) / 2, rel=1e-5)
    found.backward()
    # softmax of the student less the teacher's, by the token's share of the weight
    slope = (1 / 3 - target.exp()) * (torch.tensor(weight) / sum(weight))[None, :, None]
    torch.testing.assert_close(logits.grad, slope, rtol=1e-4, atol=1e-6)


# The optimiser


def steps_taken(total: int, *, constant: bool) -> list[float]:
    """Under a constant gradient a step of Adam is its learning rate."""
    parameter, moves = nn.Parameter(torch.zeros(1, dtype=torch.float64)), []
    schedule = Schedule([([parameter], 0.1), ([], 1.0)], total, constant=constant)
    for _ in range(total):
        before = parameter.item()
        schedule.step(-parameter.sum())
        moves.append(parameter.item() - before)
    return moves


def test_schedule_warms_up_and_decays_unless_constant() -> None:
    assert steps_taken(7, constant=True) == pytest.approx([0.1] * 7, rel=1e-5)
    moves = steps_taken(100, constant=False)
    # warm-up over 5 steps, half of the rate halfway, next to nothing at the end
    assert moves[0] == pytest.approx(0.1 / 5, rel=1e-3)
    assert moves[4] == max(moves) == pytest.approx(0.1, rel=0.01)
    assert moves[50] == pytest.approx(0.05, rel=0.01) and moves[99] < 1e-4
    assert steps_taken(1, constant=False) == pytest.approx([0.1], rel=1e-5)


# A block


class Toy:
    """y = (x Wᵀ) * gain: a block of one linear and one norm, with a target to be met."""

    def __init__(
        self, qw: QuantizedWeight, rows: int = 20, tokens: int = 16, flips: float = 0.0
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        n, k = qw.codes.shape
        self.inputs = [torch.randn(1, tokens, k, generator=generator) for _ in range(rows)]
        self.norms = {"norm.weight": torch.ones(n, dtype=torch.bfloat16)}
        W = qw.dequantize()
        # another scale for every row, and a share of other signs
        self.W = W * (0.6 + torch.rand(n, 1, generator=generator))
        self.W = torch.where(torch.rand(n, k, generator=generator) < flips, -self.W, self.W)
        self.targets = [x @ self.W.T for x in self.inputs]
        self.trained_on: set[int] = set()

    def run(self, W: Mapping[str, Tensor], gains: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.trained_on.add(id(x))
        return (x @ W["a"].T) * gains["norm.weight"].float()

    def loss(self, W: Tensor, gain: Tensor, rows: list[int]) -> float:
        losses = [
            relative_error((self.inputs[i] @ W.T) * gain.float(), self.targets[i]) for i in rows
        ]
        return float(torch.stack(losses).mean())


@pytest.fixture
def weight(random_packed: RandomPacked) -> QuantizedWeight:
    return drawn(random_packed, (Tier(1, 20), Tier(2, -1, offset=True)))


def tune(
    toy: Toy,
    tunable: TunableWeight,
    tuning: BlockTuning,
    seed: int = 0,
    second: list[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
):
    return tune_block(
        toy.run, {"a": tunable}, toy.norms, toy.inputs, toy.targets, second, tuning, seed, progress
    )


def test_tuning_lowers_the_held_out_loss(weight: QuantizedWeight) -> None:
    toy = Toy(weight)
    scales, gains, scales_only = tune(toy, TunableWeight(weight), BlockTuning(epochs=10, lr=2e-2))
    assert scales_only.kept and scales_only.after < 0.1 * scales_only.before
    assert torch.equal(scales["a"].codes, weight.codes)
    assert gains["norm.weight"].dtype == torch.bfloat16
    assert not torch.equal(gains["norm.weight"], toy.norms["norm.weight"])
    # the reported losses are those of what would be stored, on the rows that were held out
    unseen = [i for i, x in enumerate(toy.inputs) if id(x) not in toy.trained_on]
    assert unseen == held_out(20) and len(unseen) == 1
    before = toy.loss(weight.dequantize(), toy.norms["norm.weight"], unseen)
    after = toy.loss(scales["a"].dequantize(), gains["norm.weight"], unseen)
    assert scales_only.before == pytest.approx(before, rel=1e-5)
    assert scales_only.after == pytest.approx(after, rel=1e-5)
    pack(scales["a"])  # every number is rounded to float16 already


def test_few_rows_are_passed_over_until_there_were_steps_enough(weight: QuantizedWeight) -> None:
    def curve(**passes: float) -> list[tuple[int, float]]:
        return tune(Toy(weight), TunableWeight(weight), BlockTuning(**passes, lr=1e-3))[2].curve

    # 19 rows are trained on
    assert curve(epochs=1, steps=57) == curve(epochs=3)
    assert curve(epochs=2, steps=11) == curve(epochs=2)
    assert curve(epochs=1, steps=20)[-1][0] == 20


def test_signs_that_move_reach_where_scales_cannot(weight: QuantizedWeight) -> None:
    rates = {"epochs": 10, "lr": 2e-2, "norm_lr": 0.0}
    fixed = tune(Toy(weight, flips=0.1), TunableWeight(weight), BlockTuning(**rates))
    latent = TunableWeight(weight, weight.dequantize())
    moved = tune(Toy(weight, flips=0.1), latent, BlockTuning(**rates, latent_lr=5e-2))
    assert moved[2].kept and moved[2].after < 0.5 * fixed[2].after
    assert not torch.equal(moved[0]["a"].codes, weight.codes)
    assert torch.equal(moved[1]["norm.weight"], Toy(weight).norms["norm.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lr", [3.0, 1e8, float("inf")])
def test_a_tuning_that_fails_is_taken_back(
    lr: float, dtype: torch.dtype, weight: QuantizedWeight
) -> None:
    toy = Toy(weight)
    toy.norms = {"norm.weight": torch.ones(7, dtype=dtype)}
    toy.targets = [x @ weight.dequantize().T for x in toy.inputs]  # nothing to be gained
    tunable = TunableWeight(weight, weight.dequantize())
    tuning = BlockTuning(epochs=2, lr=lr, norm_lr=lr, latent_lr=lr)
    found, gains, tuned = tune(toy, tunable, tuning)
    assert not tuned.kept and not tuned.after < tuned.before
    assert_same(found["a"], weight)
    assert torch.equal(gains["norm.weight"], torch.ones(7, dtype=dtype))
    assert torch.equal(toy.norms["norm.weight"], torch.ones(7, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_best_state_on_the_way_is_kept(dtype: torch.dtype, weight: QuantizedWeight) -> None:
    toy = Toy(weight)
    toy.norms = {name: gain.to(dtype) for name, gain in toy.norms.items()}
    tunable = TunableWeight(weight)

    def spoil(step: int, total: int) -> None:
        if step == 3 * total // 4 + 1:
            with torch.no_grad():
                tunable.row.mul_(-1)

    found, gains, tuned = tune(toy, tunable, BlockTuning(epochs=8, lr=2e-2), progress=spoil)
    steps = [step for step, _ in tuned.curve]
    assert steps == [38, 76, 114, 152]
    losses = dict(tuned.curve)
    assert losses[114] == min(losses.values()) < tuned.before < losses[152]
    assert tuned.kept and tuned.after == losses[114]
    again = toy.loss(found["a"].dequantize(), gains["norm.weight"], held_out(20))
    assert again == pytest.approx(tuned.after, rel=1e-5)


def test_tuning_is_deterministic_for_a_seed(weight: QuantizedWeight) -> None:
    tuning = BlockTuning(epochs=1.5, latent_lr=1e-2)

    def once(seed: int) -> QuantizedWeight:
        latent = TunableWeight(weight, weight.dequantize())
        return tune(Toy(weight), latent, tuning, seed)[0]["a"]

    first = once(1)
    torch.manual_seed(99)
    torch.randn(5)
    assert_same(once(1), first)
    assert not torch.equal(once(2).dequantize(), first.dequantize())


@pytest.mark.parametrize(("rows", "unseen"), [(1, 0), (3, 0), (4, 1), (31, 1), (32, 2)])
def test_one_row_in_sixteen_is_never_trained_on(
    rows: int, unseen: int, weight: QuantizedWeight
) -> None:
    toy, seen = Toy(weight, rows=rows, tokens=3), []
    tune(toy, TunableWeight(weight), BlockTuning(epochs=2), progress=lambda *at: seen.append(at))
    assert len(toy.trained_on) == rows - unseen
    steps = 2 * (rows - unseen)
    assert seen == [(i + 1, steps) for i in range(steps)]


@pytest.mark.parametrize("loss", ["relative", "mse-nlc"])
def test_the_dual_loss_is_the_sum_over_both_targets(loss: str, weight: QuantizedWeight) -> None:
    toy = Toy(weight)
    second = [target + 0.1 for target in toy.targets]
    tuning = BlockTuning(epochs=1, loss=loss)
    single = tune(toy, TunableWeight(weight), tuning)[2]
    toy.targets, swapped = second, toy.targets
    other = tune(toy, TunableWeight(weight), tuning)[2]
    both = tune(toy, TunableWeight(weight), tuning, second=swapped)[2]
    assert both.before == pytest.approx(single.before + other.before, rel=1e-5)


def test_weights_without_a_trainable_number_come_back(random_packed: RandomPacked) -> None:
    qw = drawn(random_packed, (Tier(0, -1),))
    toy = Toy(qw)
    toy.targets = [x @ torch.ones(7, 37).T for x in toy.inputs]
    found, _, tuned = tune(toy, TunableWeight(qw), BlockTuning(epochs=1))
    assert not tuned.kept and not found["a"].dequantize().any()


def test_distillation_meets_the_teachers_distribution(weight: QuantizedWeight) -> None:
    toy = Toy(weight)
    seen: list[tuple[int, int]] = []
    found, gains, tuned = distill(
        lambda W, gains, i: toy.run(W, gains, toy.inputs[i]),
        lambda i: toy.targets[i],
        {"a": TunableWeight(weight)},
        toy.norms,
        len(toy.inputs),
        [7],
        Distillation(steps=60, lr=2e-2),
        seed=0,
        progress=lambda *at: seen.append(at),
    )
    assert seen[-1] == (60, 60) and tuned.kept and tuned.after < 0.1 * tuned.before
    assert torch.equal(found["a"].codes, weight.codes)
    assert [i for i, x in enumerate(toy.inputs) if id(x) not in toy.trained_on] == [7]
    y = toy.run({"a": found["a"].dequantize()}, gains, toy.inputs[7])
    assert tuned.after == pytest.approx(float(forward_kl(y, toy.targets[7])), rel=1e-5)


class Killed(BaseException):
    pass


class Kept:
    """Keeps every second state, as a file would hold it, and is killed after step `stop`."""

    def __init__(self, stop: int) -> None:
        self.stop, self.steps = stop, 0
        self.state: tuple[dict[str, Tensor], str] | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, object]] | None:
        return None if self.state is None else (self.state[0], json.loads(self.state[1]))

    def offer(self, state: Callable[[], tuple[dict[str, Tensor], dict[str, object]]]) -> None:
        self.steps += 1
        if self.steps % 2 == 0:
            tensors, meta = state()
            self.state = {name: t.clone() for name, t in tensors.items()}, json.dumps(meta)
        if self.steps == self.stop:
            raise Killed


@pytest.mark.parametrize("tiers", [MIXED, KINDS["groups"]], ids=["mixed", "groups"])
@pytest.mark.parametrize("stop", [1, 2, 7, 18, 29, 30])
def test_a_training_that_was_killed_ends_in_the_same_bits(
    random_packed: RandomPacked, tiers: tuple[Tier, ...], stop: int
) -> None:
    qw = unpack(random_packed(7, 37, tiers, column_scale=True))

    def run(keep: Kept | None) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], object]:
        toy = Toy(qw, flips=0.1)
        return distill(
            lambda W, gains, i: toy.run(W, gains, toy.inputs[i]),
            lambda i: toy.targets[i],
            {"a": TunableWeight(qw, qw.dequantize())},
            toy.norms,
            len(toy.inputs),
            [7],
            Distillation(steps=30, lr=2e-2, latent_lr=5e-2),
            seed=0,
            keep=keep,
        )

    weights, gains, tuned = run(None)
    keep = Kept(stop)
    with pytest.raises(Killed):
        run(keep)
    keep.stop, done = 0, keep.steps
    again, gains_again, tuned_again = run(keep)
    assert keep.steps - done == 30 - done // 2 * 2  # what was kept was not done again
    assert_same(again["a"], weights["a"])
    assert torch.equal(gains_again["norm.weight"], gains["norm.weight"]) and tuned_again == tuned


def test_held_out_rows_are_spread_evenly() -> None:
    assert [len(held_out(n)) for n in (1, 3, 4, 16, 31, 32, 64)] == [0, 0, 1, 1, 1, 2, 4]
    assert held_out(32) == [8, 24]
    assert all(0 <= i < n for n in range(1, 200) for i in held_out(n))


def test_a_grid_of_two_equal_levels_keeps_its_value() -> None:
    """A row of scale zero: any code will do, the weight must not change."""
    codes = torch.tensor([[1, 0, 1]], dtype=torch.uint8)
    grid = TierGrid(torch.zeros(1, 1, 1), None)
    qw = QuantizedWeight((Tier(1, 3),), torch.zeros(3, dtype=torch.uint8), codes, [grid])
    weight = TunableWeight(qw, torch.randn(1, 3))
    assert not weight().any() and not weight.freeze().dequantize().any()
