"""The eviction by fading counts, beside a slow twin that keeps a dictionary, and what it is there for."""

import pickle
from typing import Any

import numpy as np
import pytest

from sparseflow.engine.least_often_used import FADING, LeastOftenUsed
from sparseflow.engine.rival_evictions import LeastOftenUsedExactly

Bundle = tuple[int, int]  # layer, id


class Slow:
    """Bundles that are known, every use of every bundle, and a list as the queue."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int) -> None:
        self.n_layers, self.ffn_dim, self.queue_length = n_layers, ffn_dim, n_slots // 16
        self.turn = [0] * n_layers
        self.last_layer = n_layers - 1
        self.uses: dict[Bundle, list[int]] = {}  # the turns of its layer in which it was used
        self.bundle_in: dict[int, Bundle] = {}
        self.queue: list[int] = []

    def filled(self, layer: int, slots: list[int], ids: list[int]) -> None:
        self.bundle_in |= {slot: (layer, neuron) for slot, neuron in zip(slots, ids, strict=True)}
        self._note(layer, slots)

    def used(self, layer: int, slots: list[int]) -> None:
        self.turn[layer] += 1
        self.last_layer = layer
        self._note(layer, slots)

    def _note(self, layer: int, slots: list[int]) -> None:
        for slot in slots:
            self.uses.setdefault(self.bundle_in[slot], []).append(self.turn[layer])
        self.queue = [slot for slot in self.queue if slot not in slots]

    def freed(self, slots: list[int]) -> None:
        for slot in slots:
            self.bundle_in.pop(slot, None)
        self.queue = [slot for slot in self.queue if slot not in slots]

    def wait(self, slot: int) -> float:
        """Layer steps until it is expected again."""
        layer, neuron = self.bundle_in[slot]
        now = self.turn[layer]
        count = sum(FADING ** (now - turn) for turn in self.uses[layer, neuron])
        most = sum(FADING**age for age in range(now))
        steps_off = (layer - self.last_layer - 1) % self.n_layers
        return (most / count - 1) * self.n_layers + steps_off - neuron / self.ffn_dim

    def victims(self, n: int, may_go: np.ndarray) -> list[int]:
        found = [slot for slot in self.queue if may_go[slot]][:n]
        self.freed(found)
        if len(found) < n:
            slots = sorted((slot for slot in self.bundle_in if may_go[slot]), key=self.wait, reverse=True)
            self.queue = slots[: max(n - len(found), self.queue_length)]
            rest = self.queue[: n - len(found)]
            self.freed(rest)
            found += rest
        return found


def arr(slots: Any) -> np.ndarray:
    return np.array(slots, np.int64)


@pytest.mark.parametrize(("n_layers", "n_slots"), [(1, 1), (1, 7), (3, 13), (5, 64), (24, 100)])
def test_random_history_gives_the_twins_victims(rng: np.random.Generator, n_layers: int, n_slots: int) -> None:
    """Bundles come back after they have gone, and are remembered."""
    ffn_dim = n_slots
    fast, twin = LeastOftenUsed(n_layers, ffn_dim, n_slots), Slow(n_layers, ffn_dim, n_slots)
    n_returns = 0
    for step in range(400):
        layer = step % n_layers if rng.random() < 0.8 else int(rng.integers(n_layers))
        own = [slot for slot, (its, _) in twin.bundle_in.items() if its == layer and rng.random() < 0.4]
        fast.used(layer, arr(own))
        twin.used(layer, own)
        absent = sorted(set(range(ffn_dim)) - {neuron for its, neuron in twin.bundle_in.values() if its == layer})
        free = rng.permutation([slot for slot in range(n_slots) if slot not in twin.bundle_in])
        n_new = int(rng.integers(0, min(len(free), len(absent)) + 1))
        slots, ids = free[:n_new].tolist(), sorted(rng.choice(absent, n_new, replace=False).tolist() if n_new else [])
        n_returns += sum((layer, neuron) in twin.uses for neuron in ids)
        fast.filled(layer, arr(slots), arr(ids))
        twin.filled(layer, slots, ids)
        if rng.random() < 0.2:
            failed = rng.permutation(list(twin.bundle_in))[:3].astype(np.int64)
            fast.freed(failed)
            twin.freed(failed.tolist())
        may_go = rng.random(n_slots) < rng.choice([0.1, 0.7, 1.0])
        n = int(rng.integers(0, n_slots // 3 + 2))
        assert fast.victims(n, may_go).tolist() == twin.victims(n, may_go)
    assert n_returns > 10
    left = fast.victims(n_slots + 1, np.ones(n_slots, bool)).tolist()
    assert sorted(left) == sorted(twin.bundle_in)
    assert len(fast.victims(1, np.ones(n_slots, bool))) == 0


def test_bundle_used_often_outlives_one_used_last() -> None:
    lfu = LeastOftenUsed(1, 8, 2)
    lfu.used(0, arr([]))
    lfu.filled(0, arr([0]), arr([5]))
    for _ in range(3):
        lfu.used(0, arr([0]))
    lfu.used(0, arr([]))
    lfu.filled(0, arr([1]), arr([6]))
    assert lfu.victims(1, np.ones(2, bool)).tolist() == [1]


def test_bundle_not_used_for_long_is_forgotten() -> None:
    lfu = LeastOftenUsed(1, 8, 2)
    for _ in range(10):
        lfu.used(0, arr([]))
        lfu.filled(0, arr([0]), arr([5]))
    for _ in range(150):
        lfu.used(0, arr([]))
    lfu.filled(0, arr([1]), arr([6]))
    assert lfu.victims(1, np.ones(2, bool)).tolist() == [0]


def test_bundle_that_comes_back_is_remembered() -> None:
    """Slot 0 holds a bundle that was there before, slot 1 one that came later and is new."""
    lfu = LeastOftenUsed(1, 8, 2)
    for _ in range(4):
        lfu.used(0, arr([]))
        lfu.filled(0, arr([0]), arr([5]))
        assert lfu.victims(1, np.array([True, False])).tolist() == [0]
    lfu.used(0, arr([]))
    lfu.filled(0, arr([0]), arr([5]))
    lfu.used(0, arr([]))
    lfu.filled(0, arr([1]), arr([6]))
    assert lfu.victims(1, np.ones(2, bool)).tolist() == [1]


def test_among_equals_goes_what_is_needed_again_last() -> None:
    lfu = LeastOftenUsedExactly(3, 8, 3)
    for layer in range(3):
        lfu.used(layer, arr([]))
        lfu.filled(layer, arr([layer]), arr([0]))
    lfu.used(0, arr([0]))  # next come 1, 2, 0
    assert lfu.victims(3, np.ones(3, bool)).tolist() == [0, 2, 1]


def test_what_may_not_go_keeps_its_place() -> None:
    lfu = LeastOftenUsed(1, 8, 6)
    lfu.used(0, arr([]))
    lfu.filled(0, np.arange(6), np.arange(6))
    leased = np.array([False, False, True, True, True, True])
    assert lfu.victims(1, leased).tolist() == [2]
    assert lfu.victims(1, ~leased).tolist() == [0]
    assert lfu.victims(6, np.ones(6, bool)).tolist() == [1, 3, 4, 5]


def test_what_is_kept_does_not_grow_and_counts_stay_finite() -> None:
    """Over more turns than are looked up."""
    lfu = LeastOftenUsed(2, 16, 8)
    sizes = []
    for turn in range(6000):
        for layer in range(2):
            lfu.used(layer, arr([]))
            slots = lfu.victims(8, np.ones(8, bool)) if turn + layer else np.arange(8)
            lfu.filled(layer, slots, np.arange(8) + turn % 8)
        sizes.append(len(pickle.dumps(lfu)))
    assert max(sizes[4000:]) <= max(sizes[:2000])
    assert len(lfu.victims(8, np.ones(8, bool))) == 8
    rare = LeastOftenUsed(1, 16, 2)
    rare.used(0, arr([]))
    rare.filled(0, arr([0, 1]), arr([0, 1]))
    for _ in range(5000):
        rare.used(0, arr([1]))
    assert np.isfinite(rare.expected_wait(arr([0, 1]))).all()
    assert rare.victims(1, np.ones(2, bool)).tolist() == [0]
