"""A packed checkpoint trained on: better or as it was, the same bits, resumable, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pbq
from pbq import finetune as finetuning
from pbq import pipeline, selftest, work
from pbq.checkpoint import verify
from pbq.config import QuantConfig
from pbq.errors import ResourceError, UsageError
from pbq.finetune import Training, finetune
from pbq.hf import packed_linears
from pbq.tunable import Rates, TunableWeight
from pbq.tune import held_out

Made = Callable[[bool], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> Made:
    """made(faithful): pb-llm, with an overlay, which nothing may move."""
    done: dict[bool, Path] = {}

    def once(faithful: bool) -> Path:
        if faithful not in done:
            done[faithful] = tmp_path_factory.mktemp("finetune") / "out"
            config = QuantConfig(method="pb-llm", bits=3.0, effort="fast", faithful=faithful,
                                 nsamples=8, seqlen=32, calib=str(text))  # fmt: skip
            pipeline.quantize(str(source), done[faithful], config)
        return done[faithful]

    return once


@pytest.fixture(scope="module")
def out(made: Made) -> Path:
    return made(False)


def train(out: Path, new: Path, text: Path, **options: Any) -> Any:
    asked = {"steps": 12, "calib": str(text), "nsamples": 16, "seqlen": 32}
    asked |= {key: options.pop(key) for key in ("steps", "recipe") if key in options}
    return finetune(out, new, Training(**asked), **options)


def stored(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: linear.packed().tensors for name, linear in packed_linears(pbq.load(path))}


@pytest.mark.parametrize("recipe", finetuning.RECIPES)
def test_it_comes_closer_to_the_original_at_the_same_bits(
    made: Made, text: Path, tmp_path: Path, recipe: str
) -> None:
    # the paper's training goes on from the paper's own scales
    out = made(recipe == "pb-llm")
    tuned = train(out, tmp_path / "new", text, recipe=recipe)
    assert tuned.kept and tuned.after < tuned.before
    before, after = verify(out), verify(tmp_path / "new")
    assert after.stored_bits == before.stored_bits
    was, now = stored(out), stored(tmp_path / "new")
    moved = {
        key for name in was for key in was[name] if not torch.equal(was[name][key], now[name][key])
    }
    assert "weight" in moved, "no sign has moved"
    assert not any(key.startswith("overlay") or key == "tier" for key in moved)
    assert selftest.check(tmp_path / "new") is not None


def test_what_is_held_out_is_what_was_promised(
    out: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    """The KL on the held-out rows, computed anew from the two models."""
    tuned = train(out, tmp_path / "new", text)
    teacher = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False).input_ids)[: 16 * 32]
    rows = ids.view(8, 2, 32)[held_out(8)].reshape(-1, 32)
    for path, said in ((out, tuned.before), (tmp_path / "new", tuned.after)):
        with torch.no_grad():
            p, q = (m(rows).logits.log_softmax(-1) for m in (teacher, pbq.load(path)))
        kl = (p.exp() * (p - q)).sum(-1).mean()
        assert float(kl) == pytest.approx(said, rel=2e-3)


def test_its_report_says_so(out: Path, text: Path, tmp_path: Path) -> None:
    train(out, tmp_path / "new", text, steps=4)
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["notes"]["trained further"].startswith(
        "4 steps, recipe pbq, on text.txt, 16 x 32"
    )
    assert report["after"] is None and report["samples"] == []
    card = (tmp_path / "new" / "README.md").read_text()
    assert "trained further" in card and "Perplexity was not measured" in card
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["finetuned"]["steps"] == 4
    # it would repeat the run before this one
    assert not (tmp_path / "new" / "recipe.yaml").exists()


def test_an_interrupted_training_resumes_to_the_same_bytes(
    out: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(out, tmp_path / "whole", text)
    monkeypatch.setattr(work, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(work, "KEEP_SHARE", 0.0)

    class Stops(pipeline.Silent):
        def step(self, done: int, total: int | None = None) -> None:
            if (done, total) == (7, 12):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(out, tmp_path / "new", text, observer=Stops())
    assert not (tmp_path / "new").exists()
    train(out, tmp_path / "new", text)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_refusals(
    out: Path, text: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    new = tmp_path / "new"
    with pytest.raises(UsageError, match="--steps 0: expected at least one"):
        train(out, new, text, steps=0)
    with pytest.raises(UsageError, match="--recipe qat: expected one of pbq, pb-llm"):
        train(out, new, text, recipe="qat")
    with pytest.raises(UsageError, match=r"was not made from this model: .*as --teacher"):
        train(out, new, text, teacher=str(tiny_checkpoint("opt")))
    with pytest.raises(ResourceError, match="overrule this estimate with --memory"):
        train(out, new, text, memory=0.001)
    with pytest.raises(UsageError, match="holds a pbq checkpoint"):
        train(out, out, text)
    assert not new.exists() and not new.with_name("new.partial").exists()


def test_a_moved_original_is_given_by_name(
    out: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace(str(source), "/nowhere/model"))
    with pytest.raises(pbq.errors.ModelError, match="/nowhere/model: no such directory"):
        train(tmp_path / "out", tmp_path / "new", text)
    train(tmp_path / "out", tmp_path / "new", text, steps=1, teacher=str(source))


def test_an_analytic_scale_is_the_mean_size_of_what_is_on_the_grid(out: Path) -> None:
    """PB-LLM's optimal scale: the l1 norm over the count, salient entries left out."""
    from pbq.pack import unpack

    qw = unpack(next(iter(packed_linears(pbq.load(out))))[1].packed())
    assert qw.overlay is not None and qw.overlay.mask.any()
    latent = qw.dequantize() + 0.01 * torch.randn(
        qw.codes.shape, generator=torch.Generator().manual_seed(0)
    )
    found = TunableWeight(qw, latent, Rates(analytic=True))
    (numbers,) = found.freeze().grids
    started = found.latent[0].detach().T[:, torch.argsort(torch.argsort(qw.tier_of, stable=True))]
    on_grid = ~qw.overlay.mask
    size = ((started - numbers.offset[:, :1]).abs() * on_grid).sum(1) / on_grid.sum(1)
    torch.testing.assert_close(numbers.scale[:, 0, 0], size.half().float())


def test_paths_of_a_trellis_stay(source: Path, text: Path, tmp_path: Path) -> None:
    made, new = tmp_path / "made", tmp_path / "new"
    config = QuantConfig(method="waterfill", bits=3.5, nsamples=8, seqlen=32, calib=str(text),
                         distil_steps=0)  # fmt: skip
    pipeline.quantize(str(source), made, config)
    with pytest.raises(UsageError, match="paths of a trellis"):
        train(made, new, text, recipe="pb-llm")
    assert not new.exists()
    # enough for scales of a byte, which stay when they move by less than .8 %
    tuned = train(made, new, text, steps=60)
    before, after = stored(made), stored(new)
    assert tuned.kept and tuned.after < tuned.before
    for name, tensors in before.items():
        assert torch.equal(after[name]["weight"], tensors["weight"])
    assert any(
        not torch.equal(after[n]["scale"], t["scale"]) for n, t in before.items() if "scale" in t
    )
