"""Where each bundle lies, and whether a slot has changed: what residency writes and other processes may read.

A reader without a lease can look a bundle up and read its slot at once, and learn afterwards whether that was right:

    1. slot = slot_of[layer, id]; turn = turn_of[slot]; read only if `is_filled(turn)`
    2. read the slot
    3. get a lease; it was right if the lease names the same slot and turn_of[slot] is still the same turn

A slot's turn counts up when it begins to be filled (odd from then on) and when that ends (even). While a slot is leased
its turn does not change. Single numbers are read and written whole, in order, as x86-64 does.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.shared_memory import SharedMemory

ABSENT = -1


class SlotTable:
    """slot_of: (n_layers, ffn_dim) int32, ABSENT for bundles that are not there. turn_of: (n_slots,) uint32."""

    def __init__(self, n_layers: int, ffn_dim: int, n_slots: int, *, shared: bool = False) -> None:
        """
        Args:
            shared: other processes can be given it to read, by the descriptor of `memory`.
        """
        nbytes = table_nbytes(n_layers, ffn_dim, n_slots)
        self.memory = SharedMemory("table", nbytes) if shared else None
        content = self.memory.bytes if self.memory else np.zeros(nbytes, np.uint8)
        self.slot_of, self.turn_of = table_views(content, n_layers, ffn_dim)
        self.slot_of[:] = ABSENT

    def close(self) -> None:
        """Close the descriptor of a shared table. May be called twice."""
        if self.memory is not None:
            self.memory.close()


def table_nbytes(n_layers: int, ffn_dim: int, n_slots: int) -> int:
    """Size of a table."""
    return 4 * (n_layers * ffn_dim + n_slots)


def table_views(content: Any, n_layers: int, ffn_dim: int) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """slot_of and turn_of of a table's memory."""
    words = np.frombuffer(content, np.int32)
    n_bundles = n_layers * ffn_dim
    return words[:n_bundles].reshape(n_layers, ffn_dim), words[n_bundles:].view(np.uint32)


def is_filled(turns: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which slots hold what they are said to hold. (n,) bool."""
    return np.asarray(turns % 2 == 0)
