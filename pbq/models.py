"""Hugging Face causal LMs, generically: load one, find its decoder blocks and linears, run a block.

Nothing here knows an architecture by name. Blocks are found by what the model says must not be
split, the calling convention of each block by recording it, shared inputs by looking.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

import pbq.hf  # packed models load too
from pbq.bfloat16 import fast_products
from pbq.errors import ModelError, PbqError, ResourceError, UsageError, is_out_of_memory
from pbq.experts import routers
from pbq.sources import Source, resolve_source
from pbq.spill import HiddenStates

log = logging.getLogger(__name__)

Linear: TypeAlias = nn.Linear | Conv1D


# --- loading ---------------------------------------------------------------------------------


def load_model(
    source: str | Source,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    *,
    packed: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in eval mode and tokenizer of a hub id, a local directory or a .gguf file.

    device: "auto" spreads it over all GPUs and, where these are too small, the CPU's memory.
    packed: accept a checkpoint that pbq packed; any other quantized one is refused. Raises
    ModelError, DataError when the hub cannot be reached, ResourceError when memory runs out.
    """
    if isinstance(source, str):
        source = resolve_source(source)
    config = _load_config(source, trust_remote_code)
    _check_unquantized(source, config, packed)
    _check_causal(source, config)
    model = _load_weights(source, dtype, device, trust_remote_code)
    return model, _load_tokenizer(source, trust_remote_code)


def outline(source: Source, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: every shape, no weight. Raises ModelError, DataError."""
    config = _load_config(source, trust_remote_code)
    _check_unquantized(source, config, packed=False)
    _check_causal(source, config)
    dtype = compute_dtype(source, torch.device("cpu"))
    with refusing(source, "cannot be built"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


def compute_dtype(source: Source, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype; bfloat16 for GGUF, and for float16 where the device has that.

    CPUs have no fast float16, and the gradients of a distillation underflow in it. Raises
    ModelError.
    """
    if source.gguf:
        return torch.bfloat16
    with refusing(source, "unreadable config"):
        # the bare file: the dtype is no reason to run a model's own config code
        said, _ = PreTrainedConfig.get_config_dict(source.path)
        own = getattr(torch, said.get("dtype") or said.get("torch_dtype") or "bfloat16")
    return torch.bfloat16 if own == torch.float16 and _prefers_bfloat16(device) else own


def _prefers_bfloat16(device: torch.device) -> bool:
    """It is no slower than float16: on GPUs of Nvidia from Ampere on, on AMD's, and on any CPU."""
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu"


def cache_name(model: PreTrainedModel) -> str:
    """Of a model's argument, and output, for keys and values: transformers 5.24 changed it."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def most_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was built for; None without a limit (ALiBi: bloom, mpt)."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found and found > 0 else None


@contextmanager
def refusing(source: Source, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into one line that names the source."""
    try:
        yield
    except PbqError:
        raise
    # transformers, tokenizers, safetensors and json each raise their own; none is swallowed
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(f"{source.name}: not enough memory to load the model") from error
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{source.name}: {what}: {said:.300}") from error


def _load_config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    with refusing(source, "unreadable config"):
        return AutoConfig.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, **source.file_argument
        )


def _check_unquantized(source: Source, config: PreTrainedConfig, packed: bool) -> None:
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else found.quant_method
    if method == pbq.hf.QUANT_METHOD and packed:
        return
    way_out = (
        "give the model it was made from" if method == "pbq" else "give the unquantized checkpoint"
    )
    raise ModelError(f"{source.name}: already quantized with {method}; {way_out}")


def _check_causal(source: Source, config: PreTrainedConfig) -> None:
    known = type(config) in AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    names = config.architectures or []
    other = names and not any("CausalLM" in name or "LMHead" in name for name in names)
    if other or config.is_encoder_decoder or not (known or remote):
        raise ModelError(
            f"{source.name}: {', '.join(names) or config.model_type} is not a causal language model"
        )


def _load_weights(
    source: Source, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool
) -> PreTrainedModel:
    with refusing(source, "cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            device_map="auto" if device == "auto" else {"": torch.device(device)},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **source.loading_arguments(),
        )
    pbq.hf.refuse_missing(source.name, info)
    if info["unexpected_keys"]:
        log.info("%s: tensors not used: %s", source.name, sorted(info["unexpected_keys"]))
    return model.eval()


