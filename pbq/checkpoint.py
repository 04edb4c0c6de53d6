"""Checkpoints on the disk, read by somebody who believes nothing they say.

`read_layers`, `read_packed`, `inspect` and `verify` read a finished checkpoint: whatever is wrong
with it is a `CheckpointError` that names the tensor or the file. `copy_auxiliary` completes a new
one with the source's tokenizer and other small files. `Work` is the run that writes one.
docs/format.md is the format in prose.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from torch import Tensor

from pbq.disk import CheckpointError, check_space, checksum, read_json, reading, writing
from pbq.work import Work
from pbq_kernels.layout import (
    FORMAT_VERSION,
    INNER,
    PackedFormatError,
    PackedWeight,
    Tier,
    WeightLayout,
    check_tensors,
)

__all__ = [
    "CheckpointError",
    "CheckpointSummary",
    "LayerSummary",
    "VerifyReport",
    "Work",
    "check_space",
    "checksum",
    "copy_auxiliary",
    "inspect",
    "read_layers",
    "read_packed",
    "verify",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Stored bits are a JSON number that may have been rounded to six decimals.
BITS_TOLERANCE = 1e-6

_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.float16: "F16"}
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PACKED_SUFFIXES = ("overlay_count", "overlay_gap", "overlay_value", "overlay_scale")


# (header, rows, title) of a table
Table = tuple[list[str], list[list[str]], str]


@dataclass(frozen=True)
class LayerSummary:
    """One quantized weight. bits: stored per weight; nbytes: of each stored tensor, by name."""

    name: str
    layout: WeightLayout
    nbytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes.values())

    @property
    def bits(self) -> float:
        return 8 * self.total_bytes / (self.layout.n * self.layout.k)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.layout.to_dict(),
            "bits": self.bits,
            "bytes": self.total_bytes,
            "tensors": self.nbytes,
        }

    def row(self) -> list[str]:
        """Its line in the table of a checkpoint."""
        shape = f"{self.layout.n}x{self.layout.k}"
        return [self.name, shape, self.columns, f"{self.bits:.4f}", f"{self.total_bytes:,}"]

    def grid(self) -> Table:
        """A row for each tier, then one for each stored tensor."""
        tiers = [
            [f"tier {i}", f"{t.columns} columns", f"{t.planes} bit", _grid_text(t)]
            for i, t in enumerate(self.layout.tiers)
        ]
        tensors = [[name, f"{size} bytes", "", ""] for name, size in self.nbytes.items()]
        n, k, rank = self.layout.n, self.layout.k, self.layout.rank
        product = f" as {n}x{rank} times {rank}x{k}" if rank else ""
        title = f"{self.name}: {n}x{k}{product}, {self.bits:.4f} bits"
        return ["", "", "", ""], tiers + tensors, title

    @property
    def columns(self) -> str:
        """How many columns at how many bits; of a product, its rank."""
        tiers = " + ".join(f"{t.columns} at {t.planes}" for t in self.layout.tiers)
        return f"rank {self.layout.rank}" if self.layout.rank else tiers


def _grid_text(tier: Tier) -> str:
    scales = "tied" if tier.tied else "free"
    offset = ", offset" if tier.offset else ""
    group = "" if tier.group_size == -1 else f", groups of {tier.group_size}"
    trellis = f", trellis of {2**tier.trellis} states" if tier.trellis else ""
    trellis += ", uneven levels" * tier.uneven
    return f"{scales} scales{offset}{group}{trellis}"


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint stores, from its headers alone.

    stored_bits: bits per quantized weight. bits_per_parameter: of the whole model, embeddings and
    norms included. embeddings: what is packed of embeddings and head, which stored_bits and the
    quantized figures leave out; embed_stored_bits: bits per weight of them. file_bytes: the weight
    files, headers included; directory_bytes: every file.
    """

    method: str
    asked_bits: float | None
    stored_bits: float
    bits_per_parameter: float
    parameters: int
    quantized_parameters: int
    quantized_bytes: int
    other_bytes: int
    file_bytes: int
    directory_bytes: int
    embed_stored_bits: float | None
    layers: tuple[LayerSummary, ...]
    embeddings: tuple[LayerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        lists = {"layers": self.layers, "embeddings": self.embeddings}
        fields = {name: value for name, value in vars(self).items() if name not in lists}
        return {**fields, **{name: [x.to_dict() for x in found] for name, found in lists.items()}}

    def grid(self) -> Table:
        """A row for each layer, then the totals."""
        rows = [layer.row() for layer in self.layers]
        packed = self.quantized_parameters + _weights(self.embeddings)
        others = self.parameters - packed
        other_bits = f"{8 * self.other_bytes / others:.4f}" if others else ""
        embed_bytes = sum(layer.total_bytes for layer in self.embeddings)
        every = self.quantized_bytes + embed_bytes + self.other_bytes
        rows += [
            [
                "all quantized weights",
                "",
                "",
                f"{self.stored_bits:.4f}",
                f"{self.quantized_bytes:,}",
            ],
            *(layer.row() for layer in self.embeddings),
            ["all other tensors", "", "", other_bits, f"{self.other_bytes:,}"],
            ["the whole model", "", "", f"{self.bits_per_parameter:.4f}", f"{every:,}"],
        ]
        header = ["layer", "shape", "columns at bits", "stored bits", "bytes"]
        asked = "" if self.asked_bits is None else f", {self.asked_bits:g} bits asked"
        return header, rows, f"{self.method}{asked}"


@dataclass(frozen=True)
class VerifyReport:
    """A checkpoint that passed: how much was read, what it stores, what is only worth a look.

    embed_stored_bits: of embeddings and head, None where they are not packed.
    unchecked: tensors beside the packed ones for which config.json has no checksum.
    """

    layers: int
    tensors: int
    nbytes: int
    stored_bits: float
    asked_bits: float | None
    embed_stored_bits: float | None
    unchecked: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def rows(self) -> dict[str, Any]:
        embed = self.embed_stored_bits
        return {
            "quantized layers": self.layers,
            "tensors": self.tensors,
            "bytes of tensors": f"{self.nbytes:,}",
            "stored bits per weight": f"{self.stored_bits:.6f}",
            "asked": "-" if self.asked_bits is None else f"{self.asked_bits:g}",
            **({"embeddings and head": f"{embed:.6f} stored bits per weight"} if embed else {}),
            "tensors without a checksum": len(self.unchecked),
            **{f"warning {i}": text for i, text in enumerate(self.warnings, 1)},
        }


def read_layers(out: Path | str) -> dict[str, WeightLayout]:
    """Layout of every quantized layer, by module name, from config.json. Raises CheckpointError."""
    return _read_config(Path(out)).layers


def read_packed(out: Path | str, name: str) -> PackedWeight:
    """One layer's packed weight, checked against layout and checksums. Raises CheckpointError."""
    contents = _Contents.open(Path(out))
    contents.refuse_unknown(name)
    return contents.read_packed(name)


@overload
def inspect(out: Path | str, layer: None = None) -> CheckpointSummary: ...


@overload
def inspect(out: Path | str, layer: str) -> LayerSummary: ...


def inspect(out: Path | str, layer: str | None = None) -> CheckpointSummary | LayerSummary:
    """Sizes and bits, of one layer or of all, from the headers alone. Raises CheckpointError."""
    contents = _Contents.open(Path(out))
    if layer is None:
        return _summary(contents)
    contents.refuse_unknown(layer)
    return _layer_summary(contents, layer)


def _summary(contents: _Contents) -> CheckpointSummary:
    config = contents.config
    layers = tuple(_layer_summary(contents, name) for name in config.layers)
    embeddings = tuple(_layer_summary(contents, name) for name in config.embeddings)
    quantized_parameters, embed_parameters = _weights(layers), _weights(embeddings)
    others = [contents.stored[name] for name in contents.stored.keys() - contents.packed_names()]
    quantized_bytes = sum(layer.total_bytes for layer in layers)
    embed_bytes = sum(layer.total_bytes for layer in embeddings)
    other_bytes = sum(tensor.nbytes for tensor in others)
    parameters = quantized_parameters + embed_parameters
    parameters += sum(math.prod(tensor.shape) for tensor in others)
    return CheckpointSummary(
        method=config.method,
        asked_bits=config.asked_bits,
        stored_bits=8 * quantized_bytes / quantized_parameters,
        bits_per_parameter=8 * (quantized_bytes + embed_bytes + other_bytes) / parameters,
        parameters=parameters,
        quantized_parameters=quantized_parameters,
        quantized_bytes=quantized_bytes,
        other_bytes=other_bytes,
        file_bytes=sum(file.stat().st_size for file in contents.files),
        directory_bytes=sum(p.stat().st_size for p in contents.out.rglob("*") if p.is_file()),
        embed_stored_bits=8 * embed_bytes / embed_parameters if embeddings else None,
        layers=layers,
        embeddings=embeddings,
    )


def _weights(layers: tuple[LayerSummary, ...]) -> int:
    return sum(layer.layout.n * layer.layout.k for layer in layers)


def _layer_summary(contents: _Contents, name: str) -> LayerSummary:
    layout = contents.config.layouts[name]
    nbytes = {key: contents.stored[f"{name}.{key}"].nbytes for key in layout.tensors()}
    return LayerSummary(name, layout, nbytes)


def verify(out: Path | str, progress: Callable[[int, int], object] | None = None) -> VerifyReport:
    """Read the whole checkpoint and check everything the format promises; the first fault raises.

    progress: called with (bytes read, bytes in all) after every layer and tensor. Raises
    CheckpointError naming the tensor or the file.
    """
    contents = _Contents.open(Path(out))
    contents.refuse_leftovers()
    summary = _summary(contents)
    _check_bits(contents, summary)
    _check_auxiliary(contents.out)
    digests = _read_everything(contents, progress or (lambda done, total: None))
    unchecked = _unchecked(contents, digests)
    return VerifyReport(
        layers=len(summary.layers),
        tensors=len(contents.stored),
        nbytes=sum(tensor.nbytes for tensor in contents.stored.values()),
        stored_bits=summary.stored_bits,
        asked_bits=summary.asked_bits,
        embed_stored_bits=summary.embed_stored_bits,
        unchecked=tuple(unchecked),
        warnings=tuple(_warnings(contents)),
    )


def _read_everything(contents: _Contents, progress: Callable[[int, int], object]) -> dict[str, str]:
    """Checksum of every stored tensor, each compared with the one written for its name."""
    total, done, digests = sum(t.nbytes for t in contents.stored.values()), 0, {}
    for layer in contents.config.layouts:
        packed = contents.read_packed(layer)
        for key in packed.tensors:
            digests[f"{layer}.{key}"] = contents.config.checksums[f"{layer}.{key}"]
            done += contents.stored[f"{layer}.{key}"].nbytes
        progress(done, total)
    for name in sorted(contents.stored.keys() - digests.keys()):
        digests[name] = checksum(contents.read(name))
        done += contents.stored[name].nbytes
        progress(done, total)
    return digests


def _unchecked(contents: _Contents, digests: Mapping[str, str]) -> list[str]:
    """Tensors without a checksum. Raises for a checksum without a tensor.

    A tied tensor is stored once and a renamed one under another name: equal bytes will do.
    """
    checksums = contents.config.checksums
    absent = {name: digest for name, digest in checksums.items() if name not in digests}
    written, elsewhere = set(digests.values()), set(absent.values())
    for name, digest in sorted(absent.items()):
        if digest not in written:
            raise CheckpointError(f"{name}: missing, though it has a checksum")
    known = checksums.keys()
    return sorted(n for n in digests.keys() - known if digests[n] not in elsewhere)


def _check_bits(contents: _Contents, summary: CheckpointSummary) -> None:
    config, file, counted = contents.config, contents.out / "config.json", summary.stored_bits
    said = {"stored_bits": (config.stored_bits, counted)}
    if summary.embed_stored_bits is not None and config.embed_stored_bits is not None:
        said["embed_stored_bits"] = config.embed_stored_bits, summary.embed_stored_bits
    for name, (written, found) in said.items():
        if abs(found - written) > BITS_TOLERANCE:
            raise CheckpointError(f"{file}: {name} says {written}, the files hold {found:.6f}")
    if config.asked_bits is not None and counted > config.asked_bits + BITS_TOLERANCE:
        raise CheckpointError(
            f"{file}: {counted:.6f} bits per weight are stored, {config.asked_bits} were asked for"
        )


# JSON objects that pbq, transformers or tokenizers read.
_READ = {
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "report.json",
    "selftest.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


def _check_auxiliary(out: Path) -> None:
    """What a load reads parses; a tokenizer's settings do not lie there without its vocabulary."""
    for path in sorted(out.glob("*.json")):
        if path.name in _READ:  # others came with the source, and may hold anything
            read_json(path)
    if (out / "tokenizer_config.json").exists() and not _has_vocabulary(out):
        raise CheckpointError(
            f"{out / 'tokenizer_config.json'}: the tokenizer's vocabulary is missing"
        )


def _has_vocabulary(out: Path) -> bool:
    patterns = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
    return any(next(out.glob(pattern), None) for pattern in patterns)


def _warnings(contents: _Contents) -> Iterator[str]:
    if not _has_vocabulary(contents.out):
        yield f"{contents.out}: no tokenizer"
    for path in sorted(contents.out.glob("*.safetensors")):
        if path not in contents.files:
            yield f"{path}: not part of the checkpoint"


def _field(data: Mapping[str, Any], name: str, kinds: tuple[type, ...], path: Path) -> Any:
    """data[name] if it is there and of exactly one of `kinds` (so that true is no number)."""
    value = data.get(name)
    if type(value) not in kinds:
        raise CheckpointError(f"{path}: {name} is {value!r:.60}, not a valid {kinds[0].__name__}")
    return value


def _bits(data: Mapping[str, Any], name: str, path: Path) -> float:
    value = _field(data, name, (float, int), path)
    if not 0 < value < 64:
        raise CheckpointError(f"{path}: {name} is {value!r:.60}; no weight takes that many bits")
    return float(value)


@dataclass(frozen=True)
class _Config:
    """quantization_config, checked. biased: layers with a bias tensor beside the packed weight.

    layers, embeddings: layouts by module name; embed_stored_bits is None without the latter.
    checksums: by tensor name; at least every packed tensor has one.
    """

    method: str
    asked_bits: float | None
    stored_bits: float
    layers: dict[str, WeightLayout]
    embeddings: dict[str, WeightLayout]
    embed_stored_bits: float | None
    biased: frozenset[str]
    checksums: dict[str, str]

    @property
    def layouts(self) -> dict[str, WeightLayout]:
        """Of everything that is packed."""
        return {**self.layers, **self.embeddings}


def _read_config(out: Path) -> _Config:
    path = out / "config.json"
    data = read_json(path).get("quantization_config")
    if not isinstance(data, dict) or data.get("quant_method") != "pbq":
        raise CheckpointError(f"{path}: not a pbq checkpoint")
    version = _field(data, "format", (int,), path)
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version!r:.20}; this pbq reads 1 to {FORMAT_VERSION}, try a newer one"
        )
    layers = _field(data, "layers", (dict,), path)
    if not layers:
        raise CheckpointError(f"{path}: no quantized layers")
    embeddings = _field(data, "embeddings", (dict,), path) if "embeddings" in data else {}
    for name in embeddings.keys() & layers.keys():
        raise CheckpointError(f"{path}: {name} is among the layers and the embeddings")
    return _Config(
        method=_field(data, "method", (str,), path),
        asked_bits=None if data.get("bits") is None else _bits(data, "bits", path),
        stored_bits=_bits(data, "stored_bits", path),
        layers={name: _layout(name, entry, path) for name, entry in layers.items()},
        embeddings={name: _rows_layout(name, entry, path) for name, entry in embeddings.items()},
        embed_stored_bits=_bits(data, "embed_stored_bits", path) if embeddings else None,
        biased=frozenset(n for n, entry in {**layers, **embeddings}.items() if entry.get("bias")),
        checksums=_checksums(data, path),
    )


