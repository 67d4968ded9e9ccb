"""Brings bundles from the shards into arena slots: plans the reads, keeps the disk busy, checks what came."""

import os
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine import read_plan
from sparseflow.engine.arena import Arena
from sparseflow.engine.disk_speed import DiskSpeed
from sparseflow.engine.read_queue import IOVEC, READ, READ_VECTOR, ReadQueue
from sparseflow.engine.residency import Failed, Load, Loaded
from sparseflow.engine.shard_files import ShardFiles
from sparseflow.errors import DiskError, ShardCorrupt, SparseFlowError

_PAGE = 4096
_LONGEST_SPAN_NBYTES = 64 << 10  # of reads that go through a cell
_MOST_CELLS = 64
_N_LATENCIES = 512
_NO_CELLS = np.empty(0, np.int64)
_NEVER_ENDED: "list[Loader]" = []
_REMEDY = "remove the store and convert the model again"


@dataclass(slots=True)
class LoadCounts:
    """Of all reads that were planned since the start. `bytes_read` is with gaps and the rest of aligned spans."""

    reads: int = 0
    bytes_read: int = 0
    bundles: int = 0


@dataclass(slots=True)
class _Batch:
    """The reads of one load. rows: (n,) READ; what they point to lives here until the last has ended."""

    load: Load
    plan: read_plan.Reads
    rows: NDArray[np.void]
    iovecs: NDArray[np.void]
    cells: NDArray[np.int64]  # (n,), where reads do not go straight to their slots
    begin_s: float
    n_begun: int = 0
    n_ended: int = 0


