"""How fast bytes come from host memory to the device: measured."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from sparseflow.cuda.driver import Driver
from sparseflow.errors import BadRequest

_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class CopyBandwidth:
    """Bytes per second of copies of `nbytes`, from memory as any and from memory that is page-locked."""

    nbytes: int
    pageable_bytes_per_s: float
    pinned_bytes_per_s: float


def measure_bandwidth(
    driver: Driver,
    nbytes: int = _NBYTES,
    n_copies: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> CopyBandwidth:
    """Medians of `n_copies`, of each kind, after one that is not counted.

    Raises:
        DeviceError: there is too little memory, or a copy fails.
    """
    if nbytes < 1 or n_copies < 1:
        raise BadRequest(f"nbytes={nbytes}, n_copies={n_copies}: give at least one byte and one copy")
    pageable = np.ones(nbytes, np.uint8)  # not zeros: those would all be one page of the kernel's
    with ExitStack() as stack:
        stream = driver.stream_create()
        stack.callback(driver.stream_destroy, stream)
        device = driver.mem_alloc(nbytes)
        stack.callback(driver.mem_free, device)
        pinned = driver.host_alloc(nbytes)
        stack.callback(driver.host_free, pinned)
        stack.callback(driver.stream_synchronize, stream)  # a failed run may have left a copy under way

        def seconds(host_address: int) -> float:
            begin = clock()
            driver.copy_to_device(device, host_address, nbytes, stream)
            driver.stream_synchronize(stream)
            return clock() - begin

        found = []
        for address in (pageable.ctypes.data, pinned):
            seconds(address)
            found.append(nbytes / statistics.median(seconds(address) for _ in range(n_copies)))
    return CopyBandwidth(nbytes, *found)
