"""The transformers plug-in: from_pretrained builds PackedLinears, save_pretrained writes them back.

A checkpoint describes itself in config.json:

    "quantization_config": {"quant_method": "pbq", "format": 1, "method": ..., "bits": asked,
        "stored_bits": true, "layers": {module name: layout, "bias": true where there is one},
        "embeddings": likewise, where embeddings and head are packed, "embed_stored_bits": true,
        "checksums": {tensor name: 16 hex digits of sha256}, "provenance": {...}}

The checksums stand here and not in the safetensors header because safetensors writes a header of
two or more entries in random order: the same model would not be the same file twice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from pbq.disk import CheckpointError, checksum
from pbq.embedding import PackedEmbedding, PackedHead, TiedHead, check_packable
from pbq.errors import ModelError
from pbq.experts import find_experts, fuse, fused_names, unfuse
from pbq.linear import PackedLinear, PackedModule
from pbq_kernels import FORMAT_VERSION, PackedFormatError, PackedWeight, WeightLayout

QUANT_METHOD = "pbq"


@dataclass(frozen=True)
class PackedLayer:
    """What config.json says of one module: the layout of its weight, and whether it has a bias."""

    layout: WeightLayout
    bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**self.layout.to_dict(), **({"bias": True} if self.bias else {})}

    @classmethod
    def from_dict(cls, name: str, data: Any) -> PackedLayer:
        """Raises CheckpointError, naming the layer, on anything the format does not allow."""
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{name}: not a description of a layer: {data!r:.80}")
        bias = data.get("bias", False)
        if not isinstance(bias, bool):
            raise CheckpointError(f"{name}: bias is {bias!r:.80}, not true or false")
        try:
            rest = {key: value for key, value in data.items() if key != "bias"}
            return cls(WeightLayout.from_dict(rest), bias)
        except PackedFormatError as error:
            raise CheckpointError(f"{name}: {error}") from None


class PbqConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    method, bits: what was asked for. layers: by module name. embeddings: likewise the input
    embeddings and a head that is not tied to them, where these are packed; `bits` says nothing of
    them. checksums: by tensor name. provenance: whatever tells how the model was made (source,
    calibration, perplexities ...).
    """

    def __init__(
        self,
        method: str = "",
        bits: float | None = None,
        layers: Mapping[str, Any] | None = None,
        checksums: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        embeddings: Mapping[str, Any] | None = None,
        format: int = FORMAT_VERSION,
        **others: Any,
    ) -> None:
        _check_format(format)
        # stored bits are computed, never believed
        unknown = others.keys() - {"quant_method", "stored_bits", "embed_stored_bits"}
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            warnings.warn(
                f"pbq: unknown keys in quantization_config ignored: {names}", stacklevel=2
            )
        self.quant_method = QUANT_METHOD
        self.method, self.bits = method, bits
        self.layers = _layers("layers", layers)
        self.embeddings = _layers("embeddings", embeddings)
        self.checksums = _mapping("checksums", checksums)
        self.provenance = _mapping("provenance", provenance)

    @property
    def stored_bits(self) -> float | None:
        """Bits on the disk per quantized weight, over all layers; None while there are none."""
        return _stored_bits(self.layers)

    @property
    def embed_stored_bits(self) -> float | None:
        """The same of embeddings and head, None where they are not packed."""
        return _stored_bits(self.embeddings)

    def to_dict(self) -> dict[str, Any]:
        embeddings = {
            "embeddings": {name: layer.to_dict() for name, layer in self.embeddings.items()},
            "embed_stored_bits": self.embed_stored_bits,
        }
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT_VERSION,
            "method": self.method,
            "bits": self.bits,
            "stored_bits": self.stored_bits,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            **(embeddings if self.embeddings else {}),
            "checksums": dict(self.checksums),
            "provenance": dict(self.provenance),
        }


def _check_format(version: Any) -> None:
    if type(version) is not int or version < 1:
        raise CheckpointError(f"quantization_config: format {version!r:.80} is not a version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"this checkpoint has pbq format {version}, the installed pbq reads up to "
            f"{FORMAT_VERSION}: install a newer pbq"
        )


def _layers(key: str, value: Any) -> dict[str, PackedLayer]:
    return {
        name: layer if isinstance(layer, PackedLayer) else PackedLayer.from_dict(name, layer)
        for name, layer in _mapping(key, value).items()
    }