def _layout(name: str, entry: Any, path: Path) -> WeightLayout:
    if not isinstance(entry, dict) or type(entry.get("bias", False)) is not bool:
        raise CheckpointError(f"{path}: {name}: not a valid layer description")
    with reading(path):
        try:
            return WeightLayout.from_dict({k: v for k, v in entry.items() if k != "bias"})
        except PackedFormatError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error


def _rows_layout(name: str, entry: Any, path: Path) -> WeightLayout:
    layout = _layout(name, entry, path)
    try:
        layout.check_rows()
    except PackedFormatError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error
    return layout


def _checksums(data: Mapping[str, Any], path: Path) -> dict[str, str]:
    table = _field(data, "checksums", (dict,), path)
    for name, value in table.items():
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{16}", value):
            raise CheckpointError(f"{path}: {name}: {value!r:.60} is not a checksum")
    return table


@dataclass(frozen=True)
class _Stored:
    """One tensor as its file's header describes it. nbytes: from the header's offsets."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class _Contents:
    """A checkpoint's config and headers, cross-checked. Tensor data is read only by `read`."""

    out: Path
    config: _Config
    files: dict[Path, Any]
    stored: dict[str, _Stored]

    @classmethod
    def open(cls, out: Path) -> _Contents:
        config = _read_config(out)
        index = _read_index(out)
        names = [SINGLE_FILE] if index is None else sorted(set(index.values()))
        files: dict[Path, Any] = {}
        stored: dict[str, _Stored] = {}
        for path in (out / name for name in names):
            files[path] = _open(path)
            for name, tensor in _read_header(path).items():
                if name in stored:
                    raise CheckpointError(f"{path}: {name} is in {stored[name].file.name} too")
                stored[name] = tensor
        _check_index(out / INDEX_FILE, index, stored)
        contents = cls(out, config, files, stored)
        for name in config.layouts:
            contents._check_layer(name)
        return contents

    def packed_names(self) -> set[str]:
        layouts = self.config.layouts.items()
        return {f"{name}.{key}" for name, layout in layouts for key in layout.tensors()}

    def refuse_unknown(self, layer: str) -> None:
        if layer not in self.config.layouts:
            raise CheckpointError(f"{self.out}: no quantized layer is called {layer!r}")

    def _check_layer(self, name: str) -> None:
        """The headers agree with the layout, before a byte of data is read."""
        layout = self.config.layouts[name]
        for key, spec in layout.tensors().items():
            self._check_tensor(f"{name}.{key}", _DTYPES[spec.dtype], spec.shape)
            if self.stored[f"{name}.{key}"].nbytes != spec.nbytes:
                raise CheckpointError(f"{name}.{key}: takes another number of bytes than its shape")
            if f"{name}.{key}" not in self.config.checksums:
                raise CheckpointError(f"{name}.{key}: no checksum")
        if name in self.config.biased:
            self._check_tensor(f"{name}.bias", None, (layout.n,))

    def _check_tensor(self, name: str, dtype: str | None, shape: tuple[int, ...]) -> None:
        if name not in self.stored:
            raise CheckpointError(f"{name}: missing")
        stored = self.stored[name]
        if stored.shape != shape or dtype not in (None, stored.dtype):
            raise CheckpointError(
                f"{name}: {stored.dtype} {list(stored.shape)}, "
                f"the layout says {dtype or 'a bias of'} {list(shape)}"
            )

    def refuse_leftovers(self) -> None:
        """Raise for tensors of the packed kind that no layer of the config accounts for."""
        known = self.packed_names() | {f"{name}.bias" for name in self.config.biased}
        for name in sorted(self.stored.keys() - known):
            module, _, key = name.rpartition(".")
            codes = key in ("weight", f"{INNER}weight") and self.stored[name].dtype == "U8"
            if module in self.config.layouts or codes or key in _PACKED_SUFFIXES:
                raise CheckpointError(f"{name}: packed data that no layer of config.json lists")

    def read(self, name: str) -> Tensor:
        """One tensor, its bytes compared with its checksum where its name has one."""
        path = self.stored[name].file
        with reading(path):
            tensor = self.files[path].get_tensor(name)
        expected = self.config.checksums.get(name)
        if expected is not None and checksum(tensor) != expected:
            raise CheckpointError(f"{name}: damaged in {path}: its checksum differs")
        return tensor

    def read_packed(self, name: str) -> PackedWeight:
        layout = self.config.layouts[name]
        tensors = {key: self.read(f"{name}.{key}") for key in layout.tensors()}
        try:
            check_tensors(layout, tensors, name, values=True)
        except PackedFormatError as error:
            raise CheckpointError(str(error)) from error
        return PackedWeight(layout, tensors)


