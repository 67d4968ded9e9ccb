"""Slots divided among layers against one pool for all, on a part of a trace that the division has not seen."""

from collections.abc import Callable

import numpy as np

from sparseflow.engine.budgets import divide_slots, equal_shares, miss_curve
from sparseflow.engine.replay import Replayed, replay, replay_under, require_policy, require_slots
from sparseflow.engine.rival_evictions import Budgeted, LeastOftenUsedExactly, PlainLeastRecentlyUsed
from sparseflow.engine.trace import Trace

_ORDERS: dict[str, Callable[[int, int, int], LeastOftenUsedExactly | PlainLeastRecentlyUsed]] = {
    "lfu": LeastOftenUsedExactly,
    "lru": PlainLeastRecentlyUsed,
}
_SHARED = {"lfu": "lfu-exact", "lru": "lru"}  # the same order, in one pool for all layers

# An order, and how slots are divided.
DIVISIONS = tuple(f"{order}-{division}" for order in _ORDERS for division in ("equal", "profile", "shared"))


def replay_budgets(trace: Trace, n_slots: int, division: str) -> Replayed:
    """Divide slots by the miss curves of the first half of a trace, and replay the second under one of `DIVISIONS`.

    Raises:
        BadRequest: as `replay`.
    """
    require_policy(division, DIVISIONS)
    require_slots(n_slots)
    half = trace.n_tokens // 2 * trace.n_layers
    seen, rest = trace.part(0, half), trace.part(half, trace.n_steps)
    order, way = division.split("-")
    if way == "shared":
        return replay(rest, n_slots, _SHARED[order])
    if way == "equal":
        budgets = equal_shares(trace.n_layers, n_slots)
    else:
        curves = [miss_curve(seen.of_layer(layer), trace.ffn_dim) for layer in range(trace.n_layers)]
        budgets = divide_slots(np.array(curves), trace.ffn_dim, n_slots)
    sizes = trace.n_layers, trace.ffn_dim, n_slots
    return replay_under(rest, n_slots, Budgeted(_ORDERS[order](*sizes), budgets, n_slots))
