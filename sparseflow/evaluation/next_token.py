"""How far two models' next-token distributions are apart, on one window of text."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Distance(NamedTuple):
    """Means over the positions of a window whose next token is known."""

    log_ratio: float
    """Logarithm of the perplexity ratio: how much less the sparse model expects the text, nats a token."""
    agreement: float
    """Share of positions with the same likeliest token."""
    divergence: float
    """Kullback-Leibler, dense || sparse, nats."""


def log_probabilities(logits: Tensor) -> Tensor:
    """(window, vocabulary) to (window - 1, vocabulary) float32: after the last token nothing is known to follow."""
    return functional.log_softmax(logits[:-1].float(), dim=-1)


def surprise(log_p: Tensor, tokens: Tensor) -> float:
    """Negative log-likelihood of the tokens after the first, nats a token. tokens: (window,)."""
    return -float(log_p.gather(1, tokens[1:, None]).mean(dtype=torch.float64))


def distance(dense: Tensor, sparse: Tensor, tokens: Tensor) -> Distance:
    """dense, sparse: (window - 1, vocabulary), log-probabilities. tokens: (window,)."""
    agreement = (dense.argmax(1) == sparse.argmax(1)).double().mean()
    divergence = functional.kl_div(sparse, dense, log_target=True, reduction="none").sum(dtype=torch.float64)
    return Distance(
        surprise(sparse, tokens) - surprise(dense, tokens), float(agreement), float(divergence) / len(dense)
    )
