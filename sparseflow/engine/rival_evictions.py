"""Evictions that the arena does not use, to compare with those that it does. Slower: they look at every slot."""

from abc import abstractmethod
from collections import deque

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.eviction import Slots
from sparseflow.engine.least_often_used import LeastOftenUsed
from sparseflow.engine.trace import Step, Trace

_NEVER = np.iinfo(np.int64).max


class InOrder:
    """Evicts by a key of each slot, the smallest first; it is asked anew each time."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        self.n_layers = n_layers
        self.layer_in = np.full(n_slots, -1, np.int64)  # -1: not filled
        self.id_in = np.zeros(n_slots, np.int64)

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        self.layer_in[slots], self.id_in[slots] = layer, ids

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""

    def freed(self, slots: Slots) -> None:
        """As `Eviction.freed`."""
        self.layer_in[slots] = -1

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`."""
        slots = np.flatnonzero((self.layer_in >= 0) & may_go)
        chosen = first(n, slots, self.keys(slots))
        self.freed(chosen)
        return chosen

    @abstractmethod
    def keys(self, slots: Slots) -> NDArray[np.generic]:
        """(n,) one of each slot."""


def first(n: int, slots: Slots, keys: NDArray[np.generic]) -> Slots:
    """The `n` slots with the smallest keys, in any order; all, if they are fewer."""
    return slots[np.argpartition(keys, n)[:n]] if n < len(slots) else slots


class PlainLeastRecentlyUsed(InOrder):
    """By the last use, over all layers."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        super().__init__(n_layers, ffn_dim, n_slots)
        self._now = 0
        self._used_at = np.zeros(n_slots, np.int64)

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        super().filled(layer, slots, ids)
        self._used_at[slots] = self._now

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._now += 1
        self._used_at[slots] = self._now

    def keys(self, slots: Slots) -> NDArray[np.int64]:
        """When each was used."""
        return self._used_at[slots]


class LastTokens(InOrder):
    """Keeps what the last turns of its layer used, and evicts what came first of the rest."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int, n_turns: int = 4) -> None:
        super().__init__(n_layers, ffn_dim, n_slots)
        self._n_turns = n_turns
        self._turn = np.zeros(n_layers, np.int64)
        self._used_in = np.zeros(n_slots, np.int64)
        self._filled_at = np.zeros(n_slots, np.int64)
        self._now = 0

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        super().filled(layer, slots, ids)
        self._now += 1
        self._filled_at[slots], self._used_in[slots] = self._now, self._turn[layer]

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._turn[layer] += 1
        self._used_in[slots] = self._turn[layer]

    def keys(self, slots: Slots) -> NDArray[np.int64]:
        """When each came, after all that was not used of late."""
        is_recent = self._turn[self.layer_in[slots]] - self._used_in[slots] < self._n_turns
        return self._filled_at[slots] + is_recent * self._now


class Optimum(InOrder):
    """Evicts what is needed again last, which only a trace can tell (Belady, 1966)."""

    def __init__(self, trace: Trace, n_slots: int) -> None:
        """trace: of the very fetches that will be made."""
        super().__init__(trace.n_layers, trace.ffn_dim, n_slots)
        self._steps = list(trace)
        self._next_use = _next_uses(self._steps, trace)
        self._step = -1
        self._needed_at = np.full(n_slots, _NEVER, np.int64)

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        super().filled(layer, slots, ids)
        self._look_ahead(slots)

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._step += 1
        self._look_ahead(slots)

    def _look_ahead(self, slots: Slots) -> None:
        positions = np.searchsorted(self._steps[self._step].ids, self.id_in[slots])
        self._needed_at[slots] = self._next_use[self._step][positions]

    def keys(self, slots: Slots) -> NDArray[np.int64]:
        """When each is needed again, the last first."""
        return -self._needed_at[slots]


def _next_uses(steps: list[Step], trace: Trace) -> list[NDArray[np.int64]]:
    """For each id of each step, the step in which it is needed next."""
    next_use = np.full((trace.n_layers, trace.ffn_dim), _NEVER, np.int64)
    found = []
    for n, (layer, ids) in reversed(list(enumerate(steps))):
        found.append(next_use[layer, ids])
        next_use[layer, ids] = n
    return found[::-1]


class Sieve:
    """SIEVE (Zhang et al., 2024): a hand goes from the oldest to the newest; what was used since it came past stays."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        self._order: dict[int, None] = {}  # slots as they came; what the hand has passed is put behind
        self._passed: list[int] = []
        self._was_used = np.zeros(n_slots, bool)

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        self._order |= dict.fromkeys(slots.tolist())
        self._was_used[slots] = False

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._was_used[slots] = True

    def freed(self, slots: Slots) -> None:
        """As `Eviction.freed`."""
        for slot in slots.tolist():
            self._order.pop(slot, None)
        gone = set(slots.tolist())
        self._passed = [slot for slot in self._passed if slot not in gone]

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`, one slot after the other. What may not go is passed as if it had been used."""
        found: list[int] = []
        n_left = 2 * (len(self._order) + len(self._passed))  # the second time round none counts as used
        while len(found) < n and n_left:
            if not self._order:  # the hand is at the newest: on with the oldest
                self._order, self._passed = dict.fromkeys(self._passed), []
            slot = next(iter(self._order))
            del self._order[slot]
            n_left -= 1
            if may_go[slot] and not self._was_used[slot]:
                found.append(slot)
            else:
                self._passed.append(slot)
                self._was_used[slot] &= not may_go[slot]
        return np.array(found, np.int64)


