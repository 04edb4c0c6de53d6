"""One file a method; the registry is this folder.

A method chooses tiers and grids and says how long to optimise. It sees tensors, never a model.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pbq.allocate import LayerPlan, PlanInput
from pbq.config import QuantConfig
from pbq.errors import UsageError
from pbq.gptq import quantize_weight
from pbq.grid import Factors, Grid, Quantized
from pbq.tune import Distillation, Recipe
from pbq_kernels.layout import PackedWeight, Tier


class Method(Protocol):
    """The whole extension point. A module here offers one through `method(config)`."""

    name: str
    summary: str
    wants_gradients: bool

    def plan(self, layers: Mapping[str, PlanInput], config: QuantConfig) -> dict[str, LayerPlan]:
        """Tiers of every column of every layer, within config.bits stored bits."""

    def fit(self, W: Tensor, weight: Tensor, tier: Tier, row: Tensor) -> Grid:
        """Grid of one tier (or group): W [n, c] its weights, weight [c] their importance.

        With an overlay weight is [n, c], and zero where an entry is not on the grid. row [n, k]
        holds all columns of the layer. The numbers must be float16-representable.
        """

    def recipe(self, config: QuantConfig) -> Recipe:
        """How to reconstruct and how long to optimise."""

    def paper_bits(self, plans: Mapping[str, LayerPlan], rows: Mapping[str, int]) -> float:
        """Bits as the paper counts them: only ever printed as a label beside the stored bits."""


@dataclass(frozen=True, eq=False)
class Placement:
    """What goes where in one layer.

    tier_of uint8 [k]: the tier of each column. salient bool [n, k]: the entries of the overlay.
    column_scale float32 [k], representable in float16.
    """

    tiers: tuple[Tier, ...]
    tier_of: Tensor
    salient: Tensor | None = None
    column_scale: Tensor | None = None


@runtime_checkable
class Places(Protocol):
    """A method that settles a layer once its Hessian is known, which a plan cannot wait for."""

    def place(self, plan: LayerPlan, W: Tensor, H: Tensor) -> Placement:
        """Within the stored bits of the plan: W [n, k] the weight to be rounded, H its metric."""


def placement(method: Method, plan: LayerPlan, W: Tensor, H: Tensor) -> Placement:
    """Of the method if it has a say, else as planned."""
    if isinstance(method, Places):
        return method.place(plan, W, H)
    return Placement(plan.tiers, plan.tier_of.to(W.device))


@runtime_checkable
class Factorizes(Protocol):
    """A method that stores a layer as a product of two factors; its plans have a rank."""

    def factorize(
        self, plan: LayerPlan, W: Tensor, H: Tensor, recipe: Recipe, percdamp: float, name: str
    ) -> tuple[Factors, float]:
        """W [n, k] in the metric H, within the plan; also the damping used."""


def rebuild(
    method: Method,
    recipe: Recipe,
    config: QuantConfig,
    plan: LayerPlan,
    W: Tensor,
    H: Tensor,
    name: str = "weight",
) -> tuple[Quantized, Tensor, float]:
    """One linear as planned, see gptq.quantize_weight: what is stored, latent weights, damping."""
    if isinstance(method, Factorizes):
        factors, damping = method.factorize(plan, W, H, recipe, config.percdamp, name)
        return factors, W, damping
    placed = placement(method, plan, W, H)
    qw, latent, damping = quantize_weight(
        W,
        H,
        placed.tiers,
        placed.tier_of,
        method.fit,
        salient=placed.salient,
        column_scale=placed.column_scale,
        joint=recipe.joint,
        percdamp=config.percdamp,
        block_size=config.block_size,
        sweeps=recipe.sweeps,
        feedback=recipe.feedback,
        natural_order=recipe.natural_order,
        scale_bits=plan.scale_bits,
        name=name,
    )
    if plan.column_scale and qw.column_scale is None:
        qw.column_scale = torch.ones_like(W[0])  # for the tuning to move
    return qw, latent, damping


@runtime_checkable
class Notes(Protocol):
    """A method with something of its own to say about what was stored."""

    def notes(self, packed: Mapping[str, PackedWeight]) -> dict[str, str]:
        """Rows for the closing table of a run."""


def notes(method: Method, packed: Mapping[str, PackedWeight]) -> dict[str, str]:
    """What the method has to say, or nothing."""
    return method.notes(packed) if isinstance(method, Notes) else {}


def names() -> list[str]:
    """Command-line names of all methods."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def at_best(config: QuantConfig, gamma: float = 0.0) -> Distillation | None:
    """Distillation of scales and norms for `--effort best`, which no paper's method has itself."""
    return Distillation(steps=400, gamma=gamma) if config.effort == "best" else None


def recipe_of(method: Method, config: QuantConfig) -> Recipe:
    """The method's recipe, with the training that `config` asks for instead of the effort's.

    Raises UsageError when there is to be training of a kind that the method does not know.
    """
    found = method.recipe(config)
    block, distillation = found.block, found.distillation
    if config.block_epochs > 0 and block is None:
        refuse_options(config, "block_epochs")
    if config.distil_steps > 0 and distillation is None:
        refuse_options(config, "distil_steps")
    if block is not None and config.block_epochs >= 0:
        block = dataclasses.replace(block, epochs=config.block_epochs, steps=0)
    if distillation is not None and config.distil_steps >= 0:
        distillation = dataclasses.replace(distillation, steps=config.distil_steps)
    distillation = distillation if distillation and distillation.steps else None
    return dataclasses.replace(
        found,
        # without a distillation no stage should want the whole model
        sensitivity=found.sensitivity and distillation is not None,
        # aimed at the original's outputs, weights that start elsewhere would become its own again
        compensate=found.compensate and not config.preprocess,
        token_noise=found.token_noise if config.token_noise < 0 else config.token_noise,
        block=block if block and block.epochs else None,
        distillation=distillation,
    )


def refuse_options(config: QuantConfig, *options: str) -> None:
    """Raise UsageError when an option was given that the method has no use for."""
    for option in options:
        value = getattr(config, option)
        if value != getattr(QuantConfig, option):
            given = f"--{option.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise UsageError(f"{given}: {config.method} has no use for it; leave it out")


def refuse_criteria_but(config: QuantConfig, *known: str) -> None:
    """Raise UsageError when the criterion is another method's."""
    if config.criterion not in known:
        raise UsageError(
            f"--criterion {config.criterion}: {config.method} knows {', '.join(known)}"
        )


def get(name: str, config: QuantConfig) -> Method:
    """The method called `name`, or in the file of that name, as `config` wants it.

    Raises UsageError listing what there is.
    """
    if name.endswith(".py"):
        return _from_file(Path(name), config)
    if name not in names():
        raise UsageError(
            f"--method {name}: unknown; there are {', '.join(names())}, or a .py file of your own"
        )
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module.method(config)


def _from_file(path: Path, config: QuantConfig) -> Method:
    """What `method(config)` of a user's own file returns."""
    if not path.is_file():
        raise UsageError(f"--method {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"pbq_method_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if not hasattr(module, "method"):
        raise UsageError(f"--method {path}: defines no method(config)")
    return module.method(config)
