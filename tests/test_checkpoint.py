"""A finished checkpoint: read, summed up, verified, and mutated in every way we could think of."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbq.checkpoint import (
    CheckpointError,
    checksum,
    copy_auxiliary,
    inspect,
    read_layers,
    read_packed,
    verify,
)
from pbq.errors import ResourceError
from pbq_kernels.layout import PackedWeight, Tier

RandomPacked = Callable[..., PackedWeight]
Q, K, UP = "model.layers.0.q", "model.layers.0.k", "model.layers.0.up"


def packed_layers(random_packed: RandomPacked) -> dict[str, PackedWeight]:
    return {
        Q: random_packed(9, 63, overlay=0.07, column_scale=True, seed=1),
        K: random_packed(9, 63, overlay=0.07, column_scale=True, seed=1),
        UP: random_packed(12, 40, [Tier(1, 30), Tier(4, 10, tied=True, offset=True)], seed=2),
    }


def other_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(16, 63, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(63),
        f"{Q}.bias": torch.randn(9, generator=generator),
    }


def write_checkpoint(folder: Path, layers: dict[str, PackedWeight]) -> None:
    """By hand: config.json, one safetensors file, a stub of a tokenizer."""
    # K is Q with other bits, so that the tensors of both could be swapped
    layers[K].tensors["weight"].bitwise_xor_(255)
    layers[K].tensors["scale"].mul_(2)
    tensors = {f"{name}.{key}": t for name, pw in layers.items() for key, t in pw.tensors.items()}
    tensors.update(other_tensors())
    weights = sum(pw.layout.n * pw.layout.k for pw in layers.values())
    described = {name: pw.layout.to_dict() for name, pw in layers.items()}
    described[Q]["bias"] = True
    config = {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "pbq",
            "format": 1,
            "method": "ptq161",
            "bits": 9.0,
            "stored_bits": sum(pw.stored_bits for pw in layers.values()) / weights,
            "layers": described,
            "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
            "provenance": {"source": "tiny"},
        },
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module")
def original(
    random_packed: RandomPacked, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, PackedWeight]]:
    folder, layers = tmp_path_factory.mktemp("original"), packed_layers(random_packed)
    write_checkpoint(folder, layers)
    return folder, layers


@pytest.fixture
def layers(original: tuple[Path, dict[str, PackedWeight]]) -> dict[str, PackedWeight]:
    return original[1]


@pytest.fixture
def out(original: tuple[Path, dict[str, PackedWeight]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "out"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """`change` the quantization_config in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def change_tensors(
    folder: Path, change: Callable[[dict[str, Tensor]], object], *, signed: bool = False
) -> None:
    """`change` the tensors in place; `signed` by somebody who updates the checksums, too."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    if signed:
        sums = {name: checksum(tensor) for name, tensor in tensors.items()}
        change_config(folder, lambda q: q.update(checksums=sums))


def shard(folder: Path, *, change: Callable[[dict[str, Any]], object] = lambda index: None) -> None:
    """Split model.safetensors in two, with an index that `change` may spoil."""
    tensors = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        part = {tensor: tensors[tensor] for tensor in tensors if where[tensor] == name}
        save_file(part, folder / name, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": where}
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_was_written_is_read(
    out: Path, layers: dict[str, PackedWeight], sharded: bool
) -> None:
    if sharded:
        shard(out)
    assert read_layers(out) == {name: pw.layout for name, pw in layers.items()}
    for name, pw in layers.items():
        read = read_packed(out, name)
        assert read.layout == pw.layout
        assert all(torch.equal(read.tensors[key], t) for key, t in pw.tensors.items())
    with pytest.raises(CheckpointError, match=r"no quantized layer is called 'model\.norm'"):
        read_packed(out, "model.norm")


@pytest.mark.parametrize("sharded", [False, True])
def test_verify_reports_what_it_read(
    out: Path, layers: dict[str, PackedWeight], sharded: bool
) -> None:
    if sharded:
        shard(out)
    calls: list[tuple[int, int]] = []
    report = verify(out, lambda done, total: calls.append((done, total)))
    stored = sum(pw.stored_bits for pw in layers.values())
    assert report.layers == 3
    assert report.tensors == sum(len(pw.tensors) for pw in layers.values()) + 3
    assert report.stored_bits == stored / (9 * 63 * 2 + 12 * 40)
    assert report.nbytes == stored // 8 + 16 * 63 * 2 + 63 * 4 + 9 * 4
    assert (report.asked_bits, report.unchecked, report.warnings) == (9.0, (), ())
    assert calls[-1] == (report.nbytes, report.nbytes)
    assert calls == sorted(calls)
    json.dumps(report.to_dict())
    assert report.rows()["stored bits per weight"] == f"{report.stored_bits:.6f}"


def test_inspect_adds_up(out: Path, layers: dict[str, PackedWeight]) -> None:
    summary = inspect(out)
    others = other_tensors()
    assert [layer.name for layer in summary.layers] == [Q, K, UP]
    assert summary.quantized_bytes * 8 == sum(pw.stored_bits for pw in layers.values())
    assert summary.quantized_parameters == 2 * 9 * 63 + 12 * 40
    assert summary.other_bytes == sum(t.nbytes for t in others.values())
    assert summary.parameters == summary.quantized_parameters + 16 * 63 + 63 + 9
    assert summary.bits_per_parameter == pytest.approx(
        8 * (summary.quantized_bytes + summary.other_bytes) / summary.parameters
    )
    assert summary.stored_bits == 8 * summary.quantized_bytes / summary.quantized_parameters
    assert summary.file_bytes == (out / "model.safetensors").stat().st_size
    assert summary.directory_bytes == sum(p.stat().st_size for p in out.iterdir())
    for layer in summary.layers:
        assert inspect(out, layer.name) == layer
        assert layer.bits == layers[layer.name].bits_per_weight
        assert layer.nbytes == {key: t.nbytes for key, t in layers[layer.name].tensors.items()}
    json.dumps(summary.to_dict())
    header, rows, _ = summary.grid()
    assert all(len(row) == len(header) for row in rows)
    assert rows[-1] == [
        "the whole model",
        "",
        "",
        f"{summary.bits_per_parameter:.4f}",
        f"{summary.quantized_bytes + summary.other_bytes:,}",
    ]


def test_inspect_reads_no_data(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbq.checkpoint._Contents.read", None)
    assert len(inspect(out).layers) == 3


def set_field(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, lambda q: q.update({name: value}))


def set_layer(**fields: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, lambda q: q["layers"][UP].update(fields))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda t: t.pop(name))


def add(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda t: t.update({name: tensor}), signed=True)


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(
        folder, lambda t: t.update({name: make(t[name])}), signed=True
    )


def put(name: str, index: int, value: float) -> Callable[[Path], None]:
    """One number of a tensor, by somebody who also updates its checksum."""
    return lambda folder: change_tensors(
        folder, lambda t: t[name].view(-1)[index].fill_(value), signed=True
    )


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def swap(a: str, b: str) -> Callable[[Path], None]:
    def exchange(tensors: dict[str, Tensor]) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return lambda folder: change_tensors(folder, exchange)


def index(**fields: object) -> Callable[[Path], None]:
    return lambda folder: shard(folder, change=lambda index: index.update(fields))


def place(name: str, file: object) -> Callable[[Path], None]:
    return lambda folder: shard(folder, change=lambda i: i["weight_map"].update({name: file}))


def flip_data(name: str) -> Callable[[Path], None]:
    """One bit of one tensor's data, at its offset in the file."""

    def flip(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        data[8 + length + header[name]["data_offsets"][0]] ^= 4
        path.write_bytes(data)

    return flip


def edit_header(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Replace text of equal length in the header of the file."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        assert len(old) == len(new)
        assert old in data
        path.write_bytes(data.replace(old, new, 1))

    return edit


def twice(folder: Path) -> None:
    """One tensor in both shards."""
    shard(folder)
    path = folder / "model-00001-of-00002.safetensors"
    other = load_file(folder / "model-00002-of-00002.safetensors")
    first = sorted(other)[0]
    save_file({**load_file(path), first: other[first]}, path, {"format": "pt"})


WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"

MUTATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    # the files
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS}: missing"),
    "weights are a directory": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        rf"{WEIGHTS}: missing",
    ),
    "truncated": (cut(WEIGHTS, 1), rf"{WEIGHTS}: unreadable"),
    "cut in the header": (lambda f: os.truncate(f / WEIGHTS, 100), rf"{WEIGHTS}: unreadable"),
    "empty": (write(WEIGHTS, b""), rf"{WEIGHTS}: unreadable"),
    "zeros": (write(WEIGHTS, bytes(1000)), rf"{WEIGHTS}: unreadable"),
    "header of 2**63 bytes": (
        write(WEIGHTS, (2**63).to_bytes(8, "little") + b"{}"),
        rf"{WEIGHTS}: unreadable",
    ),
    "header without end": (write(WEIGHTS, b"\x10" + bytes(7) + b"[" * 16), "unreadable"),
    "longer": (lambda f: os.truncate(f / WEIGHTS, 10**6), rf"{WEIGHTS}: unreadable"),
    "renamed in the header": (
        edit_header(b"layers.0.up.scale", b"layers.0.up.scalf"),
        r"layers\.0\.up\.scale: missing",
    ),
    "dtype in the header": (edit_header(b'"dtype":"I32"', b'"dtype":"F32"'), "overlay_count: F32"),
    "not torch's": (edit_header(b'"format":"pt"', b'"format":"tf"'), rf"{WEIGHTS}: its metadata"),
    # the data
    "bit in the codes": (flip_data(f"{Q}.weight"), r"layers\.0\.q\.weight: damaged"),
    "bit in the scales": (flip_data(f"{K}.scale"), r"layers\.0\.k\.scale: damaged"),
    "bit in the overlay": (flip_data(f"{K}.overlay_value"), r"k\.overlay_value: damaged"),
    "bit in the bias": (flip_data(f"{Q}.bias"), r"q\.bias: damaged"),
    "bit in the embedding": (flip_data("model.embed.weight"), r"embed\.weight: damaged"),
    "swapped": (swap(f"{Q}.weight", f"{K}.weight"), r"layers\.0\.[qk]\.weight: damaged"),
    "missing codes": (drop(f"{Q}.weight"), r"q\.weight: missing"),
    "missing offset": (drop(f"{UP}.offset"), r"up\.offset: missing"),
    "missing tier": (drop(f"{UP}.tier"), r"up\.tier: missing"),
    "missing bias": (drop(f"{Q}.bias"), r"q\.bias: missing"),
    "missing norm": (drop("model.norm.weight"), r"norm\.weight: missing"),
    "extra tensor of a layer": (add(f"{UP}.column_scale", torch.ones(40)), r"up\.column_scale"),
    "undeclared bias": (add(f"{UP}.bias", torch.ones(12)), r"up\.bias: packed data"),
    "codes of no layer": (
        add("model.layers.1.up.weight", torch.zeros(4, 4, dtype=torch.uint8)),
        r"layers\.1\.up\.weight: packed data that no layer",
    ),
    "overlay of no layer": (
        add("model.layers.1.up.overlay_gap", torch.zeros(4)),
        r"layers\.1\.up\.overlay_gap: packed data that no layer",
    ),
    "layer dropped from the config": (
        lambda f: change_config(f, lambda q: q["layers"].pop(UP)),
        r"layers\.0\.up\.\w+: packed data",
    ),
    "float32 scales": (replace(f"{UP}.scale", Tensor.float), r"up\.scale: F32 \[12, 2\]"),
    "signed codes": (replace(f"{UP}.weight", lambda t: t.to(torch.int8)), r"up\.weight: I8"),
    "fewer rows": (replace(f"{UP}.weight", lambda t: t[1:].clone()), r"up\.weight: U8 \[11, 9\]"),
    "flat codes": (replace(f"{UP}.weight", lambda t: t.flatten()), r"up\.weight: U8 \[108\]"),
    "long bias": (replace(f"{Q}.bias", lambda t: t.repeat(2)), r"q\.bias: F32 \[18\]"),
    "NaN scale": (put(f"{UP}.scale", 5, math.nan), r"up\.scale: non-finite"),
    "infinite offset": (put(f"{UP}.offset", 0, math.inf), r"up\.offset: non-finite"),
    "NaN column scale": (put(f"{Q}.column_scale", 62, math.nan), r"q\.column_scale: non-finite"),
    "tier out of range": (put(f"{UP}.tier", 0, 9), r"up\.tier: column counts"),
    "tiers of other sizes": (replace(f"{UP}.tier", lambda t: 1 - t), r"up\.tier: column counts"),
    "negative overlay count": (put(f"{Q}.overlay_count", 0, -3), r"q\.overlay_count: does not"),
    "overlay beyond the row": (
        replace(f"{Q}.overlay_count", lambda t: t.sum().mul(torch.arange(9) == 0).int()),
        r"q\.overlay_gap: an entry lies outside",
    ),
    # the description
    "no config": (lambda f: (f / CONFIG).unlink(), rf"{CONFIG}: missing"),
    "config is a pipe": (
        lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)),
        rf"{CONFIG}: missing",
    ),
    "invalid config": (cut(CONFIG, 2), rf"{CONFIG}: unreadable"),
    "config is a list": (write(CONFIG, b"[]"), rf"{CONFIG}: expected an object"),
    "deep config": (write(CONFIG, b'{"a":' * 10**5), rf"{CONFIG}: unreadable"),
    "not quantized": (write(CONFIG, b"{}"), rf"{CONFIG}: not a pbq checkpoint"),
    "another method's": (set_field("quant_method", "gptq"), rf"{CONFIG}: not a pbq checkpoint"),
    "format 999": (set_field("format", 999), rf"{CONFIG}: format 999; this pbq reads 1 to 1"),
    "format 0": (set_field("format", 0), rf"{CONFIG}: format 0"),
    "format 10**400": (set_field("format", 10**400), rf"{CONFIG}: format 1000"),
    "format true": (set_field("format", True), rf"{CONFIG}: format is True"),
    "format as text": (set_field("format", "1"), rf"{CONFIG}: format is '1'"),
    "method is a number": (set_field("method", 3), rf"{CONFIG}: method is 3"),
    "no layers": (set_field("layers", {}), rf"{CONFIG}: no quantized layers"),
    "layers are a list": (set_field("layers", [1]), rf"{CONFIG}: layers is \[1\]"),
    "layer is null": (
        lambda f: change_config(f, lambda q: q["layers"].update({UP: None})),
        r"up: not a valid layer",
    ),
    "layer without data": (
        lambda f: change_config(f, lambda q: q["layers"].update({"ghost": q["layers"][UP]})),
        r"ghost\.\w+: missing",
    ),
    "negative rows": (set_layer(n=-12), r"up: layout: impossible shape n=-12"),
    "huge rows": (set_layer(n=2**62), r"up: layout: impossible shape"),
    "rows true": (set_layer(n=True), r"up: layout: field 'n' has type bool"),
    "many rows": (set_layer(n=2**24), r"up\.\w+: \w+ \[12, \d+\], the layout says"),
    "tiers null": (set_layer(tiers=None), r"up: layout: 'tiers'"),
    "surprise field": (set_layer(surprise=1), r"up: layout: unknown field"),
    "bias is text": (set_layer(bias="no"), r"up: not a valid layer"),
    "huge overlay": (set_layer(overlay=480, overlay_bytes=240), r"up\.overlay_\w+: missing"),
    "stored bits wrong": (set_field("stored_bits", 1.61), rf"{CONFIG}: stored_bits says 1\.61"),
    "stored bits NaN": (set_field("stored_bits", math.nan), rf"{CONFIG}: stored_bits is nan"),
    "stored bits huge": (set_field("stored_bits", 10**400), rf"{CONFIG}: stored_bits is 1000"),
    "stored bits missing": (set_field("stored_bits", None), rf"{CONFIG}: stored_bits is None"),
    "more bits than asked": (set_field("bits", 1.61), rf"{CONFIG}: .* 1\.61 were asked for"),
    "bits as text": (set_field("bits", "1.61"), rf"{CONFIG}: bits is '1\.61'"),
    "no checksums": (set_field("checksums", None), rf"{CONFIG}: checksums is None"),
    "a checksum too few": (
        lambda f: change_config(f, lambda q: q["checksums"].pop(f"{UP}.weight")),
        r"up\.weight: no checksum",
    ),
    "a checksum too many": (
        lambda f: change_config(f, lambda q: q["checksums"].update(ghost="0" * 16)),
        r"ghost: missing, though it has a checksum",
    ),
    "a checksum that is none": (
        lambda f: change_config(f, lambda q: q["checksums"].update({f"{UP}.weight": "0X"})),
        r"up\.weight: '0X' is not a checksum",
    ),
    # the shards
    "traversal": (place(f"{UP}.weight", "../model.safetensors"), rf"{INDEX}: .*up\.weight is in"),
    "absolute path": (place(f"{UP}.weight", "/etc/x.safetensors"), rf"{INDEX}: .*not a plain"),
    "subdirectory": (place(f"{UP}.weight", "a/x.safetensors"), rf"{INDEX}: .*not a plain"),
    "backslash": (place(f"{UP}.weight", "..\\x.safetensors"), rf"{INDEX}: .*not a plain"),
    "pickle": (place(f"{UP}.weight", "pytorch_model.bin"), rf"{INDEX}: .*not a plain"),
    "null byte": (place(f"{UP}.weight", "x\0.safetensors"), rf"{INDEX}: .*not a plain"),
    "file is a number": (place(f"{UP}.weight", 3), rf"{INDEX}: .*not a plain"),
    "absent shard": (place(f"{UP}.weight", "x.safetensors"), r"x\.safetensors: missing"),
    "wrong shard": (
        lambda f: shard(f, change=lambda i: swap_shards(i["weight_map"])),
        rf"{INDEX}: .* is in model-0000\d-of-00002\.safetensors, the index says",
    ),
    "tensor not in the index": (
        lambda f: shard(f, change=lambda i: i["weight_map"].pop("model.norm.weight")),
        rf"{INDEX}: model\.norm\.weight is in model.*, the index says None",
    ),
    "tensor only in the index": (
        place("ghost", "model-00001-of-00002.safetensors"),
        rf"{INDEX}: ghost is in no file",
    ),
    "one tensor in two shards": (twice, r"model-00002-of-00002\.safetensors: .* is in model-00001"),
    "index is a list": (write(INDEX, b"[]"), rf"{INDEX}: "),
    "index beside the single file": (write(INDEX, b"{}"), rf"{INDEX}: lies beside"),
    "index without a map": (index(weight_map=None), rf"{INDEX}: weight_map is None"),
    "index with an empty map": (index(weight_map={}), rf"{INDEX}: lists no tensors"),
    # the rest
    "vocabulary missing": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer_config\.json"),
    "tokenizer cut": (cut("tokenizer.json", 1), r"tokenizer\.json: unreadable"),
}


