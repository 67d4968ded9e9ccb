"""Mapping shared memory so that the kernel can use huge pages for it.

A memory-bound product runs a tenth slower over 4 KiB pages. Shared memory gets 2 MiB pages where a map of it lies on a
multiple of that: by itself if the host allows it (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`, as a rule
`never`), or piece by piece on request (`MADV_COLLAPSE`, Linux 6.1), whatever is set there.
"""

import ctypes
import errno
import mmap
import os
import weakref
from typing import Any

HUGE_NBYTES = 2 << 20
_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_MADV_COLLAPSE = 25
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapping:
    """Memory of a descriptor, mapped until neither this object nor anything made of `content` is left."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool, private: bool = False) -> None:
        """
        Args:
            writable: else a write is a fault (SIGSEGV).
            private: what is written is seen here only.

        Raises:
            OSError: the system refuses.
        """
        self._nbytes = max(nbytes, 1)
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._flags = mmap.MAP_PRIVATE | _MAP_NORESERVE if private else mmap.MAP_SHARED
        self._address = _aligned_address(self._nbytes)
        self.replace(fd)
        self.content: Any = (ctypes.c_ubyte * nbytes).from_address(self._address)
        """A buffer that numpy and torch take for writable."""
        weakref.finalize(self.content, _libc.munmap, self._address, self._nbytes).atexit = False  # users may outlive us

    def replace(self, fd: int) -> None:
        """Put other memory of the same size in place, under whatever reads it now."""
        if _map(self._address, self._nbytes, self._protection, self._flags | _MAP_FIXED, fd) == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        _libc.madvise(self._address, self._nbytes, mmap.MADV_HUGEPAGE)  # where the kernel has them

    def use_huge_pages(self, first: int, after: int) -> None:
        """Make huge what begins between `first` and `after` and nobody uses yet; what cannot be stays as it was.

        first, after: multiples of `HUGE_NBYTES`. One page made huge before it is filled costs less than 512 small ones.
        """
        whole = min(after, self._nbytes // HUGE_NBYTES * HUGE_NBYTES)
        for address in range(self._address + first, self._address + whole, HUGE_NBYTES):
            ctypes.c_ubyte.from_address(address).value  # noqa: B018  there must be one page to begin with
            if _libc.madvise(address, HUGE_NBYTES, _MADV_COLLAPSE) != 0:
                return


def _aligned_address(nbytes: int) -> int:
    """Reserve addresses, from a multiple of a huge page on where that is any use."""
    spare = HUGE_NBYTES if nbytes >= HUGE_NBYTES else 0
    start = _map(None, nbytes + spare, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    if start is None or start == _FAILED:
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code))
    if not spare:
        return start
    address = -(-start // HUGE_NBYTES) * HUGE_NBYTES
    end = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = -(-(start + nbytes + spare) // mmap.PAGESIZE) * mmap.PAGESIZE
    for first, after in ((start, address), (end, last)):
        if after > first:
            _libc.munmap(first, after - first)
    return address


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int | None:
    found: int | None = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    return found
