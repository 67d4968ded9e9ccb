"""A mapping of shared memory, as a client of a weight server has it."""

import ctypes
from typing import NamedTuple

from sparseflow.engine.mapping import Mapping
from sparseflow.engine.shared_memory import SharedMemory


class Mapped(NamedTuple):
    """It lasts as long as `mapping` is held."""

    address: int
    nbytes: int
    mapping: Mapping


def map_shared(memory: SharedMemory, *, writable: bool) -> Mapped:
    mapping = Mapping(memory.fd, memory.nbytes, writable=writable)
    return Mapped(ctypes.addressof(mapping.content), memory.nbytes, mapping)
