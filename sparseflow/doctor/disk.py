"""The disk where stores are made: room, direct I/O, and how fast it is read past the page cache.

It is measured in a process of its own, on a file without a name, so that nothing is left there however that ends.
"""

import json
import mmap
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from sparseflow.doctor.finding import Check, Finding, Found, Group
from sparseflow.doctor.trial import call, tried
from sparseflow.engine import disk_speed
from sparseflow.engine.read_queue import AioQueue, ReadQueue, ThreadQueue, read_vector
from sparseflow.utils.home import sparseflow_home
from sparseflow.utils.sizes import format_size

BUNDLE_NBYTES = 8192  # of OPT-1.3B in 16 bits
FILE_NBYTES, BLOCK_NBYTES = 64 << 20, 4 << 20

_LEAST_NBYTES = 4 * FILE_NBYTES  # free, or nothing is written: a disk is not filled to its end to measure it
_LITTLE_NBYTES = 4 << 30  # less than a store of OPT-1.3B takes
_SLOW_BYTES_PER_S = 20e6  # of bundles from random places: less than any flash memory gives
_WRITE_S = 3.0  # then what is written is enough
_TIMEOUT_S = 40.0
_ALIGNMENTS = (512, 1024, 2048, 4096)  # bytes; what direct I/O asks for on the disks there are
_N_THREADS = 16
_SPACE_REMEDY = "free some, or set SPARSEFLOW_HOME to a folder on another disk"
_WRITE_REMEDY = "set SPARSEFLOW_HOME to a folder that can be written, or look for what is wrong with the disk"


def group() -> Group:
    """All of it."""
    return Group("Disk", [Check("disk", lambda: look(sparseflow_home()), deadline_s=None)])


def look(home: Path) -> Found:
    """home: where stores are made; it may not exist. facts: as `measure_disk`."""
    outcome = tried(call("sparseflow.doctor.disk.disk_trial", str(home.absolute())), _TIMEOUT_S)
    if outcome.found is None:
        return Found([Finding("disk", "problem", f"{home}: {outcome.reason}", _WRITE_REMEDY)])
    return Found(findings(outcome.found), outcome.found)


def disk_trial(home: str) -> None:
    """Measure, and print what was found as JSON."""
    print(json.dumps(measure_disk(Path(home))))


def measure_disk(home: Path) -> dict[str, Any]:
    """What the disk of a folder gives.

    Returns: `disk`, the folder, or the nearest above it that exists; `disk_total_nbytes`, `disk_free_nbytes`;
    `direct_io` with `works`, `reason` and `alignment_nbytes`; `disk_speed` with `bundle_nbytes`, `random_bytes_per_s`,
    `reads_under_way` and `sequential_bytes_per_s`, or None; `disk_reason`, why there is none.
    """
    folder = next(folder for folder in (home, *home.parents) if os.path.lexists(folder))
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    facts: dict[str, Any] = {
        "disk": str(folder),
        "disk_total_nbytes": space.f_blocks * space.f_frsize,
        "disk_free_nbytes": free,
        "direct_io": {"works": False, "reason": "not tried", "alignment_nbytes": None},
        "disk_speed": None,
        "disk_reason": "",
    }
    if free < _LEAST_NBYTES:
        return facts | {"disk_reason": f"not measured with less than {format_size(_LEAST_NBYTES)} free"}
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return facts | _measured(file.fileno(), folder)
    except OSError as error:
        return facts | {"disk_reason": f"no file can be made and read there ({error.strerror or error})"}


class _Way(NamedTuple):
    fd: int
    queue: ReadQueue
    alignment: int | None
    """Bytes, of direct reads; None: through the page cache."""
    reason: str


def _measured(fd: int, folder: Path) -> dict[str, Any]:
    nbytes = _fill(fd)
    with ExitStack() as stack:
        way = _way_to_read(fd, stack)
        reason = f"{folder}: {way.reason}; stores there are read through the page cache" if way.reason else ""
        speed = disk_speed.measure(way.queue, [way.fd], 0, nbytes, BUNDLE_NBYTES)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return {
            "direct_io": {"works": not reason, "reason": reason, "alignment_nbytes": way.alignment},
            "disk_speed": {
                "bundle_nbytes": BUNDLE_NBYTES,
                "random_bytes_per_s": speed.bytes_per_s(BUNDLE_NBYTES),
                "reads_under_way": speed.depth,
                "sequential_bytes_per_s": _sequential_bytes_per_s(way.fd, nbytes),
            },
        }


