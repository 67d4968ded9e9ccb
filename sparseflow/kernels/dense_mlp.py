"""The whole MLP as matrix products over the bundles where they lie: for prompts, and as the sparse kernel's rival."""

import torch
from torch import Tensor

from sparseflow.kernels.linear import linear, linear_transposed


def dense_mlp(bundles: Tensor, fc1_bias: Tensor | None, fc2_bias: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """y = W2 relu(W1 x + b1) + b2 over all neurons, in float32.

    Args:
        bundles: (ffn_dim, 2, hidden), float16, bfloat16 or float32.
        fc1_bias, fc2_bias: (ffn_dim,) and (hidden,), or None; dtype of the bundles.
        x: (n_tokens, hidden) float32.

    Returns:
        y: (n_tokens, hidden) float32; and how many pairs of token and neuron were active.
    """
    h = torch.relu_(linear(x, bundles[:, 0], fc1_bias))  # (n_tokens, ffn_dim)
    return linear_transposed(h, bundles[:, 1], fc2_bias), int(torch.count_nonzero(h))
