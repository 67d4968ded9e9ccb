"""Which bundle to evict: what a policy is, and two of them: least recently used, first in first out. Vectorised.

Slots that were used (or filled) together form a group, and groups wait in lanes, oldest first. A slot that is used
again joins a new group; its entry in the old one is known to be stale by the slot's stamp. So every use costs one
numpy call, whatever the number of slots, and a victim is found by looking at the first group of each lane.
"""

from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class Eviction(Protocol):
    """What residency asks of a policy."""

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """Slots were given to bundles of a layer, which are on their way. ids[i] goes to slots[i]."""
        ...

    def used(self, layer: int, slots: Slots) -> None:
        """A layer step uses these slots. They have been filled before."""
        ...

    def freed(self, slots: Slots) -> None:
        """Slots hold nothing any more."""
        ...

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """The next `n` slots to evict, fewer if fewer may go. may_go: (n_slots,) bool."""
        ...


class _Group(NamedTuple):
    stamp: int
    turn: int
    slots: Slots


class _Lanes:
    """Groups in lanes, oldest first, and which entries are still true."""

    def __init__(self, n_lanes: int, n_slots: int) -> None:
        self.lanes: list[deque[_Group]] = [deque() for _ in range(n_lanes)]
        self._stamp_of = np.zeros(n_slots, np.int64)  # 0: in no group
        self._last_stamp = 0
        self._n_entries = 0

    def append(self, lane: int, turn: int, slots: Slots) -> None:
        """Put slots into a new group; what groups they were in no longer counts."""
        if not len(slots):
            return
        self._last_stamp += 1
        self._stamp_of[slots] = self._last_stamp
        self.lanes[lane].append(_Group(self._last_stamp, turn, slots.copy()))
        self._n_entries += len(slots)
        if self._n_entries > 4 * len(self._stamp_of):
            self._drop_stale()

    def remove(self, slots: Slots) -> None:
        self._stamp_of[slots] = 0

    def take(self, lane: int, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """At most `n` entries of a lane's first group. The group stays, with the rest, if something is left of it."""
        group = self.lanes[lane].popleft()
        self._n_entries -= len(group.slots)
        slots = group.slots[self._stamp_of[group.slots] == group.stamp]
        taken = slots[may_go[slots]][:n]
        self._stamp_of[taken] = 0
        rest = slots[self._stamp_of[slots] == group.stamp]
        if len(rest):
            self.lanes[lane].appendleft(_Group(group.stamp, group.turn, rest))
            self._n_entries += len(rest)
        return np.asarray(taken, np.int64)

    def _drop_stale(self) -> None:
        for lane in self.lanes:
            groups = [_Group(g.stamp, g.turn, g.slots[self._stamp_of[g.slots] == g.stamp]) for g in lane]
            lane.clear()
            lane.extend(group for group in groups if len(group.slots))
        self._n_entries = sum(len(group.slots) for lane in self.lanes for group in lane)


class LeastRecentlyUsed:
    """Evicts what its own layer has not used for most of that layer's turns.

    Layers come round in a cycle, so with an arena that holds less than one token's neurons, plain LRU over all layers
    would evict just what is needed next. Counted in turns of their own layer, bundles of the last token are equally old
    in all layers; among those the ones go first whose layer comes again last.
    """

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        self._lanes = _Lanes(n_layers, n_slots)
        self._turn = [0] * n_layers
        self._current = n_layers - 1

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`: as young as what is used this turn."""
        self._lanes.append(layer, self._turn[layer], slots)

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`."""
        self._turn[layer] += 1
        self._current = layer
        self._lanes.append(layer, self._turn[layer], slots)

    def freed(self, slots: Slots) -> None:
        """As `Eviction.freed`."""
        self._lanes.remove(slots)

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`."""
        skipped: list[tuple[int, _Group]] = []
        found: list[Slots] = []
        missing = n
        lanes = self._lanes.lanes
        ages = [self._age(layer) for layer in range(len(lanes))]
        while missing > 0 and (oldest := max(ages)) >= 0:
            layer = ages.index(oldest)
            stamp = lanes[layer][0].stamp
            taken = self._lanes.take(layer, missing, may_go)
            found.append(taken)
            missing -= len(taken)
            if missing and lanes[layer] and lanes[layer][0].stamp == stamp:  # what is left of it may not go
                skipped.append((layer, lanes[layer].popleft()))
            ages[layer] = self._age(layer)
        for layer, group in reversed(skipped):
            lanes[layer].appendleft(group)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _age(self, layer: int) -> int:
        """Of a layer's first group, so that no two layers' are equal: turns, then how far off the next is. -1: none."""
        lane, n_layers = self._lanes.lanes[layer], len(self._turn)
        if not lane:
            return -1
        return (self._turn[layer] - lane[0].turn) * n_layers + (layer - self._current - 1) % n_layers


class FirstInFirstOut:
    """Evicts what was filled first, whatever has been used since."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        self._lanes = _Lanes(1, n_slots)

    def filled(self, layer: int, slots: Slots, ids: NDArray[np.integer]) -> None:
        """As `Eviction.filled`."""
        self._lanes.append(0, 0, slots)

    def used(self, layer: int, slots: Slots) -> None:
        """As `Eviction.used`: makes no difference."""

    def freed(self, slots: Slots) -> None:
        """As `Eviction.freed`."""
        self._lanes.remove(slots)

    def victims(self, n: int, may_go: NDArray[np.bool_]) -> Slots:
        """As `Eviction.victims`."""
        lane = self._lanes.lanes[0]
        skipped: list[_Group] = []
        found: list[Slots] = []
        missing = n
        while missing > 0 and lane:
            stamp = lane[0].stamp
            taken = self._lanes.take(0, missing, may_go)
            found.append(taken)
            missing -= len(taken)
            if missing and lane and lane[0].stamp == stamp:
                skipped.append(lane.popleft())
        lane.extendleft(reversed(skipped))
        return np.concatenate(found) if found else np.empty(0, np.int64)
