"""Memory that one process writes and others read: a sealed memfd.

It has no name, so nothing is left behind whoever dies, and what is mapped stays valid until its last mapper ends. The
seals keep everybody else from writing to it and everybody at all from changing its size (which would kill readers with
SIGBUS); only the map that was made before sealing can be written through.
"""

import fcntl
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sparseflow.engine.mapping import HUGE_NBYTES, Mapping
from sparseflow.errors import DiskError, NotEnoughMemory, ShardCorrupt
from sparseflow.store.shard_format import FileEntry

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python's fcntl does not name it
_CHUNK_NBYTES = 4 << 20


class SharedMemory:
    """`nbytes` bytes, zero at first, of this process, to be handed to others by its descriptor."""

    def __init__(self, name: str, nbytes: int, *, others_may_write: bool = False) -> None:
        """
        Args:
            name: what /proc/PID/maps calls it.
            others_may_write: leave it writable for whoever is given the descriptor; its size is sealed all the same.

        Raises:
            NotEnoughMemory: the system refuses.
        """
        self.nbytes = nbytes
        fd = -1
        try:
            fd = os.memfd_create(f"sparseflow-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, max(nbytes, 1))
            self._mapping = Mapping(fd, nbytes, writable=True)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (0 if others_may_write else _F_SEAL_FUTURE_WRITE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise NotEnoughMemory(
                f"{nbytes} bytes of shared memory: {error.strerror}; give less memory, or raise the limits of this user"
            ) from error
        self.fd = fd
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mapping.content, np.uint8, nbytes)
        """(nbytes,) uint8."""
        self._begun_nbytes = 0
        self._close: Callable[[], Any] = weakref.finalize(self, os.close, fd)

    def begin(self, nbytes: int) -> None:
        """Before the first of so many bytes, from the start, are filled: take huge pages for them."""
        if nbytes > self._begun_nbytes:
            first, self._begun_nbytes = self._begun_nbytes, -(-nbytes // HUGE_NBYTES) * HUGE_NBYTES
            self._mapping.use_huge_pages(first, self._begun_nbytes)

    def close(self) -> None:
        """Close the descriptor. The memory is returned once nobody, here or elsewhere, maps it. May be called twice."""
        self._close()


def read_into(
    memory: NDArray[np.uint8], path: Path, entry: FileEntry, *, require: Callable[[], None] = lambda: None
) -> None:
    """Copy a file and compare its checksum. Its pages do not stay in the page cache, where they would count twice.

    Args:
        memory: (entry.nbytes,) uint8.
        require: called now and then, to raise what ends this early.

    Raises:
        DiskError: it cannot be read. ShardCorrupt: it is not what the manifest says.
    """
    digest = xxhash.xxh3_64()
    done = 0
    try:
        with open(path, "rb", buffering=0) as file:
            while done < len(memory):
                require()
                n = file.readinto(memory[done : done + _CHUNK_NBYTES].data)
                if not n:
                    break
                digest.update(memory[done : done + n].data)
                os.posix_fadvise(file.fileno(), done, n, os.POSIX_FADV_DONTNEED)
                done += n
            is_whole = done == len(memory) and not file.read(1)
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from error
    if not is_whole or digest.hexdigest() != entry.xxh3_64:
        raise ShardCorrupt(
            f"{path}: {done} bytes of {entry.nbytes} read, and they are not those that were written; "
            "remove the store and convert the model again"
        )