def _read_index(out: Path) -> dict[str, str] | None:
    """{tensor: file name} of a sharded checkpoint, None for a single file. File names are plain."""
    path = out / INDEX_FILE
    if not path.exists():
        return None
    if (out / SINGLE_FILE).exists():
        raise CheckpointError(
            f"{path}: lies beside {SINGLE_FILE}, which loaders prefer; remove one"
        )
    files = _field(read_json(path), "weight_map", (dict,), path)
    for tensor, file in files.items():
        if not isinstance(file, str) or not _PLAIN_FILE.fullmatch(file):
            raise CheckpointError(
                f"{path}: {tensor} is in {file!r:.80}, not a plain .safetensors name"
            )
    if not files:
        raise CheckpointError(f"{path}: lists no tensors")
    return files


def _check_index(
    path: Path, index: Mapping[str, str] | None, stored: Mapping[str, _Stored]
) -> None:
    if index is None:
        return
    for name in sorted(index.keys() | stored.keys()):
        place = stored[name].file.name if name in stored else "no file"
        if index.get(name) != place:
            raise CheckpointError(f"{path}: {name} is in {place}, the index says {index.get(name)}")


def _open(path: Path) -> Any:
    with reading(path):
        if not path.is_file():
            raise FileNotFoundError(path)
        file = safe_open(path, framework="pt")
    if (file.metadata() or {}).get("format") != "pt":
        raise CheckpointError(f"{path}: its metadata does not say format 'pt'")
    return file


