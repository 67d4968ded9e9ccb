"""The page cache limited, emptied and bypassed: what a fair measurement below the size of a model needs.

A limit on address space would punish whoever maps files. A memory control group (cgroup) charges each page, anonymous
or cached, to the group that touched it first, and takes cached pages back once the limit is reached, as a machine with
that much memory would. A page that is cached already stays charged to others: hence `drop_page_cache`. What the disk
gives without any cache is `disk_bandwidth`.
"""

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAME_PREFIX = "sparseflow-bench-"
EMPTY_DEADLINE_S = 30.0  # a killed process that waits for a disk goes once the disk has answered
_ENTER = 'echo $$ > "$0" && exec "$@"'  # the shell moves itself, and becomes the program
SWAP_SLACK_NBYTES = 4 << 20  # v1: met first, the limit with swap would hide the other's hits, which alone are counted
SAMPLE_NBYTES = 256 << 20  # read for one measurement of the disk
DEPTH = 128  # reads under way; more gave nothing
N_THREADS = 16
_READY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


class NoMemoryGroupError(RuntimeError):
    """No group can be made here; the text says what was tried and what would help."""


class NoColdReadError(RuntimeError):
    """These files cannot be read past the page cache; the text says why."""


@dataclass(frozen=True, slots=True)
class Interface:
    """What a version of cgroups calls its files."""

    version: int
    limit: str
    swap_limit: str
    peak: str
    counts: str
    """Holds the count `oom_kill`."""


V1 = Interface(1, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes",
               "memory.oom_control")  # fmt: skip
V2 = Interface(2, "memory.max", "memory.swap.max", "memory.peak", "memory.events")


@dataclass(frozen=True, slots=True)
class GroupParent:
    """A folder in which groups can be made."""

    folder: Path
    interface: Interface


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """What a group has used. None: this kernel does not say."""

    peak_nbytes: int | None
    limit_hits: int
    """How often the limit was met, and something had to be taken back: v1's `memory.failcnt`, v2's event `max`."""
    oom_kills: int


class MemoryGroup:
    """A fresh group with a limit. Leaving the context kills what is still inside and removes it."""

    def __init__(self, parent: GroupParent, limit_nbytes: int) -> None:
        """
        Raises:
            OSError: the group cannot be made or limited; nothing remains of it.
        """
        self._interface = parent.interface
        self.folder = parent.folder / f"{NAME_PREFIX}{os.getpid()}-{next(_numbers)}"
        self.folder.mkdir()
        try:
            (self.folder / self._interface.limit).write_text(str(limit_nbytes))
            self.swap_is_limited = self._limit_swap(limit_nbytes)
        except BaseException:
            self.folder.rmdir()
            raise

    def _limit_swap(self, limit_nbytes: int) -> bool:
        path = self.folder / self._interface.swap_limit
        if not path.exists():  # a kernel that does not count swap
            return False
        sum_nbytes = limit_nbytes + SWAP_SLACK_NBYTES
        path.write_text(str(sum_nbytes) if self._interface.version == 1 else "0")  # v1 limits memory and swap as one
        return True

    def command(self, program: Sequence[str]) -> list[str]:
        """What to start so that `program` is inside before its first instruction."""
        return ["sh", "-c", _ENTER, str(self.folder / "cgroup.procs"), *program]

    def usage(self) -> GroupUsage:
        """Counted since the group was made."""
        counts = _counts(self.folder / self._interface.counts)
        if self._interface.version == 1:
            limit_hits = int((self.folder / "memory.failcnt").read_text())
        else:
            limit_hits = counts.get("max", 0)
        peak = self.folder / self._interface.peak  # v2 has it from Linux 5.19 on
        peak_nbytes = int(peak.read_text()) if peak.exists() else None
        return GroupUsage(peak_nbytes, limit_hits, counts.get("oom_kill", 0))

    def kill(self) -> None:
        """End every process inside, and wait until the group is empty.

        Raises:
            TimeoutError: some process is still there after `EMPTY_DEADLINE_S`.
        """
        deadline = time.monotonic() + EMPTY_DEADLINE_S
        while pids := (self.folder / "cgroup.procs").read_text().split():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder}: processes {', '.join(pids)} outlive SIGKILL; look at their state")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)

    def close(self) -> None:
        """Kill what is inside and remove the group. May be called twice."""
        if not self.folder.exists():
            return
        self.kill()
        deadline = time.monotonic() + EMPTY_DEADLINE_S
        while True:
            try:
                self.folder.rmdir()
                return
            except OSError:  # busy for a moment after its last process has gone
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find_group_parent() -> GroupParent:
    """The first folder in which a group can be made, limited, entered and removed; cgroup v1 or v2, as mounted.

    Raises:
        NoMemoryGroupError: there is none.
    """
    refusals = []
    for parent in _candidates():
        _remove_abandoned(parent.folder)
        try:
            with MemoryGroup(parent, 1 << 30) as group:
                subprocess.run(group.command(["true"]), check=True, capture_output=True, timeout=EMPTY_DEADLINE_S)
        except (OSError, subprocess.SubprocessError) as error:
            refusals.append(f"{parent.folder} (v{parent.interface.version}): {error}")
        else:
            return parent
    raise NoMemoryGroupError(
        f"no memory cgroup can be made here ({'; '.join(refusals) or 'no memory controller is mounted'}); run as "
        "root, in a container with its cgroups writable (docker: --privileged --cgroupns=host). If cgroup v2 gives a "
        "group no memory.max, write +memory to cgroup.subtree_control of the folder above it"
    )


