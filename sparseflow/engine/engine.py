"""The engine: residency decides, the loader reads, callers wait. No torch, no thread of its own.

Whoever waits for a fetch collects finished reads meanwhile, for everybody: between two waits nothing has to be done,
because the kernel (or the reading threads) go on with the reads that were begun.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.arena import Arena
from sparseflow.engine.counts import FetchCounts, ReadTimes
from sparseflow.engine.disk_speed import DiskSpeed
from sparseflow.engine.eviction import Eviction, FirstInFirstOut, LeastRecentlyUsed
from sparseflow.engine.least_often_used import LeastOftenUsed
from sparseflow.engine.loader import Loader
from sparseflow.engine.read_plan import LONGEST_READ_NBYTES
from sparseflow.engine.reading import Reading, open_reading
from sparseflow.engine.residency import Acquire, Event, Hint, Instruction, Load, Ready, Refuse, Release, Residency
from sparseflow.engine.shard_files import ShardFiles
from sparseflow.errors import ArenaBusy, BadRequest, DiskError
from sparseflow.store.manifest import Manifest

# By the number of layers, neurons of a layer, and slots.
EVICTIONS: dict[str, Callable[[int, int, int], Eviction]] = {
    "lfu": LeastOftenUsed,
    "lru": LeastRecentlyUsed,
    "fifo": FirstInFirstOut,
}
DEFAULT_EVICTION = "lfu"  # on every trace so far it missed the fewest, see scripts/bench/NOTES.md
_CLOSE_TIMEOUT_S = 30.0


class EngineState(NamedTuple):
    """How an engine stands. hits, misses: (n_layers,) int64, of fetches so far. latencies_s: of the last loads."""

    n_slots: int
    n_resident: int
    n_leased: int
    n_loading: int
    hits: NDArray[np.int64]
    misses: NDArray[np.int64]
    n_bundles_read: int
    latencies_s: tuple[float, ...]
    threads_alive: tuple[bool, ...]


class Engine:
    """The bundles of one store in an arena smaller than all of them. Safe to use from several threads."""

    def __init__(
        self,
        store: Path,
        manifest: Manifest,
        n_slots: int,
        *,
        eviction: str = DEFAULT_EVICTION,
        io: str = "auto",
        shared: bool = False,
        event_fd: int | None = None,
    ) -> None:
        """
        Args:
            n_slots: bundles that the arena holds.
            eviction: one of EVICTIONS.
            io: `direct`, `buffered`, `map`, or `auto`: direct where the file system and the kernel allow it.
            shared: the arena is memory that other processes can be given to read.
            event_fd: an eventfd that becomes readable as reads end, for a loop that never waits here.

        Raises:
            DiskError, ShardCorrupt, NotEnoughMemory: as their texts say.
        """
        profile = manifest.profile
        self.profile = profile
        self._arena = Arena(n_slots, profile.bundle_nbytes, shared=shared)
        sizes = profile.num_layers, profile.ffn_dimension, n_slots
        self._residency = Residency(*sizes, EVICTIONS[eviction](*sizes))
        shards = ShardFiles(store, manifest)
        reading = self._reading = open_reading(shards, io, event_fd)
        try:
            self._loader = Loader(shards, self._arena, reading.queue, reading.speed, reading.alignment)
        except BaseException:
            reading.close()
            raise
        # Holds all memory that reads may still write to, whoever forgets to close.
        self._shut = weakref.finalize(self, _shut, self._loader, reading, self._arena)
        self._changed = threading.Condition()
        self._is_collecting = False
        self._is_closed = False
        self._broken_by: BaseException | None = None
        self._n_fetches = 0
        self._ended: dict[int, NDArray[np.int64] | Exception] = {}
        self._wait_s = 0.0

    @property
    def slots(self) -> NDArray[np.uint8]:
        """(n_slots, bundle_nbytes) uint8: the arena. Read only what a fetch leases."""
        return self._arena.slots

    @property
    def arena(self) -> Arena:
        """The arena itself."""
        return self._arena

    @property
    def io(self) -> str:
        """How shards are read: `direct`, `buffered` or `map`."""
        return self._reading.queue.name

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why shards are not read directly, where that was tried; and that reads go wrong on purpose."""
        return self._reading.reasons

    @property
    def faults(self) -> dict[str, int]:
        """Reads that went wrong on purpose so far, by point."""
        return {fault.point: fault.n_done for fault in self._reading.faults}

    @property
    def speed(self) -> DiskSpeed:
        """As measured when the engine was opened."""
        return self._reading.speed

    @property
    def read_times(self) -> ReadTimes:
        """Of one layer, as measured when the engine was opened."""
        nbytes, longest = self.profile.bundle_nbytes, LONGEST_READ_NBYTES
        layer_nbytes = nbytes * self.profile.ffn_dimension
        speed = self._reading.speed
        return ReadTimes(layer_nbytes / speed.bytes_per_s(longest), layer_nbytes / speed.bytes_per_s(nbytes))

    @property
    def n_resident(self) -> int:
        """Bundles in the arena, or on their way to it."""
        return self._residency.n_resident

    def state(self) -> EngineState:
        """What is where now."""
        with self._changed:
            residency = self._residency
            return EngineState(
                residency.n_slots,
                residency.n_resident,
                residency.n_leased,
                residency.n_loading,
                residency.layer_hits.copy(),
                residency.layer_misses.copy(),
                self._loader.counts.bundles,
                tuple(self._loader.latencies_s),
                tuple(thread.is_alive() for thread in self._reading.queue.threads),
            )

    def counts(self) -> FetchCounts:
        """What has happened so far."""
        with self._changed:
            counts, loads = self._residency.counts, self._loader.counts
            return FetchCounts(
                *(counts.hits, counts.misses, counts.evictions),
                *(counts.hinted, counts.hints_useful, counts.hints_late, counts.hints_wasted),
                *(loads.reads, loads.bytes_read, self._wait_s),
            )

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """Start reading bundles that may be asked for; as many as can be under way at once, the others are dropped."""
        self._require_neurons(layer, ids)
        with self._changed:
            self._require_open()
            self._collect_now()
            ids = ids[~self._residency.resident(layer, ids)]
            ids = ids[: self._loader.reads_of(ids).first[: self._loader.room + 1][-1]] if len(ids) else ids
            self._handle(Hint(layer, ids))

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> int:
        """Ask for bundles; returns at once, with the fetch's number.

        Args:
            ids: (n,) uint32, ascending, no repeats.
            keep: False: leave no trace, in what is kept, in its order of eviction or in the counts of bundles.

        Raises:
            ArenaBusy: more than the arena has slots. BadRequest: not neurons of this model.
        """
        self._require_neurons(layer, ids)
        if len(ids) > self._residency.n_slots:
            raise ArenaBusy(
                f"layer {layer}: {len(ids)} bundles asked for at once, the arena has {self._residency.n_slots} slots; "
                "ask for them in parts, or give more memory"
            )
        with self._changed:
            self._require_open()
            self._collect_now()
            number = self._n_fetches = self._n_fetches + 1
            self._handle(Acquire(number, layer, ids, keep))
            return number

    def leased(self, fetch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
        """The slots of a fetch, and which are filled already, both in the order of its ids. Returns at once.

        None: it waits for slots, or is over.
        """
        with self._changed:
            return self._residency.leased(fetch)

    def collect(self) -> None:
        """Apply reads that have ended, without waiting. For a loop: when `event_fd` is readable, before `outcome`."""
        with self._changed:
            self._require_open()
            self._collect_now()

    def missed(self, fetch: int) -> int | None:
        """How many bundles of a fetch had to be read when it was given its slots; None where it has none."""
        with self._changed:
            return self._residency.missed(fetch)

    def outcome(self, fetch: int) -> NDArray[np.int64] | Exception | None:
        """As `wait`, at once: slots, the error that the fetch ended with, or None while bundles are missing."""
        with self._changed:
            return self._ended.get(fetch)

    def wait(self, fetch: int, timeout_s: float) -> NDArray[np.int64]:
        """The arena slots of a fetch's bundles, in the order of its ids, once all are there.

        Raises:
            TimeoutError: they are not after `timeout_s`.
            DiskError, ShardCorrupt: they could not be read.
        """
        begin = time.monotonic()
        deadline = begin + timeout_s
        with self._changed:
            while fetch not in self._ended:
                self._require_open()
                if not self._residency.is_known(fetch):
                    raise BadRequest(f"fetch {fetch} was released; ask for its bundles again")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(self._why_late(timeout_s))
                if self._is_collecting or self._loader.is_idle:
                    self._changed.wait(left_s)
                else:
                    self._collect(left_s)
            self._wait_s += time.monotonic() - begin
            result = self._ended[fetch]
        if isinstance(result, Exception):
            raise result
        return result

    def release(self, fetch: int) -> None:
        """Say that nobody reads a fetch's slots any more. May be called twice."""
        with self._changed:
            self._ended.pop(fetch, None)
            if not self._is_closed and self._broken_by is None:
                self._handle(Release(fetch))

    def settle(self, timeout_s: float) -> None:
        """Wait until nothing is under way.

        Raises:
            TimeoutError: something still is.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._loader.is_idle:
                self._require_open()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(self._why_late(timeout_s))
                if self._is_collecting:
                    self._changed.wait(left_s)
                else:
                    self._collect(left_s)

    def close(self) -> None:
        """Wait for what is under way, and give everything back. May be called twice."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
            deadline = time.monotonic() + _CLOSE_TIMEOUT_S
            while self._is_collecting and time.monotonic() < deadline:
                self._changed.wait(0.1)
        self._shut()

    def _collect(self, timeout_s: float) -> None:
        """Wait for reads with the lock open, and apply what came."""
        self._is_collecting = True
        try:
            self._changed.release()
            try:
                self._loader.wait(min(timeout_s, 1.0))
            finally:
                self._changed.acquire()
        finally:
            self._is_collecting = False
            self._changed.notify_all()
        self._apply_finished()

    def _collect_now(self) -> None:
        """Apply what has come by itself, without waiting."""
        if not self._is_collecting and not self._loader.is_idle:
            self._loader.wait(0)
            self._apply_finished()

    def _apply_finished(self) -> None:
        with self._all_or_broken():
            for event in self._loader.collect():
                self._perform(self._residency.handle(event))

    def _handle(self, event: Event) -> None:
        with self._all_or_broken():
            self._perform(self._residency.handle(event))

    def _perform(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Load():
                    self._loader.begin(instruction)
                case Ready():
                    self._ended[instruction.fetch] = instruction.slots
                case Refuse():
                    self._ended[instruction.fetch] = instruction.error

    @contextmanager
    def _all_or_broken(self) -> Iterator[None]:
        """What is begun here is finished, or the engine serves nobody any more: it would not know who is where."""
        try:
            yield
        except BaseException as error:
            self._broken_by = error
            raise
        finally:
            self._changed.notify_all()

    def _require_open(self) -> None:
        if self._is_closed:
            raise BadRequest("the store was closed; open it again")
        if self._broken_by is not None:
            raise DiskError(f"the store was interrupted in its work ({self._broken_by!r}); open it again")

    def _require_neurons(self, layer: int, ids: NDArray[np.uint32]) -> None:
        n_layers, ffn_dim = self.profile.num_layers, self.profile.ffn_dimension
        are_ids = not len(ids) or (ids[-1] < ffn_dim and bool((ids[1:] > ids[:-1]).all()))
        if not (0 <= layer < n_layers and are_ids):
            raise BadRequest(
                f"layer {layer}, {len(ids)} neurons: the model has {n_layers} layers of {ffn_dim} neurons; "
                "ask for ascending ids without repeats"
            )

    def _why_late(self, timeout_s: float) -> str:
        residency = self._residency
        return (
            f"bundles did not arrive within {timeout_s:g} s: {residency.n_leased} of {residency.n_slots} slots are "
            f"leased, reads {'are' if not self._loader.is_idle else 'none'} under way; "
            "release fetches before asking for more, or check the disk"
        )


def _shut(loader: Loader, reading: Reading, arena: Arena) -> None:
    loader.close()
    reading.close()
    arena.close()
