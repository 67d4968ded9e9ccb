"""How many slots each layer should have: miss curves, and the division of slots that they ask for. numpy only."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparseflow.errors import BadRequest

N_POINTS = 33
_WARM_UP_SHARE = 0.1  # of the tokens: they fill the cache and are not counted


def miss_curve(tokens: Iterable[NDArray[np.generic]], ffn_dim: int, n_points: int = N_POINTS) -> NDArray[np.float64]:
    """Misses a token of an LRU cache of one layer alone, for every number of slots at once (Mattson et al., 1970).

    The place of a neuron in the order of last use is the number of slots with which it is found. What is used for the
    first time is missed with any number, and a token's neurons are in the cache together, so that the curve is exact
    from the largest token's number of neurons on.

    Args:
        tokens: for each token the ids that it uses, ascending; or (ffn_dim,) bool, so that (n_tokens, ffn_dim) bool
            is good as it is.

    Returns:
        (n_points,) at evenly spaced numbers of slots, from 0 to `ffn_dim`.
    """
    order = np.empty(0, np.int64)  # of what was used, the last use first
    place = np.full(ffn_dim, ffn_dim)  # in it; ffn_dim: not used yet
    steps = [np.flatnonzero(token) if token.dtype == bool else token.astype(np.int64) for token in tokens]
    n_warm_up = int(_WARM_UP_SHARE * len(steps))
    at_place = np.zeros(ffn_dim + 1, np.int64)
    for n, ids in enumerate(steps):
        if n >= n_warm_up:
            at_place += np.bincount(place[ids], minlength=ffn_dim + 1)
        is_used = np.zeros(ffn_dim, bool)
        is_used[ids] = True
        order = np.concatenate([ids, order[~is_used[order]]])
        place[order] = np.arange(len(order))
    missed = at_place.sum() - np.concatenate([[0], np.cumsum(at_place[:-1])])  # (ffn_dim + 1,) by number of slots
    return np.asarray(missed[sizes(ffn_dim, n_points)] / max(1, len(steps) - n_warm_up))


def sizes(ffn_dim: int, n_points: int) -> NDArray[np.int64]:
    """(n_points,) the numbers of slots that a curve is given for."""
    return np.linspace(0, ffn_dim, n_points).astype(np.int64)


def divide_slots(
    curves: Sequence[Sequence[float]] | NDArray[np.float64], ffn_dim: int, n_slots: int, least: int = 0
) -> NDArray[np.int64]:
    """Slots of each layer: one after the other goes where it spares most misses.

    For convex curves no division has fewer misses; others are taken by their lower convex hulls.

    Args:
        curves: (n_layers, n_points) as `miss_curve` gives them.
        least: slots that each layer has in any case.

    Returns:
        (n_layers,) with the sum `n_slots`.

    Raises:
        BadRequest: more slots than neurons, or fewer than `least` for each.
    """
    table = np.asarray(curves, np.float64)
    n_layers = len(table)
    if not n_layers * least <= n_slots <= n_layers * ffn_dim or table.ndim != 2 or table.shape[1] < 2:
        raise BadRequest(
            f"{n_slots} slots for curves of shape {table.shape}: give {n_layers * least} to {n_layers * ffn_dim}, "
            "and at least two points a layer"
        )
    points = sizes(ffn_dim, table.shape[1])
    stretches: list[tuple[float, int, int]] = []  # what a slot more costs in misses, the layer, how many slots
    for layer, curve in enumerate(table):
        own = np.unique([least, *points[points > least]])
        corners = _lower_hull(own, np.interp(own, points, curve))
        x, y = own[corners], np.interp(own, points, curve)[corners]
        stretches += [(float(dy / dx), layer, int(dx)) for dx, dy in zip(np.diff(x), np.diff(y), strict=True)]
    slots, left = np.full(n_layers, least, np.int64), n_slots - n_layers * least
    for _, layer, length in sorted(stretches):
        slots[layer] += min(length, left)
        left -= min(length, left)
    return slots


def _lower_hull(x: NDArray[np.int64], y: NDArray[np.float64]) -> list[int]:
    """Positions of the corners of the lower convex hull of points from left to right (Andrew, 1979)."""
    corners: list[int] = []
    for n in range(len(x)):
        while len(corners) > 1 and _is_above(x, y, corners[-2], corners[-1], n):
            corners.pop()
        corners.append(n)
    return corners


def _is_above(x: NDArray[np.int64], y: NDArray[np.float64], left: int, middle: int, right: int) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return bool((y[middle] - y[left]) * (x[right] - x[left]) >= (y[right] - y[left]) * (x[middle] - x[left]))


def equal_shares(n_layers: int, n_slots: int) -> NDArray[np.int64]:
    """(n_layers,) as many slots for each; what is left over goes to the first ones."""
    return n_slots // n_layers + (np.arange(n_layers) < n_slots % n_layers)


def shares_of(slots: NDArray[np.int64], ffn_dim: int) -> Mapping[int, float]:
    """layer -> share of `ffn_dim`, for `ModelProfile.layer_sparsity_map`; rounded down it is that many slots again."""
    # a quotient may be rounded below what gives the number back
    return {layer: min(1.0, math.nextafter(n / ffn_dim, 2.0)) for layer, n in enumerate(slots.tolist())}
