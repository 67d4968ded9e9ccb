"""Who is where: any events in any order beside a model of it, and by name what follows from each."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from residency_model import Bundle, Checker
from shards import neurons

from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.residency import (
    Acquire,
    Failed,
    Hint,
    Instruction,
    Load,
    Loaded,
    Ready,
    Refuse,
    Release,
    Residency,
)
from sparseflow.errors import DiskError

# --- any events in any order


class ResidencyMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.over: list[int] = []

    @initialize(
        n_layers=st.integers(2, 4),
        ffn_dim=st.integers(4, 24),
        n_slots=st.integers(1, 20),
        eviction=st.sampled_from(sorted(EVICTIONS)),
    )
    def start(self, n_layers: int, ffn_dim: int, n_slots: int, eviction: str) -> None:
        self.n_layers, self.ffn_dim = n_layers, ffn_dim
        self.checker = Checker(n_layers, ffn_dim, n_slots, eviction)
        self.model = self.checker.model

    def draw_ids(self, data: st.DataObject, most: int) -> list[int]:
        ids = st.sets(st.integers(0, self.ffn_dim - 1), max_size=min(most, self.ffn_dim))
        return sorted(data.draw(ids, label="ids"))

    def draw_layer(self, data: st.DataObject) -> int:
        return int(data.draw(st.integers(0, self.n_layers - 1), label="layer"))

    def draw_loading(self, data: st.DataObject) -> list[Bundle]:
        """Some that are on their way, of any loads: reads end in any order, and several at once."""
        ended = st.sets(st.sampled_from(sorted(self.model.loading)), min_size=1)
        return sorted(data.draw(ended, label="ended"))

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        layer = self.draw_layer(data)
        keep = data.draw(st.integers(0, 2), label="keep") > 0
        number = self.checker.acquire(layer, self.draw_ids(data, self.model.n_slots), keep)
        assert number not in self.over

    @rule(data=st.data())
    def hint(self, data: st.DataObject) -> None:
        layer = self.draw_layer(data)
        self.checker.hint(layer, self.draw_ids(data, self.ffn_dim))

    @precondition(lambda self: self.checker.n_fetches)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Any fetch there ever was: waiting, loading, ready, refused, or released before."""
        number = data.draw(st.integers(1, self.checker.n_fetches), label="fetch")
        self.checker.release(number)

    @precondition(lambda self: self.model.loading)
    @rule(data=st.data())
    def load_ends(self, data: st.DataObject) -> None:
        self.checker.load_ends(self.draw_loading(data))

    @precondition(lambda self: self.model.loading)
    @rule(data=st.data())
    def load_fails(self, data: st.DataObject) -> None:
        self.checker.load_fails(self.draw_loading(data))

    @invariant()
    def agrees(self) -> None:
        self.checker.check()
        self.checker.check_resident(self.n_layers, self.ffn_dim)

    def teardown(self) -> None:
        if hasattr(self, "checker"):
            self.checker.wind_down()


ResidencyMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
TestAnyEvents = ResidencyMachine.TestCase


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_long_random_history_agrees_with_the_model(rng: np.random.Generator, eviction: str) -> None:
    """Longer than hypothesis goes, so that groups of the eviction go stale and are dropped many times."""
    n_layers, ffn_dim, n_slots = 3, 24, int(rng.integers(4, 21))
    checker = Checker(n_layers, ffn_dim, n_slots, eviction)
    for _ in range(3000):
        layer = int(rng.integers(n_layers))
        ids = np.flatnonzero(rng.random(ffn_dim) < rng.random()).tolist()
        loading = [bundle for bundle in sorted(checker.model.loading) if rng.random() < 0.6]
        match int(rng.integers(10)):
            case 0 | 1 | 2:
                checker.acquire(layer, ids[:n_slots], keep=bool(rng.random() < 0.7))
            case 3:
                checker.hint(layer, ids)
            case 4 | 5 | 6 if checker.model.fetches:
                checker.release(int(rng.choice(list(checker.model.fetches))))
            case 7 | 8 if loading:
                checker.load_ends(loading)
            case 9 if loading:
                checker.load_fails(loading[:2])
        checker.check()
    assert checker.model.evictions
    checker.wind_down()


# --- by name


@pytest.fixture(params=EVICTIONS)
def residency(request: pytest.FixtureRequest) -> Residency:
    """Two layers of 8 neurons, 4 slots."""
    return Residency(2, 8, 4, EVICTIONS[request.param](2, 8, 4))


