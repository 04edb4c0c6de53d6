"""`pbq export OUT FILE.gguf`: a packed checkpoint as one file for llama.cpp and its relatives.

No GGUF type has tiers of columns with scales of their own, so only float32 holds every packed
layer exactly, and smaller types those that are simple enough. The error of every tensor is measured
before anything is written, reported, and refused beyond a limit.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pbq import hf
from pbq.disk import check_space, read_json, size_text, unused, writing
from pbq.errors import ModelError, UsageError
from pbq.linear import PackedModule

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Of the types that the gguf package can write, by bits a weight: 1.69, 2.06, 4.5, 5, 5.5, 6, 8.5.
BLOCKS = ("TQ1_0", "TQ2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SMALLEST = "smallest"
DTYPES = (*FLOATS, *(name.lower() for name in BLOCKS), SMALLEST)

# model_type in transformers -> general.architecture, where the tensors differ in name and, for
# llama, in the order of the rows that rope turns
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_WAY_OUT = "`pbq export OUT DENSE`, and llama.cpp's convert_hf_to_gguf.py on DENSE, may do it"

# How text is cut before byte pairs are merged, under the names that llama.cpp has for it.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. error: norm of what was lost over the norm of what was packed."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    error: float


@dataclass(frozen=True)
class GgufFile:
    """path: the file that was written; tensors: all of them, in its order."""

    path: Path
    architecture: str
    tensors: tuple[GgufTensor, ...]

    @property
    def worst(self) -> GgufTensor:
        return max(self.tensors, key=lambda tensor: tensor.error)

    def rows(self) -> dict[str, str]:
        types = collections.Counter(tensor.type for tensor in self.tensors)
        said = f"{self.worst.error:.2g}, {self.worst.name}" if self.worst.error else "none: exact"
        return {
            "architecture": self.architecture,
            "tensors": ", ".join(f"{count} {name}" for name, count in types.most_common()),
            "weights": size_text(sum(tensor.nbytes for tensor in self.tensors)),
            "largest relative error": said,
        }

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}


def export_gguf(
    out: Path | str,
    path: Path | str,
    dtype: str = "bfloat16",
    *,
    max_error: float = 0.01,
    trust_remote_code: bool = False,
) -> GgufFile:
    """Write the model at `out` as a GGUF file, packed values rounded once to `dtype`.

    `smallest` chooses, layer by layer, the smallest type whose relative error is at most
    `max_error`. Embeddings and the head keep the type they have unless `dtype` is a float, packed
    ones get a float within `max_error`; norms are float32, as llama.cpp wants them. The file
    appears when it is whole.

    Raises UsageError for a `path` that exists or an error above `max_error`, ModelError for what
    the format, or this function, does not know, CheckpointError, ResourceError.
    """
    out, path = Path(out), Path(path)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if path.exists():
        raise UsageError(f"{path} exists; choose another name or remove it")
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UsageError(f"{path}: writing it needs pip install 'pbq-llm[gguf]'") from error
    model = hf.load(str(out), dtype=torch.float32, trust_remote_code=trust_remote_code)
    architecture = _architecture(out, model.config)
    writer = GGUFWriter(None, architecture)
    _describe(writer, out, model.config)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=trust_remote_code)
    _describe_tokenizer(writer, out, tokenizer, model.config.vocab_size)
    tensors = tuple(
        _planned(hf_name, name, values, *_candidates(dtype, module, values.ndim, max_error))
        for hf_name, name, values, module in _tensors(model, architecture)
    )
    found = GgufFile(path, architecture, tensors)
    check_space(path, sum(tensor.nbytes for tensor in tensors))
    _write(writer, model, found)
    return found


def _write(writer: GGUFWriter, model: PreTrainedModel, file: GgufFile) -> None:
    """Dequantize and encode again, tensor by tensor, so that no two are held at once."""
    from gguf.quants import quantize

    staging = unused(file.path)
    try:
        with writing(staging):
            kinds = {tensor.name: _kind(tensor.type) for tensor in file.tensors}
            for tensor in file.tensors:
                values_dtype = np.dtype(np.float32)
                writer.add_tensor_info(
                    tensor.name, tensor.shape, values_dtype, tensor.nbytes, kinds[tensor.name]
                )
            writer.write_header_to_file(staging)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, name, values, _ in _tensors(model, file.architecture):
                writer.write_tensor_data(quantize(values, kinds[name]))
            writer.close()
            staging.rename(file.path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


# --- tensors -------------------------------------------------------------------------------------


def _tensors(
    model: PreTrainedModel, architecture: str
) -> Iterator[tuple[str, str, np.ndarray, PackedModule | None]]:
    """Name here, name in the file, float32 values, and the packed module whose weight they are."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    packed = dict(hf.packed_modules(model))
    for full, tensor in _values(model, packed):
        layer, _, suffix = full.rpartition(".")
        name = names.get_name(layer)
        if name is None:
            raise ModelError(f"{full}: GGUF has no name for it in {architecture}; {_WAY_OUT}")
        values = tensor.detach().float().numpy()
        if architecture == "llama" and layer.endswith(("q_proj", "k_proj")):
            queries = layer.endswith("q_proj")
            heads = config.num_attention_heads if queries else config.num_key_value_heads
            values = _interleaved(values, heads)
        module = packed.get(layer) if suffix == "weight" else None
        yield full, f"{name}.{suffix}", values, module


