"""The arena: host memory cut into slots of one bundle each."""

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import NotEnoughMemory


class Arena:
    """`n_slots` cells of `slot_nbytes`, starting on a page. Memory is taken from the system as slots are filled."""

    def __init__(self, n_slots: int, slot_nbytes: int, *, shared: bool = False) -> None:
        """
        Args:
            shared: other processes can be given it to read, by the descriptor of `memory`.

        Raises:
            NotEnoughMemory: the system refuses.
        """
        self.memory = SharedMemory("arena", n_slots * slot_nbytes) if shared else None
        try:
            content = self.memory.bytes if self.memory else _private_memory(n_slots * slot_nbytes)
        except OSError as error:
            raise NotEnoughMemory(
                f"an arena of {n_slots} slots of {slot_nbytes} bytes: {error.strerror}; give less memory"
            ) from error
        self.slots: NDArray[np.uint8] = content.reshape(n_slots, slot_nbytes)
        self._address = self.slots.ctypes.data

    def begin(self, slots: NDArray[np.integer]) -> None:
        """Before slots are filled, which are given out from the first on."""
        if self.memory is not None and len(slots):
            self.memory.begin((int(slots.max()) + 1) * self.slots.strides[0])

    def close(self) -> None:
        """Close the descriptor of a shared arena. May be called twice."""
        if self.memory is not None:
            self.memory.close()

    def addresses(self, slots: NDArray[np.integer]) -> NDArray[np.uint64]:
        """Where slots begin in memory, (n,) uint64."""
        return np.asarray(self._address + slots * self.slots.strides[0], np.uint64)


def _private_memory(nbytes: int) -> NDArray[np.uint8]:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # fewer TLB misses where the kernel has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
