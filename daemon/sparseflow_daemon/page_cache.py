"""What the page cache keeps of the files of stores."""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from sparseflow.store.stored_files import stat_inside
from sparseflow_daemon.served_model import ServedModel

_CACHESTAT = 451  # the same number on every architecture; Linux 6.5 and later
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def page_cache_nbytes(models: Iterable[ServedModel]) -> int | None:
    """What the page cache holds of the files of these stores; None where the kernel does not tell."""
    total = 0
    for model in models:
        for name in model.manifest.files:
            cached = _cached_nbytes(model.store, name)
            if cached is None:
                return None
            total += cached
    return total


def _cached_nbytes(store: Path, name: str) -> int | None:
    """cachestat(2) of a whole file; 0 for one that is missing, or no file of the store."""
    try:
        stat_inside(store, name)
        fd = os.open(store / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        whole = (ctypes.c_uint64 * 2)(0, 0)  # offset, length: 0 is to the end
        found = (ctypes.c_uint64 * 5)()  # cached, dirty, writeback, evicted, recently evicted; in pages
        result = _libc.syscall(
            ctypes.c_long(_CACHESTAT), ctypes.c_uint(fd), ctypes.byref(whole), ctypes.byref(found), ctypes.c_uint(0)
        )
        return None if result else int(found[0]) * os.sysconf("SC_PAGESIZE")
    finally:
        os.close(fd)
