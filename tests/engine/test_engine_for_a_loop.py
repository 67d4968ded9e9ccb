"""The engine as a loop uses it that never waits in it: shared memory, an event descriptor, and what is where now."""

import gc
import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import BUNDLE_SIZES, Shards, neurons, some_ids

from sparseflow.engine import read_queue
from sparseflow.engine.engine import Engine
from sparseflow.errors import BadRequest, DiskError, ShardCorrupt

IO = ("direct", "buffered", "map")
DEADLINE_S = 20.0
all_io = pytest.mark.parametrize("io", IO)


class Loop:
    """An engine with an event descriptor, and a turn of a loop: wait for the event, clear it, collect."""

    def __init__(self, shards: Shards, n_slots: int, io: str = "buffered", **options: Any) -> None:
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self.event_fd, select.POLLIN)
        try:
            self.engine = Engine(shards.folder, shards.manifest, n_slots, io=io, event_fd=self.event_fd, **options)
        except DiskError as error:
            os.close(self.event_fd)
            if io == "direct" and "io='buffered'" in str(error):
                pytest.skip(str(error))
            raise

    def clear(self) -> bool:
        """Whether the event had come."""
        try:
            return os.eventfd_read(self.event_fd) > 0
        except BlockingIOError:
            return False

    def quiet(self) -> None:
        """Until no event comes any more: one may come a moment after its read was collected."""
        while self.has_event(0.05):
            self.clear()

    def has_event(self, within_s: float = 0.0) -> bool:
        return bool(self._poll.poll(int(1000 * within_s)))

    def turn(self) -> None:
        assert self.has_event(DEADLINE_S), "nothing came, though reads are under way"
        assert self.clear()
        self.engine.collect()

    def end_of(self, fetch: int) -> NDArray[np.int64] | Exception:
        """Turns until a fetch has ended; what with."""
        while (outcome := self.engine.outcome(fetch)) is None:
            self.turn()
        return outcome

    def close(self) -> None:
        self.engine.close()
        if self.event_fd >= 0:
            os.close(self.event_fd)
            self.event_fd = -1


class HeldDisk:
    """What a buffered queue performs, held back while `is_held`; `monkeypatch` puts it in place of `read_vector`."""

    def __init__(self) -> None:
        self._gate = threading.Event()
        self._gate.set()
        self._read = read_queue.read_vector

    def hold(self) -> None:
        self._gate.clear()

    def let_go(self) -> None:
        self._gate.set()

    def __call__(self, read: Any) -> int:
        assert self._gate.wait(DEADLINE_S)
        return self._read(read)


OpenLoop = Callable[..., Loop]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldDisk]:
    held = HeldDisk()
    monkeypatch.setattr("sparseflow.engine.reading.read_vector", held)
    yield held
    held.let_go()