def _load_tokenizer(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with refusing(source, "no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, **source.file_argument
        )
        if not tokenizer("a").input_ids:
            raise ModelError(f"{source.name}: no tokenizer beside the model")
    return tokenizer


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is CUDA where there is one. Raises UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # torch raises an AssertionError where it was built without the device
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {said:.120}") from error
    return device


# --- blocks and linears ------------------------------------------------------------------------


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the modules that transformers will not split.

    The heaviest where several lists qualify, or none. Raises ModelError when there is no list.
    """
    unsplit = set(model._no_split_modules or [])
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f"{type(model).__name__}: no list of decoder blocks found")
    marked = [(n, m) for n, m in lists if all(type(block).__name__ in unsplit for block in m)]
    return max(marked or lists, key=lambda named: sum(p.numel() for p in named[1].parameters()))


def find_linears(block: nn.Module) -> dict[str, Linear]:
    """Every nn.Linear and Conv1D inside but the routers of a MoE, by its name in the block."""
    found = {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    for name in routers(block) & found.keys():
        del found[name]
    return found


def weight_of(linear: Linear) -> Tensor:
    """The weight as [n, k], a view: a Conv1D holds it transposed."""
    weight = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


@torch.no_grad()
def set_weight(linear: Linear, W: Tensor) -> None:
    """Write W [n, k] into the linear, in its own dtype."""
    weight_of(linear).copy_(W)


@dataclass(frozen=True)
class Coverage:
    """How much of the decoder blocks is in linears. skipped: reason by name, largest first."""

    quantized: int
    total: int
    skipped: Mapping[str, str]

    @property
    def share(self) -> float:
        return self.quantized / self.total

    def line(self) -> str:
        """For people: the share, and what stays as it is."""
        kinds = Counter(reason.split(",")[0] for reason in self.skipped.values())
        left = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        share = f"{self.share:.2%} of the block weights"
        return f"{share}; not quantized: {left}" if left else share


def coverage(model: PreTrainedModel) -> Coverage:
    """Count the weights (two dimensions and more) of the decoder blocks. Experts that are fused
    into 3-D parameters (see pbq.experts) are no linears and appear among the skipped."""
    name, blocks = find_blocks(model)
    linears = {id(linear.weight) for linear in find_linears(blocks).values()}
    weights = [(f"{name}.{n}", p) for n, p in blocks.named_parameters() if p.ndim >= 2]
    left = sorted((w for w in weights if id(w[1]) not in linears), key=lambda w: -w[1].numel())
    routing = routers(model)
    skipped = {n: _why_skipped(model, n, p, routing) for n, p in left}
    quantized = sum(p.numel() for _, p in weights if id(p) in linears)
    return Coverage(quantized, sum(p.numel() for _, p in weights), skipped)


def _why_skipped(model: nn.Module, name: str, parameter: Tensor, routing: Collection[str]) -> str:
    owner = name.rpartition(".")[0]
    shape = "x".join(map(str, parameter.shape))
    kind = "fused experts" if parameter.ndim == 3 else "not a linear layer"
    if owner in routing:
        kind = "router in full precision"
    return f"{kind}, {shape} in {type(model.get_submodule(owner)).__name__}"


def check_coverage(model: PreTrainedModel, least: float = 0.9) -> Coverage:
    """The coverage; raises ModelError with the figure when its share is below `least`."""
    found = coverage(model)
    if found.share < least:
        name, reason = next(iter(found.skipped.items()))
        raise ModelError(
            f"{type(model).__name__}: only {found.share:.1%} of the block weights are in linear "
            f"layers, {least:.0%} are asked for; {len(found.skipped)} tensors would stay as they "
            f"are, as {name} ({reason})"
        )
    return found


# --- running one block -----------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What the model passes to one block beside the hidden states [batch, L, d]."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: int

    def first(self, rows: int) -> Call:
        """The call for the first `rows` sequences of the batch.

        A tensor is cut when its first axis is the batch, or the batch times the heads (alibi).
        """
        if rows >= self.batch:
            return self

        def cut(tensor: Tensor) -> Tensor:
            per_row, rest = divmod(len(tensor), self.batch) if tensor.ndim >= 2 else (0, 1)
            whole = rest == 0 and (per_row == 1 or tensor.ndim == 3)
            return tensor[: rows * per_row] if whole else tensor

        return replace(self.with_tensors(cut), batch=rows)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor in its arguments changed."""
        args, kwargs = _map_tensors(change, (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.batch)


@dataclass
class Recording:
    """hidden: what enters the first block, per batch. calls[block][batch]: the rest, equal ones
    stored once, so that without padding `calls[block][0]` serves every batch of the same shape."""

    hidden: HiddenStates = field(default_factory=HiddenStates)
    calls: list[list[Call]] = field(default_factory=list)


@fast_products()
def run_block(block: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor:
    """hidden [b, L, d] -> the block's output [b, L, d], be it returned bare or in a tuple.

    b may be smaller than the batch the call was recorded with: its first rows are used.
    """
    call = call.first(len(hidden))
    out = block(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    batches: Iterable[Tensor],
    hidden: HiddenStates | None = None,
) -> Recording:
    """Every block's own arguments for every batch of token ids [b, L]; no block is run.

    Stubs that pass the hidden states through stand in for the blocks, which may be on meta. One
    block's arguments do not do for the others: masks and rope differ between the layers of gemma
    or of sliding-window models. hidden: where to put the first block's inputs. Raises ModelError
    when the model does not take such stubs.
    """
    recording = Recording(HiddenStates() if hidden is None else hidden, [[] for _ in blocks])
    for ids in batches:
        entering, calls, _ = _through_stubs(model, blocks, ids)
        recording.hidden.append(entering)
        _append_calls(recording.calls, calls)
    return recording


@torch.no_grad()
def run_tail(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor) -> Tensor:
    """Logits [b, L, vocabulary] of `hidden` [b, L, d], the output of the last block for `ids`.

    Runs what lies around the blocks (final norm, head, soft caps) and no block. Raises ModelError.
    """
    logits = _through_stubs(model, blocks, ids, end=hidden)[2]
    assert logits is not None
    return logits


def _bare(hidden: Tensor) -> Any:
    return hidden


def _in_tuple(hidden: Tensor) -> Any:
    return (hidden,)


class _Done(Exception):
    """The last stub has been called."""


class _Misfit(Exception):
    """The model does not take what the stubs return."""


@fast_products()
def _through_stubs(
    model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor, end: Tensor | None = None
) -> tuple[Tensor, list[Call], Tensor | None]:
    """First input, calls and logits, by the first convention that fits. Raises ModelError.

    end: what the last stub returns in place of the hidden states; without it there are no logits.
    """
    misfit: _Misfit | None = None
    for returns in (_bare, _in_tuple):
        try:
            return _pass_through(model, blocks, ids, returns, end)
        except _Misfit as error:
            misfit = error
    raise ModelError(
        f"{type(model).__name__}: its decoder blocks do not hand hidden states on in order, so "
        "pbq cannot run them one by one"
    ) from misfit


def _pass_through(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    ids: Tensor,
    returns: Callable[[Tensor], Any],
    end: Tensor | None,
) -> tuple[Tensor, list[Call], Tensor | None]:
    """As `_through_stubs`, by one convention. Raises _Misfit or ModelError."""
    real = list(blocks)
    calls: list[Call] = []
    entered: list[Tensor] = []

    def take(hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered.append(hidden)
        if hidden is not entered[0] or not isinstance(hidden, Tensor):
            raise _Misfit
        calls.append(Call(args, kwargs, len(hidden)))
        if len(calls) < len(real):
            return returns(hidden)
        if end is None:
            raise _Done
        return returns(end)

    try:
        for i, block in enumerate(real):
            blocks[i] = _Stub(block, take)
        out = model(ids, use_cache=False)
    except _Done:
        return entered[0], calls, None
    except (ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        if not entered:
            raise ModelError(f"{type(model).__name__}: its forward fails: {error}") from error
        # a model that unpacks what a block returns fails in its own way between two stubs
        raise _Misfit from error
    finally:
        for i, block in enumerate(real):
            blocks[i] = block
    if len(calls) < len(real):
        raise ModelError(f"{type(model).__name__}: its forward does not run all of its blocks")
    if out.logits.shape[:2] != ids.shape:  # the last stub's tensor was taken for a tuple
        raise _Misfit
    return entered[0], calls, out.logits


class _Stub(nn.Module):
    """Stands in for a block: hands its arguments to `take`; other attributes are the block's."""

    def __init__(
        self,
        block: nn.Module,
        take: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        super().__init__()
        # past nn.Module.__setattr__: the block must not become a submodule and move with the model
        self.__dict__.update(block=block, take=take)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.__dict__["take"](args[0], args[1:], kwargs)
        return self.__dict__["take"](kwargs.pop("hidden_states", None), (), kwargs)


def _append_calls(recorded: list[list[Call]], calls: Sequence[Call]) -> None:
    """Append one call to every block's list; tensors equal to the last batch's are taken from it.

    64 batches of masks and rope tables would otherwise outweigh a small model.
    """
    known: dict[int, Tensor] = {}
    for block_calls, call in zip(recorded, calls, strict=True):
        if block_calls:
            for new, old in zip(_tensors(call), _tensors(block_calls[-1]), strict=False):
                if id(new) not in known and _equal(new, old):
                    known[id(new)] = old
            call = call.with_tensors(lambda tensor: known.get(id(tensor), tensor))
        block_calls.append(call)


def _tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    call.with_tensors(note)
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor in its tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(change, item) for item in value)
    if type(value) is dict:
        return {key: _map_tensors(change, item) for key, item in value.items()}
    return value


@contextmanager
def before_forward(
    modules: Mapping[str, nn.Module], note: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """note(name, positional arguments) before every forward of the modules inside."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: note(name, args)

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shared_inputs(
    block: nn.Module, hidden: Tensor, call: Call, linears: Mapping[str, nn.Module] | None = None
) -> list[tuple[str, ...]]:
    """Names of the block's linears grouped by their input, in the order in which they run.

    Found by running the block on `hidden` [b, L, d] (its first row): q, k and v see one and the
    same tensor, whatever they are called. Raises ModelError for a linear that does not run.
    """
    linears = find_linears(block) if linears is None else linears
    groups: dict[tuple[Any, ...], list[str]] = {}
    alive: list[Tensor] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        x = args[0]
        alive.append(x)  # else the address could be given to the next input
        groups.setdefault((x.data_ptr(), x.shape, x.stride(), x._version), []).append(name)

    with before_forward(linears, note):
        run_block(block, hidden[:1], call)
    idle = linears.keys() - {name for group in groups.values() for name in group}
    if idle:
        raise ModelError(f"{type(block).__name__}: {min(idle)} does not take part in the forward")
    return [tuple(dict.fromkeys(group)) for group in groups.values()]