def slots_of(instructions: list[Instruction]) -> Any:
    (load,) = (i for i in instructions if isinstance(i, Load))
    return load.slots


def kinds(instructions: list[Instruction]) -> list[str]:
    return [type(i).__name__ for i in instructions]


def fetched(residency: Residency, fetch: int, layer: int, ids: np.ndarray) -> np.ndarray:
    """A fetch that is ready, as far as it was not refused slots."""
    instructions = residency.handle(Acquire(fetch, layer, ids))
    slots = slots_of(instructions)
    assert kinds(residency.handle(Loaded(slots))) == ["Ready"]
    return np.asarray(slots)


def test_absent_bundles_are_loaded_and_then_ready_in_the_order_of_their_ids(residency: Residency) -> None:
    (load,) = residency.handle(Acquire(1, 1, neurons(2, 5, 7)))
    assert isinstance(load, Load)
    assert (load.layer, load.ids.tolist(), load.is_hint) == (1, [2, 5, 7], False)
    assert residency.handle(Loaded(load.slots[1:])) == []
    (ready,) = residency.handle(Loaded(load.slots[:1]))
    assert isinstance(ready, Ready)
    assert ready.slots.tolist() == load.slots.tolist()


def test_resident_bundles_are_ready_at_once(residency: Residency) -> None:
    slots = fetched(residency, 1, 0, neurons(1, 2, 3))
    (ready,) = residency.handle(Acquire(2, 0, neurons(1, 3)))
    assert isinstance(ready, Ready)
    assert ready.slots.tolist() == [slots[0], slots[2]]


def test_fetch_of_nothing_is_ready_at_once(residency: Residency) -> None:
    assert kinds(residency.handle(Acquire(1, 0, neurons()))) == ["Ready"]


def test_fetch_that_exceeds_what_is_free_and_may_go_waits_and_holds_nothing(residency: Residency) -> None:
    fetched(residency, 1, 0, neurons(0, 1, 2))
    assert residency.handle(Acquire(2, 1, neurons(0, 1))) == []
    assert residency.n_leased == 3
    assert kinds(residency.handle(Release(1))) == ["Load"]


def test_bundles_a_fetch_finds_are_not_evicted_for_those_it_lacks(residency: Residency) -> None:
    slots = fetched(residency, 1, 0, neurons(0, 1, 2, 3))
    residency.handle(Release(1))
    (load,) = residency.handle(Acquire(2, 0, neurons(0, 4, 5, 6)))
    assert isinstance(load, Load)
    assert slots[0] not in load.slots
    (ready,) = residency.handle(Loaded(load.slots))
    assert isinstance(ready, Ready)
    assert ready.slots[0] == slots[0]


def test_fetch_that_would_fit_does_not_overtake_one_that_waits(residency: Residency) -> None:
    fetched(residency, 1, 0, neurons(0, 1, 2))
    assert residency.handle(Acquire(2, 1, neurons(0, 1))) == []
    assert residency.handle(Acquire(3, 0, neurons(2))) == [], "though it is there"
    assert residency.handle(Acquire(4, 1, neurons(7))) == [], "though a slot is free"
    loads = residency.handle(Release(1))
    first, *_, last = (i.ids.tolist() for i in loads if isinstance(i, Load))
    assert (first, last) == ([0, 1], [7])


def test_released_fetch_that_waits_lets_those_behind_it_pass(residency: Residency) -> None:
    fetched(residency, 1, 0, neurons(0, 1, 2))
    assert residency.handle(Acquire(2, 1, neurons(0, 1))) == []
    assert residency.handle(Acquire(3, 1, neurons(7))) == []
    (load,) = residency.handle(Release(2))
    assert isinstance(load, Load)
    assert load.ids.tolist() == [7]


def test_slots_of_a_released_fetch_are_not_reused_before_their_loads_have_ended(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(0, 1, 2, 3))))
    assert residency.handle(Release(1)) == []
    assert residency.handle(Acquire(2, 1, neurons(5))) == []
    (load,) = residency.handle(Loaded(slots[:1]))
    assert isinstance(load, Load)
    assert load.slots.tolist() == slots[:1].tolist()


