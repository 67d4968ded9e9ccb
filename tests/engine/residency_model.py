"""What `residency` promises, by plain dictionaries, one bundle at a time; and who compares both, event by event."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from shards import neurons

from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.residency import (
    Acquire,
    Event,
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

Bundle = tuple[int, int]  # layer, id


@dataclass
class Fetch:
    """One that was asked for and is not over."""

    bundles: list[Bundle]
    keep: bool = True
    is_granted: bool = False
    """It leases its bundles."""
    is_ready: bool = False


@dataclass
class Model:
    """What the docstring of `residency` promises. Slots are told by the instructions; all the rest is counted here."""

    n_slots: int
    slot_of: dict[Bundle, int] = field(default_factory=dict)
    loading: set[Bundle] = field(default_factory=set)
    passing: set[Bundle] = field(default_factory=set)
    """Brought by fetches that keep nothing, and wanted by no other so far."""
    fetches: dict[int, Fetch] = field(default_factory=dict)
    waiting: deque[int] = field(default_factory=deque)
    answers: dict[int, int] = field(default_factory=dict)
    """fetch -> number of Ready and Refuse."""
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    hinted: int = 0

    def leased(self) -> set[Bundle]:
        return {bundle for fetch in self.fetches.values() if fetch.is_granted for bundle in fetch.bundles}

    def may_go(self) -> set[Bundle]:
        return set(self.slot_of) - self.leased() - self.loading

    def room(self) -> int:
        """Slots that bundles which are not here could have."""
        return self.n_slots - len(self.slot_of) + len(self.may_go())

    def can_grant(self, fetch: Fetch) -> bool:
        here = [bundle for bundle in fetch.bundles if bundle in self.slot_of]
        would_be_leased = self.may_go() - set(here)
        return len(fetch.bundles) - len(here) <= self.n_slots - len(self.slot_of) + len(would_be_leased)

    def let_pass(self) -> None:
        """Passing bundles are gone with their last lease, but for those that somebody waits for and will keep."""
        for bundle in self.passing & self.may_go():
            if not any(fetch.keep and bundle in fetch.bundles for fetch in self.fetches.values()):
                del self.slot_of[bundle]
            self.passing.remove(bundle)

    def is_done(self, fetch: Fetch) -> bool:
        return not any(bundle in self.loading for bundle in fetch.bundles)


class Checker:
    """Applies events to both and compares."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int, eviction: str) -> None:
        self.residency = Residency(n_layers, ffn_dim, n_slots, EVICTIONS[eviction](n_layers, ffn_dim, n_slots))
        self.model = Model(n_slots)
        self.n_fetches = 0
        self.filling: set[int] = set()
        """Slots of loads that have not ended."""
        self.leased: dict[int, set[int]] = {}
        """Slots by the fetches that lease them, as of the last event."""

    # events

    def acquire(self, layer: int, ids: list[int], keep: bool = True) -> int:
        self.n_fetches += 1
        self.model.fetches[self.n_fetches] = Fetch([(layer, id_) for id_ in ids], keep)
        self.model.waiting.append(self.n_fetches)
        rest = self._handle(Acquire(self.n_fetches, layer, neurons(*ids), keep))
        self._check_grants(rest)
        return self.n_fetches

    def hint(self, layer: int, ids: list[int]) -> None:
        model = self.model
        missing = [(layer, id_) for id_ in ids if (layer, id_) not in model.slot_of]
        expected = [] if model.waiting else missing[: model.room()]
        rest = self._handle(Hint(layer, neurons(*ids)))
        if expected:
            load = rest.popleft()
            assert isinstance(load, Load)
            assert load.is_hint
            self._check_load(load, expected)
            model.hinted += len(expected)
        assert not rest, "a hint only loads"

    def release(self, number: int) -> None:
        if number in self.model.waiting:
            self.model.waiting.remove(number)
        self.model.fetches.pop(number, None)
        self.model.let_pass()
        self._check_grants(self._handle(Release(number)))

    def load_ends(self, bundles: list[Bundle]) -> None:
        slots = np.array([self.model.slot_of[bundle] for bundle in bundles], np.int64)
        self.model.loading -= set(bundles)
        self.model.let_pass()
        rest = self._handle(Loaded(slots))
        expected = {n for n, fetch in self.model.fetches.items()
                    if fetch.is_granted and not fetch.is_ready and self.model.is_done(fetch)}  # fmt: skip
        for _ in expected.copy():
            ready = rest.popleft()
            assert isinstance(ready, Ready)
            expected.remove(ready.fetch)
            self._check_ready(ready)
        self._check_grants(rest)

    def load_fails(self, bundles: list[Bundle]) -> None:
        error = DiskError("a test's own")
        slots = np.array([self.model.slot_of[bundle] for bundle in bundles], np.int64)
        hurt = {n for n, fetch in self.model.fetches.items() if fetch.is_granted and set(fetch.bundles) & set(bundles)}
        rest = self._handle(Failed(slots, error))
        for _ in hurt.copy():
            refusal = rest.popleft()
            assert isinstance(refusal, Refuse)
            assert refusal.error is error
            hurt.remove(refusal.fetch)
            del self.model.fetches[refusal.fetch]
        for bundle in bundles:
            del self.model.slot_of[bundle]
        self.model.loading -= set(bundles)
        self.model.passing -= set(bundles)
        self.model.let_pass()
        self._check_grants(rest)

    # instructions

    def _handle(self, event: Event) -> deque[Instruction]:
        instructions = deque(self.residency.handle(event))
        self._check_slots(event, instructions)
        for instruction in instructions:
            if isinstance(instruction, Ready | Refuse):
                self.model.answers[instruction.fetch] = self.model.answers.get(instruction.fetch, 0) + 1
        return instructions

    def _check_slots(self, event: Event, instructions: Iterable[Instruction]) -> None:
        """A leased slot, and one that is being filled, is never given to another bundle."""
        match event:
            case Release():
                self.leased.pop(event.fetch, None)
            case Loaded():
                self.filling -= set(event.slots.tolist())
            case Failed():
                failed = set(event.slots.tolist())
                self.filling -= failed
                self.leased = {fetch: slots for fetch, slots in self.leased.items() if not slots & failed}
        held = self.filling.union(*self.leased.values())
        for load in instructions:
            if isinstance(load, Load):
                given = load.slots.tolist()
                assert held.isdisjoint(given), "a slot is given away that is leased, or being filled"
                held.update(given)
                self.filling.update(given)
        for fetch in self.model.fetches.keys() - self.leased.keys():
            if leased := self.residency.leased(fetch):
                self.leased[fetch] = set(leased[0].tolist())

    def _check_grants(self, rest: deque[Instruction]) -> None:
        """First come, first served; and whoever can be served is."""
        model = self.model
        while model.waiting and model.can_grant(fetch := model.fetches[model.waiting[0]]):
            number = model.waiting.popleft()
            missing = [bundle for bundle in fetch.bundles if bundle not in model.slot_of]
            fetch.is_granted = True  # from here on its bundles may not go, not even for its own
            if fetch.keep:
                model.hits += len(fetch.bundles) - len(missing)
                model.misses += len(missing)
                model.passing -= set(fetch.bundles)
            else:
                model.passing |= set(missing)
            if missing:
                load = rest.popleft()
                assert isinstance(load, Load)
                assert not load.is_hint
                self._check_load(load, missing)
            if model.is_done(fetch):
                ready = rest.popleft()
                assert isinstance(ready, Ready)
                assert ready.fetch == number
                self._check_ready(ready)
        assert not rest

    def _check_load(self, load: Load, expected: list[Bundle]) -> None:
        """It brings what is expected, into slots that are free or may go, and frees no more than it must."""
        model = self.model
        assert [(load.layer, id_) for id_ in load.ids.tolist()] == expected
        slots = load.slots.tolist()
        assert len(set(slots)) == len(slots) == len(expected)
        n_free = model.n_slots - len(model.slot_of)
        bundle_in = {slot: bundle for bundle, slot in model.slot_of.items()}
        gone = {bundle_in[slot] for slot in slots if slot in bundle_in}
        assert gone <= model.may_go()
        assert len(gone) == max(0, len(expected) - n_free)
        for bundle in gone:
            del model.slot_of[bundle]
        model.evictions += len(gone)
        model.slot_of |= dict(zip(expected, slots, strict=True))
        model.loading |= set(expected)

    def _check_ready(self, ready: Ready) -> None:
        fetch = self.model.fetches[ready.fetch]
        assert ready.slots.tolist() == [self.model.slot_of[bundle] for bundle in fetch.bundles]
        assert self.model.is_done(fetch)
        fetch.is_ready = True

    # at any time

    def check(self) -> None:
        model, residency = self.model, self.residency
        assert len(set(model.slot_of.values())) == len(model.slot_of) <= model.n_slots
        assert set(model.slot_of.values()) <= set(range(model.n_slots))
        assert residency.n_resident == len(model.slot_of)
        assert residency.n_leased == len(model.leased())
        assert not model.passing & model.may_go(), "what passes is leased, or on its way"
        counts = residency.counts
        assert (counts.hits, counts.misses) == (model.hits, model.misses)
        assert (counts.evictions, counts.hinted) == (model.evictions, model.hinted)
        assert all(n == 1 for n in model.answers.values())
        for n, fetch in model.fetches.items():
            assert (n in model.answers) == fetch.is_ready, "an answer for what is not ready, or none"
            here = [i for i, bundle in enumerate(fetch.bundles) if fetch.is_granted and bundle not in model.loading]
            leased = residency.leased(n)
            assert (leased is not None) == fetch.is_granted
            if leased is not None:
                assert leased[0].tolist() == [model.slot_of[bundle] for bundle in fetch.bundles]
                assert leased[1].nonzero()[0].tolist() == here

    def check_resident(self, n_layers: int, ffn_dim: int) -> None:
        for layer in range(n_layers):
            expected = [(layer, id_) in self.model.slot_of for id_ in range(ffn_dim)]
            assert self.residency.resident(layer, np.arange(ffn_dim, dtype=np.uint32)).tolist() == expected

    def wind_down(self) -> None:
        """Every load ends and every fetch that is ready is released, until nothing is left to do."""
        while self.model.loading or self.model.fetches:
            n_to_do = len(self.model.waiting) + len(self.model.fetches)
            if self.model.loading:
                self.load_ends(sorted(self.model.loading))
                self.check()
            for number in [n for n, fetch in self.model.fetches.items() if fetch.is_ready]:
                self.release(number)
                self.check()
            assert not n_to_do or len(self.model.waiting) + len(self.model.fetches) < n_to_do, "fetches wait for ever"
        assert not self.model.waiting
        assert not self.filling
        assert self.residency.n_leased == 0