def swap_shards(where: dict[str, str]) -> None:
    a, b = sorted(where)[:2]
    where[a], where[b] = where[b], where[a]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_checkpoint_is_refused_by_name(out: Path, mutation: str) -> None:
    mutate, says = MUTATIONS[mutation]
    mutate(out)
    with pytest.raises(CheckpointError, match=says):
        verify(out)
    # the other readers look at less, and raise nothing else
    for read in (read_layers, inspect, lambda folder: read_packed(folder, UP)):
        with contextlib.suppress(CheckpointError):
            read(out)


def test_random_bytes_never_crash_verify(out: Path) -> None:
    """200 seeded single-byte mutations: refused with a name, or harmless outside the tensors."""
    draw = random.Random(0)
    paths = sorted(p for p in out.iterdir() if p.suffix in (".json", ".safetensors"))
    header = 8 + int.from_bytes((out / WEIGHTS).read_bytes()[:8], "little")
    refused = 0
    for _ in range(200):
        path = draw.choice([out / WEIGHTS, *paths])
        data = path.read_bytes()
        offset, value = draw.randrange(len(data)), draw.randrange(256)
        path.write_bytes(data[:offset] + bytes([value]) + data[offset + 1 :])
        try:
            verify(out)
            assert value == data[offset] or path.name != WEIGHTS or offset < header
        except CheckpointError as error:
            refused += 1
            assert any(name in str(error) for name in (path.name, "model.", "ghost"))
        path.write_bytes(data)
    assert refused > 120
    verify(out)


