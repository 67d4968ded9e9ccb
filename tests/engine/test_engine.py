"""The engine on real shards: bytes, leases, waits that end, damage that is told, and nothing left behind."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from child_process import run_python
from numpy.typing import NDArray
from shards import BUNDLE_SIZES, Shards, neurons, some_ids

from sparseflow.engine import read_queue
from sparseflow.engine.engine import Engine
from sparseflow.errors import ArenaBusy, BadRequest, DiskError, ShardCorrupt, SparseFlowError

IO = ("direct", "buffered", "map")
DEADLINE_S = 20.0
all_io = pytest.mark.parametrize("io", IO)


def opened(shards: Shards, n_slots: int, io: str = "buffered", **options: Any) -> Engine:
    try:
        return Engine(shards.folder, shards.manifest, n_slots, io=io, **options)
    except DiskError as error:
        if io == "direct" and "io='buffered'" in str(error):
            pytest.skip(str(error))
        raise


OpenEngine = Callable[..., Engine]


@pytest.fixture
def open_engine() -> Iterator[OpenEngine]:
    """(shards, n_slots, io, options) -> an engine that is closed at the end."""
    made: list[Engine] = []

    def make(*arguments: Any, **options: Any) -> Engine:
        made.append(opened(*arguments, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Three layers of 61 neurons, 512 bytes each. Not to be damaged."""
    return Shards(tmp_path_factory.mktemp("intact"))


