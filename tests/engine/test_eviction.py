"""LRU and FIFO beside slow twins that look at one slot at a time, and what the order of eviction is there for."""

import pickle
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest

from sparseflow.engine.eviction import Eviction, FirstInFirstOut, LeastRecentlyUsed
from sparseflow.engine.least_often_used import LeastOftenUsed

Key = tuple[int, ...]

N_NEURONS = 64  # of a layer


class Twin(Protocol):
    def filled(self, layer: int, slots: list[int]) -> None: ...
    def used(self, layer: int, slots: list[int]) -> None: ...
    def freed(self, slots: list[int]) -> None: ...
    def keys(self) -> dict[int, Key]:
        """slot -> what decides; the smallest goes first."""
        ...


class LeastRecentlyUsedSlow:
    """By age in turns of the own layer, then what comes again last, then what came earlier."""

    def __init__(self, n_layers: int) -> None:
        self.turn = [0] * n_layers
        self.last_layer = n_layers - 1
        self.n_calls = 0
        self.known: dict[int, tuple[int, int, int]] = {}  # slot -> layer, turn, number of the call

    def _note(self, layer: int, slots: list[int]) -> None:
        self.n_calls += 1
        for slot in slots:
            self.known[slot] = (layer, self.turn[layer], self.n_calls)

    def filled(self, layer: int, slots: list[int]) -> None:
        self._note(layer, slots)

    def used(self, layer: int, slots: list[int]) -> None:
        self.turn[layer] += 1
        self.last_layer = layer
        self._note(layer, slots)

    def freed(self, slots: list[int]) -> None:
        for slot in slots:
            self.known.pop(slot, None)

    def _turns_until(self, layer: int) -> int:
        turns, at = 1, (self.last_layer + 1) % len(self.turn)
        while at != layer:
            turns, at = turns + 1, (at + 1) % len(self.turn)
        return turns

    def keys(self) -> dict[int, Key]:
        return {slot: (turn - self.turn[layer], -self._turns_until(layer), call)
                for slot, (layer, turn, call) in self.known.items()}  # fmt: skip


class FirstInFirstOutSlow:
    """By when a slot was filled."""

    def __init__(self, n_layers: int) -> None:
        self.n_calls = 0
        self.known: dict[int, int] = {}

    def filled(self, layer: int, slots: list[int]) -> None:
        self.n_calls += 1
        self.known |= dict.fromkeys(slots, self.n_calls)

    def used(self, layer: int, slots: list[int]) -> None:
        pass

    def freed(self, slots: list[int]) -> None:
        for slot in slots:
            self.known.pop(slot, None)

    def keys(self) -> dict[int, Key]:
        return {slot: (call,) for slot, call in self.known.items()}


class PlainLeastRecentlyUsedSlow(FirstInFirstOutSlow):
    """What `LeastRecentlyUsed` is not: by last use over all layers."""

    def used(self, layer: int, slots: list[int]) -> None:
        self.filled(layer, slots)


PAIRS: dict[str, tuple[Callable[[int, int, int], Eviction], Callable[[int], Twin]]] = {
    "lru": (LeastRecentlyUsed, LeastRecentlyUsedSlow),
    "fifo": (FirstInFirstOut, FirstInFirstOutSlow),
}
both = pytest.mark.parametrize("name", PAIRS)


def arr(slots: Any) -> np.ndarray:
    return np.array(slots, np.int64)


def fill(policy: Eviction, layer: int, slots: Any) -> None:
    """Which neurons come makes no difference to these evictions."""
    policy.filled(layer, arr(slots), arr(slots))


def check_victims(fast: Eviction, twin: Twin, n: int, may_go: np.ndarray) -> list[int]:
    """The same as the twin's, in its order; slots that came with one call may stand in any order among themselves."""
    keys = twin.keys()
    expected = sorted(keys[slot] for slot in keys if may_go[slot])[:n]
    victims = fast.victims(n, may_go).tolist()
    assert len(set(victims)) == len(victims)
    assert all(may_go[slot] for slot in victims)
    assert [keys[slot] for slot in victims] == expected
    twin.freed(victims)
    return victims