def test_random_truncations_never_crash_verify(out: Path) -> None:
    data = (out / WEIGHTS).read_bytes()
    draw = random.Random(1)
    for length in [0, 7, 8, 9, *(draw.randrange(len(data)) for _ in range(20))]:
        (out / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=WEIGHTS):
            verify(out)


def test_a_tied_tensor_is_stored_once_and_a_renamed_one_elsewhere(out: Path) -> None:
    """The writer knows the head by its own name; safetensors keeps one name of two."""

    def tie(q: dict[str, Any]) -> None:
        sums = q["checksums"]
        sums["lm_head.weight"] = sums["model.embed.weight"]
        sums["norm_by_another_name.weight"] = sums.pop("model.norm.weight")

    change_config(out, tie)
    assert verify(out).unchecked == ()


def test_tensors_without_a_checksum_are_listed(out: Path) -> None:
    change_config(out, lambda q: [q["checksums"].pop(name) for name in other_tensors()])
    assert verify(out).unchecked == tuple(sorted(other_tensors()))


def test_no_budget_was_promised(out: Path) -> None:
    change_config(out, lambda q: q.update(bits=None))
    assert verify(out).asked_bits is None
    change_config(out, lambda q: q.pop("bits"))
    assert inspect(out).asked_bits is None


def test_files_that_nothing_reads_may_hold_anything(out: Path) -> None:
    """The source had them, and they were copied along."""
    (out / "modules.json").write_text("[1, 2]")
    (out / "results.json").write_text('{"a": 1}\n{"a": 2}\n')
    verify(out)
    (out / "generation_config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected an object"):
        verify(out)


