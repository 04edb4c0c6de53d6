"""A packed checkpoint, mutated: by random bytes, by who knows the format, by who signs his forgery.

Every mutation must be refused with a CheckpointError that names a file or a tensor, or do no harm:
what can still be read is then what was written. Nothing may crash, hang or take much memory.
"""

from __future__ import annotations

import json
import math
import random
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file

from pbq.checkpoint import CheckpointError, checksum, inspect, read_packed, verify
from pbq_kernels import dequant_matmul
from pbq_kernels.reference import dequantize

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
SECONDS = 10
# Beyond what the process had before: a header of a few bytes must not ask for more.
MEMORY = 2**28

Draw = random.Random
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 255, 2**31, 2**32 + 1, 2**53, 2**63, -(2**63), 10**400),
    *(0.5, -0.0, 1e308, math.nan, math.inf, "", "x", "1", "../../etc/passwd", "/dev/zero", "a\0b"),
    *("A" * 5000, "..", "model.safetensors", "pytorch_model.bin", "\ud800", [], [[]], [0] * 999),
    *({}, {"weight": {}}, {"n": 1}, [[[[[[]]]]]]),
)


@dataclass
class Outcome:
    """refused: typed errors. harmless: read as it was written. signed: consistent forgeries."""

    tried: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    harmless: int = 0
    signed: int = 0
    grown_bytes: int = 0
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "tried": dict(self.tried), "total": sum(self.tried.values())}


def try_mutations(source: Path, folder: Path, tries: int, seed: int) -> Outcome:
    """`tries` seeded mutations of the packed checkpoint `source`, one after the other."""
    found = Outcome()
    before = peak_bytes()
    for i in range(tries):
        kind = list(KINDS)[i % len(KINDS)]
        try:
            with _in_time():
                outcome = attempt(source, folder / "mutated", kind, Draw(f"{seed}-{i}"))
            setattr(found, outcome, getattr(found, outcome) + 1)
        except Exception as error:
            found.faults.append(f"{kind}, seed {seed}-{i}: {type(error).__name__}: {error!s:.200}")
        found.tried[kind] += 1
    found.grown_bytes = peak_bytes() - before
    if found.grown_bytes > MEMORY:
        found.faults.append(f"memory grew by {found.grown_bytes} bytes")
    return found


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(source: Path, copy: Path, kind: str, draw: Draw) -> str:
    """One mutation: "refused", "harmless" or "signed". Raises when it was none of these."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    KINDS[kind](copy, draw)
    try:
        report = verify(copy)
    except CheckpointError as error:
        _check_named(error, copy)
        _read_what_can_be_read(copy)
        return "refused"
    if kind in SIGNED:
        _run_every_layer(copy)
        return "signed"
    _check_same(source, copy, report.unchecked)
    return "harmless"


class _in_time:
    """Raises TimeoutError inside after SECONDS."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._late)
        signal.alarm(SECONDS)

    def _late(self, *args: Any) -> None:
        raise TimeoutError

    def __exit__(self, *exc: object) -> None:
        signal.alarm(0)


def _check_named(error: CheckpointError, copy: Path) -> None:
    """The message names the file or a module of the model, and is short enough to be read."""
    said = str(error)
    named = re.search(r"\.safetensors|\.json|layers\.\d|\.weight|\.scale|ghost", said)
    assert named and len(said) < 7000, f"does not say where: {said:.300}"


def _read_what_can_be_read(copy: Path) -> None:
    """Readers that look at less raise nothing else either."""
    for read in (inspect, lambda folder: read_packed(folder, "model.layers.0.mlp.up_proj")):
        try:
            read(copy)
        except CheckpointError:
            continue


def _check_same(source: Path, copy: Path, unchecked: tuple[str, ...]) -> None:
    """What verify let pass holds the tensors, and says the layers, of the original.

    Tensors of other names may be there, where verify says that it knows nothing of them. One that
    is not packed may have another name or shape: only loading knows the model's own, and refuses.
    """
    was, now = _tensors(source), _tensors(copy)
    packed = {name for layer in inspect(source).layers for name in _names(layer)}
    sums = {checksum(tensor) for tensor in now.values()}
    for name, tensor in was.items():
        if name not in now:
            assert name not in packed and checksum(tensor) in sums, f"{name} is gone"
            continue
        assert now[name].shape == tensor.shape or name not in packed, name
        same = torch.equal(tensor.flatten(), now[name].flatten())
        assert tensor.dtype == now[name].dtype and same, name
    known = {checksum(tensor) for tensor in was.values()}
    for name in now.keys() - was.keys() - set(unchecked):
        assert checksum(now[name]) in known, f"{name} was let pass"
    layers = [
        json.loads((f / CONFIG).read_text())["quantization_config"]["layers"]
        for f in (source, copy)
    ]
    assert layers[0].keys() == layers[1].keys()


def _names(layer: Any) -> list[str]:
    return [f"{layer.name}.{key}" for key in layer.layout.tensors()]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def _run_every_layer(copy: Path) -> None:
    """A forgery that holds together is some other model: it multiplies without a crash."""
    for layer in inspect(copy).layers:
        packed = read_packed(copy, layer.name)
        x = torch.ones(2, layer.layout.k)
        assert dequant_matmul(x, packed).shape == (2, layer.layout.n)
        assert dequantize(packed).shape == (layer.layout.n, layer.layout.k)


# --- mutations -----------------------------------------------------------------------------------


