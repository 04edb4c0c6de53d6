"""One block: what its linears write to, the moments they are fitted to, the order they are done in.

The slow truth beside `BlockQuantizer` is a copy of the original block in which the linears that
were quantized so far have been replaced by hand: every moment is recomputed on it in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbq import blocks as blocks_module
from pbq.allocate import ChannelStats, LayerPlan, PlanInput
from pbq.blocks import BlockQuantizer, Streams, _Stop, residual_bases, watch
from pbq.compensation import (
    DAMPING,
    LEAST_DAMPING,
    NEIGHBOURS,
    Gaps,
    Moments,
    compensate,
    compensate_where_batches_agree,
)
from pbq.config import QuantConfig
from pbq.errors import NumericalError
from pbq.methods import ptq161
from pbq.models import (
    find_blocks,
    find_linears,
    record_calls,
    run_block,
    set_weight,
    weight_of,
)
from pbq.tune import BlockTuning, Recipe, held_out

TinyModel = Callable[..., PreTrainedModel]
BATCHES, ROWS, LENGTH = 3, 2, 9


class Scene:
    """The first block of a tiny model, its call, and two streams that differ."""

    def __init__(self, model: PreTrainedModel, index: int = 0, batches: int = BATCHES) -> None:
        model.requires_grad_(False)
        name, blocks = find_blocks(model)
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(0, 250, (ROWS, LENGTH), generator=generator) for _ in range(batches)]
        recording = record_calls(model, blocks, ids)
        self.name, self.block = f"{name}.{index}", blocks[index]
        self.call = recording.calls[index][0]
        fp = recording.hidden
        noise = [0.1 * x.std() * torch.randn(x.shape, generator=generator) for x in fp]
        self.streams = Streams(fp, [x + e for x, e in zip(fp, noise, strict=True)])
        self.linears = find_linears(self.block)
        self.config = QuantConfig(bits=2.5, nsamples=batches * ROWS, seqlen=LENGTH)

    def bases(self) -> dict[str, str]:
        return residual_bases(self.block, list(self.linears), self.streams.fp[0][:1], self.call)

    def plans(self, method: ptq161.Ptq161) -> dict[str, LayerPlan]:
        layers = {}
        for name, linear in self.linears.items():
            k = weight_of(linear).shape[1]
            stats = ChannelStats(*(torch.rand(3, k, generator=torch.Generator().manual_seed(k))))
            layers[f"{self.name}.{name}"] = PlanInput(weight_of(linear), stats)
        return method.plan(layers, self.config)

    def quantizer(self, recipe: Recipe, method: ptq161.Ptq161) -> BlockQuantizer:
        return BlockQuantizer(
            self.block, self.linears, self.call, method, recipe, self.config, self.name
        )


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


# Residual bases

LLAMA_LIKE = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
BASES: dict[str, dict[str, str]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"], LLAMA_LIKE),
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
    "bloom": {
        "self_attention.dense": "",
        "mlp.dense_4h_to_h": "post_attention_layernorm",
    },
    # a norm stands between the linear and the residual stream
    "gemma2": {},
    "gemma3_text": {},
    # attention and MLP are added together: neither alone makes the sum
    "gpt_neox": {},
    "falcon": {},
}


def test_residual_bases(architecture: str, tiny_model: TinyModel) -> None:
    assert Scene(tiny_model(architecture)).bases() == BASES[architecture]


@pytest.mark.parametrize(
    ("architecture", "change", "attention", "mlp"),
    [
        ("gpt_neox", {"use_parallel_residual": False}, "attention.dense", "mlp.dense_4h_to_h"),
        ("falcon", {"parallel_attn": False}, "self_attention.dense", "mlp.dense_4h_to_h"),
    ],
)
def test_the_sequential_form_of_a_parallel_block_has_bases(
    architecture: str, change: dict[str, Any], attention: str, mlp: str, tiny_model: TinyModel
) -> None:
    found = Scene(tiny_model(architecture, **change)).bases()
    assert found == {attention: "", mlp: "post_attention_layernorm"}


class Toy(nn.Module):
    """x + scale * linear(x), the addition in place or not."""

    def __init__(self, scale: float = 1.0, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale, self.in_place = nn.Linear(12, 12), scale, in_place

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.linear(hidden)
        if self.scale != 1.0:
            out = out * self.scale
        if self.in_place:
            out += hidden
            return out
        return hidden + out


class PlainCall:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012

    def first(self, rows: int) -> PlainCall:
        return self


@pytest.mark.parametrize(
    ("scale", "in_place", "expected"),
    [(1.0, False, {"linear": ""}), (1.0, True, {"linear": ""}), (0.5, False, {})],
)
def test_a_scaled_output_has_no_base(
    scale: float, in_place: bool, expected: dict[str, str]
) -> None:
    block = Toy(scale, in_place)
    assert residual_bases(block, ["linear"], torch.randn(1, 5, 12), PlainCall()) == expected


def test_residual_bases_leaves_no_hooks(tiny_model: TinyModel) -> None:
    scene = Scene(tiny_model("llama"))
    scene.bases()
    assert hooks_of(scene.block) == 0
    with pytest.raises(RuntimeError):
        residual_bases(scene.block, list(scene.linears), torch.randn(1, LENGTH, 7), scene.call)
    assert hooks_of(scene.block) == 0


# Watch


def test_watch_sees_the_inputs_and_stops(tiny_model: TinyModel) -> None:
    scene = Scene(tiny_model("llama"))
    x, ran = scene.streams.fp[0], []
    scene.block.mlp.down_proj.register_forward_hook(lambda *a: ran.append(1))
    own = hooks_of(scene.block)
    names = ["self_attn.q_proj", "mlp.up_proj"]
    with torch.no_grad(), pytest.raises(_Stop), watch(scene.block, names, stop_at=names[1]) as seen:
        run_block(scene.block, x, scene.call)
    assert list(seen) == names and not ran and hooks_of(scene.block) == own
    assert torch.equal(seen[names[0]], scene.block.input_layernorm(x))
    with pytest.raises(KeyError, match="mine"), watch(scene.block, names):
        raise KeyError("mine")
    assert hooks_of(scene.block) == own


# Compensate


def moments_of(
    x_f: Tensor,
    x_q: Tensor,
    w: Tensor,
    gap: Tensor | None = None,
    name: str = "a",
    sign: Tensor | float = 1.0,
) -> Moments:
    """The definition, one sum after the other; sign: of each token in the gaps."""
    total = w.sum()
    H = (x_q * w[:, None]).T @ x_q / total
    own = x_q * (w * sign)[:, None]
    residual = {} if gap is None else {name: gap.T @ own / total}
    return Moments(H, Gaps((x_f - x_q).T @ own / total, residual))


@pytest.mark.parametrize("with_residual", [False, True])
def test_compensate_solves_its_least_squares_problem(with_residual: bool) -> None:
    n, k, m = 5, 11, 63
    torch.manual_seed(0)
    x_f = torch.randn(m, k, dtype=torch.float64)
    x_q = x_f + 0.3 * torch.randn(m, k, dtype=torch.float64)
    gap = torch.randn(m, n, dtype=torch.float64) if with_residual else None
    W, w = torch.randn(n, k, dtype=torch.float64), torch.rand(m, dtype=torch.float64)
    moments = moments_of(x_f, x_q, w, gap)
    found, damping_used = compensate(W, moments, "a", percdamp=0.05)
    assert damping_used == 0.05
    # every token and every damping term is one row of an ordinary least squares problem
    damping = 0.05 * moments.H.diagonal().mean()
    target = x_f @ W.T + (0 if gap is None else gap)
    root = (w / w.sum()).sqrt()[:, None]
    A = torch.cat([root * x_q, damping.sqrt() * torch.eye(k, dtype=torch.float64)])
    b = torch.cat([root * target, damping.sqrt() * W.T])
    expected = torch.linalg.lstsq(A, b).solution.T
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_compensate_changes_nothing_when_the_streams_are_equal() -> None:
    torch.manual_seed(0)
    W, x = torch.randn(5, 11), torch.randn(63, 11)
    moments = moments_of(x, x.clone(), torch.rand(63), torch.zeros(63, 5))
    assert torch.equal(compensate(W, moments, "a", 0.05)[0], W)


def test_compensate_takes_the_residual_of_its_own_layer_only() -> None:
    torch.manual_seed(0)
    W, x = torch.randn(5, 11), torch.randn(63, 11)
    moments = moments_of(x, x.clone(), torch.rand(63), torch.randn(63, 5), name="another")
    assert torch.equal(compensate(W, moments, "a", 0.05)[0], W)
    assert not torch.equal(compensate(W, moments, "another", 0.05)[0], W)


def test_compensate_names_the_layer_of_a_bad_hessian() -> None:
    moments = Moments(-torch.eye(3), Gaps(torch.zeros(3, 3), {}))
    with pytest.raises(NumericalError, match=r"layers\.7\.o_proj: H is not positive definite"):
        compensate(torch.ones(2, 3), moments, "layers.7.o_proj", 0.05)


def test_compensate_climbs_the_ladder_and_tells_the_damping() -> None:
    torch.manual_seed(0)
    H = torch.diag(torch.tensor([4.0, 2.0, -0.9]))  # mean 1.7: positive definite from 0.53 on
    cross = torch.randn(3, 3)
    W = torch.randn(2, 3)
    found, damping = compensate(W, Moments(H, Gaps(cross, {})), "a", 0.3)
    assert damping == 1.0
    expected = W + W @ cross @ torch.linalg.inv(H + 1.7 * torch.eye(3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def two_halves(seed: int, tokens: int = 200) -> tuple[Tensor, Moments]:
    """(W, moments in float64); what is missing shows in the five largest directions of x."""
    g = torch.Generator().manual_seed(seed)
    n, k = 7, 41
    normal = partial(torch.randn, dtype=torch.float64, generator=g)
    directions = torch.linalg.qr(normal(k, k))[0]
    W, truth = normal(n, k), normal(n, 5) @ directions[:5]

    def half() -> Moments:
        x = normal(tokens, k) * torch.logspace(1, -1, k, dtype=torch.float64) @ directions
        return moments_of(x, x, torch.ones(tokens), x @ truth.T + 10 * normal(tokens, n))

    a, b = half(), half()
    found, chance = (
        Gaps(a.gaps.cross, {"a": (a.gaps.residual["a"] + sign * b.gaps.residual["a"]) / 2})
        for sign in (1, -1)
    )
    return W, Moments((a.H + b.H) / 2, found, chance)


def test_what_two_halves_agree_on_one_eigenvector_at_a_time() -> None:
    W, moments = two_halves(0)
    assert moments.chance is not None
    found = compensate_where_batches_agree(W, moments, "a")
    values, vectors = torch.linalg.eigh(moments.H)
    components = [
        [gaps.missing(W, "a") @ v for v in vectors.T] for gaps in (moments.gaps, moments.chance)
    ]
    energies = [[float(c @ c) for c in each] for each in components]
    expected, k, reach = W.clone(), len(values), NEIGHBOURS // 2
    for i in range(k):
        near = [min(max(j, 0), k - 1) for j in range(i - reach, i + reach + 1)]
        all_of_it, noise = (sum(each[j] for j in near) for each in energies)
        believed = max(0.0, 1 - noise / all_of_it)
        damped = float(values[i] + LEAST_DAMPING * values.mean())
        expected += torch.outer(components[0][i], vectors[:, i]) * believed / damped
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    again, damping = compensate(W, moments, "a", 0)
    assert torch.equal(again, found) and damping == LEAST_DAMPING


def test_what_two_halves_agree_on_is_nearer_to_the_truth_than_any_damping() -> None:
    left = dict.fromkeys((0.0, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.9), 0.0)
    for seed in range(5):
        W, moments = two_halves(seed)
        _, plenty = two_halves(seed, tokens=20_000)
        for percdamp in left:
            D = compensate(W, moments, "a", percdamp)[0] - W
            left[percdamp] += float(((D @ plenty.H - 2 * plenty.gaps.missing(W, "a")) * D).sum())
    best = min(left[percdamp] for percdamp in left if percdamp)
    assert best < 0 and left[0.0] < best


def test_nothing_is_believed_of_what_is_all_chance_and_all_of_what_is_not() -> None:
    W, moments = two_halves(1)
    chance = Moments(moments.H, moments.gaps, moments.gaps)
    assert torch.equal(compensate(W, chance, "a", 0)[0], W)
    none = {name: torch.zeros_like(x) for name, x in moments.gaps.residual.items()}
    sure = Moments(moments.H, moments.gaps, Gaps(moments.gaps.cross, none))
    expected, _ = compensate(W, moments, "a", LEAST_DAMPING)
    torch.testing.assert_close(compensate(W, sure, "a", 0)[0], expected, atol=1e-9, rtol=1e-6)
    one_batch, damping = compensate(W, Moments(moments.H, moments.gaps), "a", 0)
    assert damping == DAMPING
    assert torch.equal(one_batch, compensate(W, moments, "a", DAMPING)[0])


def test_outputs_that_are_not_finite_name_the_block(tiny_model: TinyModel) -> None:
    scene = Scene(tiny_model("llama"))
    scene.block.mlp.down_proj.weight.data[3, 3] = float("nan")
    quantizer = scene.quantizer(Recipe(), ptq161.Ptq161(faithful=False))
    said = r"^model\.layers\.0: non-finite outputs on the calibration text, first at token 0 of its"
    with pytest.raises(NumericalError, match=said):
        quantizer.run(scene.streams, scene.plans(ptq161.Ptq161(faithful=False)))


def test_dead_inputs_and_tokens_are_counted(tiny_model: TinyModel) -> None:
    scene = Scene(tiny_model("llama"))
    scene.block.self_attn.v_proj.weight.data.zero_()
    quantizer = scene.quantizer(Recipe(), ptq161.Ptq161(faithful=False))
    done = quantizer.run(scene.streams, scene.plans(ptq161.Ptq161(faithful=False)))
    for name, report in done.layers.items():
        assert report.dead == (48 if name == "self_attn.o_proj" else 0)
        assert report.tokens == BATCHES * ROWS * LENGTH and report.borrowed == 0
        assert report.compensation == 0.3
    assert torch.isfinite(done.weights["self_attn.o_proj"].dequantize()).all()


# A whole block


def run_and_record(
    scene: Scene,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    method: ptq161.Ptq161 | None = None,
) -> tuple[BlockQuantizer, Any, dict[str, Moments]]:
    """Quantize the scene's block; the moments that each linear was given, by its full name."""
    given: dict[str, Moments] = {}

    def spy(W: Tensor, moments: Moments, name: str, percdamp: float) -> tuple[Tensor, float]:
        given[name] = moments
        return compensate(W, moments, name, percdamp)

    monkeypatch.setattr(blocks_module, "compensate", spy)
    method = method or ptq161.Ptq161(faithful=False)
    quantizer = scene.quantizer(recipe, method)
    return quantizer, quantizer.run(scene.streams, scene.plans(method)), given