class Loader:
    """One method at a time, but `wait`, which one thread may be in while another begins loads."""

    def __init__(self, shards: ShardFiles, arena: Arena, queue: ReadQueue, speed: DiskSpeed, alignment: int) -> None:
        """
        Args:
            shards: open.
            speed: how many reads to have under way, and which gaps to read along.
            alignment: bytes; that of offset, length and memory of a read.
        """
        self.counts = LoadCounts()
        self.latencies_s: deque[float] = deque(maxlen=_N_LATENCIES)
        """Of the last loads that somebody waited for: from the plan to the last bundle."""
        self._shards, self._arena, self._queue, self._depth = shards, arena, queue, speed.depth
        self._alignment = alignment
        self._is_straight = shards.bundle_nbytes % alignment == 0 and shards.start % alignment == 0
        self._longest_nbytes = read_plan.LONGEST_READ_NBYTES if self._is_straight else _LONGEST_SPAN_NBYTES
        self._gap_nbytes = min(speed.gap_nbytes, self._longest_nbytes)
        self._scrap = _page_aligned(1, self._gap_nbytes)[0]
        if not self._is_straight:
            self._depth = min(self._depth, _MOST_CELLS)
        span = 0 if self._is_straight else max(self._longest_nbytes, shards.bundle_nbytes) + 2 * _PAGE
        self._cells = _page_aligned(self._depth, span)
        self._free_cells = list(range(self._depth))
        self._batches: dict[int, _Batch] = {}
        self._n_batches = 0
        self._not_begun: deque[int] = deque()  # batches that have reads to begin
        self._n_under_way = 0
        self._n_awaited = 0  # of those, not from hints

    @property
    def room(self) -> int:
        """Reads that could begin at once."""
        return 0 if self._not_begun else self._depth - self._n_under_way

    @property
    def is_idle(self) -> bool:
        """Nothing is under way or waiting to be."""
        return not self._batches

    def reads_of(self, ids: NDArray[np.uint32]) -> read_plan.Reads:
        """How bundles of one layer would be read."""
        return read_plan.group(ids, self._shards.bundle_nbytes, self._gap_nbytes, self._longest_nbytes)

    def begin(self, load: Load) -> None:
        """Begin to read, or line up behind what cannot begin yet."""
        plan, nbytes = self.reads_of(load.ids), self._shards.bundle_nbytes
        self._arena.begin(load.slots)
        rows = np.zeros(len(plan), READ)
        rows["opcode"], rows["fd"] = READ_VECTOR, self._shards.fds[load.layer]
        rows["offset"] = self._shards.start + load.ids[plan.first[:-1]].astype(np.int64) * nbytes
        if self._is_straight:
            addresses = self._arena.addresses(load.slots)
            vectors = read_plan.scatter(load.ids, addresses, plan, nbytes, self._scrap.ctypes.data)
            iovecs, first = vectors.iovecs, vectors.first
        else:  # the aligned span around what is wanted, to a cell that is chosen when the read begins
            end = self._shards.start + (load.ids[plan.first[1:] - 1].astype(np.int64) + 1) * nbytes
            rows["offset"] -= rows["offset"] % self._alignment
            iovecs, first = np.zeros(len(plan), IOVEC), np.arange(len(plan) + 1)
            iovecs["nbytes"] = -(-end // self._alignment) * self._alignment - rows["offset"]
        rows["iovecs"] = iovecs.ctypes.data + first[:-1] * IOVEC.itemsize
        rows["n_iovecs"] = first[1:] - first[:-1]
        number = self._n_batches = self._n_batches + 1
        rows["token"] = (number << 32) + np.arange(len(plan))
        cells = _NO_CELLS if self._is_straight else np.zeros(len(plan), np.int64)
        self._batches[number] = _Batch(load, plan, rows, iovecs, cells, time.monotonic())
        self._not_begun.append(number)
        self._begin_more()
        self.counts.reads += len(plan)
        self.counts.bytes_read += int(iovecs["nbytes"].sum())
        self.counts.bundles += len(load.ids)

    def wait(self, timeout_s: float) -> None:
        """Wait until reads have ended: those that somebody waits for; where others queue behind them, a good part."""
        least = max(1, min(self._n_awaited, self._depth // 2 if self._not_begun else self._depth))
        self._queue.wait(least, timeout_s)

    def collect(self) -> list[Loaded | Failed]:
        """What has ended since the last time. Begins what there is room for now."""
        events: list[Loaded | Failed] = []
        finished = self._queue.take()
        tokens, results = finished.tokens.view(np.int64), finished.results
        while len(tokens):
            number = int(tokens[0]) >> 32
            is_its = tokens >> 32 == number
            events += self._end(number, tokens[is_its] & 0xFFFFFFFF, results[is_its])
            tokens, results = tokens[~is_its], results[~is_its]
        self._begin_more()
        return events

    def close(self) -> None:
        """Wait for what is under way, and let the buffers go.

        Raises:
            DiskError: it does not end; all that it may write to is kept for ever.
        """
        try:
            self._queue.close()
        except DiskError:
            _NEVER_ENDED.append(self)
            raise
        self._batches.clear()
        self._not_begun.clear()

    def _begin_more(self) -> None:
        while self._not_begun and self._n_under_way < self._depth:
            batch = self._batches[self._not_begun[0]]
            n = min(len(batch.rows) - batch.n_begun, self._depth - self._n_under_way)
            rows = slice(batch.n_begun, batch.n_begun + n)
            if not self._is_straight:
                batch.cells[rows] = [self._free_cells.pop() for _ in range(n)]
                batch.iovecs["address"][rows] = self._cells.ctypes.data + batch.cells[rows] * self._cells.shape[1]
            taken = self._queue.submit(batch.rows[rows])
            if not self._is_straight:
                self._free_cells += batch.cells[batch.n_begun + taken : batch.n_begun + n].tolist()
            batch.n_begun += taken
            self._n_under_way += taken
            self._n_awaited += 0 if batch.load.is_hint else taken
            if batch.n_begun == len(batch.rows):
                self._not_begun.popleft()
            elif not taken:
                return

    def _end(self, number: int, reads: NDArray[np.int64], results: NDArray[np.int64]) -> list[Loaded | Failed]:
        """Check the bundles of some reads of a batch that have ended."""
        batch = self._batches[number]
        self._n_under_way -= len(reads)
        self._n_awaited -= 0 if batch.load.is_hint else len(reads)
        load, nbytes = batch.load, self._shards.bundle_nbytes
        first, last = batch.plan.first[reads], batch.plan.first[reads + 1]
        positions = _ranges(first, last)
        ids, slots = load.ids[positions], load.slots[positions]
        came_to = np.repeat(batch.rows["offset"][reads] + results, last - first)  # where each one's read ended
        has_come = came_to >= self._shards.start + (ids.astype(np.int64) + 1) * nbytes
        if not self._is_straight:
            self._copy_out(batch, reads)
            self._free_cells += batch.cells[reads].tolist()
        is_right = has_come.copy()
        is_right[has_come] = self._shards.are_intact(load.layer, ids[has_come], self._arena.slots, slots[has_come])
        events: list[Loaded | Failed] = [Loaded(slots[is_right])]
        for n in (~is_right).nonzero()[0].tolist():
            result = int(np.repeat(results, last - first)[n])
            error = self._why_wrong(load.layer, int(ids[n]), result, bool(has_come[n]))
            events.append(Failed(slots[n : n + 1], error))
        batch.n_ended += len(reads)
        if batch.n_ended == len(batch.rows):
            del self._batches[number]
            if not load.is_hint:
                self.latencies_s.append(time.monotonic() - batch.begin_s)
        return events

    def _copy_out(self, batch: _Batch, reads: NDArray[np.int64]) -> None:
        nbytes = self._shards.bundle_nbytes
        for read in reads.tolist():
            cell = self._cells[batch.cells[read]]
            offset = int(batch.rows["offset"][read])
            for position in range(batch.plan.first[read], batch.plan.first[read + 1]):
                start = self._shards.start + int(batch.load.ids[position]) * nbytes - offset
                self._arena.slots[batch.load.slots[position]] = cell[start : start + nbytes]

    def _why_wrong(self, layer: int, neuron: int, result: int, has_come: bool) -> SparseFlowError:
        what = f"{self._shards.paths[layer]}: layer {layer}, neuron {neuron}"
        if result < 0:
            return DiskError(f"{what} cannot be read ({os.strerror(-result)}); check the disk")
        end = self._shards.start + (neuron + 1) * self._shards.bundle_nbytes
        if not has_come and os.fstat(self._shards.fds[layer]).st_size >= end:
            return DiskError(f"{what} was not read, the disk gave {result} bytes only; check the disk")
        if not has_come:
            return ShardCorrupt(f"{what} is missing, the file ends early; {_REMEDY}")
        return ShardCorrupt(f"{what} differs from its checksum; {_REMEDY}")


def _page_aligned(n: int, nbytes: int) -> NDArray[np.uint8]:
    """(n, nbytes) uint8, whole pages a row."""
    row = -(-nbytes // _PAGE) * _PAGE
    memory = np.zeros(n * row + _PAGE, np.uint8)
    start = -memory.ctypes.data % _PAGE
    return memory[start : start + n * row].reshape(n, row)


def _ranges(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0] .. last[0] - 1, first[1] .. last[1] - 1, and so on, in one array."""
    n = last - first
    if (n == 1).all():
        return first
    return np.repeat(first - np.concatenate(([0], np.cumsum(n)[:-1])), n) + np.arange(n.sum())
