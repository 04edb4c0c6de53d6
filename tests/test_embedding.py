"""Packed embeddings and heads: rows by themselves, one weight for two modules, whole models."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import pbq
from pbq import linear, rounding
from pbq.checkpoint import checksum, inspect, verify
from pbq.contents import describe_layer
from pbq.embedding import PackedEmbedding, PackedHead, TiedHead
from pbq.errors import ModelError, UsageError
from pbq.evaluate import perplexity, tokenize_file
from pbq.export import export
from pbq.finetune import Training, finetune
from pbq.hf import CheckpointError, install_embeddings, packed_linears, packed_modules
from pbq.pack import unpack
from pbq.pipeline import quantize
from pbq.planning import plan
from pbq.rounding import embedding_layout, round_embeddings, round_weight
from pbq_kernels import PackedFormatError, PackedWeight, Tier
from pbq_kernels.reference import dequantize

IDS = torch.arange(40)[None]
# tied, and untied: plain, saved under another name, with a bias, with a padding row
TIED, UNTIED = ("llama", "gpt2", "opt"), ("mistral", "gpt_neox", "phi")
RandomPacked = Callable[..., PackedWeight]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_backend_name", "reference")


def embedding_of(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> PackedEmbedding:
    return PackedEmbedding(packed.layout, dtype).hold(packed)


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [torch.tensor(3), torch.tensor([[5, 0, 5], [36, 1, 2]]), torch.empty(0, 2, dtype=torch.long)],
    ids=["one", "some", "none"],
)
@pytest.mark.parametrize(
    "tiers",
    [
        (Tier(8, 45, tied=True, offset=True, group_size=32),),
        (Tier(4, 40, tied=True, group_size=7), Tier(8, 5, tied=True, offset=True)),
        (Tier(0, 11), Tier(2, 30, offset=True), Tier(3, 4)),
    ],
    ids=["one tier", "two", "pruned"],
)
def test_rows_are_those_of_the_whole_weight(
    tiers: tuple[Tier, ...], rows: torch.Tensor, random_packed: RandomPacked
) -> None:
    packed = random_packed(37, 45, tiers, column_scale=len(tiers) == 3)
    for dtype in (torch.float32, torch.bfloat16):
        embedding, expected = embedding_of(packed, dtype), dequantize(packed, dtype)[rows]
        assert torch.equal(embedding(rows), expected)
        embedding.prepare()
        assert torch.equal(embedding(rows), expected)
        assert torch.equal(embedding(rows - 37), expected)


def test_rows_that_do_not_stand_by_themselves_are_refused(random_packed: RandomPacked) -> None:
    for packed in (random_packed(37, 45, overlay=0.1), random_packed(37, 45, rank=7)):
        with pytest.raises(PackedFormatError, match="do not stand by themselves"):
            embedding_of(packed)


def test_one_weight_serves_both_modules(random_packed: RandomPacked) -> None:
    packed = random_packed(37, 45, (Tier(4, -1, tied=True, offset=True, group_size=32),))
    embedding = embedding_of(packed, torch.bfloat16)
    model = torch.nn.Sequential(embedding, TiedHead(embedding))
    assert list(model.state_dict()) == ["0.weight", "0.scale", "0.offset"]
    ids = torch.tensor([[1, 36], [0, 1]])
    found = model(ids)
    W = dequantize(packed)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), W.bfloat16().float()[ids] @ W.T, rtol=0.01, atol=0.01)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(ids), found)
    copied = copy.deepcopy(model).float()
    assert copied[1].embedding is copied[0] and copied(ids).dtype == torch.float32
    assert copied[0].scale.dtype == torch.float16 and embedding.dtype == torch.bfloat16
    assert torch.equal(copied[0](ids), W[ids])


def test_a_tied_head_takes_no_other_weight(random_packed: RandomPacked) -> None:
    embedding = embedding_of(random_packed(37, 45))
    head = TiedHead(embedding)
    head.weight = embedding.weight
    with pytest.raises(UsageError, match="dequantize"):
        head.weight = torch.zeros(37, 45)


# --- rounding ------------------------------------------------------------------------------------


def rounded(W: torch.Tensor, bits: int) -> PackedWeight:
    n, k = W.shape
    return round_weight(W, embedding_layout(torch.nn.Linear(k, n, bias=False), bits))


@pytest.mark.parametrize(("n", "k", "bits"), [(33, 63, 8), (7, 150, 4), (5, 2, 4), (3, 1, 4)])
def test_every_weight_is_rounded_to_the_nearest_level(n: int, k: int, bits: int) -> None:
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    W[:, k // 2] *= 6  # by far the heaviest column
    packed = rounded(W, bits)
    heavy = -(-k // 32) if bits == 4 and k > 1 else 0
    planes = [tier.planes for tier in packed.layout.tiers]
    assert planes == ([4, 8] if heavy else [bits])
    assert packed.layout.tiers[-1].columns == (heavy or k)
    qw = unpack(packed)
    found, expected = qw.dequantize(), torch.empty_like(W)
    for t, tier in enumerate(qw.tiers):
        columns = qw.columns(t)
        for g, group in enumerate(columns.split(64)):
            levels = qw.grids[t].grid(tier, g).levels()
            nearest = (W[:, group, None] - levels[:, None]).abs().argmin(-1)
            expected[:, group] = levels.gather(1, nearest)
            step = levels[:, -1:] - levels[:, -2:-1]
            # the ends of the range are levels, but for the zero point's rounding
            assert ((W[:, group] - expected[:, group]).abs() <= 1.01 * step).all()
    assert torch.equal(found, expected)
    assert not heavy or qw.tier_of[k // 2] == 1


def test_rows_rounded_some_at_a_time_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(50, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = rounded(W, 4)
    monkeypatch.setattr(rounding, "_WEIGHTS_AT_ONCE", 7 * 70 + 5)
    for name, tensor in rounded(W, 4).tensors.items():
        assert torch.equal(tensor, whole.tensors[name]), name


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(packed_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """embedded(architecture, bits): blocks of random packed weights, embeddings rounded."""

    def build(architecture: str, bits: int) -> PreTrainedModel:
        model = packed_model(architecture)
        packed = round_embeddings(model, bits)
        return install_embeddings(model, packed, model.config.quantization_config)

    return build


@pytest.fixture(scope="module")
def saved(
    embedded: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """saved(architecture): its directory, embeddings at 4 bits; copy before changing."""
    written: dict[str, Path] = {}

    def write(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = tmp_path_factory.mktemp(architecture)
            embedded(architecture, 4).save_pretrained(written[architecture])
        return written[architecture]

    return write


def load(path: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [*TIED, *UNTIED])
def test_round_trip(
    architecture: str,
    embedded: Callable[..., PreTrainedModel],
    saved: Callable[[str], Path],
    tmp_path: Path,
    reference: None,
) -> None:
    path, expected = saved(architecture), embedded(architecture, 4)(IDS).logits
    model, info = load(path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (path / name).read_bytes()
    model.tie_weights()
    model.resize_token_embeddings(model.config.vocab_size)
    assert torch.equal(model(IDS).logits, expected)
    written = model.generate(IDS[:, :5], min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert written.shape == (1, 8)
    half = load(path, dtype=torch.bfloat16)
    assert half.get_input_embeddings()(IDS).dtype == half(IDS).logits.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("architecture", [*TIED, *UNTIED])
def test_a_tied_weight_is_stored_once_and_held_once(
    architecture: str, saved: Callable[[str], Path], reference: None
) -> None:
    path, tied = saved(architecture), architecture in TIED
    model, report, summary = load(path), verify(path), inspect(path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is PackedEmbedding and type(head) is (TiedHead if tied else PackedHead)
    assert (head.weight is embedding.weight) == tied
    packed = [embedding.packed(), *([] if tied else [head.packed()])]
    stored = sum(pw.stored_bits for pw in packed)
    weights = sum(pw.layout.n * pw.layout.k for pw in packed)
    assert report.embed_stored_bits == stored / weights and report.unchecked == ()
    held = {name: module.layout for name, module in packed_modules(model)}
    assert {e.name: e.layout for e in summary.embeddings}.items() < held.items()
    assert len(summary.embeddings) == len(packed)
    file = load_file(path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in file.values()) == report.nbytes
    # the promise about the blocks' weights does not see them
    layers = [linear.layout for _, linear in packed_linears(model)]
    bits = sum(L.stored_bits for L in layers) / sum(L.n * L.k for L in layers)
    assert report.stored_bits == pytest.approx(bits, abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_dense_again(
    architecture: str, saved: Callable[[str], Path], tmp_path: Path, reference: None
) -> None:
    packed = load(saved(architecture))
    export(saved(architecture), tmp_path / "dense", "float32")
    for plain in (load(saved(architecture)).dequantize(), load(tmp_path / "dense")):
        head = plain.get_output_embeddings()
        assert torch.equal(
            plain.get_input_embeddings().weight, packed.get_input_embeddings().dequantize()
        )
        assert (head.weight is plain.get_input_embeddings().weight) == (architecture in TIED)
        torch.testing.assert_close(plain(IDS).logits, packed(IDS).logits, atol=1e-5, rtol=1e-5)
        plain.resize_token_embeddings(300)
        assert plain(IDS).logits.shape[-1] == 300
    with pytest.raises(TypeError, match="PackedEmbedding"):
        packed.resize_token_embeddings(300)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_embeddings_that_do_more_than_look_up_are_refused(
    architecture: str, tiny_checkpoint: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """gemma scales what it looks up."""
    source = str(tiny_checkpoint(architecture))
    config = pbq.QuantConfig("rtn", bits=4.5, calib=str(text), seqlen=16, embed_bits=8)
    for attempt in (lambda: plan(source, config), lambda: quantize(source, tmp_path / "o", config)):
        with pytest.raises(ModelError, match=r"embed_tokens: a Gemma.* cannot be packed; --embed"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_a_head_that_only_the_config_ties_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    with pytest.raises(ModelError, match="lm_head: has a weight of its own"):
        round_embeddings(model, 8)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    tiny_checkpoint: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[Path, Any]]:
    """runs(architecture, embed_bits): OUT and the report, quantized once."""
    done: dict[tuple[str, int], tuple[Path, Any]] = {}

    def run(architecture: str, bits: int) -> tuple[Path, Any]:
        if (architecture, bits) not in done:
            out = tmp_path_factory.mktemp("runs") / "out"
            config = pbq.QuantConfig(
                "rtn", bits=4.5, calib=str(text), nsamples=4, seqlen=16, embed_bits=bits
            )
            source = str(tiny_checkpoint(architecture))
            report = quantize(source, out, config, ppl_text=text, ppl_windows=2)
            done[architecture, bits] = out, report
        return done[architecture, bits]

    return run


@pytest.mark.parametrize(("architecture", "bits"), [("llama", 4), ("mistral", 8)])
def test_a_run_says_what_it_stored(
    architecture: str,
    bits: int,
    runs: Callable[..., tuple[Path, Any]],
    tiny_checkpoint: Callable[[str], Path],
    tiny_tokenizer: Any,
    text: Path,
) -> None:
    (out, report), (plain, without) = runs(architecture, bits), runs(architecture, 0)
    planned = plan(str(tiny_checkpoint(architecture)), pbq.QuantConfig(**report.config))
    assert planned.model_bytes == report.model_bytes == verify(out).nbytes
    assert planned.embed_bytes == report.embed_bytes < without.model_bytes - report.model_bytes
    assert bits < planned.embed_bits == report.embed_bits == verify(out).embed_stored_bits
    assert "embed_stored_bits" not in (plain / "config.json").read_text()
    kinds = {"embeddings"} if architecture in TIED else {"embeddings", "head"}
    assert sum(report.bytes_of[kind] for kind in kinds) == report.embed_bytes
    assert sum(report.bytes_of.values()) == report.model_bytes
    assert f"rounded to {bits} bits" in (out / "README.md").read_text()
    assert f"embed-bits: {bits}\n" in (out / "recipe.yaml").read_text()
    # blocks never saw the rounded embeddings
    assert (report.bits, report.before.ppl) == (without.bits, without.before.ppl)
    own, other = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(torch.equal(own[n], other[n]) for n in own if ".layers." in n)
    # what was measured is the model as it is stored
    scored = perplexity(
        pbq.load(str(out)), tokenize_file(tiny_tokenizer, text), max_windows=2, window=64
    )
    assert report.after.ppl == pytest.approx(scored.ppl, rel=1e-6)
    assert report.after.ppl != without.after.ppl


def test_what_is_trained_on_keeps_its_embeddings(
    runs: Callable[..., tuple[Path, Any]], text: Path, tmp_path: Path
) -> None:
    out, report = runs("mistral", 8)
    finetune(out, tmp_path / "new", Training(steps=1, calib=str(text), nsamples=4, seqlen=16))
    own, other = (load_file(p / "model.safetensors") for p in (out, tmp_path / "new"))
    around = [name for name in own if "embed_tokens" in name or "lm_head" in name]
    assert len(around) == 6 and all(torch.equal(own[name], other[name]) for name in around)
    assert (
        json.loads((tmp_path / "new" / "report.json").read_text())["embed_bits"]
        == report.embed_bits
    )


def test_its_scales_are_shown(runs: Callable[..., tuple[Path, Any]]) -> None:
    found = describe_layer(runs("llama", 4)[0], "model.embed_tokens")
    assert [entry["what"] for entry in found.scales] == ["scale of plane 0", "offset"] * 2


# --- files that lie ------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


EMBED = "model.embed_tokens"
LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a list": (lambda q: q.update(embeddings=[]), "embeddings"),
    "unlisted": (lambda q: q.pop("embeddings"), EMBED),
    "a block's": (lambda q: q["layers"].update(q.pop("embeddings")), f"stored_bits|{EMBED}"),
    "a norm": (
        lambda q: q["embeddings"].update({"model.norm": q["embeddings"][EMBED]}),
        "model.norm",
    ),
    "an overlay": (lambda q: q["embeddings"][EMBED].update(overlay=2, overlay_bytes=1), EMBED),
    "other rows": (lambda q: q["embeddings"][EMBED].update(n=271), EMBED),
    "fewer planes": (lambda q: q["embeddings"][EMBED]["tiers"][0].update(planes=3), EMBED),
    "no checksum": (lambda q: q["checksums"].pop(f"{EMBED}.scale"), f"{EMBED}.scale"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_by_name(lie: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(saved("llama"), path)
    change, says = LIES[lie]
    edit(path, change)
    with pytest.raises(CheckpointError, match=says):
        verify(path)
    with pytest.raises(ModelError, match=says):
        pbq.load(str(path))


def test_wrong_bits_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(saved("llama"), path)
    edit(path, lambda q: q.update(embed_stored_bits=q["embed_stored_bits"] - 0.01))
    with pytest.raises(CheckpointError, match="embed_stored_bits says"):
        verify(path)


def test_values_outside_the_format_are_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(saved("llama"), path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{EMBED}.scale"][5, 1] = float("inf")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for said in ("differs|damaged", "non-finite"):
        with pytest.raises(CheckpointError, match=f"{EMBED}.scale.*({said})"):
            verify(path)
        with pytest.raises(CheckpointError, match=f"{EMBED}.scale.*({said})"):
            pbq.load(str(path))
        digest = checksum(tensors[f"{EMBED}.scale"])
        edit(path, lambda q, digest=digest: q["checksums"].update({f"{EMBED}.scale": digest}))
