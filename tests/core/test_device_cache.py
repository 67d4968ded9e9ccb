"""Device slots against a slow twin, their invariants after every call, and the plan of a layer step."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.core.device_cache import WeightCache
from sparseflow.errors import BadRequest
from sparseflow.orchestration.transfer_coordinator import NeuronTransferPlan, plan_transfer

N_NEURONS = 12


def ids(*neurons: int) -> np.ndarray:
    return np.array(neurons, np.int64)


class SlowCache:
    """What `WeightCache` promises, slot by slot: each is None or [neuron, time]."""

    def __init__(self, capacity: int, lru: bool) -> None:
        self.slots: list[list[int] | None] = [None] * capacity
        self.lru = lru
        self.now = 0

    def slot_of(self, neuron: int) -> int | None:
        return next((slot for slot, held in enumerate(self.slots) if held and held[0] == neuron), None)

    def access(self, neuron: int) -> int | None:
        self.now += 1
        slot = self.slot_of(neuron)
        if slot is not None and self.lru:
            self.slots[slot][1] = self.now
        return slot

    def place(self, neurons: Sequence[int]) -> tuple[list[int], list[int]]:
        """(slot of each neuron, neurons evicted): empty slots first, then the oldest; the lowest slot of equals."""
        self.now += 1
        evicted = []
        for neuron in neurons:
            if self.lru and (slot := self.slot_of(neuron)) is not None:
                self.slots[slot][1] = self.now
        for neuron in neurons:
            if self.slot_of(neuron) is not None:
                continue
            free = [slot for slot, held in enumerate(self.slots) if held is None]
            old = sorted((held[1], slot) for slot, held in enumerate(self.slots) if held and held[0] not in neurons)
            slot = free[0] if free else old[0][1]
            if not free:
                evicted.append(self.slots[slot][0])
            self.slots[slot] = [neuron, self.now]
        return [self.slot_of(neuron) for neuron in neurons], evicted


def check_invariants(cache: WeightCache) -> None:
    """Slots are within capacity, no two neurons share one, and every view of the table says the same."""
    slots = cache.slots(np.arange(N_NEURONS))
    taken = slots[slots >= 0]
    assert len(set(taken.tolist())) == len(taken)
    assert (taken < cache.capacity).all()
    assert len(cache) == len(taken) <= cache.capacity
    assert cache.get_cached_indices().tolist() == np.flatnonzero(slots >= 0).tolist()
    assert cache.get_missing_indices(torch.arange(N_NEURONS)).tolist() == np.flatnonzero(slots < 0).tolist()


neuron = st.integers(0, N_NEURONS - 1)
calls = st.lists(
    st.tuples(st.sampled_from(["access", "insert"]), neuron)
    | st.tuples(st.sampled_from(["place", "bulk_insert"]), st.lists(neuron, max_size=6, unique=True)),
    max_size=40,
)


@settings(max_examples=400, deadline=None, database=None)
@given(capacity=st.integers(1, 8), lru=st.booleans(), calls=calls)
def test_any_sequence_of_calls_gives_what_the_slow_twin_gives(
    capacity: int, lru: bool, calls: list[tuple[str, int | list[int]]]
) -> None:
    cache, twin = WeightCache(capacity, "cpu", lru=lru), SlowCache(capacity, lru)
    for name, argument in calls:
        if isinstance(argument, list) and len(argument) > capacity:
            before = cache.slots(np.arange(N_NEURONS)).tolist()
            with pytest.raises(BadRequest):
                getattr(cache, name)(np.array(argument))
            assert cache.slots(np.arange(N_NEURONS)).tolist() == before
        elif name == "access":
            assert cache.access(argument) == twin.access(argument)
        elif name == "insert":
            (slot,), evicted = twin.place([argument])
            assert cache.insert(argument) == (slot, evicted[0] if evicted else None)
        elif name == "place":
            placement = cache.place(ids(*argument))
            slots, evicted = twin.place(argument)
            assert placement.slots.tolist() == slots
            assert placement.evicted.tolist() == evicted
        else:
            in_order = sorted(argument)
            assert cache.bulk_insert(argument) == dict(zip(in_order, twin.place(in_order)[0], strict=True))
        check_invariants(cache)


@settings(max_examples=200, deadline=None, database=None)
@given(capacity=st.integers(1, 8), lru=st.booleans(), steps=st.lists(st.sets(neuron, max_size=8), max_size=20))
def test_whatever_the_order_of_eviction_no_neuron_asked_for_is_a_victim(
    capacity: int, lru: bool, steps: list[set[int]]
) -> None:
    cache = WeightCache(capacity, "cpu", lru=lru)
    held: set[int] = set()
    for step in steps:
        asked = ids(*sorted(step)[:capacity])
        placement = cache.place(asked)
        evicted = set(placement.evicted.tolist())
        assert not evicted & set(asked.tolist())
        assert evicted <= held
        assert len(evicted) == max(0, len(held | set(asked.tolist())) - capacity)
        held = (held | set(asked.tolist())) - evicted
        assert set(cache.get_cached_indices().tolist()) == held
        assert cache.slots(asked).tolist() == placement.slots.tolist()
        check_invariants(cache)


# --- order of eviction


def test_least_recently_used_neuron_goes_first() -> None:
    cache = WeightCache(2, "cpu")
    cache.insert(1)
    cache.insert(2)
    cache.access(1)
    assert cache.insert(3) == (1, 2)


def test_without_lru_the_oldest_goes_first_however_recently_used() -> None:
    cache = WeightCache(2, "cpu", lru=False)
    cache.insert(1)
    cache.insert(2)
    cache.access(1)
    cache.insert(1)
    assert cache.insert(3) == (0, 1)


@pytest.mark.parametrize("lru", [True, False])
def test_of_neurons_that_came_together_the_lower_slot_goes_first(lru: bool) -> None:
    cache = WeightCache(3, "cpu", lru=lru)
    cache.place(ids(7, 5, 6))
    assert [cache.insert(n)[1] for n in (1, 2, 3)] == [7, 5, 6]


def test_found_and_new_neurons_of_one_call_are_equally_recent() -> None:
    """Neuron 3 (slot 2) is found and 4 (slot 0) is new in one call: the lower slot goes first."""
    cache = WeightCache(3, "cpu")
    cache.place(ids(1, 2, 3))
    cache.place(ids(3, 4))
    assert cache.insert(5) == (1, 2)
    assert cache.insert(6) == (0, 4)


def test_looking_up_slots_is_no_use() -> None:
    cache = WeightCache(2, "cpu")
    cache.insert(1)
    cache.insert(2)
    cache.slots(ids(1))
    cache.get_missing_indices(torch.tensor([1]))
    cache.get_cached_indices()
    assert cache.insert(3) == (0, 1)


def test_touch_of_several_neurons_keeps_them() -> None:
    cache = WeightCache(3, "cpu")
    cache.place(ids(1, 2, 3))
    assert cache.touch(ids(1, 9, 2)).tolist() == [0, -1, 1]
    assert cache.insert(4) == (2, 3)


# --- one call at a time


def test_access_of_an_absent_neuron_is_none_and_places_nothing() -> None:
    cache = WeightCache(2, "cpu")
    assert cache.access(5) is None
    assert len(cache) == 0


def test_insert_returns_slot_and_victim() -> None:
    cache = WeightCache(1, "cpu")
    assert cache.insert(4) == (0, None)
    assert cache.insert(4) == (0, None)
    assert cache.insert(9) == (0, 4)
    assert cache.access(9) == 0


def test_bulk_insert_maps_each_neuron_to_its_slot() -> None:
    cache = WeightCache(4, "cpu")
    cache.insert(8)
    assert cache.bulk_insert([9, 8, 3, 9]) == {3: 1, 8: 0, 9: 2}
    assert cache.bulk_insert([]) == {}


def test_cached_indices_are_ascending_int32_on_the_device() -> None:
    cache = WeightCache(4, "cpu")
    cache.place(ids(9, 2, 5))
    cached = cache.get_cached_indices()
    assert cached.dtype == torch.int32
    assert cached.device.type == "cpu"
    assert cached.tolist() == [2, 5, 9]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_missing_indices_are_int32_on_the_device_in_the_order_given(dtype: torch.dtype) -> None:
    cache = WeightCache(4, "cpu")
    cache.place(ids(9, 2, 5))
    missing = cache.get_missing_indices(torch.tensor([7, 5, 1, 9, 3], dtype=dtype))
    assert missing.dtype == torch.int32
    assert missing.device.type == "cpu"
    assert missing.tolist() == [7, 1, 3]


def test_empty_cache_has_no_indices_and_misses_all() -> None:
    cache = WeightCache(4, "cpu")
    assert cache.get_cached_indices().tolist() == []
    assert cache.get_missing_indices(torch.tensor([3, 1])).tolist() == [3, 1]
    assert cache.get_missing_indices(torch.tensor([], dtype=torch.int32)).tolist() == []


def test_device_is_a_gpu_unless_said_otherwise() -> None:
    assert WeightCache(1).device == "cuda"


@pytest.mark.parametrize("capacity", [0, -3])
def test_cache_without_slots_is_refused_by_value(capacity: int) -> None:
    with pytest.raises(BadRequest, match=f"capacity={capacity}"):
        WeightCache(capacity, "cpu")


def test_more_neurons_than_slots_are_refused_and_nothing_changes() -> None:
    cache = WeightCache(2, "cpu")
    cache.place(ids(1, 2))
    with pytest.raises(BadRequest, match="3 neurons for 2 slots"):
        cache.place(ids(2, 3, 4))
    assert cache.insert(5) == (0, 1)  # neuron 2 was not touched either


@pytest.mark.parametrize("name", ["access", "insert"])
def test_negative_neuron_is_refused(name: str) -> None:
    cache = WeightCache(2, "cpu")
    with pytest.raises(BadRequest, match="neuron -1"):
        getattr(cache, name)(-1)
    assert len(cache) == 0


# --- the plan of a step


def test_plan_loads_what_is_missing_where_the_victims_were() -> None:
    cache = WeightCache(3, "cpu")
    cache.place(ids(10, 11, 12))
    plan = plan_transfer(cache, ids(11, 20, 21))
    assert plan.neurons_to_load.tolist() == [20, 21]
    assert plan.neurons_to_evict.tolist() == [10, 12]
    assert plan.neurons_already_cached.tolist() == [11]
    assert plan.transfer_positions.tolist() == [0, 2]
    assert cache.slots(ids(11, 20, 21)).tolist() == [1, 0, 2]
    assert plan.get_total_transfer_count() == 2
    assert not plan.is_empty()


def test_plan_of_cached_neurons_is_empty() -> None:
    cache = WeightCache(3, "cpu")
    cache.place(ids(1, 2))
    plan = plan_transfer(cache, ids(1, 2))
    assert plan.is_empty()
    assert plan.get_total_transfer_count() == 0
    assert plan.neurons_already_cached.tolist() == [1, 2]
    assert len(plan.neurons_to_evict) == len(plan.transfer_positions) == 0


def test_plan_of_no_neurons_is_empty() -> None:
    plan = plan_transfer(WeightCache(3, "cpu"), ids())
    assert plan.is_empty()
    assert len(plan.neurons_already_cached) == 0


def test_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadRequest, match="3 neurons for 2 slots"):
        plan_transfer(WeightCache(2, "cpu"), ids(1, 2, 3))


@settings(max_examples=200, deadline=None, database=None)
@given(capacity=st.integers(1, 8), steps=st.lists(st.sets(neuron, max_size=8), max_size=15))
def test_carrying_out_the_plans_keeps_each_neurons_bundle_in_its_slot(capacity: int, steps: list[set[int]]) -> None:
    """A device that copies what the plans say, and nothing else, always holds the bundles asked for."""
    cache = WeightCache(capacity, "cpu")
    device = [-1] * capacity  # which neuron's bundle was copied to each slot last
    for step in steps:
        asked = ids(*sorted(step)[:capacity])
        held_before = set(device) - {-1}
        plan = plan_transfer(cache, asked)
        assert isinstance(plan, NeuronTransferPlan)
        for loaded, slot in zip(plan.neurons_to_load.tolist(), plan.transfer_positions.tolist(), strict=True):
            device[slot] = loaded
        assert [device[slot] for slot in cache.slots(asked).tolist()] == asked.tolist()
        assert set(plan.neurons_already_cached.tolist()) == held_before & set(asked.tolist())
        assert set(device) - {-1} == (held_before | set(asked.tolist())) - set(plan.neurons_to_evict.tolist())
