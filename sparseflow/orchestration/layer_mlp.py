"""One layer's MLP as two matrices in float32, all neurons of it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparseflow.core.weight_source import FETCH_TIMEOUT_S, WeightSource


@dataclass(frozen=True, slots=True)
class LayerMlp:
    """W2 relu(W1 x + b1) + b2. weights: (2, ffn_dim, hidden) float32, rows of W1 and columns of W2; biases float32."""

    weights: Tensor
    fc1_bias: Tensor
    fc2_bias: Tensor

    @classmethod
    def fetch(cls, source: WeightSource, layer: int, fc1_bias: Tensor | None, fc2_bias: Tensor | None) -> "LayerMlp":
        """Copy a layer out of its bundles. Biases are None where the model has none."""
        profile = source.profile
        ids = np.arange(profile.ffn_dimension, dtype=np.uint32)
        weights = torch.empty(2, profile.ffn_dimension, profile.hidden_dimension)
        for start in range(0, len(ids), source.fetch_limit):
            part = ids[start : start + source.fetch_limit]
            with source.fetch(layer, part, keep=False) as fetch:
                bundles = fetch.wait(FETCH_TIMEOUT_S)
                rows = bundles.base[torch.from_numpy(bundles.slots.astype(np.int64))]
                weights[:, start : start + len(part)] = rows.transpose(0, 1)
        return cls(
            weights,
            torch.zeros(profile.ffn_dimension) if fc1_bias is None else fc1_bias.float(),
            torch.zeros(profile.hidden_dimension) if fc2_bias is None else fc2_bias.float(),
        )

    def pre_activations(self, x: Tensor) -> Tensor:
        """(n_tokens, hidden) to (n_tokens, ffn_dim), float32."""
        return torch.addmm(self.fc1_bias, x, self.weights[0].T)

    def output(self, h: Tensor) -> Tensor:
        """Activations (n_tokens, ffn_dim) to (n_tokens, hidden), float32."""
        return torch.addmm(self.fc2_bias, h, self.weights[1])