@both
@pytest.mark.parametrize(("n_layers", "n_slots"), [(1, 1), (1, 7), (3, 13), (5, 64), (24, 40)])
def test_random_history_gives_the_twins_victims(
    rng: np.random.Generator, name: str, n_layers: int, n_slots: int
) -> None:
    make, make_twin = PAIRS[name]
    fast, twin = make(n_layers, N_NEURONS, n_slots), make_twin(n_layers)
    layer_in: dict[int, int] = {}  # slots that are filled
    layer = 0
    for _ in range(500):
        layer = (layer + 1) % n_layers if rng.random() < 0.8 else int(rng.integers(n_layers))
        own = [slot for slot, its in layer_in.items() if its == layer and rng.random() < 0.6]
        fast.used(layer, arr(own))
        twin.used(layer, own)
        free = rng.permutation([slot for slot in range(n_slots) if slot not in layer_in])
        new = free[: rng.integers(0, len(free) + 1)].tolist()
        fill(fast, layer, new)
        twin.filled(layer, new)
        layer_in |= dict.fromkeys(new, layer)
        if rng.random() < 0.2 and layer_in:
            failed = rng.permutation(list(layer_in))[:3].tolist()
            fast.freed(arr(failed))
            twin.freed(failed)
            for slot in failed:
                del layer_in[slot]
        may_go = np.zeros(n_slots, bool)
        may_go[list(layer_in)] = rng.random(len(layer_in)) < rng.choice([0.1, 0.7, 1.0])
        for slot in check_victims(fast, twin, int(rng.integers(0, n_slots + 2)), may_go):
            del layer_in[slot]
    everything = np.zeros(n_slots, bool)
    everything[list(layer_in)] = True
    assert sorted(check_victims(fast, twin, n_slots, everything)) == sorted(layer_in)
    assert len(fast.victims(n_slots, np.ones(n_slots, bool))) == 0


@both
def test_no_slot_is_lost_or_found_twice_after_many_uses_without_an_eviction(name: str) -> None:
    """Each use leaves stale entries behind, which are dropped now and then."""
    n_layers, n_slots = 4, 32
    fast, twin = PAIRS[name][0](n_layers, N_NEURONS, n_slots), PAIRS[name][1](n_layers)
    for layer in range(n_layers):
        own = list(range(layer, n_slots, n_layers))
        fill(fast, layer, own)
        twin.filled(layer, own)
    for step in range(1000):
        layer = step % n_layers
        own = list(range(layer, n_slots, n_layers))[: 1 + step % 8]
        fast.used(layer, arr(own))
        twin.used(layer, own)
    assert sorted(check_victims(fast, twin, n_slots, np.ones(n_slots, bool))) == list(range(n_slots))


@both
@pytest.mark.parametrize("n_evicted", [0, 1])
def test_what_is_kept_does_not_grow_with_use(name: str, n_evicted: int) -> None:
    """Nor where slots go one at a time from a large group."""
    n_layers, n_slots = 3, 60
    everything = np.ones(n_slots, bool)
    policy = PAIRS[name][0](n_layers, N_NEURONS, n_slots)
    sizes = []
    for layer in range(n_layers):
        fill(policy, layer, range(layer, n_slots, n_layers))
    for step in range(3000):
        layer = step % n_layers
        policy.used(layer, np.arange(layer, n_slots, n_layers)[1 + step % 3 :])
        fill(policy, layer, policy.victims(n_evicted, everything))
        sizes.append(len(pickle.dumps(policy)))
    assert max(sizes[2000:]) < 1.5 * max(sizes[:1000])


@both
def test_slots_that_may_not_go_keep_their_place_in_the_order(name: str) -> None:
    fast = PAIRS[name][0](1, N_NEURONS, 6)
    for slot in range(6):
        fill(fast, 0, [slot])
    leased = np.array([False, False, True, True, True, True])
    assert fast.victims(1, leased).tolist() == [2]
    assert fast.victims(1, ~leased).tolist() == [0]
    assert fast.victims(6, np.ones(6, bool)).tolist() == [1, 3, 4, 5]


@both
def test_fewer_victims_where_fewer_may_go(name: str) -> None:
    fast = PAIRS[name][0](2, N_NEURONS, 4)
    fill(fast, 1, [0, 1, 2])
    assert fast.victims(3, np.array([False, True, False, True])).tolist() == [1]
    assert fast.victims(3, np.zeros(4, bool)).tolist() == []