def test_fetch_of_a_bundle_that_a_hint_brings_waits_for_it_and_loads_it_no_second_time(residency: Residency) -> None:
    hinted = slots_of(residency.handle(Hint(0, neurons(3, 4))))
    assert residency.handle(Acquire(1, 0, neurons(4))) == []
    (ready,) = residency.handle(Loaded(hinted))
    assert isinstance(ready, Ready)
    assert ready.slots.tolist() == [hinted[1]]
    assert (residency.counts.hits, residency.counts.misses) == (1, 0)


def test_two_fetches_of_one_bundle_share_a_load_and_both_hold_it(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(0, 1, 2, 3))))
    assert residency.handle(Acquire(2, 0, neurons(3))) == []
    assert kinds(residency.handle(Loaded(slots))) == ["Ready", "Ready"]
    residency.handle(Release(1))
    (load,) = residency.handle(Acquire(3, 1, neurons(0, 1, 2)))
    assert isinstance(load, Load)
    assert slots[3] not in load.slots


def test_hint_takes_no_more_than_free_slots_and_what_may_go(residency: Residency) -> None:
    held = fetched(residency, 1, 0, neurons(0, 1))
    fetched(residency, 2, 0, neurons(2))
    residency.handle(Release(2))
    (load,) = residency.handle(Hint(1, neurons(0, 1, 2, 3, 4)))
    assert isinstance(load, Load)
    assert load.is_hint
    assert load.ids.tolist() == [0, 1]
    assert not set(load.slots.tolist()) & set(held.tolist())


def test_hint_does_nothing_while_a_fetch_waits_for_slots(residency: Residency) -> None:
    fetched(residency, 1, 0, neurons(0, 1, 2))
    assert residency.handle(Acquire(2, 1, neurons(0, 1))) == []
    assert residency.handle(Hint(1, neurons(5))) == []


def test_failure_refuses_exactly_the_fetches_that_lease_a_failed_slot(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(0, 1))))
    other = slots_of(residency.handle(Acquire(2, 1, neurons(6))))
    assert residency.handle(Acquire(3, 0, neurons(1))) == []
    assert residency.handle(Acquire(4, 0, neurons(0))) == []
    error = DiskError("the disk")
    refusals = residency.handle(Failed(slots[1:], error))
    assert [(i.fetch, i.error) for i in refusals if isinstance(i, Refuse)] == [(1, error), (3, error)]
    assert kinds(refusals) == ["Refuse", "Refuse"]
    (ready,) = residency.handle(Loaded(slots[:1]))
    assert isinstance(ready, Ready)
    assert ready.fetch == 4
    assert kinds(residency.handle(Loaded(other))) == ["Ready"]


def test_bundle_that_failed_is_loaded_again_when_it_is_asked_for_again(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(0))))
    residency.handle(Failed(slots, DiskError("the disk")))
    assert not residency.resident(0, neurons(0))[0]
    assert kinds(residency.handle(Acquire(2, 0, neurons(0)))) == ["Load"]


def test_failure_makes_room_for_a_fetch_that_waits(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(0, 1, 2, 3))))
    assert residency.handle(Acquire(2, 1, neurons(0, 1, 2, 3))) == []
    residency.handle(Loaded(slots[1:]))
    assert kinds(residency.handle(Failed(slots[:1], DiskError("the disk")))) == ["Refuse", "Load"]


def looked_at(residency: Residency, fetch: int, layer: int, ids: np.ndarray) -> None:
    """A fetch that keeps nothing, from its beginning to its end."""
    for load in residency.handle(Acquire(fetch, layer, ids, keep=False)):
        if isinstance(load, Load):
            residency.handle(Loaded(load.slots))
    residency.handle(Release(fetch))


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_fetch_that_keeps_nothing_changes_neither_what_is_there_nor_its_order_nor_any_count(
    rng: np.random.Generator, eviction: str
) -> None:
    """Beside a twin that is spared all looks: where these have room, nothing that follows tells the two apart."""
    n_layers, ffn_dim, n_slots = 3, 40, 40
    policies = [EVICTIONS[eviction](n_layers, ffn_dim, n_slots) for _ in range(2)]
    ours, twin = (Residency(n_layers, ffn_dim, n_slots, policy) for policy in policies)
    n_evicted = 0
    for fetch in range(1, 400):
        layer = int(rng.integers(n_layers))
        ids = np.flatnonzero(rng.random(ffn_dim) < 0.2).astype(np.uint32)
        n_free = n_slots - ours.n_resident
        skipped = np.flatnonzero(~ours.resident(layer, np.arange(ffn_dim, dtype=np.uint32)))
        there = np.flatnonzero(ours.resident(layer, np.arange(ffn_dim, dtype=np.uint32)))
        wanted = np.union1d(skipped[: rng.integers(n_free + 1)], there[: rng.integers(len(there) + 1)])
        looked_at(ours, -fetch, layer, wanted.astype(np.uint32))
        for residency in (ours, twin):
            for load in residency.handle(Acquire(fetch, layer, ids)):
                if isinstance(load, Load):
                    residency.handle(Loaded(load.slots))
            residency.handle(Release(fetch))
        assert ours.counts == twin.counts
        assert (ours.layer_hits == twin.layer_hits).all()
        for each in range(n_layers):
            everything = np.arange(ffn_dim, dtype=np.uint32)
            assert (ours.resident(each, everything) == twin.resident(each, everything)).all()
        n_evicted = ours.counts.evictions
    assert n_evicted > 100


