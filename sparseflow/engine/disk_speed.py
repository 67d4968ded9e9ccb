"""How fast this disk answers reads from random places: measured when a store is opened, in a fraction of a second."""

import os
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.read_queue import IOVEC, READ, READ_VECTOR, ReadQueue
from sparseflow.errors import DiskError

MOST_READS = 256  # under way at once; no disk seen here answers faster to more
_DEPTHS = (16, 32, 64, 128, MOST_READS)
_AS_FAST = 1.1  # of equally fast depths the deepest is best: what a layer needs is begun, and waited for, at once
_ENOUGH_S = 0.05  # of measuring one depth
_TIMEOUT_S = 30.0


class DiskSpeed(NamedTuple):
    """What a read of n bytes costs while `depth` reads are under way: read_s + n * byte_s."""

    depth: int
    read_s: float
    byte_s: float

    def seconds(self, nbytes: int) -> float:
        """Of one read, as it adds to the time of many."""
        return self.read_s + nbytes * self.byte_s

    def bytes_per_s(self, nbytes: int) -> float:
        """Of reads of `nbytes` from random places."""
        return nbytes / self.seconds(nbytes)

    @property
    def gap_nbytes(self) -> int:
        """The longest gap that is cheaper read than jumped over."""
        return int(self.read_s / self.byte_s)


def measure(queue: ReadQueue, fds: list[int], start: int, region_nbytes: int, read_nbytes: int) -> DiskSpeed:
    """Read at random with deeper and deeper queues; then with longer reads.

    Args:
        start, region_nbytes: where in each file, from an aligned place on.
        read_nbytes: of a read; a multiple of the alignment.
    """
    probe = _Probe(queue, fds, start, region_nbytes)
    found_s: dict[int, float] = {}
    for depth in _DEPTHS:
        found_s[depth] = probe.seconds_a_read(read_nbytes, depth)
        if depth * found_s[depth] > _ENOUGH_S:  # a slow disk: measuring more would take seconds
            break
    depth = max(depth for depth, seconds in found_s.items() if seconds <= _AS_FAST * min(found_s.values()))
    best_s = found_s[depth]
    long_nbytes = min(8 * read_nbytes, region_nbytes)
    if long_nbytes <= read_nbytes:
        return DiskSpeed(depth, best_s / 2, best_s / 2 / read_nbytes)
    long_s = probe.seconds_a_read(long_nbytes, depth)
    byte_s = max(long_s - best_s, 0.02 * best_s) / (long_nbytes - read_nbytes)
    return DiskSpeed(depth, max(best_s - read_nbytes * byte_s, 0.02 * best_s), byte_s)


class _Probe:
    def __init__(self, queue: ReadQueue, fds: list[int], start: int, region_nbytes: int) -> None:
        self._queue, self._fds, self._start, self._region_nbytes = queue, fds, start, region_nbytes
        self._random = np.random.default_rng(0)

    def seconds_a_read(self, nbytes: int, depth: int) -> float:
        """Wall time over reads, with `depth` of them under way."""
        memory = np.empty(nbytes + 4096, np.uint8)
        iovec = np.zeros(1, IOVEC)
        iovec["address"] = memory.ctypes.data + -memory.ctypes.data % 4096  # all into the same place: nobody looks
        iovec["nbytes"] = nbytes
        n_reads = 0
        begin = time.perf_counter()
        while not n_reads or (n_reads < 4 * depth and time.perf_counter() - begin < _ENOUGH_S):
            reads = np.zeros(depth, READ)
            reads["token"] = 1
            reads["opcode"], reads["iovecs"], reads["n_iovecs"] = READ_VECTOR, iovec.ctypes.data, 1
            reads["fd"] = self._random.choice(self._fds, depth)
            places = self._random.integers(0, max(1, (self._region_nbytes - nbytes) // nbytes + 1), depth)
            reads["offset"] = self._start + places * nbytes
            self._finish(reads)
            n_reads += depth
        return (time.perf_counter() - begin) / n_reads

    def _finish(self, reads: NDArray[np.void]) -> None:
        started = ended = 0
        deadline = time.monotonic() + _TIMEOUT_S
        while ended < len(reads):
            if time.monotonic() > deadline:
                raise DiskError(f"{len(reads) - ended} reads did not end within {_TIMEOUT_S:g} s; check the disk")
            if started < len(reads):
                started += self._queue.submit(reads[started:])
            self._queue.wait(started - ended, 1.0)
            finished = self._queue.take()
            if len(failed := finished.results[finished.results < 0]):
                raise DiskError(f"reading at random failed ({os.strerror(-int(failed[0]))}); check the disk")
            ended += len(finished.tokens)