def test_what_is_only_worth_a_look_is_a_warning(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    (out / "tokenizer_config.json").unlink()
    save_file({"x": torch.zeros(1)}, out / "adapter.safetensors")
    report = verify(out)
    assert [text.split(": ")[-1] for text in report.warnings] == [
        "no tokenizer",
        "not part of the checkpoint",
    ]


AUXILIARY = [
    "LICENSE",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "additional_chat_templates/tool.jinja",
]
NOT_COPIED = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.PTH",
    "training_args.pt",
    "tf_model.h5",
    "model.gguf",
    "optimizer.pkl",
    "config.json",
    "adapter_config.json",
    "README.md",
    ".gitattributes",
    "onnx/model.onnx",
    "original/params.json",
]


def test_auxiliary_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for name in [*AUXILIARY, *NOT_COPIED, "modeling_x.py"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    blob = tmp_path / "blob"
    blob.write_text("hub snapshots are links")
    (source / "vocab.json").unlink()
    (source / "vocab.json").symlink_to(blob)
    out.mkdir()
    (out / "generation_config.json").write_text("ours")
    expected = sorted(set(AUXILIARY) - {"generation_config.json"})
    assert sorted(copy_auxiliary(source, out)) == expected
    assert (out / "generation_config.json").read_text() == "ours"
    assert (out / "vocab.json").read_text() == "hub snapshots are links"
    assert not (out / "vocab.json").is_symlink()
    copied = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert copied == set(AUXILIARY)
    assert copy_auxiliary(source, out, trust_remote_code=True) == ["modeling_x.py"]


def test_no_space_for_auxiliary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "tokenizer.json"))

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ResourceError, match=r"tokenizer\.json: No space left.* 2 B needed"):
        copy_auxiliary(tmp_path / "source", tmp_path / "out")
