"""Scores of all neurons of a layer from two thin matrices: what trained and decomposed predictors have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class LowRank:
    """scores = up f(down x) + bias, f = ReLU or nothing.

    down: (rank, width), up: (ffn_dim, rank), both of one dtype, in which products are made. bias: (ffn_dim,) float32.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    has_relu: bool = False

    def scores(self, x: Tensor) -> Tensor:
        """(n_tokens, width) to (n_tokens, ffn_dim) float32. A neuron is chosen where its score is not <= 0."""
        inner = functional.linear(x.to(self.down.dtype), self.down)
        if self.has_relu:
            inner = inner.relu_()
        return functional.linear(inner, self.up).float() + self.bias

    @property
    def rank(self) -> int:
        """Of the product."""
        return len(self.down)

    @property
    def nbytes(self) -> int:
        """What one token reads."""
        return self.down.nbytes + self.up.nbytes + self.bias.nbytes


def normalised(hidden: Tensor) -> Tensor:
    """The residual stream as lookahead predictors see it: float32, mean 0 and variance 1, token by token."""
    return functional.layer_norm(hidden.float(), hidden.shape[-1:])


def half_precision(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float16, scaled against each other so that neither leaves its range. Their product stays."""
    scale = down.abs().amax(1).clamp_min(torch.finfo(down.dtype).tiny)  # (rank,)
    return (down / scale[:, None]).half(), (up * scale).half()
