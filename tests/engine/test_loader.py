"""Loads of real shards, every way to read them: each slot gets its bundle or a reason, and no other byte changes."""

import errno
import mmap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import BUNDLE_SIZES, Shards, neurons, some_ids

from sparseflow.engine.arena import Arena
from sparseflow.engine.disk_speed import DiskSpeed
from sparseflow.engine.loader import Loader
from sparseflow.engine.read_queue import (
    AioQueue,
    DirectRefused,
    Finished,
    ReadQueue,
    ThreadQueue,
    copy_from,
    read_vector,
)
from sparseflow.engine.residency import Failed, Load, Loaded
from sparseflow.engine.shard_files import ShardFiles
from sparseflow.errors import DiskError, ShardCorrupt

IO = ("direct", "buffered", "map")
DEADLINE_S = 20.0
EMPTY = 0xA5  # what slots hold before anything is loaded

all_io = pytest.mark.parametrize("io", IO)
all_sizes = pytest.mark.parametrize("bundle_nbytes", BUNDLE_SIZES.values(), ids=BUNDLE_SIZES)


class Tampered:
    """A queue as the loader sees it, watched and meddled with on the way."""

    def __init__(self, queue: ReadQueue) -> None:
        self._queue = queue
        self.name = queue.name
        self.takes: Callable[[int], int] = lambda n: n
        """How many of n reads are taken."""
        self.result: Callable[[int], int] = lambda result: result
        """What is reported in place of a result."""
        self.n_under_way = self.most_under_way = 0

    def submit(self, reads: NDArray[np.void]) -> int:
        n = self.takes(len(reads))
        taken = self._queue.submit(reads[:n]) if n else 0
        self.n_under_way += taken
        self.most_under_way = max(self.most_under_way, self.n_under_way)
        return taken

    def wait(self, least: int, timeout_s: float) -> None:
        self._queue.wait(min(least, self.n_under_way), timeout_s)

    def take(self) -> Finished:
        finished = self._queue.take()
        self.n_under_way -= len(finished.tokens)
        return Finished(finished.tokens, np.array([self.result(int(n)) for n in finished.results], np.int64))

    def close(self) -> None:
        self._queue.close()


