"""The arena: host memory cut into slots of one bundle each."""

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from sparseflow.errors import NotEnoughMemory


class Arena:
    """`n_slots` cells of `slot_nbytes`, starting on a page. Memory is taken from the system as slots are filled."""

    def __init__(self, n_slots: int, slot_nbytes: int) -> None:
        """
        Raises:
            NotEnoughMemory: the system refuses.
        """
        try:
            self._map = mmap.mmap(-1, n_slots * slot_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise NotEnoughMemory(
                f"an arena of {n_slots} slots of {slot_nbytes} bytes: {error.strerror}; give less memory"
            ) from error
        with suppress(OSError):  # fewer TLB misses where the kernel has huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.slots: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8).reshape(n_slots, slot_nbytes)

    def addresses(self, slots: NDArray[np.integer]) -> NDArray[np.uint64]:
        """Where slots begin in memory, (n,) uint64."""
        start, stride = self.slots.ctypes.data, self.slots.strides[0]
        return np.asarray(start + slots.astype(np.int64) * stride, np.uint64)
