"""Trained predictors: two layers, as in Deja Vu (Liu et al. 2023), which loses least where recall counts.

down and up start from the best linear guess and are trained on which neurons fired, by cross-entropy in which a neuron
that fired counts more than one that did not.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from sparseflow.calibration.activations import LayerActivity
from sparseflow.orchestration.low_rank import LowRank, half_precision
from sparseflow.utils.progress import progress

# A missed neuron costs quality, a needless one only its bytes.
POSITIVE_WEIGHT = 8.0
_BATCH = 512
_RATE = 3e-3
_LOGIT_SPREAD = 2.0  # of what the guess leaves open, so that the first logits are of a classifier's size


def train(
    start: LowRank, spread: Tensor, activity: LayerActivity, n_tokens: int, epochs: int, seed: int, *, quiet: bool
) -> LowRank:
    """Train a predictor of the rank of `start` on the first `n_tokens` tokens.

    spread: (ffn_dim,) float32, what `start` leaves open of each neuron.
    """
    scale = _LOGIT_SPREAD / float(spread.mean())
    weights = [start.down.float(), start.up.float() * scale, start.bias * scale]
    weights = [weight.clone().requires_grad_() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    n_steps = epochs * max(1, n_tokens // _BATCH)
    with torch.enable_grad():
        optimizer = torch.optim.Adam(weights, _RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, n_steps))
        order = torch.empty(0, dtype=torch.int64)
        for _ in progress(range(n_steps), f"rank {start.rank}: train", quiet=quiet, leave=False):
            if len(order) < min(_BATCH, n_tokens):
                order = torch.randperm(n_tokens, generator=generator)
            rows, order = order[:_BATCH], order[_BATCH:]
            down, up, bias = weights
            logits = functional.linear(activity.x[rows].float() @ down.T, up, bias)
            loss = functional.binary_cross_entropy_with_logits(
                logits, activity.labels(rows.numpy()).float(), pos_weight=torch.tensor(POSITIVE_WEIGHT), reduction="sum"
            )
            optimizer.zero_grad()
            (loss / len(rows)).backward()
            optimizer.step()
            schedule.step()
    down, up, bias = (weight.detach() for weight in weights)
    return LowRank(*half_precision(down, up), bias)


def _rate(n_steps: int, step: int) -> float:
    """Up over the first tenth, then down to nothing."""
    return min(1.0, (step + 1) / (1 + n_steps // 10)) * (1 - step / n_steps)