class Bench:
    """A loader over shards, with an arena that is marked empty."""

    def __init__(self, shards: Shards, io: str, *, n_slots: int = 64, depth: int = 8, gap_nbytes: int = 0) -> None:
        self.shards = shards
        self.files = ShardFiles(shards.folder, shards.manifest)
        alignment = self.files.open(direct=io == "direct")
        if alignment is None:
            pytest.skip(f"{shards.folder}: this file system refuses direct I/O")
        self.alignment = alignment
        self.queue = Tampered(self._queue(io))
        self.arena = Arena(n_slots, shards.bundle_nbytes)
        self.arena.slots[:] = EMPTY
        self.loader = Loader(self.files, self.arena, self.queue, DiskSpeed(depth, float(gap_nbytes), 1.0), alignment)

    def _queue(self, io: str) -> ReadQueue:
        if io == "direct":
            try:
                return AioQueue(64)
            except DirectRefused as error:
                self.files.close()
                pytest.skip(str(error))
        if io == "buffered":
            return ThreadQueue(io, read_vector, 3)
        self.maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in self.files.fds]
        where = {fd: (np.frombuffer(m, np.uint8).ctypes.data, len(m))
                 for fd, m in zip(self.files.fds, self.maps, strict=True)}  # fmt: skip
        return ThreadQueue(io, copy_from(where), 3)

    def load(self, layer: int, ids: NDArray[np.uint32], slots: Any, *, is_hint: bool = False) -> None:
        self.loader.begin(Load(layer, ids, np.array(slots, np.int64), is_hint))

    def drained(self) -> tuple[list[int], list[Failed]]:
        """Slots that are reported filled, in order, and failures, once nothing is under way any more."""
        loaded: list[int] = []
        failed: list[Failed] = []
        deadline = time.monotonic() + DEADLINE_S
        while not self.loader.is_idle:
            assert time.monotonic() < deadline, "reads do not end"
            self.loader.wait(0.2)
            for event in self.loader.collect():
                match event:
                    case Loaded():
                        loaded += event.slots.tolist()
                    case Failed():
                        failed.append(event)
        return sorted(loaded), failed

    def holds(self, layer: int, ids: NDArray[np.uint32], slots: Any) -> bool:
        return np.array_equal(self.arena.slots[slots], self.shards.content(layer, ids))

    def close(self) -> None:
        self.loader.close()
        self.files.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """(io, sizes of the shards..., options of Bench...) -> Bench; closed at the end."""
    made: list[Bench] = []

    def make(io: str, **options: Any) -> Bench:
        sizes = {key: options.pop(key) for key in ("n_layers", "ffn_dim", "bundle_nbytes") if key in options}
        made.append(Bench(Shards(tmp_path / f"store-{len(made)}", **sizes), io, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# --- bytes


@all_io
@all_sizes
def test_random_loads_fill_their_slots_and_touch_no_others(
    bench: Callable[..., Bench], rng: np.random.Generator, io: str, bundle_nbytes: int
) -> None:
    b = bench(io, bundle_nbytes=bundle_nbytes, gap_nbytes=int(rng.choice([0, 700, 20_000])))
    for _ in range(10):
        slots = rng.permutation(len(b.arena.slots))
        expected = b.arena.slots.copy()
        used: list[int] = []
        for layer in range(b.shards.n_layers):
            n = int(rng.integers(0, 20))
            ids, its, slots = some_ids(rng, b.shards.ffn_dim, n), slots[:n], slots[n:]
            if n:
                b.load(layer, ids, its, is_hint=bool(rng.integers(2)))
            expected[its] = b.shards.content(layer, ids)
            used += its.tolist()
        assert b.drained() == (sorted(used), [])
        assert np.array_equal(b.arena.slots, expected)


@all_io
@all_sizes
@pytest.mark.parametrize("ffn_dim", [1, 2, 5, 17])
def test_bundles_at_both_ends_of_a_small_file(
    bench: Callable[..., Bench], io: str, bundle_nbytes: int, ffn_dim: int
) -> None:
    """After the last bundle come 8 bytes of checksum a bundle, then the end: an aligned span may pass it."""
    b = bench(io, n_layers=1, ffn_dim=ffn_dim, bundle_nbytes=bundle_nbytes)
    everything = np.arange(ffn_dim, dtype=np.uint32)
    for ids in (everything, everything[-1:], everything[:1], everything[1::2]):
        if len(ids):
            b.arena.slots[:] = EMPTY
            b.load(0, ids, np.arange(len(ids)) + 3)
            assert b.drained() == (list(range(3, 3 + len(ids))), [])
            assert b.holds(0, ids, np.arange(len(ids)) + 3)


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96, 147456])
def test_whole_layers_come_in_long_reads(bench: Callable[..., Bench], io: str, bundle_nbytes: int) -> None:
    ffn_dim = max(20, (1 << 20) // bundle_nbytes)
    b = bench(io, n_layers=2, ffn_dim=ffn_dim, bundle_nbytes=bundle_nbytes, n_slots=ffn_dim, gap_nbytes=4096)
    ids = np.arange(ffn_dim, dtype=np.uint32)
    slots = np.arange(ffn_dim)[::-1]
    b.load(1, ids, slots)
    assert b.drained() == (list(range(ffn_dim)), [])
    assert b.holds(1, ids, slots)
    most = max(-(-ffn_dim * bundle_nbytes // (64 << 10)), ffn_dim // 512) + 2 if bundle_nbytes < 100_000 else ffn_dim
    assert b.loader.counts.reads <= most


@all_io
def test_neighbours_and_short_gaps_come_with_one_read(bench: Callable[..., Bench], io: str) -> None:
    ids = neurons(3, 4, 7, 20, 21)
    for gap_nbytes, n_reads, n_bundles in ((0, 3, 5), (2 * 512, 2, 7), (40 * 512, 1, 19)):
        b = bench(io, gap_nbytes=gap_nbytes)
        if b.alignment > 512:
            pytest.skip(f"direct I/O asks for {b.alignment} bytes here")
        b.load(0, ids, [5, 9, 1, 2, 3])
        assert b.drained() == ([1, 2, 3, 5, 9], [])
        assert b.holds(0, ids, [5, 9, 1, 2, 3])
        assert (b.loader.counts.reads, b.loader.counts.bytes_read) == (n_reads, n_bundles * 512)
        assert len(b.loader.reads_of(ids)) == n_reads


def test_direct_reads_of_misaligned_bundles_are_whole_blocks(bench: Callable[..., Bench]) -> None:
    b = bench("direct", bundle_nbytes=96)
    b.load(0, neurons(1, 2), [0, 1])
    b.drained()
    assert b.loader.counts.bytes_read == b.alignment


# --- how many at once


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_never_more_reads_under_way_than_the_depth(
    bench: Callable[..., Bench], rng: np.random.Generator, io: str, bundle_nbytes: int, depth: int
) -> None:
    b = bench(io, bundle_nbytes=bundle_nbytes, depth=depth)
    assert b.loader.room == depth
    chosen = [some_ids(rng, b.shards.ffn_dim, 16) for _ in range(3)]
    for layer, ids in enumerate(chosen):
        b.load(layer, ids, np.arange(16 * layer, 16 * layer + 16))
    assert b.loader.room == 0
    assert b.drained() == (list(range(48)), [])
    assert b.queue.most_under_way <= depth
    assert b.loader.room == depth
    assert all(b.holds(layer, ids, np.arange(16 * layer, 16 * layer + 16)) for layer, ids in enumerate(chosen))


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_queue_that_takes_few_or_none_at_times_gets_the_rest_later(
    bench: Callable[..., Bench], rng: np.random.Generator, io: str, bundle_nbytes: int
) -> None:
    b = bench(io, bundle_nbytes=bundle_nbytes, depth=6)
    b.queue.takes = lambda n: int(rng.integers(0, min(n, 3) + 1))
    for _ in range(10):
        b.arena.slots[:] = EMPTY
        chosen = [some_ids(rng, b.shards.ffn_dim, 20) for _ in range(3)]
        for layer, ids in enumerate(chosen):
            b.load(layer, ids, np.arange(20 * layer, 20 * layer + 20))
        assert b.drained() == (list(range(60)), [])
        assert all(b.holds(layer, ids, np.arange(20 * layer, 20 * layer + 20)) for layer, ids in enumerate(chosen))
    assert b.loader.room == 6


def test_wait_with_nothing_under_way_ends_at_its_deadline(bench: Callable[..., Bench]) -> None:
    b = bench("buffered")
    begin = time.monotonic()
    b.loader.wait(0.05)
    assert time.monotonic() - begin < 2
    assert b.loader.collect() == []
    assert b.loader.is_idle


# --- what goes wrong


def text_of(failed: list[Failed]) -> str:
    return "\n".join(str(failure.error) for failure in failed)


def failed_slots(failed: list[Failed]) -> list[int]:
    return sorted(slot for failure in failed for slot in failure.slots.tolist())


@all_io
@all_sizes
@pytest.mark.parametrize("gap_nbytes", [0, 1 << 16])
def test_flipped_bits_fail_their_bundles_and_no_others(
    bench: Callable[..., Bench], io: str, bundle_nbytes: int, gap_nbytes: int
) -> None:
    b = bench(io, bundle_nbytes=bundle_nbytes, gap_nbytes=gap_nbytes)
    ids, slots = neurons(0, 4, 5, 6, 30, 60), [10, 11, 12, 13, 14, 15]
    with b.shards.flipped(1, 5, 60, byte=bundle_nbytes - 1):
        b.load(1, ids, slots)
        loaded, failed = b.drained()
    assert loaded == [10, 11, 13, 14]
    assert b.holds(1, ids[[0, 1, 3, 4]], loaded)
    assert failed_slots(failed) == [12, 15]
    assert all(isinstance(failure.error, ShardCorrupt) for failure in failed)
    assert str(b.shards.path(1)) in text_of(failed)
    assert "layer 1" in text_of(failed)
    assert "neuron 5 " in text_of(failed) or "neuron 60 " in text_of(failed)
    assert "convert the model again" in text_of(failed)
    b.load(1, ids, slots)
    assert b.drained() == (slots, [])


@all_io
def test_flipped_bit_in_a_gap_that_is_read_along_concerns_nobody(bench: Callable[..., Bench], io: str) -> None:
    b = bench(io, gap_nbytes=1 << 16)
    with b.shards.flipped(0, 5):
        b.load(0, neurons(4, 6), [0, 1])
        assert b.drained() == ([0, 1], [])


@pytest.mark.parametrize("io", ["direct", "buffered"])
@all_sizes
@pytest.mark.parametrize("extra", [0, 1, 95])
def test_file_that_ends_early_fails_the_bundles_that_are_gone(
    bench: Callable[..., Bench], io: str, bundle_nbytes: int, extra: int
) -> None:
    b = bench(io, bundle_nbytes=bundle_nbytes)
    ids = neurons(2, 17, 38, 40, 42, 60)  # apart, so that each is a read of its own
    with b.shards.cut(2, 40, extra):
        b.load(2, ids, np.arange(6))
        loaded, failed = b.drained()
    assert loaded == [0, 1, 2]
    assert b.holds(2, ids[:3], [0, 1, 2])
    assert failed_slots(failed) == [3, 4, 5]
    assert all(isinstance(failure.error, ShardCorrupt) for failure in failed)
    assert all(str(b.shards.path(2)) in str(f.error) and "layer 2" in str(f.error) for f in failed)
    assert "ends early" in text_of(failed)


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_one_read_across_an_early_end_fails_only_the_bundles_that_are_gone(
    bench: Callable[..., Bench], io: str, bundle_nbytes: int
) -> None:
    """Which bundles come with one read is the plan's affair, and no reason to refuse those that are intact."""
    b = bench(io, bundle_nbytes=bundle_nbytes)
    with b.shards.cut(0, 40):
        b.load(0, neurons(38, 39, 40, 41), np.arange(4))
        loaded, failed = b.drained()
    assert failed_slots(failed) == [2, 3]
    assert loaded == [0, 1]


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_read_that_the_disk_answers_with_an_error_is_a_disk_error(
    bench: Callable[..., Bench], io: str, bundle_nbytes: int
) -> None:
    b = bench(io, bundle_nbytes=bundle_nbytes)
    b.queue.result = lambda _result: -errno.EIO
    b.load(1, neurons(3, 4, 9), [7, 8, 9])
    loaded, failed = b.drained()
    assert (loaded, failed_slots(failed)) == ([], [7, 8, 9])
    assert all(isinstance(f.error, DiskError) and not isinstance(f.error, ShardCorrupt) for f in failed)
    assert f"{b.shards.path(1)}: layer 1, neuron 3 cannot be read (Input/output error)" in text_of(failed)
    b.queue.result = lambda result: result
    b.load(1, neurons(3, 4, 9), [7, 8, 9])
    assert b.drained() == ([7, 8, 9], [])
    assert b.loader.room == 8


# --- the end


@all_io
@pytest.mark.parametrize("bundle_nbytes", [512, 96])
def test_close_waits_for_what_is_under_way_and_may_be_called_twice(
    bench: Callable[..., Bench], io: str, bundle_nbytes: int
) -> None:
    b = bench(io, bundle_nbytes=bundle_nbytes)
    for layer in range(3):
        b.load(layer, np.arange(0, 61, 3, dtype=np.uint32), np.arange(21) + 21 * layer)
    b.close()
    b.arena.slots[:] = EMPTY
    time.sleep(0.02)
    assert (b.arena.slots == EMPTY).all()
    assert b.loader.is_idle
    b.close()
