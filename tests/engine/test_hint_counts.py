"""Hints that were useful, late or wasted, and hits by layer: by hand, and beside a twin that counts one by one."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import neurons

from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.residency import Acquire, Failed, Hint, Instruction, Load, Loaded, Refuse, Release, Residency
from sparseflow.errors import DiskError

Bundle = tuple[int, int]  # layer, id


class Hinted:
    """A residency whose events are given by hand. Two layers of 8 neurons, 4 slots."""

    def __init__(self, eviction: str) -> None:
        self.residency = Residency(2, 8, 4, EVICTIONS[eviction](2, 8, 4))
        self._n_fetches = 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """hinted, useful, late, wasted."""
        counts = self.residency.counts
        return counts.hinted, counts.hints_useful, counts.hints_late, counts.hints_wasted

    def hint(self, layer: int, *ids: int) -> Load:
        (load,) = self.residency.handle(Hint(layer, neurons(*ids)))
        assert isinstance(load, Load)
        return load

    def hint_that_comes(self, layer: int, *ids: int) -> None:
        self.residency.handle(Loaded(self.hint(layer, *ids).slots))

    def fetch(self, layer: int, *ids: int) -> int:
        """Whatever it lacks comes at once."""
        self._n_fetches += 1
        self.load_all(self.residency.handle(Acquire(self._n_fetches, layer, neurons(*ids))))
        return self._n_fetches

    def load_all(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Load):
                self.load_all(self.residency.handle(Loaded(instruction.slots)))

    def release(self, fetch: int) -> None:
        self.load_all(self.residency.handle(Release(fetch)))

    def use(self, layer: int, *ids: int) -> None:
        self.release(self.fetch(layer, *ids))


@pytest.fixture(params=EVICTIONS)
def hinted(request: pytest.FixtureRequest) -> Hinted:
    return Hinted(request.param)


# --- by hand


def test_hint_that_has_come_when_it_is_asked_for_was_useful(hinted: Hinted) -> None:
    hinted.hint_that_comes(0, 1, 2, 3)
    assert hinted.counts == (3, 0, 0, 0)
    hinted.use(0, 1, 3)
    assert hinted.counts == (3, 2, 0, 0)


def test_hint_that_is_on_its_way_when_it_is_asked_for_was_late(hinted: Hinted) -> None:
    load = hinted.hint(0, 1, 2, 3)
    hinted.residency.handle(Loaded(load.slots[:1]))
    hinted.use(0, 1, 2)
    assert hinted.counts == (3, 1, 1, 0)
    hinted.residency.handle(Loaded(load.slots[1:]))
    hinted.use(0, 1, 2, 3)
    assert hinted.counts == (3, 2, 1, 0), "3 had come"


def test_hint_that_is_evicted_before_anybody_asks_was_wasted(hinted: Hinted) -> None:
    hinted.hint_that_comes(0, 1, 2)
    hinted.use(1, 0, 1, 2)
    assert hinted.counts == (2, 0, 0, 1)
    hinted.use(1, 0, 1, 2, 3)
    assert hinted.counts == (2, 0, 0, 2)


def test_each_hint_counts_once_however_often_it_is_asked_for(hinted: Hinted) -> None:
    hinted.hint_that_comes(0, 1)
    for _ in range(3):
        hinted.use(0, 1)
    hinted.use(1, 0, 1, 2, 3)
    assert hinted.counts == (1, 1, 0, 0), "and its eviction is no waste"


def test_two_who_ask_at_once_count_it_once(hinted: Hinted) -> None:
    load = hinted.hint(0, 1)
    first, second = hinted.fetch(0, 1), hinted.fetch(0, 1)
    hinted.residency.handle(Loaded(load.slots))
    hinted.release(first)
    hinted.release(second)
    assert hinted.counts == (1, 0, 1, 0)


def test_hint_of_what_is_there_or_on_its_way_counts_nothing(hinted: Hinted) -> None:
    hinted.use(0, 1, 2)
    hinted.hint(0, 3)
    assert hinted.residency.handle(Hint(0, neurons(1, 2, 3))) == []
    assert hinted.counts == (1, 0, 0, 0)


def test_what_a_fetch_brought_is_no_hint(hinted: Hinted) -> None:
    hinted.use(0, 1, 2)
    hinted.use(0, 1, 2)
    hinted.use(1, 0, 1, 2, 3)
    assert hinted.counts == (0, 0, 0, 0)


def test_hint_that_fails_before_anybody_asks_was_wasted(hinted: Hinted) -> None:
    load = hinted.hint(0, 1, 2)
    hinted.residency.handle(Failed(load.slots[:1], DiskError("a test's own")))
    assert hinted.counts == (2, 0, 0, 1)


def test_hint_that_fails_after_somebody_asked_was_late_and_no_more(hinted: Hinted) -> None:
    load = hinted.hint(0, 1)
    hinted.fetch(0, 1)
    hinted.residency.handle(Failed(load.slots, DiskError("a test's own")))
    assert hinted.counts == (1, 0, 1, 0)


def test_bundle_that_is_hinted_again_counts_again(hinted: Hinted) -> None:
    for _ in range(3):
        hinted.hint_that_comes(0, 1)
        hinted.use(1, 0, 1, 2, 3)
    assert hinted.counts == (3, 0, 0, 3)
    hinted.hint_that_comes(0, 1)
    hinted.use(0, 1)
    assert hinted.counts == (4, 1, 0, 3)


def test_slot_that_a_hint_had_filled_means_nothing_for_the_next_bundle_in_it(hinted: Hinted) -> None:
    hinted.hint_that_comes(0, 0, 1, 2, 3)
    hinted.use(1, 0, 1, 2, 3)
    hinted.use(1, 0, 1, 2, 3)
    hinted.use(0, 4, 5, 6, 7)
    assert hinted.counts == (4, 0, 0, 4)


def test_fetch_counts_when_it_gets_its_slots(hinted: Hinted) -> None:
    """What is on its way when a fetch begins to wait for slots may have come by then."""
    load = hinted.hint(0, 1)
    holder = hinted.fetch(1, 0, 1, 2)
    hinted.residency.handle(Acquire(77, 0, neurons(1, 2)))
    assert hinted.counts == (1, 0, 0, 0)
    hinted.residency.handle(Loaded(load.slots))
    hinted.release(holder)
    assert hinted.counts == (1, 1, 0, 0)


def test_fetch_that_is_given_up_while_it_waits_for_slots_counts_nothing(hinted: Hinted) -> None:
    hinted.hint_that_comes(0, 1)
    hinted.fetch(1, 0, 1, 2)
    hinted.residency.handle(Acquire(77, 0, neurons(1, 2)))
    hinted.residency.handle(Release(77))
    assert hinted.counts == (1, 0, 0, 0)
    assert hinted.residency.layer_hits.tolist() == [0, 0]


def test_hits_and_misses_are_of_the_layer_asked_for(hinted: Hinted) -> None:
    hinted.use(0, 1, 2)
    hinted.use(1, 1)
    hinted.use(0, 2, 3)
    assert hinted.residency.layer_hits.tolist() == [1, 0]
    assert hinted.residency.layer_misses.tolist() == [3, 1]


# --- any events, beside a twin


@dataclass
class Twin:
    """Counts each bundle by itself. Which slots are given is told by the instructions."""

    n_layers: int
    n_slots: int
    bundle_in: dict[int, Bundle] = field(default_factory=dict)
    loading: set[Bundle] = field(default_factory=set)
    unasked: set[Bundle] = field(default_factory=set)
    """Hinted, here or on their way, and nobody has asked for them yet."""
    waiting: deque[tuple[int, list[Bundle]]] = field(default_factory=deque)
    leased: dict[int, list[Bundle]] = field(default_factory=dict)
    hinted: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    hits: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hits, self.misses = [0] * self.n_layers, [0] * self.n_layers

    def place(self, load: Load) -> None:
        for slot in load.slots.tolist():
            self.leave(slot)
        for id_, slot in zip(load.ids.tolist(), load.slots.tolist(), strict=True):
            bundle = (load.layer, id_)
            self.bundle_in[slot] = bundle
            self.loading.add(bundle)
            if load.is_hint:
                self.hinted += 1
                self.unasked.add(bundle)

    def leave(self, slot: int) -> None:
        bundle = self.bundle_in.pop(slot, None)
        if bundle in self.unasked:
            self.unasked.remove(bundle)
            self.wasted += 1
        self.loading.discard(bundle)  # type: ignore[arg-type]

    def can_grant(self, bundles: list[Bundle]) -> bool:
        """There are slots for what is not here: free ones, and those of bundles that may go."""
        here = set(self.bundle_in.values())
        may_go = here - self.loading - set(bundles) - {each for held in self.leased.values() for each in held}
        return len(set(bundles) - here) <= self.n_slots - len(here) + len(may_go)

    def ask(self, bundle: Bundle) -> None:
        is_here = bundle in self.bundle_in.values()
        self.hits[bundle[0]] += is_here
        self.misses[bundle[0]] += not is_here
        if bundle in self.unasked:
            self.unasked.remove(bundle)
            self.late += bundle in self.loading
            self.useful += bundle not in self.loading


class Pair:
    """Gives events to a residency and tells the twin what came of them."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int, eviction: str) -> None:
        self.residency = Residency(n_layers, ffn_dim, n_slots, EVICTIONS[eviction](n_layers, ffn_dim, n_slots))
        self.twin = Twin(n_layers, n_slots)
        self.fetches: set[int] = set()
        self._n_fetches = 0

    def acquire(self, layer: int, ids: list[int]) -> None:
        self._n_fetches += 1
        self.fetches.add(self._n_fetches)
        self.twin.waiting.append((self._n_fetches, [(layer, id_) for id_ in ids]))
        self._grants(self.residency.handle(Acquire(self._n_fetches, layer, neurons(*ids))))

    def hint(self, layer: int, ids: list[int]) -> None:
        for load in self.residency.handle(Hint(layer, neurons(*ids))):
            assert isinstance(load, Load)
            self.twin.place(load)

    def release(self, fetch: int) -> None:
        self.fetches.discard(fetch)
        self.twin.waiting = deque(each for each in self.twin.waiting if each[0] != fetch)
        self.twin.leased.pop(fetch, None)
        self._grants(self.residency.handle(Release(fetch)))

    def load_ends(self, slots: list[int]) -> None:
        self.twin.loading -= {self.twin.bundle_in[slot] for slot in slots}
        self._grants(self.residency.handle(Loaded(np.array(slots, np.int64))))

    def load_fails(self, slots: list[int]) -> None:
        for slot in slots:
            self.twin.leave(slot)
        self._grants(self.residency.handle(Failed(np.array(slots, np.int64), DiskError("a test's own"))))

    def _grants(self, instructions: list[Instruction]) -> None:
        """Fetches get their slots one after the other; each may load, and evict for that."""
        for refused in (each for each in instructions if isinstance(each, Refuse)):
            del self.twin.leased[refused.fetch]
        loads = deque(each for each in instructions if isinstance(each, Load))
        while self.twin.waiting and self.twin.can_grant(self.twin.waiting[0][1]):
            fetch, bundles = self.twin.waiting.popleft()
            self.twin.leased[fetch] = bundles
            here = set(self.twin.bundle_in.values())
            for bundle in bundles:
                self.twin.ask(bundle)
            if not here.issuperset(bundles):
                self.twin.place(loads.popleft())
        assert not loads

    @property
    def loading_slots(self) -> list[int]:
        return [slot for slot, bundle in self.twin.bundle_in.items() if bundle in self.twin.loading]

    def check(self) -> None:
        counts, twin = self.residency.counts, self.twin
        assert (counts.hinted, counts.hints_useful) == (twin.hinted, twin.useful)
        assert (counts.hints_late, counts.hints_wasted) == (twin.late, twin.wasted)
        assert counts.hints_useful + counts.hints_late + counts.hints_wasted == counts.hinted - len(twin.unasked)
        assert self.residency.layer_hits.tolist() == twin.hits
        assert self.residency.layer_misses.tolist() == twin.misses
        assert (counts.hits, counts.misses) == (sum(twin.hits), sum(twin.misses))