def fetched(engine: Engine, layer: int, ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """A copy of bundles, fetched and released."""
    fetch = engine.fetch(layer, ids)
    try:
        return engine.slots[engine.wait(fetch, DEADLINE_S)].copy()
    finally:
        engine.release(fetch)


def is_right(engine: Engine, shards: Shards, layer: int, ids: NDArray[np.uint32]) -> bool:
    return np.array_equal(fetched(engine, layer, ids), shards.content(layer, ids))


class InThread:
    """Runs something in another thread and hands out its result, or raises its error, before a deadline."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout_s: float = DEADLINE_S) -> Any:
        self._thread.join(timeout_s)
        assert self.is_over, f"not over after {timeout_s:g} s"
        if self._error is not None:
            raise self._error
        return self._result


class SlowDisk:
    """What a buffered queue performs, with a delay: `monkeypatch` puts it in place of `read_vector`."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self._read = read_queue.read_vector

    def __call__(self, read: Any) -> int:
        time.sleep(self.delay_s)
        return self._read(read)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    disk = SlowDisk()
    monkeypatch.setattr("sparseflow.engine.reading.read_vector", disk)
    return disk


# --- bytes


@all_io
@pytest.mark.parametrize("bundle_nbytes", BUNDLE_SIZES.values(), ids=BUNDLE_SIZES)
@pytest.mark.parametrize("eviction", ["lfu", "lru", "fifo"])
def test_random_fetches_give_the_right_bytes_in_the_order_asked_for(
    tmp_path: Path, rng: np.random.Generator, open_engine: OpenEngine, io: str, bundle_nbytes: int, eviction: str
) -> None:
    shards = Shards(tmp_path / "store", bundle_nbytes=bundle_nbytes)
    engine = open_engine(shards, 40, io, eviction=eviction)
    assert engine.io == io
    for step in range(40):
        layer, n = step % shards.n_layers, int(rng.integers(0, 41))
        if rng.random() < 0.3:
            engine.hint(int(rng.integers(shards.n_layers)), some_ids(rng, shards.ffn_dim, int(rng.integers(0, 61))))
        assert is_right(engine, shards, layer, some_ids(rng, shards.ffn_dim, n))
        assert engine.n_resident <= 40
    counts = engine.counts()
    assert counts.evictions > 0
    assert counts.bytes_from_disk >= counts.misses * bundle_nbytes


@all_io
def test_all_bundles_fit_and_stay(open_engine: OpenEngine, intact: Shards, io: str) -> None:
    engine = open_engine(intact, intact.n_bundles, io)
    everything = np.arange(intact.ffn_dim, dtype=np.uint32)
    for _ in range(2):
        assert all(is_right(engine, intact, layer, everything) for layer in range(intact.n_layers))
    counts = engine.counts()
    assert (counts.hits, counts.misses, counts.evictions) == (intact.n_bundles, intact.n_bundles, 0)
    assert engine.n_resident == intact.n_bundles


@all_io
def test_bytes_stay_as_long_as_they_are_leased(
    open_engine: OpenEngine, intact: Shards, rng: np.random.Generator, io: str
) -> None:
    """While everything else is fetched through the slots that are left."""
    engine = open_engine(intact, 24, io)
    ids = some_ids(rng, intact.ffn_dim, 16)
    fetch = engine.fetch(1, ids)
    slots = engine.wait(fetch, DEADLINE_S)
    for layer in range(intact.n_layers):
        for part in np.array_split(np.arange(intact.ffn_dim, dtype=np.uint32), 8):
            assert is_right(engine, intact, layer, part)
            assert np.array_equal(engine.slots[slots], intact.content(1, ids))
    engine.release(fetch)


def test_fetch_of_nothing_is_ready(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 4)
    assert len(fetched(engine, 0, neurons())) == 0
    engine.hint(0, neurons())


def test_a_fetch_knows_its_slots_and_which_are_filled_while_the_rest_is_read(
    open_engine: OpenEngine, intact: Shards, slow_disk: SlowDisk
) -> None:
    engine = open_engine(intact, 20)
    ids = neurons(3, 5, 8, 13, 60)
    fetched(engine, 1, neurons(5, 60))
    slow_disk.delay_s = 0.3
    fetch = engine.fetch(1, ids)
    leased = engine.leased(fetch)
    assert leased is not None
    slots, are_filled = leased
    assert are_filled.tolist() == [False, True, False, False, True]
    assert np.array_equal(engine.slots[slots[are_filled]], intact.content(1, ids[are_filled]))
    assert engine.wait(fetch, DEADLINE_S).tolist() == slots.tolist()
    leased = engine.leased(fetch)
    assert leased is not None
    assert leased[1].all()
    engine.release(fetch)
    assert engine.leased(fetch) is None


def test_a_fetch_that_waits_for_slots_leases_none(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 8)
    holder = engine.fetch(0, np.arange(8, dtype=np.uint32))
    engine.wait(holder, DEADLINE_S)
    late = engine.fetch(0, neurons(1, 9))
    assert engine.leased(late) is None
    engine.release(late)
    engine.release(holder)


def test_slots_are_the_arena_and_nothing_else(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 7)
    assert engine.slots.shape == (7, intact.bundle_nbytes)
    assert engine.slots.nbytes == 7 * intact.bundle_nbytes
    assert engine.slots.dtype == np.uint8
    assert engine.slots.ctypes.data % 4096 == 0


# --- hints


@all_io
def test_hinted_bundles_are_hits_and_read_once(open_engine: OpenEngine, intact: Shards, io: str) -> None:
    engine = open_engine(intact, 64, io)
    ids = np.arange(0, 61, 4, dtype=np.uint32)
    engine.hint(2, ids)
    engine.hint(2, ids)
    engine.settle(DEADLINE_S)
    before = engine.counts()
    assert before.hinted == len(ids)
    assert is_right(engine, intact, 2, ids)
    since = engine.counts() - before
    assert (since.hits, since.misses, since.reads) == (len(ids), 0, 0)


@all_io
def test_fetch_waits_for_what_a_hint_is_bringing(open_engine: OpenEngine, intact: Shards, io: str) -> None:
    engine = open_engine(intact, 64, io)
    ids = np.arange(0, 61, 4, dtype=np.uint32)
    engine.hint(0, ids)
    assert is_right(engine, intact, 0, ids)
    counts = engine.counts()
    assert (counts.hinted, counts.misses) == (len(ids), 0)


def test_hint_leaves_leased_bundles_alone(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 20)
    ids = np.arange(20, dtype=np.uint32)
    fetch = engine.fetch(0, ids)
    slots = engine.wait(fetch, DEADLINE_S)
    engine.hint(1, np.arange(61, dtype=np.uint32))
    engine.settle(DEADLINE_S)
    assert engine.counts().hinted == 0
    assert np.array_equal(engine.slots[slots], intact.content(0, ids))
    engine.release(fetch)


def test_settle_waits_for_what_hints_bring(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 64)
    engine.hint(0, np.arange(61, dtype=np.uint32))
    engine.settle(DEADLINE_S)
    before = engine.counts()
    engine.settle(0)
    assert before.bytes_from_disk >= before.hinted * intact.bundle_nbytes


# --- slots run out


def test_fetch_of_more_than_all_slots_is_refused_at_once(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 8)
    with pytest.raises(ArenaBusy, match=r"layer 2: 9 bundles asked for at once, the arena has 8 slots; .*in parts"):
        engine.fetch(2, np.arange(9, dtype=np.uint32))
    assert is_right(engine, intact, 2, np.arange(8, dtype=np.uint32))


@all_io
def test_wait_for_slots_that_others_lease_ends_at_its_deadline_and_names_the_leases(
    open_engine: OpenEngine, intact: Shards, io: str
) -> None:
    engine = open_engine(intact, 8, io)
    holder = engine.fetch(0, np.arange(8, dtype=np.uint32))
    engine.wait(holder, DEADLINE_S)
    late = engine.fetch(1, neurons(3))
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0.2 s: 8 of 8 slots are leased.*release fetches"):
        engine.wait(late, 0.2)
    assert 0.2 <= time.monotonic() - begin < 5
    engine.release(holder)
    assert np.array_equal(engine.slots[engine.wait(late, DEADLINE_S)], intact.content(1, neurons(3)))
    engine.release(late)


@all_io
def test_release_wakes_a_fetch_that_waits_in_another_thread(open_engine: OpenEngine, intact: Shards, io: str) -> None:
    engine = open_engine(intact, 8, io)
    holder = engine.fetch(0, np.arange(8, dtype=np.uint32))
    engine.wait(holder, DEADLINE_S)
    waiter = InThread(lambda: is_right(engine, intact, 1, np.arange(8, dtype=np.uint32)))
    time.sleep(0.05)
    assert not waiter.is_over
    engine.release(holder)
    assert waiter.result()


def test_fetch_given_up_lets_those_behind_it_pass(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 8)
    holder = engine.fetch(0, np.arange(6, dtype=np.uint32))
    engine.wait(holder, DEADLINE_S)
    large, small = engine.fetch(1, np.arange(7, dtype=np.uint32)), engine.fetch(2, neurons(9))
    with pytest.raises(TimeoutError):
        engine.wait(small, 0.05)
    engine.release(large)
    assert np.array_equal(engine.slots[engine.wait(small, DEADLINE_S)], intact.content(2, neurons(9)))
    engine.release(small)
    engine.release(holder)


def test_fetch_released_while_its_reads_are_under_way_gives_its_slots_back(
    open_engine: OpenEngine, intact: Shards, rng: np.random.Generator
) -> None:
    engine = open_engine(intact, 16)
    for _ in range(30):
        engine.release(engine.fetch(int(rng.integers(3)), some_ids(rng, intact.ffn_dim, 16)))
    assert is_right(engine, intact, 1, np.arange(16, dtype=np.uint32))


def test_release_may_be_called_twice(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 4)
    one, other = engine.fetch(0, neurons(1)), engine.fetch(0, neurons(1))
    engine.wait(other, DEADLINE_S)
    engine.release(one)
    engine.release(one)
    assert is_right(engine, intact, 1, neurons(0, 1, 2))
    assert np.array_equal(engine.slots[engine.wait(other, DEADLINE_S)], intact.content(0, neurons(1)))
    engine.release(other)


def test_request_that_makes_no_sense_does_not_stop_the_engine(open_engine: OpenEngine, intact: Shards) -> None:
    """Neurons and layers that no model of this size has."""
    engine = open_engine(intact, 8)
    for layer, ids in ((0, neurons(61)), (3, neurons(0))):
        with pytest.raises((SparseFlowError, IndexError)):
            engine.wait(engine.fetch(layer, ids), 0.5)
        with pytest.raises((SparseFlowError, IndexError)):
            engine.hint(layer, ids)
    assert is_right(engine, intact, 0, neurons(0, 60))


# --- several threads


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_threads_that_fetch_at_once_all_get_the_right_bytes(
    tmp_path: Path, rng: np.random.Generator, open_engine: OpenEngine, io: str, bundle_nbytes: int
) -> None:
    shards = Shards(tmp_path / "store", bundle_nbytes=bundle_nbytes)
    n_slots = 30
    engine = open_engine(shards, n_slots, io)

    def work(own: np.random.Generator) -> int:
        n_right = 0
        for _ in range(25):
            ids = some_ids(own, shards.ffn_dim, int(own.integers(1, n_slots + 1)))
            n_right += is_right(engine, shards, int(own.integers(shards.n_layers)), ids)
        return n_right

    workers = [InThread(lambda own=own: work(own)) for own in rng.spawn(5)]  # type: ignore[misc]
    assert [worker.result() for worker in workers] == [25] * 5


def test_thread_in_a_long_wait_does_not_keep_others_from_theirs(open_engine: OpenEngine, intact: Shards) -> None:
    engine = open_engine(intact, 8)
    holder = engine.fetch(0, np.arange(5, dtype=np.uint32))
    engine.wait(holder, DEADLINE_S)
    patient = InThread(lambda: is_right(engine, intact, 0, np.arange(3, dtype=np.uint32)))
    assert patient.result()
    blocked = engine.fetch(1, np.arange(8, dtype=np.uint32))
    waiter = InThread(lambda: engine.wait(blocked, DEADLINE_S))
    time.sleep(0.02)
    begin = time.monotonic()
    engine.release(holder)
    waiter.result()
    assert time.monotonic() - begin < 5
    engine.release(blocked)


# --- damage


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_flipped_byte_is_told_to_the_fetches_that_want_it_and_to_no_others(
    tmp_path: Path, open_engine: OpenEngine, io: str, bundle_nbytes: int
) -> None:
    shards = Shards(tmp_path / "store", bundle_nbytes=bundle_nbytes)
    engine = open_engine(shards, 40, io)
    with shards.flipped(1, 33):
        good, bad, other = (engine.fetch(1, neurons(31, 32, 34, 35)), engine.fetch(1, neurons(30, 33, 34)),
                            engine.fetch(0, neurons(33)))  # fmt: skip
        assert np.array_equal(engine.slots[engine.wait(good, DEADLINE_S)], shards.content(1, neurons(31, 32, 34, 35)))
        for _ in range(2):
            with pytest.raises(ShardCorrupt) as caught:
                engine.wait(bad, DEADLINE_S)
            assert str(shards.path(1)) in str(caught.value)
            assert "layer 1" in str(caught.value)
            assert "neuron 33 " in str(caught.value)
        assert np.array_equal(engine.slots[engine.wait(other, DEADLINE_S)], shards.content(0, neurons(33)))
        for fetch in (good, bad, other):
            engine.release(fetch)
        assert is_right(engine, shards, 1, neurons(30, 34))
        with pytest.raises(ShardCorrupt):
            fetched(engine, 1, neurons(33))
    assert is_right(engine, shards, 1, neurons(30, 33, 34))


def test_each_fetch_is_told_of_a_neuron_that_it_wants(
    tmp_path: Path, open_engine: OpenEngine, slow_disk: SlowDisk
) -> None:
    """Though one hint brought both."""
    shards = Shards(tmp_path / "store")
    engine = open_engine(shards, 64)
    slow_disk.delay_s = 0.1
    with shards.flipped(1, 5, 6):
        engine.hint(1, np.arange(40, dtype=np.uint32))
        one, other = engine.fetch(1, neurons(4, 5)), engine.fetch(1, neurons(6, 7))
        with pytest.raises(ShardCorrupt, match="neuron 5 "):
            engine.wait(one, DEADLINE_S)
        with pytest.raises(ShardCorrupt, match="neuron 6 "):
            engine.wait(other, DEADLINE_S)


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("bundle_nbytes", [512, 1600])
def test_file_cut_while_it_is_open_refuses_what_is_gone_and_gives_the_rest(
    tmp_path: Path, open_engine: OpenEngine, io: str, bundle_nbytes: int
) -> None:
    shards = Shards(tmp_path / "store", bundle_nbytes=bundle_nbytes)
    engine = open_engine(shards, 40, io)
    with shards.cut(2, 50, 7):
        for _ in range(2):
            with pytest.raises(ShardCorrupt) as caught:
                fetched(engine, 2, neurons(3, 50))
            assert str(shards.path(2)) in str(caught.value)
            assert "layer 2" in str(caught.value)
            assert is_right(engine, shards, 2, neurons(2, 3, 49))
        assert is_right(engine, shards, 1, neurons(50, 60))
    assert is_right(engine, shards, 2, neurons(3, 50, 60))


def test_hint_past_the_end_of_a_cut_file_does_not_refuse_a_fetch_of_what_is_there(
    tmp_path: Path, open_engine: OpenEngine, slow_disk: SlowDisk
) -> None:
    shards = Shards(tmp_path / "store")
    engine = open_engine(shards, 61)
    slow_disk.delay_s = 0.1
    with shards.cut(2, 50):
        engine.hint(2, np.arange(40, 60, dtype=np.uint32))
        assert is_right(engine, shards, 2, neurons(45, 49))


def test_missing_shard_and_shard_of_another_size_are_refused_when_opened(tmp_path: Path, nothing_left: None) -> None:
    shards = Shards(tmp_path / "store")
    with shards.cut(1, 3), pytest.raises(ShardCorrupt, match=r"layer-001"):
        opened(shards, 8)
    shards.path(2).unlink()
    with pytest.raises(DiskError, match=r"layer-002.*missing"):
        opened(shards, 8)


def test_shard_of_another_layer_is_refused_when_opened(tmp_path: Path, nothing_left: None) -> None:
    """Its bundles agree with its own checksums, and its size is right."""
    shards = Shards(tmp_path / "store")
    shards.path(2).write_bytes(shards.path(0).read_bytes())
    with pytest.raises(ShardCorrupt, match=r"layer-002.*its checksums are not those of this store"):
        opened(shards, 8)


# --- the end


@all_io
def test_engine_that_is_forgotten_lets_go_of_all(tmp_path: Path, io: str, nothing_left: None) -> None:
    """With reads under way, whose memory must outlive them."""
    shards = Shards(tmp_path / "store", ffn_dim=400)
    for _ in range(5):
        engine = opened(shards, 300, io)
        engine.fetch(0, np.arange(300, dtype=np.uint32))
        del engine
        gc.collect()


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_close_leaves_no_thread_no_descriptor_and_no_map(tmp_path: Path, io: str, bundle_nbytes: int) -> None:
    shards = Shards(tmp_path / "store", bundle_nbytes=bundle_nbytes)
    opened(shards, 1000, io).close()  # whatever is made once is made
    gc.collect()
    process = psutil.Process()
    threads, n_fds = set(threading.enumerate()), process.num_fds()
    aio_contexts = n_aio_rings()
    for _ in range(2):
        engine = opened(shards, 1000, io)
        assert process.num_fds() > n_fds
        engine.hint(0, np.arange(60, dtype=np.uint32))
        engine.fetch(1, np.arange(60, dtype=np.uint32))
        engine.close()
        engine.close()
        assert set(threading.enumerate()) <= threads
        assert process.num_fds() <= n_fds
        assert not [where.path for where in process.memory_maps() if str(shards.folder) in where.path]
        assert n_aio_rings() == aio_contexts


def n_aio_rings() -> int:
    """Linux maps a ring for each AIO context of a process."""
    return Path("/proc/self/maps").read_text().count("/[aio]")


def test_memory_of_the_arena_goes_with_the_engine(intact: Shards) -> None:
    n_slots = 100_000  # 51 MB
    process = psutil.Process()
    engine = opened(intact, n_slots)
    engine.slots[:] = 1
    full = process.memory_info().rss
    engine.close()
    del engine
    gc.collect()
    assert full - process.memory_info().rss > 0.8 * n_slots * intact.bundle_nbytes


@all_io
def test_close_ends_a_wait_in_another_thread(open_engine: OpenEngine, intact: Shards, io: str) -> None:
    engine = open_engine(intact, 8, io)
    engine.wait(engine.fetch(0, np.arange(8, dtype=np.uint32)), DEADLINE_S)
    late = engine.fetch(1, neurons(1))
    waiter = InThread(lambda: engine.wait(late, 600))
    time.sleep(0.05)
    assert not waiter.is_over
    engine.close()
    with pytest.raises(BadRequest, match="closed"):
        waiter.result(5)


def test_close_ends_waits_and_settles_for_reads_that_are_under_way(
    open_engine: OpenEngine, intact: Shards, slow_disk: SlowDisk
) -> None:
    """With what was waited for, if that has come, or by saying that the store was closed."""
    for _ in range(5):
        engine = open_engine(intact, 100)
        slow_disk.delay_s = 0.2
        engine.hint(2, np.arange(0, 61, 2, dtype=np.uint32))
        waits = [InThread(lambda n=n, engine=engine: engine.wait(engine.fetch(0, neurons(n)), 600))  # type: ignore[misc]
                 for n in range(3)]  # fmt: skip
        waits += [InThread(lambda engine=engine: engine.settle(600)) for _ in range(3)]  # type: ignore[misc]
        time.sleep(0.05)
        engine.close()
        slow_disk.delay_s = 0.0
        for each in waits:
            with suppress(BadRequest):
                each.result(5)


def test_closed_engine_refuses_fetches_and_hints_and_forgives_releases(intact: Shards, nothing_left: None) -> None:
    engine = opened(intact, 8)
    fetch = engine.fetch(0, neurons(1))
    engine.wait(fetch, DEADLINE_S)
    engine.close()
    for use in (lambda: engine.fetch(0, neurons(1)), lambda: engine.hint(0, neurons(1))):
        with pytest.raises(BadRequest, match="closed"):
            use()
    engine.release(fetch)
    engine.counts()


class Interrupted(KeyboardInterrupt):
    """As Ctrl-C comes to the main thread, and to be told from it."""


WORK = {f"{name}.py" for name in ("loader", "read_queue", "read_plan", "residency", "eviction", "shard_files")}


class Interruption:
    """Raises `Interrupted` in the main thread, once, as soon as that is at the engine's work, or wherever it is."""

    def __init__(self) -> None:
        self._is_due = False
        self.anywhere = False

    def on_alarm(self, _number: int, frame: Any) -> None:
        if not self._is_due:
            return
        if self.anywhere or Path(frame.f_code.co_filename).name in WORK:
            self._is_due = False
            raise Interrupted
        signal.setitimer(signal.ITIMER_REAL, 0.0002)

    def after(self, seconds: float) -> None:
        self._is_due = True
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def call_off(self) -> None:
        self._is_due = False
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    made = Interruption()
    before = signal.signal(signal.SIGALRM, made.on_alarm)
    yield made
    made.call_off()
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_interrupted_engine_goes_on_or_says_that_it_does_not(
    tmp_path: Path,
    open_engine: OpenEngine,
    io: str,
    interruption: Interruption,
    rng: np.random.Generator,
) -> None:
    """Ctrl-C while a model generates, then it generates again: nobody may wait for reads that were forgotten."""
    shards = Shards(tmp_path / "store", n_layers=2, ffn_dim=4000, bundle_nbytes=4096)
    n_interrupted = n_told = 0
    for _ in range(12):
        engine = open_engine(shards, 3000, io)
        fetch = engine.fetch(0, some_ids(rng, 4000, 2000))
        try:
            interruption.after(float(rng.uniform(0.0005, 0.01)))
            engine.wait(fetch, DEADLINE_S)
        except Interrupted:
            n_interrupted += 1
        finally:
            interruption.call_off()
        engine.release(fetch)
        try:
            engine.settle(DEADLINE_S)
            assert is_right(engine, shards, 0, some_ids(rng, 4000, 3000))
        except SparseFlowError:
            n_told += 1
        engine.close()
    print(f"{n_interrupted} of 12 waits interrupted, {n_told} engines said that they do not go on")


def test_thread_that_waits_is_not_left_alone_when_the_one_that_collects_is_interrupted(
    open_engine: OpenEngine, intact: Shards, interruption: Interruption, slow_disk: SlowDisk
) -> None:
    engine = open_engine(intact, 30)
    slow_disk.delay_s = 0.5
    fetch = engine.fetch(0, neurons(1))

    def wait_later() -> bool:
        time.sleep(0.1)  # the main thread collects by now
        return is_right(engine, intact, 1, neurons(2, 30))

    other = InThread(wait_later)
    interruption.anywhere = True
    interruption.after(0.3)
    with pytest.raises(Interrupted):
        engine.wait(fetch, DEADLINE_S)  # does nothing but wait for the disk then
    try:
        assert other.result(5)
    finally:
        engine.close()


class Failing:
    """Something of the engine's that raises, as when a bug or a signal strikes it."""

    def __init__(self, kind: type[BaseException], *arguments: Any) -> None:
        self._kind, self._arguments = kind, arguments

    def __call__(self, *_arguments: Any, **_options: Any) -> Any:
        raise self._kind(*self._arguments)


def test_broken_engine_says_so_at_once_lets_go_of_fetches_and_closes(
    intact: Shards, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    engine = opened(intact, 30)
    held = engine.fetch(0, neurons(1, 2))
    engine.wait(held, DEADLINE_S)
    with monkeypatch.context() as patch:
        patch.setattr("sparseflow.engine.residency.Residency._place", Failing(Interrupted))
        with pytest.raises(Interrupted):
            engine.fetch(1, neurons(3))
    for use in (lambda: engine.fetch(0, neurons(1)), lambda: engine.hint(0, neurons(1)), lambda: engine.wait(77, 20)):
        begin = time.monotonic()
        with pytest.raises(DiskError, match="open it again"):
            use()
        assert time.monotonic() - begin < 5
    engine.release(held)
    engine.counts()
    engine.close()


# --- which way to read


def test_auto_reads_directly_where_it_can(open_engine: OpenEngine, intact: Shards) -> None:
    opened(intact, 4, "direct").close()  # skips where it cannot
    engine = open_engine(intact, 4, "auto")
    assert (engine.io, engine.reasons) == ("direct", ())


def test_auto_reads_through_the_page_cache_where_the_kernel_has_no_aio(
    open_engine: OpenEngine, intact: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_queue.platform, "machine", lambda: "riscv64")
    engine = open_engine(intact, 8, "auto")
    assert engine.io == "buffered"
    assert "riscv64" in engine.reasons[0]
    assert is_right(engine, intact, 0, neurons(1, 2, 60))
    with pytest.raises(DiskError, match="riscv64"):
        Engine(intact.folder, intact.manifest, 8, io="direct")


def test_refused_modes_leave_nothing_open(intact: Shards, monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    with pytest.raises(BadRequest, match=r"io='mmap'.*auto, direct, buffered, map"):
        Engine(intact.folder, intact.manifest, 8, io="mmap")
    monkeypatch.setattr(read_queue.platform, "machine", lambda: "riscv64")
    with pytest.raises(DiskError):
        Engine(intact.folder, intact.manifest, 8, io="direct")


def test_arena_that_cannot_be_had_leaves_nothing_open(intact: Shards, nothing_left: None) -> None:
    with pytest.raises(MemoryError, match="give less memory"):
        Engine(intact.folder, intact.manifest, 1 << 50, io="buffered")


def test_unknown_eviction_leaves_nothing_open(intact: Shards, nothing_left: None) -> None:
    with pytest.raises((SparseFlowError, KeyError)):
        Engine(intact.folder, intact.manifest, 8, io="buffered", eviction="random")


@pytest.mark.parametrize("io", ["auto", "direct", "buffered", "map"])
@pytest.mark.parametrize("error", [Interrupted, DiskError])
def test_opening_that_ends_while_the_disk_is_measured_leaves_nothing_open(
    intact: Shards, monkeypatch: pytest.MonkeyPatch, nothing_left: None, io: str, error: type[BaseException]
) -> None:
    aio_rings = n_aio_rings()
    monkeypatch.setattr("sparseflow.engine.disk_speed.measure", Failing(error))
    with pytest.raises(error):
        opened(intact, 8, io)
    gc.collect()
    assert n_aio_rings() == aio_rings
    assert not [where.path for where in psutil.Process().memory_maps() if str(intact.folder) in where.path]


def test_file_system_that_opens_for_direct_reads_but_refuses_them_is_as_one_that_does_not(
    intact: Shards, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    opened(intact, 4, "direct").close()  # skips where nothing is read directly
    refusal = Failing(OSError, errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    monkeypatch.setattr("sparseflow.engine.shard_files.os.preadv", refusal)
    with pytest.raises(DiskError, match=r"io='buffered'"):
        Engine(intact.folder, intact.manifest, 8, io="direct")
    engine = opened(intact, 8, "auto")
    assert engine.io == "buffered"
    assert engine.reasons
    assert is_right(engine, intact, 0, neurons(1, 60))
    engine.close()


WITHOUT_DIRECT_IO = """
import sys
from pathlib import Path
import numpy as np
from shards import Shards, neurons
from sparseflow.engine.engine import Engine
from sparseflow.errors import DiskError
shards = Shards(Path(sys.argv[1]) / "store")
engine = Engine(shards.folder, shards.manifest, 8, io="auto")
slots = engine.wait(engine.fetch(1, neurons(3, 60)), 20)
assert np.array_equal(engine.slots[slots], shards.content(1, neurons(3, 60)))
print(engine.io, engine.reasons)
engine.close()
try:
    Engine(shards.folder, shards.manifest, 8, io="direct")
except DiskError as error:
    print("refused:", error)
"""


def run_on(mount: list[str], folder: Path) -> str:
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    command = ["sh", "-c", 'eval "$MOUNT" && exec "$@"', "sh", sys.executable, "-c", WITHOUT_DIRECT_IO, str(folder)]
    environment = os.environ | {"PYTHONPATH": path, "MOUNT": " ".join(mount) if mount else "true"}
    unshare = ["unshare", "--mount"] if mount else []
    result = subprocess.run(
        [*unshare, *command], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    if mount and ("mount:" in result.stderr or "unshare:" in result.stderr or "Permission" in result.stderr):
        pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_fell_back(said: str) -> None:
    assert said.startswith("buffered ")
    assert "refuses direct I/O" in said.splitlines()[0]
    assert "refused:" in said
    assert "io='buffered'" in said.split("refused:")[1]


def test_auto_falls_back_on_a_file_system_without_direct_reads(tmp_path: Path) -> None:
    """ramfs has none, whatever the kernel; it is mounted where only the child sees it."""
    check_fell_back(run_on(["mount", "-t", "ramfs", "none", str(tmp_path)], tmp_path))


def test_auto_falls_back_in_shared_memory(tmp_path: Path) -> None:
    folder = Path("/dev/shm") / f"sparseflow-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "probe").write_bytes(bytes(4096))
        try:
            os.close(os.open(folder / "probe", os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pass
        else:
            pytest.skip("tmpfs of this kernel (6.6 or later) takes O_DIRECT")
        check_fell_back(run_on([], folder))
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True, timeout=20)


def test_engine_needs_no_torch() -> None:
    said = run_python("import sys, sparseflow.engine.engine; print('torch' in sys.modules)")
    assert said.strip() == "False"
