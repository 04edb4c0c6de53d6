"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): the baseline with data.

The grids of rtn, on the range that loses least by what GPTQ's sweep says of a column's importance
(an option of GPTQ's code, `mse`, off there); columns rounded in their own order, each error
spread over the columns not yet rounded.
Nothing of ours: no compensation of earlier layers, no refitted scales, no second sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

from pbq.config import QuantConfig
from pbq.methods import refuse_options
from pbq.methods.rtn import Rtn
from pbq.tune import Recipe


@dataclass(frozen=True)
class Gptq(Rtn):
    name: str = "gptq"
    search: bool = True
    summary: str = "uniform grid with error feedback, 2 bits and more: the baseline with data"

    def recipe(self, config: QuantConfig) -> Recipe:
        return Recipe(sweeps=0, compensate=False, natural_order=True)


def method(config: QuantConfig) -> Gptq:
    refuse_options(config, "faithful", "criterion", "salient_share")
    return Gptq()