def _stored_bits(layers: Mapping[str, PackedLayer]) -> float | None:
    layouts = [layer.layout for layer in layers.values()]
    weights = sum(layout.n * layout.k for layout in layouts)
    return sum(layout.stored_bits for layout in layouts) / weights if weights else None


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"quantization_config: {key!r} is not an object")
    return dict(value or {})


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """The packed modules of a model, by name; a head that is tied is none."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def is_packed_linear(module: nn.Module | None) -> TypeGuard[PackedLinear]:
    """Is it a quantized linear of a block? Embeddings and head are not."""
    return isinstance(module, PackedLinear) and not isinstance(module, PackedHead)


def packed_linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The quantized linears of a model, by name."""
    for name, module in packed_modules(model):
        if is_packed_linear(module):
            yield name, module


def checksums(
    model: PreTrainedModel, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, str]:
    """Checksum of every tensor that save_pretrained will write, by its name in the state dict.

    tensors: those that will be written, if not all.

    Offloaded tensors are left out, and three-dimensional ones: experts are saved one by one.
    """
    unsaved = model._keys_to_ignore_on_save or set()
    tensors = model.state_dict() if tensors is None else tensors
    return {
        name: checksum(tensor)
        for name, tensor in tensors.items()
        if name not in unsaved and not tensor.is_meta and tensor.ndim < 3
    }


# --- from a model in RAM to a model that saves itself packed ------------------------------------


def install(
    model: PreTrainedModel,
    packed: Mapping[str, tuple[PackedWeight, Tensor | None]],
    config: PbqConfig,
) -> PreTrainedModel:
    """Put a PackedLinear in the place of each named module; `save_pretrained` then writes them.

    packed: weight and bias [n] by module name. `config` says what was asked for and where the model
    comes from; its layers are filled in here, its checksums when saving. Raises CheckpointError.
    """
    for name, (pw, bias) in packed.items():
        layer = PackedLayer(pw.layout, bias is not None)
        _check_place(model, name, layer)
        model.set_submodule(name, PackedLinear.from_packed(pw, bias))
        config.layers[name] = layer
    return _now_packed(model, config)


def install_embeddings(
    model: PreTrainedModel, packed: Mapping[str, PackedWeight], config: PbqConfig
) -> PreTrainedModel:
    """Put the packed embeddings, and the head if it is not tied to them, in place, by module name.

    As `install` in everything else. Raises CheckpointError.
    """
    for name, pw in packed.items():
        bias = getattr(model.get_submodule(name), "bias", None)
        config.embeddings[name] = PackedLayer(pw.layout, bias is not None)
    for name, module in _vocabulary(model, config.embeddings).items():
        if isinstance(module, PackedHead):
            module = PackedHead.from_packed(packed[name], model.get_submodule(name).bias)
        elif isinstance(module, PackedEmbedding):
            module.hold(packed[name])
        model.set_submodule(name, module)
    return _now_packed(model, config)


def _now_packed(model: PreTrainedModel, config: PbqConfig) -> PreTrainedModel:
    quantizer = PbqQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    _keep_names(model, config)
    model.hf_quantizer = quantizer
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    return model