def test_fifo_does_not_care_for_use() -> None:
    fifo = FirstInFirstOut(1, N_NEURONS, 3)
    for slot in (2, 0, 1):
        fill(fifo, 0, [slot])
    fifo.used(0, arr([2, 0]))
    assert fifo.victims(3, np.ones(3, bool)).tolist() == [2, 0, 1]


def test_lru_evicts_what_its_own_layer_left_out_longest_ago() -> None:
    """Layer 0 has come three times and used slot 0 each time; slot 1 came later than that, but was not used again."""
    lru = LeastRecentlyUsed(2, N_NEURONS, 4)
    lru.used(0, arr([]))
    fill(lru, 0, [0, 1])
    lru.used(1, arr([]))
    fill(lru, 1, [2, 3])
    lru.used(0, arr([0]))
    assert lru.victims(1, np.ones(4, bool)).tolist() == [1]


def test_lru_among_equally_old_evicts_the_layer_that_comes_again_last() -> None:
    lru = LeastRecentlyUsed(3, N_NEURONS, 6)
    for layer in range(3):
        lru.used(layer, arr([]))
        fill(lru, layer, [2 * layer, 2 * layer + 1])
    lru.used(0, arr([0, 1]))  # next come 1, 2, 0
    assert lru.victims(6, np.ones(6, bool)).tolist() == [0, 1, 4, 5, 2, 3]


# --- what the order is for


def hits_of_a_cycle(policy: Any, n_layers: int, n_neurons: int, n_slots: int, n_rounds: int) -> int:
    """Every round each layer asks for the same bundles, one layer after the other; a step's own may not go."""
    slot_of: dict[tuple[int, int], int] = {}
    free = list(range(n_slots))
    hits = 0
    for _ in range(n_rounds):
        for layer in range(n_layers):
            own = [(layer, neuron) for neuron in range(n_neurons)]
            found = [slot_of[bundle] for bundle in own if bundle in slot_of]
            hits += len(found)
            policy.used(layer, arr(found))
            missing = [bundle for bundle in own if bundle not in slot_of]
            n_short = max(0, len(missing) - len(free))
            may_go = np.zeros(n_slots, bool)
            may_go[[slot for bundle, slot in slot_of.items() if bundle[0] != layer]] = True
            victims = policy.victims(n_short, may_go)
            assert len(victims) == n_short
            gone = set(victims.tolist())
            slot_of = {bundle: slot for bundle, slot in slot_of.items() if slot not in gone}
            free += sorted(gone)
            slots = [free.pop() for _ in missing]
            slot_of |= dict(zip(missing, slots, strict=True))
            policy.filled(layer, arr(slots), arr([neuron for _, neuron in missing]))
    return hits


class Plain:
    """The plain twin as a policy."""

    def __init__(self) -> None:
        self._twin = PlainLeastRecentlyUsedSlow(1)

    def filled(self, layer: int, slots: np.ndarray, ids: np.ndarray) -> None:
        self._twin.filled(layer, slots.tolist())

    def used(self, layer: int, slots: np.ndarray) -> None:
        self._twin.filled(layer, slots.tolist())

    def victims(self, n: int, may_go: np.ndarray) -> np.ndarray:
        keys = self._twin.keys()
        chosen = sorted((slot for slot in keys if may_go[slot]), key=lambda slot: keys[slot])[:n]
        self._twin.freed(chosen)
        return arr(chosen)


@pytest.mark.parametrize("make", [LeastRecentlyUsed, LeastOftenUsed])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_finds_bundles_again_in_an_arena_smaller_than_one_round(make: Any, share: float) -> None:
    """Plain LRU finds none: what it evicts is what the cycle needs next. Here about as many as the arena can keep."""
    n_layers, n_neurons, n_rounds = 12, 10, 20
    n_slots = int(share * n_layers * n_neurons)
    sizes = (n_layers, n_neurons, n_slots, n_rounds)
    assert hits_of_a_cycle(Plain(), *sizes) == 0
    hit_rate = hits_of_a_cycle(make(n_layers, n_neurons, n_slots), *sizes) / (n_layers * n_neurons * n_rounds)
    print(f"arena of {share:.0%} of a round, {hit_rate:.1%} found again")
    assert hit_rate > 0.5 * share