def _candidates() -> Iterator[GroupParent]:
    """This process's own group and those above it, up to the mount: v1's memory hierarchy first, then v2's."""
    own: dict[str, str] = {}  # controllers -> path
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path.strip("/"))
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    roots = [(Path(where), V1, own.get("memory", "")) for _, where, kind, options, *_ in mounts
             if kind == "cgroup" and "memory" in options.split(",")]  # fmt: skip
    roots += [(Path(where), V2, own.get("", "")) for _, where, kind, *_ in mounts if kind == "cgroup2"]
    for root, interface, path in roots:
        is_seen = ".." not in path.split("/") and (root / path).is_dir()  # a container may see another part of the tree
        folder = root / path if is_seen else root
        while True:
            yield GroupParent(folder, interface)
            if folder == root:
                break
            folder = folder.parent


def _remove_abandoned(folder: Path) -> None:
    """Remove empty groups of runs that were killed themselves."""
    for group in folder.glob(NAME_PREFIX + "*"):
        pid = group.name.removeprefix(NAME_PREFIX).split("-")[0]
        if not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                group.rmdir()


def _counts(path: Path) -> dict[str, int]:
    """A file of lines `name number`."""
    return {name: int(number) for name, number in (line.split() for line in path.read_text().splitlines())}


def swap_nbytes() -> int:
    """Swap of this machine, used or not."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:"))


def cached_nbytes(path: Path) -> int:
    """Bytes of a file that lie in the page cache, by whole pages."""
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if not nbytes:
            return 0
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
            residency = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
            start = ctypes.c_char.from_buffer(mapping)
            failed = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(nbytes), residency)
            del start  # else the mapping cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"{path}: mincore: {os.strerror(ctypes.get_errno())}")
    return residency.raw.count(b"\x01") * mmap.PAGESIZE


def drop_page_cache(paths: Iterable[Path], attempts: int = 3) -> int:
    """Take files out of the page cache; return the bytes that stay, because some process has them mapped."""
    still_cached = 0
    for path in paths:
        for _ in range(attempts):  # pages on their way into the cache's lists are passed over
            fd = os.open(path, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # a file system that cannot be written, so nothing is dirty
                    os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
            if not (nbytes := cached_nbytes(path)):
                break
            time.sleep(0.01)
        still_cached += nbytes
    return still_cached


class _Request(ctypes.Structure):
    """`struct iocb` of Linux on x86-64."""

    _fields_ = [("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("rw_flags", ctypes.c_int32),
                ("opcode", ctypes.c_uint16), ("priority", ctypes.c_int16), ("fd", ctypes.c_uint32),
                ("buffer", ctypes.c_uint64), ("nbytes", ctypes.c_uint64), ("offset", ctypes.c_int64),
                ("reserved", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("event_fd", ctypes.c_uint32)]  # fmt: skip


class _Completion(ctypes.Structure):
    """`struct io_event`."""

    _fields_ = [("data", ctypes.c_uint64), ("request", ctypes.c_uint64),
                ("result", ctypes.c_int64), ("result2", ctypes.c_int64)]  # fmt: skip


Read = tuple[int, int]  # fd, offset


def read_queued(reads: Sequence[Read], block_nbytes: int) -> float:
    """Seconds for these reads, `DEPTH` of them under way, through Linux AIO."""
    setup, destroy, get_events, submit = 206, 207, 208, 209  # x86-64
    libc, context = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)

    def call(*arguments: Any) -> int:
        if (result := libc.syscall(*arguments)) < 0:
            raise OSError(ctypes.get_errno(), f"Linux AIO: {os.strerror(ctypes.get_errno())}")
        return int(result)

    call(setup, DEPTH, ctypes.byref(context))
    try:
        with mmap.mmap(-1, DEPTH * block_nbytes, flags=_READY) as buffer:
            view = ctypes.c_char.from_buffer(buffer)
            start = ctypes.addressof(view)
            requests = (_Request * len(reads))()
            for n, (fd, offset) in enumerate(reads):  # what is read is not looked at, so buffers may be shared
                requests[n] = _Request(
                    fd=fd, buffer=start + n % DEPTH * block_nbytes, nbytes=block_nbytes, offset=offset
                )
            pointers = (ctypes.c_void_p * len(reads))(*(ctypes.addressof(request) for request in requests))
            completions = (_Completion * DEPTH)()
            n_submitted = n_done = 0
            begin = time.perf_counter()
            while n_done < len(reads):
                if n_new := min(DEPTH - (n_submitted - n_done), len(reads) - n_submitted):
                    n_submitted += call(submit, context, ctypes.c_long(n_new), ctypes.byref(pointers, 8 * n_submitted))
                n_wanted = max(1, min(DEPTH // 2, n_submitted - n_done))
                n_ready = call(get_events, context, ctypes.c_long(n_wanted), ctypes.c_long(DEPTH), completions, None)
                if any(completions[n].result != block_nbytes for n in range(n_ready)):
                    raise OSError(f"Linux AIO: a read of {block_nbytes} bytes returned {completions[0].result}")
                n_done += n_ready
            elapsed_s = time.perf_counter() - begin
            del view  # else the buffer cannot be closed
    finally:
        libc.syscall(destroy, context)
    return elapsed_s


def read_threaded(reads: Sequence[Read], block_nbytes: int) -> float:
    """The same by `N_THREADS` threads, where AIO is refused: slower."""
    with mmap.mmap(-1, N_THREADS * block_nbytes, flags=_READY) as buffer, ThreadPoolExecutor(N_THREADS) as pool:
        views = [memoryview(buffer)[n * block_nbytes : (n + 1) * block_nbytes] for n in range(N_THREADS)]

        def work(n: int) -> None:
            for fd, offset in reads[n::N_THREADS]:
                os.preadv(fd, [views[n]], offset)

        begin = time.perf_counter()
        list(pool.map(work, range(N_THREADS)))
        elapsed_s = time.perf_counter() - begin
        for view in views:
            view.release()
    return elapsed_s


def disk_bandwidth(paths: Sequence[Path], block_nbytes: int) -> tuple[float, str]:
    """Bytes per second of O_DIRECT reads of whole blocks, in random order over these files, each once at most; and how.

    Raises:
        NoColdReadError: the file system does not read past its cache.
    """
    with contextlib.ExitStack() as stack:
        reads: list[Read] = []
        for path in paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                raise NoColdReadError(f"{path}: {error.strerror} with O_DIRECT; put the store on a disk") from error
            stack.callback(os.close, fd)
            reads += [(fd, block * block_nbytes) for block in range(path.stat().st_size // block_nbytes)]
        if not reads:
            raise NoColdReadError(f"{paths[0]}: shorter than a block of {block_nbytes} bytes; use a larger model")
        reads = random.sample(reads, min(len(reads), max(1, SAMPLE_NBYTES // block_nbytes)))
        try:
            elapsed_s, how = read_queued(reads, block_nbytes), f"Linux AIO, {DEPTH} under way"
        except OSError as error:
            elapsed_s, how = read_threaded(reads, block_nbytes), f"{N_THREADS} threads ({error})"
    return len(reads) * block_nbytes / elapsed_s, how