def test_fetch_that_keeps_nothing_displaces_what_would_have_gone_next(residency: Residency) -> None:
    for fetch, ids in enumerate(([0, 1], [2, 3]), 1):
        fetched(residency, fetch, 0, neurons(*ids))
        residency.handle(Release(fetch))
    looked_at(residency, 3, 1, neurons(6))
    assert residency.resident(0, neurons(0, 1, 2, 3)).tolist() == [False, True, True, True]
    assert residency.n_resident == 3
    fetched(residency, 4, 1, neurons(5))
    assert residency.resident(0, neurons(1, 2, 3)).all(), "there is room now"


def test_bundle_stays_if_another_fetch_has_leased_it_meanwhile(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(2, 3), keep=False)))
    assert residency.handle(Acquire(2, 0, neurons(3))) == []
    residency.handle(Loaded(slots))
    residency.handle(Release(1))
    assert residency.resident(0, neurons(2, 3)).tolist() == [False, True]
    residency.handle(Release(2))
    assert residency.resident(0, neurons(3)).all()
    assert (residency.counts.hits, residency.counts.misses) == (1, 0)


def test_bundle_stays_if_another_fetch_waits_for_it(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(0, 1), keep=False)))
    assert residency.handle(Acquire(2, 0, neurons(1, 2, 3, 4))) == []
    residency.handle(Loaded(slots))
    (load,) = residency.handle(Release(1))
    assert isinstance(load, Load)
    assert load.ids.tolist() == [2, 3, 4]


def test_bundle_is_gone_with_the_last_of_several_looks(residency: Residency) -> None:
    residency.handle(Loaded(slots_of(residency.handle(Acquire(1, 0, neurons(2), keep=False)))))
    assert kinds(residency.handle(Acquire(2, 0, neurons(2), keep=False))) == ["Ready"]
    residency.handle(Release(1))
    assert residency.resident(0, neurons(2)).all()
    residency.handle(Release(2))
    assert residency.n_resident == 0


def test_bundle_that_comes_after_its_look_was_given_up_is_gone(residency: Residency) -> None:
    slots = slots_of(residency.handle(Acquire(1, 0, neurons(2), keep=False)))
    residency.handle(Release(1))
    assert residency.n_resident == 1
    residency.handle(Loaded(slots))
    assert residency.n_resident == 0


def test_look_at_a_hinted_bundle_says_nothing_about_the_hint(residency: Residency) -> None:
    residency.handle(Loaded(slots_of(residency.handle(Hint(0, neurons(3, 4))))))
    looked_at(residency, 1, 0, neurons(3, 4))
    assert residency.counts.hints_useful == 0
    assert kinds(residency.handle(Acquire(2, 0, neurons(3)))) == ["Ready"]
    assert residency.counts.hints_useful == 1


def test_failed_hint_refuses_nobody(residency: Residency) -> None:
    slots = slots_of(residency.handle(Hint(0, neurons(0, 1))))
    assert residency.handle(Failed(slots, DiskError("the disk"))) == []
    assert residency.n_resident == 0


def test_release_of_what_is_over_or_was_never_there_does_nothing(residency: Residency) -> None:
    fetched(residency, 1, 0, neurons(0))
    for fetch in (1, 1, 77):
        assert residency.handle(Release(fetch)) == []
    assert residency.n_leased == 0


def test_what_is_no_event_is_refused(residency: Residency) -> None:
    with pytest.raises(TypeError, match="unknown event"):
        residency.handle("acquire")  # type: ignore[arg-type]
