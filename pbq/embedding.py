"""Packed embeddings and heads: the modules of a model whose vocabulary is packed too.

A model that ties its head to its embeddings holds the packed tensors once, in the embedding; the
head then asks the embedding for its product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pbq.errors import ModelError, UsageError
from pbq.linear import PackedLinear, PackedModule
from pbq_kernels import WeightLayout


class PackedEmbedding(PackedModule):
    """ids [*b] -> rows of W_hat [*b, k] in `dtype`, of which only these rows are dequantized.

    Called with activations [*b, k] it multiplies with them, as a head that is tied to it does: so
    whatever hooks move its tensors (accelerate's offloading) serve both. `dtype` is the model's and
    follows its casts. Raises PackedFormatError for a layout whose rows cannot be read one by one.
    """

    def __init__(
        self, layout: WeightLayout, dtype: torch.dtype, padding_idx: int | None = None
    ) -> None:
        layout.check_rows()
        super().__init__(layout)
        self.num_embeddings, self.embedding_dim = layout.n, layout.k
        self.dtype, self.padding_idx = dtype, padding_idx

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if x.is_floating_point() else self.rows(x, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self


class PackedHead(PackedLinear):
    """A head that has a packed weight of its own. It counts with the embeddings, not the blocks."""


class TiedHead(nn.Module):
    """x [*b, k] -> x @ W_hat.T [*b, n] with the W_hat of the embedding, which is not its child."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # past nn.Module, which would list the embedding's tensors a second time
        object.__setattr__(self, "embedding", embedding)

    embedding: PackedEmbedding

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    @weight.setter
    def weight(self, tensor: Tensor) -> None:
        """What transformers ties it to must be what it has."""
        if tensor is not self.embedding.weight:
            raise UsageError(
                "the head of this model is tied to its packed embeddings and takes no other "
                "weight; `model.dequantize()` makes both dense"
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x)

    def extra_repr(self) -> str:
        return "tied to the embeddings"


def check_packable(name: str, module: nn.Module, *, tied: bool = False) -> nn.Embedding | nn.Linear:
    """The module, if it does nothing but look up rows or multiply. Raises ModelError, naming it.

    tied: it is a head whose weight is the embeddings' own.
    """
    # not isinstance: a subclass may do more, as gemma's, which scales the rows that it looks up
    if type(module) is nn.Embedding and module.max_norm is None and not tied:
        return module
    if type(module) is nn.Linear and not (tied and module.bias is not None):
        return module
    biased = " with a bias, tied to the embeddings," if tied and type(module) is nn.Linear else ""
    raise ModelError(
        f"{name}: a {type(module).__name__}{biased} cannot be packed; --embed-bits 0 leaves "
        "embeddings and head as they are"
    )