ORDER = {
    "llama": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "opt": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ],
    "falcon": [
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
}


def inputs_of(block: nn.Module, x: Tensor, call: Any) -> dict[str, Tensor]:
    """First input of every submodule, the block itself under "", as float64 [tokens, ...]."""
    found = {"": x}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: found.update({name: args[0]}) if args else None
        )
        for name, module in block.named_modules()
        if name
    ]
    run_block(block, x, call)
    for handle in handles:
        handle.remove()
    return {name: t.reshape(-1, t.shape[-1]).double() for name, t in found.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "hessian_tokens", "chosen"),
    [
        ("llama", 10**6, [0, 1, 2]),
        ("llama", ROWS * LENGTH + 1, [0, 1]),
        ("gpt2", 10**6, [0, 1, 2]),
        ("opt", 1, [0]),
        ("falcon", 10**6, [0, 1, 2]),
    ],
)
def test_each_linear_meets_what_the_ones_before_it_really_deliver(
    architecture: str,
    hessian_tokens: int,
    chosen: list[int],
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(tiny_model(architecture))
    original = copy.deepcopy(scene.block)
    recipe = Recipe(hessian_tokens=hessian_tokens, compensate_damp=0)
    quantizer, done, given = run_and_record(scene, recipe, monkeypatch)
    targets = [run_block(original, x, scene.call) for x in scene.streams.fp]
    assert all(map(torch.equal, quantizer.targets, targets)) and not quantizer.second
    mixed = copy.deepcopy(original)
    for group in ORDER[architecture]:
        tokens: dict[str, list[Tensor]] = {"x_f": [], "x_q": [], "w": []}
        gaps: dict[str, list[Tensor]] = {name: [] for name in group}
        for i in chosen:
            fp = inputs_of(original, scene.streams.fp[i], scene.call)
            quant = inputs_of(mixed, scene.streams.quant[i], scene.call)
            tokens["x_f"].append(fp[group[0]])
            tokens["x_q"].append(quant[group[0]])
            tokens["w"].append(1 / (targets[i].flatten(0, 1).double().pow(2).mean(1) + 1e-6))
            for name in group:
                if name in BASES[architecture]:
                    base = BASES[architecture][name]
                    gaps[name].append(fp[base] - quant[base])
        x_f, x_q, w = (torch.cat(tokens[key]) for key in ("x_f", "x_q", "w"))
        for name in group:
            full = f"{scene.name}.{name}"
            gap = torch.cat(gaps[name]) if gaps[name] else None
            expected, found = moments_of(x_f, x_q, w, gap, full), given[full]
            # of the tokens of every other batch
            sign = torch.cat(
                [torch.full_like(t, (-1) ** place) for place, t in enumerate(tokens["w"])]
            )
            apart = moments_of(x_f, x_q, w, gap, full, sign).gaps
            pairs = [(found.H, expected.H), (found.gaps.cross, expected.gaps.cross)]
            assert (found.chance is None) == (len(chosen) == 1)
            if found.chance is not None:
                pairs.append((found.chance.cross, apart.cross))
            assert found.gaps.residual.keys() & {full} == expected.gaps.residual.keys()
            if gap is not None:
                pairs.append((found.gaps.residual[full], expected.gaps.residual[full]))
                if found.chance is not None:
                    pairs.append((found.chance.residual[full], apart.residual[full]))
            for a, b in pairs:
                torch.testing.assert_close(a.double(), b, atol=1e-4 * float(b.abs().max()), rtol=0)
            W_hat = done.weights[name].dequantize()
            set_weight(find_linears(mixed)[name], W_hat)
            assert torch.equal(weight_of(scene.linears[name]), W_hat)
    assert hooks_of(scene.block) == 0


def test_layers_of_one_input_share_its_moments(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tiny_model("llama"))
    _, done, given = run_and_record(scene, Recipe(), monkeypatch)
    assert list(done.weights) == [name for group in ORDER["llama"] for name in group]
    q, k = (given[f"{scene.name}.self_attn.{p}_proj"] for p in "qk")
    assert q is k
    for name, report in done.layers.items():
        qw = done.weights[name]
        assert report.bits == qw.layout().bits_per_weight <= 2.5
        assert 0 < report.error < 0.5 and report.damping == 0.01
        assert done.latents[name].shape == qw.codes.shape


def test_tokens_count_for_a_group_as_its_linears_say(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tiny_model("llama"))
    asked: list[int] = []

    def importance(block, linears, call, x, generator):  # type: ignore[no-untyped-def]
        asked.append(generator.initial_seed())
        drawn = torch.Generator().manual_seed(len(asked))
        counts = {n: torch.rand(ROWS * LENGTH, generator=drawn) for n in linears}
        return run_block(block, x, call), counts

    monkeypatch.setattr(blocks_module, "token_importance", importance)
    group = [f"self_attn.{p}_proj" for p in "qkv"]
    with watch(scene.block, group[:1]) as seen:
        X = []
        for x in scene.streams.quant:
            run_block(scene.block, x, scene.call)
            X.append(seen[group[0]].flatten(0, -2).double())
    _, _, given = run_and_record(scene, Recipe(importance=True), monkeypatch)
    assert len(set(asked)) == BATCHES  # each batch with signs of its own
    H, total = torch.zeros(X[0].shape[1], X[0].shape[1], dtype=torch.float64), 0.0
    for i, x in enumerate(X):
        drawn = torch.Generator().manual_seed(i + 1)
        each = {n: torch.rand(ROWS * LENGTH, generator=drawn) for n in scene.linears}
        w = torch.stack([each[n] for n in group]).mean(0).double()
        H, total = H + x.T @ (x * w[:, None]), total + float(w.sum())
    found = given[f"{scene.name}.{group[0]}"].H
    torch.testing.assert_close(found.double(), H / total, rtol=1e-4, atol=1e-6)


def test_compensation_brings_the_block_closer_to_the_original(tiny_model: TinyModel) -> None:
    """On streams that differ, the point of the whole exercise."""
    errors = []
    for on in (False, True):
        scene = Scene(tiny_model("llama"), batches=24)
        method = ptq161.Ptq161(faithful=False)
        quantizer = scene.quantizer(Recipe(compensate=on), method)
        quantizer.run(scene.streams, scene.plans(method))
        error = 0.0
        for x, target in zip(scene.streams.quant, quantizer.targets, strict=True):
            y = run_block(scene.block, x, scene.call)
            error += float(((y - target) ** 2).sum() / (target**2).sum())
        errors.append(error)
    assert errors[1] < 0.97 * errors[0]


def test_the_dual_loss_gets_the_original_block_on_the_quantized_inputs(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tiny_model("llama"))
    original = copy.deepcopy(scene.block)
    recipe = Recipe(block=BlockTuning(epochs=1, dual=True))
    quantizer, _, _ = run_and_record(scene, recipe, monkeypatch)
    expected = [run_block(original, x, scene.call) for x in scene.streams.quant]
    assert all(map(torch.equal, quantizer.second, expected))


def test_the_papers_recipe_rounds_the_weight_as_it_came(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, method = Scene(tiny_model("llama")), ptq161.Ptq161(faithful=True)
    W = weight_of(scene.linears["mlp.down_proj"]).clone()
    recipe = Recipe(feedback=False, sweeps=0, compensate=False)
    _, done, given = run_and_record(scene, recipe, monkeypatch, method)
    assert not given
    qw = done.weights["mlp.down_proj"]
    binary = qw.columns(0)
    mu = W[:, binary].mean(1, keepdim=True).half().float()
    assert torch.equal(qw.codes[:, binary].bool(), W[:, binary] > mu)
    # column factors start at one and are there to be tuned and stored
    assert qw.column_scale is not None and torch.equal(qw.column_scale, torch.ones(84))
    assert qw.layout() == scene.plans(method)[f"{scene.name}.mlp.down_proj"].layout(48)


@pytest.mark.parametrize("count", [1, 2, 5, 32])
@pytest.mark.parametrize("tokens", [1, 40, 41, 10**9])
def test_hessian_batches_are_spread_enough_and_others_in_the_next_block(
    count: int, tokens: int, tiny_model: TinyModel
) -> None:
    scene = Scene(tiny_model("llama"), batches=1)
    quantizer = scene.quantizer(Recipe(hessian_tokens=tokens), ptq161.Ptq161(faithful=False))
    hidden, every = [torch.zeros(2, 10, 1)] * count, []
    for quantizer.index in range(4):
        chosen = quantizer._hessian_batches(hidden)
        assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < count
        usable = count - len(held_out(count))
        assert len(chosen) == usable or 20 * (len(chosen) - 1) < tokens <= 20 * len(chosen)
        assert not set(chosen) & set(held_out(count))
        every.append(set(chosen))
    assert 0 in every[0]
    if 2 * len(every[0]) <= usable:
        assert not every[0] & every[1] and not every[1] & every[2]


@pytest.mark.parametrize("stream", ["fp", "quant"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_activations_name_block_and_layer(
    stream: str, bad: float, tiny_model: TinyModel
) -> None:
    scene = Scene(tiny_model("llama"))
    poisoned = [x.clone() for x in getattr(scene.streams, stream)]
    poisoned[1][0, 3, 5] = bad
    setattr(scene.streams, stream, poisoned)
    method = ptq161.Ptq161(faithful=False)
    quantizer = scene.quantizer(Recipe(), method)
    expected = (
        r"^model\.layers\.0\.self_attn\.q_proj: non-finite inputs on the calibration text, "
        rf"first at token 3 of its segment {ROWS}$"
    )
    with pytest.raises(NumericalError, match=expected):
        quantizer.run(scene.streams, scene.plans(method))
    assert hooks_of(scene.block) == 0