def any_events(pair: Pair, n_layers: int, ffn_dim: int, n_slots: int, n: int, rng: np.random.Generator) -> None:
    for _ in range(n):
        layer = int(rng.integers(n_layers))
        ids = np.flatnonzero(rng.random(ffn_dim) < rng.random()).tolist()
        loading = [slot for slot in pair.loading_slots if rng.random() < 0.6]
        match int(rng.integers(10)):
            case 0 | 1:
                pair.acquire(layer, ids[:n_slots])
            case 2 | 3:
                pair.hint(layer, ids)
            case 4 | 5 | 6 if pair.fetches:
                pair.release(int(rng.choice(sorted(pair.fetches))))
            case 7 | 8 if loading:
                pair.load_ends(loading)
            case 9 if loading:
                pair.load_fails(loading[:2])
        pair.check()


@given(
    n_layers=st.integers(1, 3),
    ffn_dim=st.integers(2, 16),
    n_slots=st.integers(1, 12),
    eviction=st.sampled_from(sorted(EVICTIONS)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None, database=None)
def test_counts_under_any_events_are_those_of_the_twin(
    n_layers: int, ffn_dim: int, n_slots: int, eviction: str, seed: int
) -> None:
    pair = Pair(n_layers, ffn_dim, n_slots, eviction)
    any_events(pair, n_layers, ffn_dim, n_slots, 120, np.random.default_rng(seed))


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_long_history_has_hints_of_every_outcome(rng: np.random.Generator, eviction: str) -> None:
    pair = Pair(3, 24, 16, eviction)
    any_events(pair, 3, 24, 16, 3000, rng)
    assert min(pair.twin.useful, pair.twin.late, pair.twin.wasted) > 0