def _read_header(path: Path) -> dict[str, _Stored]:
    """Tensors of one file by the offsets in its header, which `safe_open` has validated before."""
    with reading(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: _Stored(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }


_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|npz|npy|ot|tflite|pkl"
    r"|pickle|joblib|mlmodel|index\.json)",
    re.IGNORECASE,
)
# The source's config and card describe the unquantized model; an adapter would be applied to OUT.
_NOT_TRUE_OF_OUT = {
    "config.json",
    "adapter_config.json",
    "README.md",
    "report.json",
    "report.html",
    "recipe.yaml",
    "selftest.json",
}
_SUBFOLDERS = ("additional_chat_templates",)


def copy_auxiliary(
    source_dir: Path | str, out: Path | str, *, trust_remote_code: bool = False
) -> list[str]:
    """Copy every file of the source that is neither weights nor already in `out`; return the names.

    Tokenizer, chat templates, generation config, licence. Never weights, their indices or pickles;
    Python files only with `trust_remote_code`. Raises ResourceError when the disk refuses.
    """
    source_dir, out = Path(source_dir), Path(out)
    copied = []
    for source in _files(source_dir):
        name = source.relative_to(source_dir)
        if _is_auxiliary(source, trust_remote_code) and not (out / name).exists():
            with writing(out / name, source.stat().st_size):
                (out / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source, out / name)
            copied.append(str(name))
    return copied


def _files(source_dir: Path) -> Iterator[Path]:
    for folder in (source_dir, *(source_dir / name for name in _SUBFOLDERS)):
        if folder.is_dir():
            # hub snapshots are symlinks into a blob store: is_file follows them
            yield from sorted(p for p in folder.iterdir() if p.is_file())


def _is_auxiliary(path: Path, trust_remote_code: bool) -> bool:
    name = path.name
    if name.startswith(".") or name in _NOT_TRUE_OF_OUT or _WEIGHTS.fullmatch(name):
        return False
    return trust_remote_code or path.suffix != ".py"