def some_bytes(folder: Path, draw: Draw) -> None:
    """Bytes changed, inserted, removed, doubled or cut off in any file that verify reads."""
    path = draw.choice([folder / WEIGHTS, folder / WEIGHTS, folder / CONFIG, *_vocabulary(folder)])
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        # the head of a file is what its reader trusts first
        start = draw.randrange(min(len(data), draw.choice([16, 4096, 2**30])))
        stop = min(len(data), start + draw.choice([0, 1, 1, 4, 100]))
        new = bytes(
            draw.choice([0, 0x22, 0x7F, 0xFF, draw.randrange(256)])
            for _ in range(draw.choice([0, 1, stop - start]))
        )
        data[start:stop] = new or data[start:stop] * 2
    path.write_bytes(data[: draw.choice([len(data)] * 3 + [draw.randrange(len(data) + 1)])])


def _vocabulary(folder: Path) -> list[Path]:
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


def header(folder: Path, draw: Draw) -> None:
    """The header of the weights: dtypes, shapes, offsets, names, its own length."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    for _ in range(draw.choice([1, 1, 2])):
        _spoil(table, draw)
    text = json.dumps(table).encode("utf-8", "surrogatepass")
    said = draw.choice([len(text)] * 8 + [0, 2**62, 2**64 - 1, len(text) - 1, len(text) + 1])
    path.write_bytes(said.to_bytes(8, "little") + text + data[8 + length :])


def description(folder: Path, draw: Draw) -> None:
    """quantization_config, anywhere in it: nasty values, keys gone or renamed, parts exchanged."""
    config = json.loads((folder / CONFIG).read_text())
    for _ in range(draw.choice([1, 1, 2])):
        _spoil(config["quantization_config"], draw)
    (folder / CONFIG).write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))


def _spoil(tree: Any, draw: Draw) -> None:
    """Change one place, at a random depth, of what JSON holds."""
    places = [(tree, key) for key in tree]
    node, key = draw.choice(places)
    while isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
        node = node[key]
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    what = draw.randrange(4)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[draw.choice(["x", "../x", f"{key}x", key.upper(), "weight"])] = node.pop(key)
    elif what == 2 and type(node[key]) is int:
        node[key] += draw.choice([-1, 1, 8, -node[key], 2**31, -(2**40)])
    else:
        other, name = draw.choice(places)
        node[key] = draw.choice([draw.choice(NASTY), json.loads(json.dumps(other[name]))])


def shards(folder: Path, draw: Draw) -> None:
    """In two files with an index, which says something else than is there."""
    tensors = load_file(folder / WEIGHTS)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        part = {tensor: tensors[tensor] for tensor in tensors if where[tensor] == name}
        save_file(part, folder / name, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    index: dict[str, Any] = {"metadata": {}, "weight_map": where}
    hostile = ["../" + names[0], "/etc/passwd", "x\0.safetensors", "a/b.safetensors", "", 3, None]
    for name in draw.sample(sorted(where), draw.choice([0, 1, 2])):
        where[name] = draw.choice([*hostile, *names, "..\\x.safetensors", "lost.safetensors"])
    if draw.random() < 0.3:
        _spoil(index, draw)
    if draw.random() < 0.1:
        (folder / draw.choice(names)).unlink()
    (folder / INDEX).write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))


def data(folder: Path, draw: Draw) -> None:
    """Tensors exchanged, retyped, reshaped or filled with other numbers, checksums as they were."""
    _change_tensors(folder, draw)


def forged(folder: Path, draw: Draw) -> None:
    """The same by somebody who also signs: checksums are those of the new bytes."""
    _change_tensors(folder, draw)
    sums = {name: checksum(t) for name, t in load((folder / WEIGHTS).read_bytes()).items()}
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"]["checksums"] = sums
    (folder / CONFIG).write_text(json.dumps(config))


def _change_tensors(folder: Path, draw: Draw) -> None:
    tensors = load_file(folder / WEIGHTS)
    name, other = draw.sample(sorted(tensors), 2)
    tensor, values = tensors[name], [0, 1, -1, 9, 127, 255, 65504, math.nan, math.inf, -math.inf]
    what = draw.randrange(6)
    if what == 0:
        tensors[name], tensors[other] = tensors[other], tensor
    elif what == 1:
        kinds = [torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]
        tensors[name] = tensor.to(draw.choice(kinds))
    elif what == 2:
        shapes = [
            tensor.flatten(),
            tensor[None],
            tensor[1:],
            tensor.repeat(2, *[1] * (tensor.ndim - 1)),
        ]
        tensors[name] = draw.choice(shapes).clone()
    elif what == 3:
        tensors.pop(name)
    elif what == 4:
        tensors[draw.choice([f"{name}x", "ghost.weight", "../x", "ghost.overlay_gap"])] = (
            tensor.clone()
        )
    else:
        value = draw.choice(values)
        info = torch.finfo if tensor.is_floating_point() else torch.iinfo
        value = (
            value
            if tensor.is_floating_point()
            else int(
                min(
                    max(0 if value != value else value, info(tensor.dtype).min),
                    info(tensor.dtype).max,
                )
            )
        )
        flat = tensor.view(-1)
        for _ in range(draw.choice([1, 1, 5])):
            flat[draw.randrange(len(flat))] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


KINDS: dict[str, Callable[[Path, Draw], None]] = {
    f.__name__: f for f in (some_bytes, header, description, shards, data, forged)
}
SIGNED = {"forged"}