def _values(
    model: PreTrainedModel, packed: Mapping[str, PackedModule]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the dense model by its name, a packed one dequantized when its turn comes."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        layer, _, suffix = name.rpartition(".")
        if layer not in packed:
            if name not in tied:
                yield name, tensor
        elif suffix == "weight":
            yield name, packed[layer].dequantize(torch.float32)
        elif suffix == "bias":
            yield name, tensor


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows as ggml's rope pairs them: i of a head's first half beside i of its second half."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _kind(name: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name]


def _candidates(
    dtype: str, module: PackedModule | None, dims: int, max_error: float
) -> tuple[Sequence[str], float]:
    """Types to try for a tensor, in this order, and the error that one of them may have."""
    if dims == 1:
        return ["F32"], 0.0
    if dtype in FLOATS:
        return [FLOATS[dtype]], max_error
    if module is None:
        return list(FLOATS.values()), 0.0
    if not hf.is_packed_linear(module):
        return list(FLOATS.values()), max_error
    return [*BLOCKS, *FLOATS.values()] if dtype == SMALLEST else [dtype.upper()], max_error


def _planned(
    hf_name: str, name: str, values: np.ndarray, kinds: Sequence[str], limit: float
) -> GgufTensor:
    """The tensor as the first of `kinds` that is near enough. Raises UsageError if none is."""
    from gguf import GGML_QUANT_SIZES

    refused = ""
    for kind in kinds:
        block, nbytes = GGML_QUANT_SIZES[_kind(kind)]
        if values.shape[-1] % block:
            refused = f"rows of {values.shape[-1]} values are no multiple of its {block}"
            continue
        error = _error(values, _kind(kind))
        if error <= limit:
            return GgufTensor(name, kind, values.shape, values.size // block * nbytes, error)
        refused = f"its relative error would be {error:.2g}, above --max-error {limit:g}"
    raise UsageError(f"{hf_name} as {kinds[-1]}: {refused}; choose another --dtype")


def _error(values: np.ndarray, kind: GGMLQuantizationType) -> float:
    """Norm of what rounding loses over that of `values`; infinite beyond the type's range."""
    from gguf.quants import dequantize, quantize

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rounded = dequantize(quantize(values, kind), kind)
        lost = np.linalg.norm(rounded - values)
    norm = np.linalg.norm(values)
    error = float(lost / norm) if norm else float(lost)
    return error if np.isfinite(error) else float("inf")


# --- what describes the model --------------------------------------------------------------------


def _architecture(out: Path, config: PretrainedConfig) -> str:
    """general.architecture. Raises ModelError for what llama.cpp would compute otherwise."""
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"{out}: GGUF export knows {known}, not {kind}; {_WAY_OUT}")
    window = getattr(config, "sliding_window", None)
    unlike = {
        f"rope of type {config.rope_parameters['rope_type']}": (
            config.rope_parameters["rope_type"] != "default"
        ),
        f"attention windows of {window}": (
            window is not None and window < config.max_position_embeddings
        ),
        "biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        f"activation {config.hidden_act}": config.hidden_act != "silu",
    }
    for what, found in unlike.items():
        if found:
            raise ModelError(f"{out}: GGUF export does not know {kind} with {what}; {_WAY_OUT}")
    return _ARCHITECTURES[kind]


def _describe(writer: GGUFWriter, out: Path, config: PretrainedConfig) -> None:
    from gguf import GGML_QUANT_VERSION

    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    bits = read_json(out / "config.json")["quantization_config"]["stored_bits"]
    writer.add_name(out.resolve().name)
    writer.add_description(f"Values of a checkpoint that pbq packed at {bits:.3f} bits per weight")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _describe_tokenizer(
    writer: GGUFWriter, out: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """The vocabulary, its merges, the special tokens and the chat template."""
    from gguf import SpecialVocab

    tokens, types = _vocabulary(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(out))
    writer.add_add_space_prefix(False)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(out, load_merges=True, n_vocab=vocab_size)
    ids = tokenizer("a").input_ids
    special.add_special_token["bos"] = ids[0] == tokenizer.bos_token_id
    special.add_special_token["eos"] = ids[-1] == tokenizer.eos_token_id
    special.add_to_gguf(writer, quiet=True)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[int]]:
    """Every id's token and its GGUF type; ids beyond the tokenizer's are padding."""
    from gguf import TokenType

    names = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    types = [TokenType.NORMAL if i in names else TokenType.UNUSED for i in range(size)]
    for i, token in added.items():
        types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return tokens, types


def _pre_tokenizer(out: Path) -> str:
    """llama.cpp's name for how tokenizer.json cuts text. Raises ModelError if it has none."""
    file = out / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{out}: has no tokenizer.json, which GGUF export reads; {_WAY_OUT}")
    described = read_json(file)
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    # the parts of a step that change where text is cut
    cuts = [
        (
            step.get("type"),
            step.get("use_regex"),
            step.get("individual_digits"),
            (step.get("pattern") or {}).get("Regex"),
        )
        for step in steps
    ]
    whole, by_regex = ("ByteLevel", True, None, None), ("ByteLevel", False, None, None)
    if described["model"]["type"] == "BPE":
        if cuts == [whole]:
            return "gpt-2"
        if cuts == [("Digits", None, True, None), whole]:
            return "smollm"
        if len(cuts) == 2 and cuts[1] == by_regex and cuts[0][0] == "Split":
            name = _SPLITS.get(cuts[0][3] or "")
            if name:
                return name
    said = json.dumps(described.get("pre_tokenizer"))
    raise ModelError(
        f"{file}: GGUF export has no name for its way to cut text ({said:.120}); {_WAY_OUT}"
    )
