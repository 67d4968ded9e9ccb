"""The whole MLP as matrix products over the bundles where they lie: for prompts, and as the sparse kernel's rival."""

import torch
from torch import Tensor
from torch.nn import functional


def dense_mlp(bundles: Tensor, fc1_bias: Tensor | None, fc2_bias: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """y = W2 relu(W1 x + b1) + b2 over all neurons, in the dtype of the bundles, as transformers computes it.

    Args:
        bundles: (ffn_dim, 2, hidden).
        fc1_bias, fc2_bias: (ffn_dim,) and (hidden,), or None; dtype of the bundles.
        x: (n_tokens, hidden), dtype of the bundles.

    Returns:
        y: (n_tokens, hidden); and how many pairs of token and neuron were active.
    """
    h = torch.relu_(functional.linear(x, bundles[:, 0], fc1_bias))  # (n_tokens, ffn_dim)
    y = h @ bundles[:, 1] if fc2_bias is None else torch.addmm(fc2_bias, h, bundles[:, 1])
    return y, int(torch.count_nonzero(h))
