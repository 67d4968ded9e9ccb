"""The ways to read shards: direct, buffered, or by memory map; chosen when a store is opened, and shown in status.

A shard that is cut while it is open is an error of the first two; mapped, it kills the process (SIGBUS).
"""

import logging
import mmap
import os
from dataclasses import dataclass, field

import numpy as np

from sparseflow.engine import disk_speed
from sparseflow.engine.disk_speed import MOST_READS, DiskSpeed
from sparseflow.engine.faulty_reads import VARIABLE, Fault, FaultyQueue, faults_asked_for
from sparseflow.engine.read_queue import AioQueue, DirectRefused, ReadQueue, ThreadQueue, copy_from, read_vector
from sparseflow.engine.shard_files import ShardFiles
from sparseflow.errors import BadRequest
from sparseflow.store.shard_format import ALIGNMENT_NBYTES

_log = logging.getLogger(__name__)
IO_MODES = ("auto", "direct", "buffered", "map")
_N_THREADS = 16  # as many readers as made buffered reads faster


@dataclass(slots=True)
class Reading:
    """An open way to read. alignment: bytes, of offset, length and memory of a read."""

    shards: ShardFiles
    queue: ReadQueue
    alignment: int
    speed: DiskSpeed
    maps: list[mmap.mmap] = field(default_factory=list)
    reasons: tuple[str, ...] = ()
    """Why it is not direct, where that was tried; and that reads go wrong on purpose, where they do."""
    faults: list[Fault] = field(default_factory=list)

    def close(self) -> None:
        """End the queue and close the shards. May be called twice."""
        self.queue.close()
        self.maps.clear()
        self.shards.close()


def open_reading(shards: ShardFiles, io: str, event_fd: int | None = None) -> Reading:
    """Open the shards, and measure how fast they are read.

    Args:
        event_fd: an eventfd that becomes readable as reads end.

    Raises:
        BadRequest: no such mode. DiskError: the mode is refused here.
    """
    require_io(io)
    faults = faults_asked_for()
    reading = _open(shards, io, event_fd)
    if faults:  # only now: the speed is the disk's own
        reading.queue, reading.faults = FaultyQueue(reading.queue, faults), faults
        reading.reasons += (f"reads go wrong on purpose: {VARIABLE}={os.environ[VARIABLE]}",)
        _log.warning("%s", reading.reasons[-1])
    return reading


def _open(shards: ShardFiles, io: str, event_fd: int | None) -> Reading:
    reasons: tuple[str, ...] = ()
    if io in ("auto", "direct"):
        try:
            return _open_direct(shards, event_fd)
        except DirectRefused as error:
            shards.close()
            if io == "direct":
                raise
            reasons = (str(error),)
    shards.open(direct=False)
    maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in shards.fds] if io == "map" else []
    if maps:
        addresses = {}
        for fd, mapping in zip(shards.fds, maps, strict=True):
            mapping.madvise(mmap.MADV_RANDOM)
            addresses[fd] = (np.frombuffer(mapping, np.uint8).ctypes.data, len(mapping))
        queue: ReadQueue = ThreadQueue("map", copy_from(addresses), _N_THREADS, event_fd)
    else:
        queue = ThreadQueue("buffered", read_vector, _N_THREADS, event_fd)
    return Reading(shards, queue, 1, _measure(shards, queue, 1), maps, reasons)


def require_io(io: str) -> None:
    """
    Raises:
        BadRequest: no such way to read.
    """
    if io not in IO_MODES:
        raise BadRequest(f"io={io!r}: shards are read in one of these ways: {', '.join(IO_MODES)}")


def _open_direct(shards: ShardFiles, event_fd: int | None) -> Reading:
    alignment = shards.open(direct=True)
    if alignment is None:
        raise DirectRefused(
            f"{shards.paths[0].parent}: the file system refuses direct I/O; use buffered reads (io='buffered')"
        )
    shards.drop_cached_pages()
    queue = AioQueue(MOST_READS, event_fd)
    return Reading(shards, queue, alignment, _measure(shards, queue, alignment))


def _measure(shards: ShardFiles, queue: ReadQueue, alignment: int) -> DiskSpeed:
    nbytes = -(-shards.bundle_nbytes // alignment) * alignment
    start = -(-shards.start // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
    region = shards.ffn_dim * shards.bundle_nbytes // alignment * alignment
    try:
        return disk_speed.measure(queue, shards.fds, start, region, nbytes)
    except BaseException:
        queue.close()
        shards.close()
        raise
