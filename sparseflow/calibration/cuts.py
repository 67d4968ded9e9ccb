"""How far below 0 a neuron may stay and still be chosen: fitted so that a given share of the active ones is found.

A neuron is chosen where score + cut * spread > 0. Each pair of token and neuron has a smallest cut that chooses it,
-score / spread; the cut for a recall is that quantile of it over the active pairs.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

# Recalls that every predictor is fitted for; between them cuts are interpolated.
RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


class Cuts(NamedTuple):
    """One of each for every recall. candidate_shares: of all pairs. found: of the active ones."""

    cuts: list[float]
    candidate_shares: list[float]
    found: list[float]


def fit_cuts(scores: Tensor, spread: Tensor, is_active: Tensor, recalls: tuple[float, ...] = RECALLS) -> Cuts:
    """
    Args:
        scores: (n_tokens, ffn_dim). spread: of the same shape or (ffn_dim,), above 0. is_active: as scores, bool.
    """
    needed = (-scores / spread).numpy()
    of_active = np.sort(needed[is_active.numpy()])
    if not len(of_active):  # nothing fires: choose nothing
        return Cuts([0.0] * len(recalls), [0.0] * len(recalls), [1.0] * len(recalls))
    of_all = np.sort(needed, axis=None)
    places = [min(len(of_active) - 1, int(np.ceil(recall * len(of_active))) - 1) for recall in recalls]
    # A little more, because a pair is chosen above 0, not at 0.
    cuts = [float(value + 1e-6 * max(1.0, abs(value))) for value in of_active[places]]
    return Cuts(cuts, _shares_below(of_all, cuts), _shares_below(of_active, cuts))


def _shares_below(ordered: np.ndarray, cuts: list[float]) -> list[float]:
    return [float(n) / len(ordered) for n in np.searchsorted(ordered, cuts)]
