"""Eviction by how often a bundle was used of late, whether it was in the arena then or not. Vectorised."""

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.eviction import Slots

# What a use counts for after another turn of its layer: half after 34 turns.
FADING = 0.98

# By the number of turns since: looked up, as powers cost ten times that. What is older counts as old as the last.
_WORTH = FADING ** np.arange(4096)

# Of all slots, that are put in order at once. They go one after the other, unless they are used by then; what has come
# since is not looked at before that. An order made afresh for every step misses 2 % less, and takes 15 times as long.
_QUEUE_SHARE = 1 / 16


class LeastOftenUsed:
    """Evicts what it expects to be needed last.

    A bundle's uses are counted, each worth `FADING` times as much with each turn of its layer; over what a bundle would
    have that was used each time, that is how probably its layer asks for it, p. So it is expected back in 1/p turns of
    its layer, the first of which is as many layer steps off as the layer is (counts that fade: Lee et al., LRFU, 2001).
    """

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        self._ffn_dim = ffn_dim
        self._count = np.zeros(n_layers * ffn_dim, np.float32)  # of each bundle, as it was when that was used last
        self._used_in = np.zeros(n_layers * ffn_dim, np.int32)  # the turn of its layer in which it was
        self._bundle_in = np.zeros(n_slots, np.int64)
        self._is_known = np.zeros(n_slots, bool)
        self._queue: Slots = np.empty(0, np.int64)
        self._is_queued = np.zeros(n_slots, bool)
        self._turn = np.zeros(n_layers, np.int64)
        self._current = n_layers - 1

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`: counts as a use."""
        self._bundle_in[slots] = layer * self._ffn_dim + ids.astype(np.int64)
        self._is_known[slots] = True
        self._note(layer, slots)

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._turn[layer] += 1
        self._current = layer
        self._note(layer, slots)

    def freed(self, slots: Slots) -> None:
        """As `Eviction.freed`."""
        self._is_known[slots] = False
        self._is_queued[slots] = False

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`."""
        found = self._first_of_queue(n, may_go)
        if len(found) < n:
            self._fill_queue(n - len(found), may_go)
            found = np.concatenate([found, self._first_of_queue(n - len(found), may_go)])
        return found

    def expected_wait(self, slots: Slots) -> NDArray[np.float64]:
        """(n,) layer steps until what lies in each slot is needed again."""
        n_layers, bundles = len(self._turn), self._bundle_in[slots]
        most = (1 - FADING**self._turn) / (1 - FADING)  # (n_layers,) the count of what is used every turn
        steps_off = (np.arange(n_layers) - self._current - 1) % n_layers
        layers, ids = np.divmod(bundles, self._ffn_dim)
        counts = self._count[bundles] * _worth(self._turn[layers] - self._used_in[bundles])
        order = ids / self._ffn_dim  # less than a step: of equals the first neuron goes, whatever slots they have
        return np.asarray((most[layers] / counts - 1) * n_layers + steps_off[layers] - order)

    def _note(self, layer: int, slots: Slots) -> None:
        bundles, turn = self._bundle_in[slots], self._turn[layer]
        self._count[bundles] = self._count[bundles] * _worth(turn - self._used_in[bundles]) + 1
        self._used_in[bundles] = turn
        self._is_queued[slots] = False

    def _first_of_queue(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        queue = self._queue = self._queue[self._is_queued[self._queue]]
        found = queue[may_go[queue]][:n]
        self.freed(found)
        return found

    def _fill_queue(self, n: int, may_go: NDArray[np.bool_]) -> None:
        """With those that are needed last, the last first; `n` at least, if there are so many."""
        slots = np.flatnonzero(self._is_known & may_go)
        length = max(n, int(len(may_go) * _QUEUE_SHARE))
        waits = self.expected_wait(slots)
        if length < len(slots):
            last = np.argpartition(waits, -length)[-length:]
            slots, waits = slots[last], waits[last]
        self._queue = slots[np.argsort(-waits, kind="stable")]
        self._is_queued[:] = False
        self._is_queued[slots] = True


def _worth(n_turns: NDArray[np.int64]) -> NDArray[np.float64]:
    """What a use counts for after so many turns."""
    return np.asarray(_WORTH.take(n_turns, mode="clip"), np.float64)
