"""Memory of a weight server, mapped here."""

import ctypes
import mmap
import os
import weakref
from typing import Any

from sparseflow.errors import NotEnoughMemory

_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class SharedMap:
    """A map that stays at its address while another server's memory takes the place of what is behind it.

    It is unmapped once neither this object nor anything made of `content` is left.
    """

    def __init__(self, fd: int, nbytes: int, *, changes: bool) -> None:
        """
        Args:
            changes: the server writes to it while we read: then a write of ours is a fault (SIGSEGV). Else it is
                copy-on-write, as a mapped file of a store is: nobody else sees what is written.

        Raises:
            NotEnoughMemory: the system refuses.
        """
        self.nbytes = nbytes
        self._changes = changes
        address = self._map(None, fd, 0)
        self.content: Any = (ctypes.c_ubyte * nbytes).from_address(address)
        """A buffer, as torch and numpy take it."""
        weakref.finalize(self.content, _libc.munmap, address, nbytes).atexit = False  # tensors may outlive us there
        self._address = address

    def replace(self, fd: int) -> None:
        """Put other memory of the same size and content in place, under whatever reads it now."""
        self._map(self._address, fd, _MAP_FIXED)

    def _map(self, address: int | None, fd: int, flags: int) -> int:
        if self._changes:
            protection, flags = mmap.PROT_READ, flags | mmap.MAP_SHARED
        else:
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, flags | mmap.MAP_PRIVATE | _MAP_NORESERVE
        found: int | None = _libc.mmap(address, self.nbytes, protection, flags, fd, 0)
        if found is None or found == _FAILED:
            raise NotEnoughMemory(
                f"{self.nbytes} bytes of the server's memory cannot be mapped ({os.strerror(ctypes.get_errno())}); "
                "raise the limits of this process (ulimit -v)"
            )
        return found