class S3Fifo:
    """S3-FIFO (Yang et al., 2023): a short queue for what is new, a long one for what was used there, and a memory of
    what the short one let go, whose return counts as use.
    """

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        self._ffn_dim = ffn_dim
        self._n_short = max(1, n_slots // 10)
        self._n_gone = n_slots - self._n_short
        self._short: deque[int] = deque()
        self._long: deque[int] = deque()
        self._gone: dict[int, None] = {}
        self._uses = np.zeros(n_slots, np.int8)
        self._bundle_in = np.zeros(n_slots, np.int64)

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        bundles = layer * self._ffn_dim + ids.astype(np.int64)
        self._bundle_in[slots], self._uses[slots] = bundles, 0
        for slot, bundle in zip(slots.tolist(), bundles.tolist(), strict=True):
            if bundle in self._gone:
                del self._gone[bundle]
                self._long.append(slot)
            else:
                self._short.append(slot)

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._uses[slots] = np.minimum(self._uses[slots] + 1, 3)

    def freed(self, slots: Slots) -> None:
        """As `Eviction.freed`."""
        gone = set(slots.tolist())
        self._short = deque(slot for slot in self._short if slot not in gone)
        self._long = deque(slot for slot in self._long if slot not in gone)

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`, one slot after the other. What may not go is put back where it was taken from, and a
        queue of nothing else is left alone.
        """
        found: list[int] = []
        n_of_short, n_of_long = (
            int(may_go[np.array(queue, np.int64)].sum()) for queue in (self._short, self._long)
        )  # may go
        while len(found) < n and n_of_short + n_of_long:
            takes_short = bool(n_of_short) and (len(self._short) > self._n_short or not n_of_long)
            slot = (self._short if takes_short else self._long).popleft()
            if not may_go[slot]:
                (self._short if takes_short else self._long).append(slot)
            elif takes_short and self._uses[slot] > 1:
                self._uses[slot] = 0
                self._long.append(slot)
                n_of_short, n_of_long = n_of_short - 1, n_of_long + 1
            elif not takes_short and self._uses[slot] > 0:
                self._uses[slot] -= 1
                self._long.append(slot)
            else:
                found.append(slot)
                n_of_short, n_of_long = n_of_short - takes_short, n_of_long - (not takes_short)
                if takes_short:
                    self._remember(int(self._bundle_in[slot]))
        return np.array(found, np.int64)

    def _remember(self, bundle: int) -> None:
        self._gone[bundle] = None
        if len(self._gone) > self._n_gone:
            del self._gone[next(iter(self._gone))]


class LeastOftenUsedExactly(LeastOftenUsed):
    """`LeastOftenUsed`, its order made afresh for every step. What that would find more."""

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`."""
        self._fill_queue(n, may_go)
        return self._first_of_queue(n, may_go)

    def keys(self, slots: Slots) -> NDArray[np.float64]:
        """How soon each is needed again, the last first."""
        return -self.expected_wait(slots)


class Budgeted:
    """Each layer has a budget of slots; evicts from the layer most above its own, in another eviction's order."""

    def __init__(self, order: LeastOftenUsedExactly | PlainLeastRecentlyUsed, budgets: NDArray[np.int64], n_slots: int):
        """budgets: (n_layers,)"""
        self._order, self._budgets = order, budgets
        self._layer_in = np.full(n_slots, -1, np.int64)
        self._current = 0

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        self._layer_in[slots] = layer
        self._order.filled(layer, slots, ids)

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._current = layer
        self._order.used(layer, slots)

    def freed(self, slots: Slots) -> None:
        """As `Eviction.freed`."""
        self._layer_in[slots] = -1
        self._order.freed(slots)

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`. The `n` bundles that are to come count as their layer's already."""
        is_filled = self._layer_in >= 0
        excess = np.bincount(self._layer_in[is_filled], minlength=len(self._budgets)) - self._budgets
        excess[self._current] += n
        slots = np.flatnonzero(is_filled & may_go)
        slots = slots[np.lexsort((self._order.keys(slots), self._layer_in[slots]))]
        layers = self._layer_in[slots]
        rank = np.arange(len(slots)) - np.searchsorted(layers, layers)  # in its layer, the first to go is 0
        chosen = first(n, slots, rank - excess[layers])
        self.freed(chosen)
        return chosen