def _fill(fd: int) -> int:
    """Write whole blocks, to the disk itself, for as long as there is time; the bytes."""
    block, nbytes, begin = os.urandom(BLOCK_NBYTES), 0, time.monotonic()
    while nbytes < FILE_NBYTES and (not nbytes or time.monotonic() - begin < _WRITE_S):
        if os.pwrite(fd, block, nbytes) != BLOCK_NBYTES:
            raise OSError(f"only a part of {BLOCK_NBYTES} bytes could be written")
        os.fdatasync(fd)
        nbytes += BLOCK_NBYTES
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return nbytes


def _way_to_read(fd: int, stack: ExitStack) -> _Way:
    """As the engine reads: direct where the file system allows it."""
    path = f"/proc/self/fd/{fd}"
    try:
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        stack.callback(os.close, direct)
        alignment = _alignment(direct)
        aio = AioQueue(disk_speed.MOST_READS)
        stack.callback(aio.close)
        return _Way(direct, aio, alignment, "")
    except OSError as error:
        reason = error.strerror or str(error)
    buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, buffered)
    os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_RANDOM)
    threads = ThreadQueue("buffered", read_vector, _N_THREADS)
    stack.callback(threads.close)
    return _Way(buffered, threads, None, reason)


def _alignment(fd: int) -> int:
    """
    Raises:
        OSError: direct reads of no alignment are taken.
    """
    with mmap.mmap(-1, 2 * _ALIGNMENTS[-1]) as memory, memoryview(memory) as view:
        for nbytes in _ALIGNMENTS:
            try:
                with view[nbytes : 2 * nbytes] as part:
                    os.preadv(fd, [part], nbytes)
                return nbytes
            except OSError as error:
                refusal = error
        raise refusal


def _sequential_bytes_per_s(fd: int, nbytes: int) -> float:
    with mmap.mmap(-1, BLOCK_NBYTES) as memory:
        begin = time.perf_counter()
        for place in range(0, nbytes, BLOCK_NBYTES):
            os.preadv(fd, [memory], place)
        return nbytes / (time.perf_counter() - begin)


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """facts: of `measure_disk`."""
    found = [_space(facts)]
    if facts["disk_speed"] is not None:
        return [*found, _direct_io(facts["direct_io"]), *_speeds(facts["disk_speed"])]
    if facts["disk_free_nbytes"] >= _LEAST_NBYTES:
        found.append(Finding("files", "problem", f"{facts['disk']}: {facts['disk_reason']}", _WRITE_REMEDY))
    return found


def _space(facts: Mapping[str, Any]) -> Finding:
    free, total = facts["disk_free_nbytes"], facts["disk_total_nbytes"]
    text = f"{format_size(free)} of {format_size(total)} free where stores are made ({facts['disk']})"
    if free < _LEAST_NBYTES:
        return Finding("space", "problem", f"{text}; {facts['disk_reason']}", _SPACE_REMEDY)
    if free < _LITTLE_NBYTES:
        return Finding(
            "space", "warning", f"{text}; a store takes its checkpoint's size and a sixth more", _SPACE_REMEDY
        )
    return Finding("space", "ok", text)


def _direct_io(direct: Mapping[str, Any]) -> Finding:
    if direct["works"]:
        return Finding("direct I/O", "ok", f"yes, from multiples of {direct['alignment_nbytes']} bytes on")
    remedy = "for models larger than memory set SPARSEFLOW_HOME to a folder on a local disk (ext4, xfs)"
    return Finding("direct I/O", "note", f"no: {direct['reason']}", remedy)


def _speeds(speed: Mapping[str, Any]) -> list[Finding]:
    rate = speed["random_bytes_per_s"]
    text = (
        f"{rate / 1e6:.0f} MB/s in pieces of {format_size(speed['bundle_nbytes'])}, "
        f"{speed['reads_under_way']} of them under way"
    )
    if rate >= _SLOW_BYTES_PER_S:
        random = Finding("random reads", "ok", text)
    else:
        remedy = "keep stores of models larger than memory on an SSD (SPARSEFLOW_HOME)"
        random = Finding("random reads", "warning", f"{text}: slow for neurons that are not in memory", remedy)
    sequential = Finding("sequential reads", "ok", f"{speed['sequential_bytes_per_s'] / 1e6:.0f} MB/s")
    return [random, sequential]
