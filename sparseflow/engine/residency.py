"""Who is where: a state machine. Events in, instructions out; no clock, no thread, no file.

    bundle   absent -> loading -> resident -> absent (evicted)
    slot     free   -> loading -> resident -> free, or straight on to the next bundle
    fetch    waiting for slots -> waiting for its bundles -> ready -> released

A fetch leases its slots from the moment it has all of them until it is released or fails. A leased slot, and one that
is being filled, is never given to another bundle. A fetch that cannot have its slots yet holds none, and those behind
it wait for it: so no two fetches can wait for each other, and none is overtaken for ever.

A fetch that keeps nothing leaves no trace: what it finds grows no younger, nothing is counted, and bundles that had to
be read for it pass. A passing bundle is unknown to the eviction, and gone with its last lease, unless a fetch that
keeps has asked for it by then.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.eviction import Eviction

ABSENT = -1


@dataclass(frozen=True, slots=True)
class Acquire:
    """A fetch asks for bundles. ids: (n,) uint32, ascending, no repeats, n at most the number of slots."""

    fetch: int
    layer: int
    ids: NDArray[np.uint32]
    keep: bool = True
    """The bundles stay when it is released, until they are evicted."""


@dataclass(frozen=True, slots=True)
class Hint:
    """Bundles that may be asked for. As many are loaded as there are slots for."""

    layer: int
    ids: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Release:
    """A fetch is over, whatever state it is in. One that is not known is over already."""

    fetch: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """Slots hold their bundles, intact."""

    slots: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Failed:
    """Slots could not be filled."""

    slots: NDArray[np.int64]
    error: Exception


Event = Acquire | Hint | Release | Loaded | Failed


@dataclass(frozen=True, slots=True)
class Load:
    """Read bundles into slots: ids[i] goes to slots[i]. A hint's are not waited for yet."""

    layer: int
    ids: NDArray[np.uint32]
    slots: NDArray[np.int64]
    is_hint: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """A fetch has its bundles, in the order of its ids."""

    fetch: int
    slots: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Refuse:
    """A fetch will not get its bundles; it is over."""

    fetch: int
    error: Exception


Instruction = Load | Ready | Refuse


@dataclass(slots=True)
class Counts:
    """Sums since the start."""

    hits: int = 0
    """Bundles of fetches that were resident, or on their way, when asked for."""
    misses: int = 0
    evictions: int = 0
    hinted: int = 0
    """Bundles loaded because of a hint."""
    hints_useful: int = 0
    """Of those, filled when a fetch first asked for them."""
    hints_late: int = 0
    """Of those, still loading then."""
    hints_wasted: int = 0
    """Of those, gone before any fetch asked for them."""


@dataclass(slots=True)
class _Lease:
    slots: NDArray[np.int64]
    is_ready: bool
    n_missing: int