@pytest.fixture
def open_loop() -> Iterator[OpenLoop]:
    """(shards, n_slots, io, options) -> a loop that is closed at the end."""
    made: list[Loop] = []

    def make(*arguments: Any, **options: Any) -> Loop:
        made.append(Loop(*arguments, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Three layers of 61 neurons, 512 bytes each. Not to be damaged."""
    return Shards(tmp_path_factory.mktemp("intact"))


def all_ids(shards: Shards) -> NDArray[np.uint32]:
    return np.arange(shards.ffn_dim, dtype=np.uint32)


# --- shared memory


@all_io
@pytest.mark.parametrize("bundle_nbytes", BUNDLE_SIZES.values(), ids=BUNDLE_SIZES)
def test_bundles_are_seen_by_whoever_maps_the_arena(
    tmp_path: Path, open_loop: OpenLoop, rng: np.random.Generator, io: str, bundle_nbytes: int
) -> None:
    """Also where the kernel itself writes into the shared pages, and where bundles are no multiple of a page."""
    shards = Shards(tmp_path / "store", bundle_nbytes=bundle_nbytes)
    loop = open_loop(shards, 45, io, shared=True)
    memory = loop.engine.arena.memory
    assert memory is not None
    assert memory.nbytes == 45 * bundle_nbytes
    with mmap.mmap(memory.fd, memory.nbytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        seen = np.frombuffer(mapping, np.uint8).reshape(45, bundle_nbytes)
        for step in range(6):
            layer, ids = step % 3, some_ids(rng, shards.ffn_dim, int(rng.integers(1, 45)))
            fetch = loop.engine.fetch(layer, ids)
            slots = loop.engine.wait(fetch, DEADLINE_S)
            assert np.array_equal(seen[slots], shards.content(layer, ids))
            loop.engine.release(fetch)
        del seen


def test_arena_is_of_this_process_alone_unless_it_is_asked_to_be_shared(open_loop: OpenLoop, intact: Shards) -> None:
    assert open_loop(intact, 4).engine.arena.memory is None
    assert open_loop(intact, 4, shared=True).engine.slots.ctypes.data % 4096 == 0


@all_io
def test_closing_leaves_no_descriptor_and_readers_keep_what_they_map(
    intact: Shards, nothing_left: None, io: str
) -> None:
    loop = Loop(intact, 10, io, shared=True)
    slots = loop.engine.wait(loop.engine.fetch(1, neurons(3, 4)), DEADLINE_S)
    memory = loop.engine.arena.memory
    assert memory is not None
    mapping = mmap.mmap(memory.fd, memory.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
    loop.close()
    loop.close()
    del loop, memory
    gc.collect()
    assert mapping[:].find(intact.content(1, neurons(3)).tobytes()) == slots[0] * intact.bundle_nbytes
    mapping.close()


def test_shared_arena_that_cannot_be_had_leaves_nothing_open(intact: Shards, nothing_left: None) -> None:
    with pytest.raises(MemoryError, match="give less memory"):
        Engine(intact.folder, intact.manifest, 1 << 50, io="buffered", shared=True)
    gc.collect()


# --- the event


@all_io
def test_event_comes_when_reads_end_and_not_before(open_loop: OpenLoop, intact: Shards, io: str) -> None:
    loop = open_loop(intact, 100, io)
    loop.quiet()  # measuring the disk made some
    assert not loop.has_event(0.02), "nothing was asked for"
    fetch = loop.engine.fetch(0, all_ids(intact))
    slots = loop.end_of(fetch)
    assert isinstance(slots, np.ndarray)
    assert np.array_equal(loop.engine.slots[slots], intact.content(0, all_ids(intact)))
    loop.quiet()
    again = loop.engine.fetch(0, all_ids(intact))
    assert isinstance(loop.engine.outcome(again), np.ndarray), "it was there"
    assert not loop.has_event(0.02)


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_loop_that_waits_for_nothing_but_the_event_sees_every_fetch_end(
    tmp_path: Path, open_loop: OpenLoop, rng: np.random.Generator, io: str, bundle_nbytes: int
) -> None:
    """Fetches of several at once, in an arena that is too small for all of them, with hints between."""
    shards = Shards(tmp_path / "store", bundle_nbytes=bundle_nbytes)
    loop = open_loop(shards, 60, io, shared=True)
    for _ in range(60):
        under_way = []
        for _ in range(int(rng.integers(1, 4))):
            layer, ids = int(rng.integers(3)), some_ids(rng, shards.ffn_dim, int(rng.integers(0, 20)))
            under_way.append((loop.engine.fetch(layer, ids), layer, ids))
        if rng.random() < 0.4:
            loop.engine.hint(int(rng.integers(3)), some_ids(rng, shards.ffn_dim, 20))
        for fetch, layer, ids in under_way:
            slots = loop.end_of(fetch)
            assert isinstance(slots, np.ndarray)
            assert np.array_equal(loop.engine.slots[slots], shards.content(layer, ids))
            loop.engine.release(fetch)
    assert loop.engine.counts().evictions


@all_io
def test_event_comes_for_hints_too(open_loop: OpenLoop, intact: Shards, io: str) -> None:
    loop = open_loop(intact, 100, io)
    loop.engine.hint(1, neurons(5, 50))
    while loop.engine.state().n_loading:
        loop.turn()
    assert loop.engine.state().n_resident == 2


@all_io
def test_event_comes_for_reads_that_fail(tmp_path: Path, open_loop: OpenLoop, io: str) -> None:
    shards = Shards(tmp_path / "store")
    loop = open_loop(shards, 20, io)
    with shards.flipped(1, 7):
        fetch = loop.engine.fetch(1, neurons(3, 7))
        error = loop.end_of(fetch)
    assert isinstance(error, ShardCorrupt)
    assert "layer 1, neuron 7" in str(error)


def test_fetch_that_waited_for_slots_begins_when_the_loop_collects(
    open_loop: OpenLoop, intact: Shards, disk: HeldDisk
) -> None:
    """Nobody else would begin it: slots of a fetch that was released are free once its reads have ended."""
    loop = open_loop(intact, 10)
    disk.hold()
    loop.engine.release(loop.engine.fetch(0, neurons(*range(10))))
    late = loop.engine.fetch(1, neurons(1, 2))
    assert loop.engine.state().n_loading == 10
    disk.let_go()
    slots = loop.end_of(late)
    assert isinstance(slots, np.ndarray)
    assert np.array_equal(loop.engine.slots[slots], intact.content(1, neurons(1, 2)))


# --- looking without waiting


def test_collect_outcome_and_state_never_wait_for_the_disk(open_loop: OpenLoop, intact: Shards, disk: HeldDisk) -> None:
    loop = open_loop(intact, 100)
    disk.hold()
    fetch = loop.engine.fetch(0, all_ids(intact))
    begin = time.monotonic()
    for _ in range(20):
        loop.engine.collect()
        assert loop.engine.outcome(fetch) is None
        assert loop.engine.state().n_loading == intact.ffn_dim
    assert time.monotonic() - begin < 5
    disk.let_go()
    assert isinstance(loop.end_of(fetch), np.ndarray)


def test_fetch_that_waits_is_over_or_never_was_has_no_outcome(open_loop: OpenLoop, intact: Shards) -> None:
    loop = open_loop(intact, 8)
    holder = loop.engine.fetch(0, neurons(*range(8)))
    loop.end_of(holder)
    late = loop.engine.fetch(1, neurons(1))
    for fetch in (late, 4711):
        assert loop.engine.outcome(fetch) is None
    loop.engine.release(holder)
    assert loop.engine.outcome(holder) is None
    assert isinstance(loop.end_of(late), np.ndarray)


def test_outcome_is_told_as_often_as_it_is_asked_for(tmp_path: Path, open_loop: OpenLoop) -> None:
    shards = Shards(tmp_path / "store")
    loop = open_loop(shards, 8)
    good = loop.engine.fetch(0, neurons(1))
    loop.end_of(good)
    assert loop.engine.outcome(good) is loop.engine.outcome(good)
    with shards.flipped(2, 1):
        bad = loop.engine.fetch(2, neurons(1))
        loop.end_of(bad)
    assert isinstance(loop.engine.outcome(bad), ShardCorrupt)
    assert loop.engine.outcome(bad) is loop.engine.outcome(bad)
    assert loop.engine.state().n_leased == 1, "its lease is over"
    loop.engine.release(bad)
    assert loop.engine.outcome(bad) is None


def test_closed_engine_collects_nothing_and_says_so(intact: Shards, nothing_left: None) -> None:
    loop = Loop(intact, 8)
    fetch = loop.engine.fetch(0, neurons(1))
    loop.close()
    with pytest.raises(BadRequest, match="closed"):
        loop.engine.collect()
    loop.engine.release(fetch)


# --- how it stands


def test_state_counts_slots_by_what_they_are(open_loop: OpenLoop, intact: Shards, disk: HeldDisk) -> None:
    loop = open_loop(intact, 20)
    loop.end_of(held := loop.engine.fetch(0, neurons(1, 2, 3)))
    loop.end_of(over := loop.engine.fetch(1, neurons(1, 2)))
    loop.engine.release(over)
    disk.hold()
    loop.engine.fetch(0, neurons(3, 4))
    loop.engine.hint(2, neurons(7))
    state = loop.engine.state()
    assert (state.n_slots, state.n_resident, state.n_leased, state.n_loading) == (20, 7, 4, 2)
    disk.let_go()
    while loop.engine.state().n_loading:
        loop.turn()
    loop.engine.release(held)
    assert loop.engine.state().n_leased == 2


@all_io
def test_state_counts_hits_and_misses_by_layer_and_its_sums_are_the_counts(
    open_loop: OpenLoop, intact: Shards, rng: np.random.Generator, io: str
) -> None:
    loop = open_loop(intact, intact.n_bundles, io)  # nothing is evicted
    hits, misses = [0, 0, 0], [0, 0, 0]
    seen: list[set[int]] = [set(), set(), set()]
    for _ in range(20):
        layer, ids = int(rng.integers(3)), some_ids(rng, intact.ffn_dim, int(rng.integers(0, 30)))
        n_new = len(set(ids.tolist()) - seen[layer])
        seen[layer] |= set(ids.tolist())
        hits[layer] += len(ids) - n_new
        misses[layer] += n_new
        loop.end_of(fetch := loop.engine.fetch(layer, ids))
        loop.engine.release(fetch)
    state, counts = loop.engine.state(), loop.engine.counts()
    assert (state.hits.tolist(), state.misses.tolist()) == (hits, misses)
    assert (counts.hits, counts.misses) == (sum(hits), sum(misses))
    assert state.n_bundles_read == sum(misses)


def test_state_is_a_copy_of_its_moment(open_loop: OpenLoop, intact: Shards) -> None:
    loop = open_loop(intact, 20)
    before = loop.engine.state()
    loop.end_of(loop.engine.fetch(1, neurons(1, 2)))
    assert before.misses.tolist() == [0, 0, 0]
    assert before.latencies_s == ()
    before.misses[:] = 99
    assert loop.engine.state().misses.tolist() == [0, 2, 0]


def test_latencies_are_of_loads_that_somebody_waited_for(open_loop: OpenLoop, intact: Shards, disk: HeldDisk) -> None:
    loop = open_loop(intact, 20)
    loop.engine.hint(0, neurons(1))
    while loop.engine.state().n_loading:
        loop.turn()
    assert loop.engine.state().latencies_s == ()
    disk.hold()
    fetch = loop.engine.fetch(0, neurons(2))
    time.sleep(0.05)
    disk.let_go()
    loop.end_of(fetch)
    (latency_s,) = loop.engine.state().latencies_s
    assert 0.05 <= latency_s < DEADLINE_S


@all_io
def test_state_tells_of_each_thread_whether_it_lives(open_loop: OpenLoop, intact: Shards, io: str) -> None:
    loop = open_loop(intact, 8, io)
    threads = loop.engine.state().threads_alive
    assert all(threads)
    assert bool(threads) == (io != "direct"), "the kernel needs none"