@contextmanager
def saving_part(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, save_pretrained of a packed model writes these of its tensors only.

    Their checksums are added to those of the parts written before.
    """
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, PbqQuantizer)
    quantizer.part = tensors
    try:
        yield
    finally:
        quantizer.part = None


def _keep_names(model: PreTrainedModel, config: PbqConfig) -> None:
    """Experts that were taken apart, and a packed head, are saved under the names they have now.

    Others take the names of the original checkpoint's files: transformers fuses such experts when
    loading, and gpt_neox's head has another name there.
    """
    if find_experts(model) or config.embeddings:
        model._weight_conversions = []


def _check_place(model: nn.Module, name: str, layer: PackedLayer) -> Tensor:
    """The weight of the linear that `layer` is to replace. Raises CheckpointError."""
    owner = type(model).__name__
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"{name}: {owner} has no such module") from None
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise CheckpointError(f"{name}: a {type(module).__name__} of {owner}, not a linear layer")
    _check_shape(name, owner, module, layer)
    return module.weight


def _check_shape(
    name: str, owner: str, module: nn.Embedding | nn.Linear | Conv1D, layer: PackedLayer
) -> None:
    n, k = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    if (n, k) != (layer.layout.n, layer.layout.k):
        raise CheckpointError(
            f"{name}: {n}x{k} in {owner}, {layer.layout.n}x{layer.layout.k} in the packed weight"
        )
    if getattr(module, "bias", None) is not None and not layer.bias:
        raise CheckpointError(f"{name}: has a bias in {owner}, none beside the packed weight")


def _vocabulary(
    model: PreTrainedModel, embeddings: Mapping[str, PackedLayer]
) -> dict[str, nn.Module]:
    """Modules on the meta device for the packed embeddings and the head, by name.

    transformers is told to tie them no more: it would look for a parameter. Raises CheckpointError.
    """
    found: dict[str, nn.Module] = {}
    tied = model.all_tied_weights_keys
    for name, layer in embeddings.items():
        module = _check_vocabulary(model, name, layer)
        with torch.device("meta"):
            if isinstance(module, nn.Linear):
                found[name] = PackedHead(layer.layout, layer.bias, module.weight.dtype)
                tied.pop(f"{name}.weight", None)
                continue
            embedding = PackedEmbedding(layer.layout, module.weight.dtype, module.padding_idx)
        found[name] = embedding
        for target in [target for target, source in tied.items() if source == f"{name}.weight"]:
            del tied[target]
            head = target.removesuffix(".weight")
            if head not in embeddings:
                check_packable(head, model.get_submodule(head), tied=True)
                found[head] = TiedHead(embedding)
    return found


def _check_vocabulary(
    model: PreTrainedModel, name: str, layer: PackedLayer
) -> nn.Embedding | nn.Linear:
    """The module that the packed weight is to replace. Raises CheckpointError."""
    owner, module = type(model).__name__, dict(model.named_modules()).get(name)
    if module is None or module not in (
        model.get_input_embeddings(),
        model.get_output_embeddings(),
    ):
        raise CheckpointError(f"{name}: neither the embeddings nor the head of {owner}")
    try:
        layer.layout.check_rows()
    except PackedFormatError as error:
        raise CheckpointError(f"{name}: {error}") from None
    module = check_packable(name, module)
    _check_shape(name, owner, module, layer)
    return module


class PbqQuantizer(HfQuantizer):
    """Builds PackedLinears on the meta device; transformers then loads their buffers unchanged."""

    # from_pretrained(dense model, quantization_config=PbqConfig(...)) is refused with a clear error
    requires_calibration = True
    quantization_config: PbqConfig
    # what save_pretrained is to write, if not the whole model
    part: dict[str, Tensor] | None = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        layers = self.quantization_config.layers
        apart = [m for m in fused_names(model) if any(n.startswith(f"{m}.") for n in layers)]
        unfuse(model, only=apart)
        for name, layer in layers.items():
            dtype = _check_place(model, name, layer).dtype
            with torch.device("meta"):
                linear = PackedLinear(layer.layout, layer.bias, dtype)
            model.set_submodule(name, linear)
        for name, module in _vocabulary(model, self.quantization_config.embeddings).items():
            model.set_submodule(name, module)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        head = model.get_output_embeddings()
        self._head_dtype = head.weight.dtype if isinstance(head, nn.Linear) else None

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Refuse tensors that are missing from the files, damaged, or outside the format."""
        _keep_names(model, self.quantization_config)
        if self._head_dtype is not None:
            # older transformers leave a head that they rename (gpt_neox) in its file's dtype
            model.get_output_embeddings().to(self._head_dtype)
        for name, tensor in model.state_dict().items():
            if tensor.shape != self._shapes.get(name, tensor.shape):  # older transformers take it
                raise CheckpointError(
                    f"{name} is {list(tensor.shape)} in its files, the model has "
                    f"{list(self._shapes[name])}"
                )
        for name, module in packed_modules(model):
            if module.weight.is_meta:  # offloaded: read, and checked, whenever it runs
                continue
            for key, tensor in module.packed().tensors.items():
                self._check_loaded(f"{name}.{key}", tensor)
            try:
                module.check(name)
            except PackedFormatError as error:
                raise CheckpointError(str(error)) from None
        return model

    def _check_loaded(self, name: str, tensor: Tensor) -> None:
        # transformers only warns of a missing tensor and leaves it uninitialized: caught here too
        found, expected = checksum(tensor), self.quantization_config.checksums.get(name)
        if expected is None:
            raise CheckpointError(f"{name}: config.json has no checksum for it; copy it again")
        if found != expected:
            raise CheckpointError(
                f"{name}: missing from the files, or damaged (checksum {found}, config.json says "
                f"{expected}); copy the checkpoint again"
            )

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """save_pretrained asks this first, before it writes config.json."""
        if self.part is not None:
            known = self.quantization_config.checksums
            self.quantization_config.checksums = {**known, **checksums(model, self.part)}
            return dict(self.part), {}
        offloaded = {
            f"{name}.{key}"
            for name, module in packed_modules(model)
            for key, tensor in module.packed().tensors.items()
            if tensor.is_meta
        }
        kept = {n: s for n, s in self.quantization_config.checksums.items() if n in offloaded}
        self.quantization_config.checksums = {**kept, **checksums(model)}
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile the decoding step, given a static cache on a GPU."""
        return True

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        # config.dtype is a string once the model has been saved
        resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        with torch.device("meta"):
            original = type(model)._from_config(_unquantized(model.config))
        unfuse(original, only=find_experts(model))
        for name, module in list(packed_modules(model)):
            if isinstance(module, PackedEmbedding):
                model.set_submodule(name, _dense_embedding(module, resolved))
            elif isinstance(module, PackedLinear):
                transposed = isinstance(original.get_submodule(name), Conv1D)
                model.set_submodule(name, _dense(module, resolved, transposed))
        for name in [name for name, m in model.named_modules() if isinstance(m, TiedHead)]:
            model.set_submodule(name, _dense_head(model.get_input_embeddings().weight))
            model.all_tied_weights_keys = original.all_tied_weights_keys
        if find_experts(model) or self.quantization_config.embeddings:
            fuse(model)
            model._weight_conversions = None  # those of its architecture
        return model


def _unquantized(config: Any) -> Any:
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain


def _dense(linear: PackedLinear, dtype: torch.dtype, transposed: bool) -> nn.Module:
    """transposed: as a Conv1D, which is what gpt2's own code will load the weight into."""
    n, k, has_bias = linear.out_features, linear.in_features, linear.bias is not None
    W = linear.dequantize(dtype)
    with torch.device("meta"):
        dense = Conv1D(n, k) if transposed else nn.Linear(k, n, has_bias)
    dense.weight = nn.Parameter(W.T.contiguous() if transposed else W, requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(dtype), requires_grad=False)
    return dense


def _dense_embedding(embedding: PackedEmbedding, dtype: torch.dtype) -> nn.Embedding:
    with torch.device("meta"):
        shape = embedding.num_embeddings, embedding.embedding_dim
        dense = nn.Embedding(*shape, padding_idx=embedding.padding_idx)
    dense.weight = nn.Parameter(embedding.dequantize(dtype), requires_grad=False)
    return dense


def _dense_head(weight: nn.Parameter) -> nn.Linear:
    """Tied to the embeddings' `weight` [n, k]."""
    with torch.device("meta"):
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight = weight
    return dense


def load(path: str, **kwargs: Any) -> PreTrainedModel:
    """AutoModelForCausalLM.from_pretrained(path, **kwargs), for a checkpoint that pbq packed.

    Raises ModelError, or CheckpointError for a damaged one.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code"))
    found = getattr(config, "quantization_config", None) or {}
    if found.get("quant_method") != QUANT_METHOD:
        raise ModelError(f"{path}: not a checkpoint that pbq packed")
    # not ignored, but refused by name
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    refuse_missing(path, info)
    return model


def refuse_missing(path: str, info: Mapping[str, Any]) -> None:
    """Raise ModelError when from_pretrained, as its loading info says, made up some tensors."""
    mismatched = sorted(tuple(entry) for entry in info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"{path}: {name} is {list(stored)} in its files, the model has {list(expected)}"
        )
    missing = info["missing_keys"]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} tensors are missing from its files, as {min(missing)}"
        )


def register() -> None:
    """Make transformers know pbq. A second registration, which it refuses, is not tried."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(PbqConfig)
        register_quantizer(QUANT_METHOD)(PbqQuantizer)


register()