class Residency:
    """The state of one arena."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int, eviction: Eviction) -> None:
        self.n_slots = n_slots
        self.counts = Counts()
        self._eviction = eviction
        self._slot_of = np.full((n_layers, ffn_dim), ABSENT, np.int32)
        self._layer_in = np.full(n_slots, ABSENT, np.int32)
        self._id_in = np.zeros(n_slots, np.int32)
        self._is_loading = np.zeros(n_slots, bool)
        self._n_leases = np.zeros(n_slots, np.int32)
        self._may_go = np.zeros(n_slots, bool)  # filled, and not leased
        self._is_hinted = np.zeros(n_slots, bool)  # loaded for a hint, and no fetch has asked for it yet
        self._is_passing = np.zeros(n_slots, bool)  # loaded for fetches that keep nothing; the eviction does not know
        self.layer_hits = np.zeros(n_layers, np.int64)
        self.layer_misses = np.zeros(n_layers, np.int64)
        self._free = np.arange(n_slots)[::-1].copy()  # a stack: the first n_free entries
        self._n_free = n_slots
        self._leases: dict[int, _Lease] = {}
        self._waiting: deque[Acquire] = deque()

    def handle(self, event: Event) -> list[Instruction]:
        """Apply one event. The only way this state ever changes."""
        match event:
            case Acquire():
                self._waiting.append(event)
                return self._grant()
            case Hint():
                return self._on_hint(event)
            case Release():
                return self._on_release(event)
            case Loaded():
                return self._on_loaded(event)
            case Failed():
                return self._on_failed(event)
        raise TypeError(f"unknown event {event!r}")

    def resident(self, layer: int, ids: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which bundles have a slot, filled or being filled. (n,) bool."""
        return np.asarray(self._slot_of[layer, ids] != ABSENT)

    def is_known(self, fetch: int) -> bool:
        """Whether a fetch was acquired and is not over."""
        return fetch in self._leases or any(fetch == waiting.fetch for waiting in self._waiting)

    def missed(self, fetch: int) -> int | None:
        """Bundles that were absent when a fetch was given its slots; None where it holds none."""
        lease = self._leases.get(fetch)
        return None if lease is None else lease.n_missing

    def leased(self, fetch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
        """Slots that a fetch leases, in the order of its ids, and which are filled; None: it has none yet."""
        lease = self._leases.get(fetch)
        return None if lease is None else (lease.slots, ~self._is_loading[lease.slots])

    @property
    def n_resident(self) -> int:
        """Bundles that have a slot."""
        return self.n_slots - self._n_free

    @property
    def n_loading(self) -> int:
        """Slots that are being filled."""
        return int(np.count_nonzero(self._is_loading))

    @property
    def n_leased(self) -> int:
        """Slots under a lease."""
        return int(np.count_nonzero(self._n_leases))

    def _grant(self) -> list[Instruction]:
        """Serve fetches in the order in which they came, until one cannot have its slots yet."""
        instructions: list[Instruction] = []
        while self._waiting:
            fetch = self._waiting[0]
            slots = self._slot_of[fetch.layer, fetch.ids].astype(np.int64)
            is_missing = slots == ABSENT
            n_missing = int(np.count_nonzero(is_missing))
            hits = slots[~is_missing]
            self._n_leases[hits] += 1
            self._may_go[hits] = False
            if n_missing > self._n_free + self._n_evictable:
                self._end_lease(hits)
                break
            self._waiting.popleft()
            if fetch.keep:
                self._use(fetch.layer, hits, n_missing)
            if n_missing:
                missing = fetch.ids[is_missing]
                slots[is_missing] = placed = self._place(fetch.layer, missing, keep=fetch.keep)
                self._n_leases[placed] += 1
                instructions.append(Load(fetch.layer, missing, placed, is_hint=False))
            is_ready = not n_missing and not self._is_loading[slots].any()
            self._leases[fetch.fetch] = _Lease(slots, is_ready, n_missing)
            if is_ready:
                instructions.append(Ready(fetch.fetch, slots))
        return instructions

    def _use(self, layer: int, hits: NDArray[np.int64], n_missing: int) -> None:
        """A fetch that keeps finds some bundles and lacks others."""
        self._keep(layer, hits)
        self._eviction.used(layer, hits)
        self._count_hints(hits)
        self.counts.hits += len(hits)
        self.counts.misses += n_missing
        self.layer_hits[layer] += len(hits)
        self.layer_misses[layer] += n_missing

    def _on_hint(self, hint: Hint) -> list[Instruction]:
        missing = hint.ids[~self.resident(hint.layer, hint.ids)]
        if self._waiting or not len(missing):  # a fetch that lacks slots comes first
            return []
        missing = missing[: self._n_free + self._n_evictable]
        if not len(missing):
            return []
        self.counts.hinted += len(missing)
        slots = self._place(hint.layer, missing)
        self._is_hinted[slots] = True
        return [Load(hint.layer, missing, slots, is_hint=True)]

    def _on_release(self, event: Release) -> list[Instruction]:
        lease = self._leases.pop(event.fetch, None)
        if lease is None:
            self._waiting = deque(fetch for fetch in self._waiting if fetch.fetch != event.fetch)
        else:
            self._end_lease(lease.slots)
            self._let_pass(lease.slots)
        return self._grant()

    def _end_lease(self, slots: NDArray[np.int64]) -> None:
        n_leases = self._n_leases[slots] - 1
        self._n_leases[slots] = n_leases
        self._may_go[slots] = (n_leases == 0) & ~self._is_loading[slots]

    def _let_pass(self, slots: NDArray[np.int64]) -> None:
        """Free those that pass and that nobody needs any more; keep those that a waiting fetch will."""
        slots = slots[self._is_passing[slots] & self._may_go[slots]]
        if not len(slots):
            return
        for fetch in self._waiting:
            if fetch.keep:
                is_wanted = (self._layer_in[slots] == fetch.layer) & np.isin(self._id_in[slots], fetch.ids)
                self._keep(fetch.layer, slots[is_wanted])
        gone = slots[self._is_passing[slots]]
        self._may_go[gone] = False
        self._empty(gone)

    def _keep(self, layer: int, slots: NDArray[np.int64]) -> None:
        """What passed so far stays."""
        kept = slots[self._is_passing[slots]]
        if len(kept):
            self._is_passing[kept] = False
            self._eviction.filled(layer, kept, self._id_in[kept])

    def _empty(self, slots: NDArray[np.int64]) -> None:
        """Slots hold nothing any more, and are free."""
        self._slot_of[self._layer_in[slots], self._id_in[slots]] = ABSENT
        self._layer_in[slots] = ABSENT
        self._eviction.freed(slots[~self._is_passing[slots]])
        self._is_passing[slots] = False
        self._forget_hints(slots)
        self._push_free(slots)

    def _on_loaded(self, event: Loaded) -> list[Instruction]:
        self._is_loading[event.slots] = False
        self._may_go[event.slots] = self._n_leases[event.slots] == 0
        self._let_pass(event.slots)
        ready: list[Instruction] = []
        for fetch, lease in self._leases.items():
            if not lease.is_ready and not self._is_loading[lease.slots].any():
                lease.is_ready = True
                ready.append(Ready(fetch, lease.slots))
        return ready + self._grant()

    def _on_failed(self, event: Failed) -> list[Instruction]:
        has_failed = np.zeros(self.n_slots, bool)
        has_failed[event.slots] = True
        hurt = [fetch for fetch, lease in self._leases.items() if has_failed[lease.slots].any()]
        ended = [self._leases.pop(fetch).slots for fetch in hurt]
        for slots in ended:
            self._end_lease(slots)
        self._is_loading[event.slots] = False
        self._empty(event.slots)
        for slots in ended:
            self._let_pass(slots)
        return [*(Refuse(fetch, event.error) for fetch in hurt), *self._grant()]

    def _place(self, layer: int, ids: NDArray[np.uint32], *, keep: bool = True) -> NDArray[np.int64]:
        """Give absent bundles a slot each, evicting where none is free. The slots count as loading from now on."""
        n_short = len(ids) - self._n_free
        if n_short > 0:
            self._evict(n_short)
        self._n_free -= len(ids)
        slots = self._free[self._n_free : self._n_free + len(ids)][::-1].copy()
        self._slot_of[layer, ids] = slots
        self._layer_in[slots] = layer
        self._id_in[slots] = ids
        self._is_loading[slots] = True
        if keep:
            self._eviction.filled(layer, slots, ids)
        else:
            self._is_passing[slots] = True
        return slots

    def _evict(self, n: int) -> None:
        victims = self._eviction.victims(n, self._may_go)
        assert len(victims) == n, f"{len(victims)} of {n} slots could be evicted"
        self._slot_of[self._layer_in[victims], self._id_in[victims]] = ABSENT
        self._layer_in[victims] = ABSENT
        self._may_go[victims] = False
        self._forget_hints(victims)
        self._push_free(victims)
        self.counts.evictions += n

    def _count_hints(self, hits: NDArray[np.int64]) -> None:
        asked = hits[self._is_hinted[hits]]
        if len(asked):
            n_late = int(np.count_nonzero(self._is_loading[asked]))
            self.counts.hints_late += n_late
            self.counts.hints_useful += len(asked) - n_late
            self._is_hinted[asked] = False

    def _forget_hints(self, slots: NDArray[np.int64]) -> None:
        self.counts.hints_wasted += int(np.count_nonzero(self._is_hinted[slots]))
        self._is_hinted[slots] = False

    def _push_free(self, slots: NDArray[np.int64]) -> None:
        self._free[self._n_free : self._n_free + len(slots)] = slots
        self._n_free += len(slots)

    @property
    def _n_evictable(self) -> int:
        return int(np.count_nonzero(self._may_go))
