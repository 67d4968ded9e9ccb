"""Reads on their way: many at once, started in batches, collected as they finish.

Linux AIO (`AioQueue`) gives a whole batch of direct reads to the kernel in one call and needs no thread: on two cores
8 KiB reads reached 830 MB/s at 2 us of CPU each, where 16 threads with `preadv` reached 550 MB/s at 10 us. AIO is
asynchronous for direct I/O only, so buffered reads and the memory map use threads (`ThreadQueue`).

A read is one row of `READ`, which is the kernel's `struct iocb`; a piece of memory that it fills is one row of `IOVEC`.
"""

import ctypes
import errno
import logging
import mmap
import os
import platform
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseflow.errors import DiskError

READ = np.dtype(
    [
        ("token", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<i4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("fd", "<u4"),
        ("iovecs", "<u8"),  # address of its first IOVEC
        ("n_iovecs", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_fd", "<u4"),
    ]
)
IOVEC = np.dtype([("address", "<u8"), ("nbytes", "<u8")])
READ_VECTOR = 7  # IOCB_CMD_PREADV
MOST_IOVECS = 1024  # IOV_MAX

_MAPPED_AROUND_NBYTES = 2 << 20  # what one page table holds: a page that is touched may bring its cached neighbours
_CLOSE_TIMEOUT_S = 60.0
_EVENT_FD_FLAG = 1  # IOCB_FLAG_RESFD
_EVENT = np.dtype([("token", "<u8"), ("iocb", "<u8"), ("result", "<i8"), ("result2", "<i8")])
_SYSCALLS = {  # io_setup, io_destroy, io_getevents, io_submit
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
}
_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.preadv.restype = ctypes.c_ssize_t
_libc.preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)


class DirectRefused(DiskError):
    """Direct I/O, or Linux AIO, is not to be had here."""


class Finished(NamedTuple):
    """Reads that ended: tokens (n,) uint64, results (n,) int64: bytes read, or minus an errno."""

    tokens: NDArray[np.uint64]
    results: NDArray[np.int64]


class ReadQueue(Protocol):
    """Where reads are started and collected. Memory and rows must stay where they are until a read has ended.

    Tokens are the caller's, and not 0.
    """

    name: str
    """`direct`, `buffered` or `map`, as status shows it."""

    def submit(self, reads: NDArray[np.void]) -> int:
        """Start reads from the front of a contiguous array of READ; returns how many were taken."""
        ...

    def wait(self, least: int, timeout_s: float) -> None:
        """Wait until `least` reads have ended, or for `timeout_s`. One thread at a time; not while another takes.

        Nothing is lost when a signal (Ctrl-C) interrupts it.
        """
        ...

    def take(self) -> Finished:
        """Reads that have ended and were waited for."""
        ...

    @property
    def threads(self) -> list[threading.Thread]:
        """Those that read; none where the kernel does it alone."""
        ...

    def close(self) -> None:
        """Wait for what is under way (the memory that it fills can be freed afterwards), and end.

        Raises:
            DiskError: it does not end.
        """
        ...


class AioQueue:
    """Linux AIO: the kernel's own queue, for file descriptors opened with O_DIRECT."""

    name = "direct"
    threads: "list[threading.Thread]" = []  # noqa: RUF012  there are none

    def __init__(self, depth: int, event_fd: int | None = None) -> None:
        """
        Args:
            depth: reads that may be under way at once.
            event_fd: an eventfd that becomes readable as reads end.

        Raises:
            DirectRefused: the kernel refuses (a sandbox, or fs.aio-max-nr is used up).
        """
        if platform.machine() not in _SYSCALLS:
            raise DirectRefused(
                f"Linux AIO on {platform.machine()}: not known here; use buffered reads (io='buffered')"
            )
        self._setup, self._destroy, self._getevents, self._submit = _SYSCALLS[platform.machine()]
        self._context = ctypes.c_ulong(0)
        self._events = np.zeros(depth, _EVENT)
        self._event_fd = event_fd
        if _libc.syscall(ctypes.c_long(self._setup), ctypes.c_long(depth), ctypes.byref(self._context)) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise DirectRefused(f"Linux AIO: {reason}; raise fs.aio-max-nr, or use buffered reads (io='buffered')")

    def submit(self, reads: NDArray[np.void]) -> int:
        """As `ReadQueue.submit`."""
        if self._event_fd is not None:
            reads["flags"], reads["event_fd"] = _EVENT_FD_FLAG, self._event_fd
        start = reads.ctypes.data
        addresses = np.arange(start, start + reads.nbytes, READ.itemsize, dtype=np.uint64)
        pointer = ctypes.c_void_p(addresses.ctypes.data)
        taken = _libc.syscall(ctypes.c_long(self._submit), self._context, ctypes.c_long(len(reads)), pointer)
        if taken >= 0:
            return int(taken)
        code = ctypes.get_errno()
        if code == errno.EAGAIN:
            return 0
        raise DiskError(f"Linux AIO: a read was refused ({os.strerror(code)}); use buffered reads (io='buffered')")

    def wait(self, least: int, timeout_s: float) -> None:
        """As `ReadQueue.wait`; at once where something was not taken yet."""
        if self._events["token"].any():
            return
        whole = int(timeout_s)
        limit = (ctypes.c_long * 2)(whole, int((timeout_s - whole) * 1e9))
        events = ctypes.c_void_p(self._events.ctypes.data)
        n = _libc.syscall(
            *(ctypes.c_long(self._getevents), self._context, ctypes.c_long(min(least, len(self._events)))),
            *(ctypes.c_long(len(self._events)), events, limit),
        )
        if n < 0 and ctypes.get_errno() != errno.EINTR:
            raise DiskError(f"Linux AIO: cannot collect reads ({os.strerror(ctypes.get_errno())})")

    def take(self) -> Finished:
        """As `ReadQueue.take`: what lies in the buffer that the kernel fills. No token is 0."""
        tokens, results = self._events["token"], self._events["result"]
        places = tokens.nonzero()[0]
        finished = Finished(tokens[places], results[places])
        tokens[places] = 0
        return finished

    def close(self) -> None:
        """As `ReadQueue.close`."""
        if self._context.value:
            _libc.syscall(ctypes.c_long(self._destroy), self._context)  # returns once nothing is under way
            self._context = ctypes.c_ulong(0)


class ThreadQueue:
    """Threads that perform one read after the other."""

    def __init__(
        self,
        name: str,
        perform: Callable[["NDArray[np.void] | Any"], int],
        n_threads: int,
        event_fd: int | None = None,
    ) -> None:
        """
        Args:
            name: of the backend.
            perform: does one READ and returns its result; `read_vector`, or a copy from a map.
            n_threads: reads under way at once.
            event_fd: an eventfd that becomes readable as reads end.
        """
        self.name = name
        self._perform = perform
        self._event_fd = event_fd
        self._begun: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended: list[tuple[int, int]] = []
        self._has_ended = threading.Condition()
        self.threads = [threading.Thread(target=self._work, name=f"read-{n}", daemon=True) for n in range(n_threads)]
        for thread in self.threads:
            thread.start()

    def _work(self) -> None:
        while (read := self._begun.get()) is not None:
            try:
                result = self._perform(read)
            except Exception:  # else the thread would end, and whoever waits would wait for ever
                _log.exception("a read failed in an unforeseen way")
                result = -errno.EIO
            with self._has_ended:
                self._ended.append((int(read["token"]), result))
                self._has_ended.notify()
            if self._event_fd is not None:
                os.eventfd_write(self._event_fd, 1)

    def submit(self, reads: NDArray[np.void]) -> int:
        """As `ReadQueue.submit`; takes all."""
        for read in reads:
            self._begun.put(read)
        return len(reads)

    def wait(self, least: int, timeout_s: float) -> None:
        """As `ReadQueue.wait`."""
        with self._has_ended:
            self._has_ended.wait_for(lambda: len(self._ended) >= least, timeout_s)

    def take(self) -> Finished:
        """As `ReadQueue.take`."""
        with self._has_ended:
            ended, self._ended = self._ended, []
        tokens, results = zip(*ended, strict=True) if ended else ((), ())
        return Finished(np.array(tokens, np.uint64), np.array(results, np.int64))

    def close(self) -> None:
        """As `ReadQueue.close`."""
        for _ in self.threads:
            self._begun.put(None)
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            raise DiskError(f"reads did not end within {_CLOSE_TIMEOUT_S:g} s of closing; their memory is kept")
        self.threads = []


def read_vector(read: Any) -> int:
    """Perform one READ with `preadv`: bytes read, or minus an errno."""
    n = _libc.preadv(int(read["fd"]), int(read["iovecs"]), int(read["n_iovecs"]), int(read["offset"]))
    return int(n) if n >= 0 else -ctypes.get_errno()


def copy_from(addresses: dict[int, tuple[int, int]]) -> Callable[[Any], int]:
    """A `perform` that copies from memory maps. addresses: file descriptor -> address and size of the file's map."""

    def perform(read: Any) -> int:
        base, size = addresses[int(read["fd"])]
        done = 0
        iovecs = (ctypes.c_uint64 * (2 * int(read["n_iovecs"]))).from_address(int(read["iovecs"]))
        for address, nbytes in zip(iovecs[::2], iovecs[1::2], strict=True):
            start = int(read["offset"]) + done
            n = min(nbytes, max(0, size - start))
            ctypes.memmove(address, base + start, n)
            done += n
        touched = base + int(read["offset"])
        first = max(base, touched & -_MAPPED_AROUND_NBYTES)
        after = min(base + size, -(-(touched + done) // _MAPPED_AROUND_NBYTES) * _MAPPED_AROUND_NBYTES)
        _libc.madvise(first, after - first, mmap.MADV_DONTNEED)  # else what was copied counts twice
        return done

    return perform
