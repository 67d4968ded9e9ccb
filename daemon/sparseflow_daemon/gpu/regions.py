"""In a GPU child: a model's files, from the server's memory copied to the GPU once, for others to read there."""

import ctypes
from contextlib import ExitStack
from functools import partial

from sparseflow.cuda.driver import Driver
from sparseflow.cuda.ipc import ExportedSlab, wait_until_done
from sparseflow.cuda.tickets import SlabTicket
from sparseflow.engine.mapping import Mapping
from sparseflow.errors import BadRequest, DeviceError, NotEnoughMemory

_ALIGNMENT_NBYTES = 4096  # as in files: kernels take it for granted
_CHUNK_NBYTES = 64 << 20
_COPY_TIMEOUT_S = 60.0  # of a chunk


class LentRegions:
    """One allocation with all regions of a model, until `close`; not before everybody has unmapped it."""

    def __init__(self, driver: Driver, names: list[str], sizes: list[int], descriptors: list[int]) -> None:
        """
        Args:
            sizes: bytes of each region. descriptors: of their memory; they stay the caller's.

        Raises:
            BadRequest: not one descriptor each. DeviceError: the GPU has no room, or fails.
            NotEnoughMemory: the memory cannot be mapped.
        """
        if not len(names) == len(sizes) == len(descriptors) or not sum(sizes):
            raise BadRequest(
                f"{len(names)} regions of {sum(sizes)} bytes, {len(descriptors)} descriptors; send one each"
            )
        self.offsets: dict[str, int] = {}
        """Where each region begins."""
        total = 0
        for name, nbytes in zip(names, sizes, strict=True):
            self.offsets[name] = total
            total += -(-nbytes // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES
        with ExitStack() as stack:
            address = driver.mem_alloc(total)
            stack.callback(driver.mem_free, address)
            for name, nbytes, fd in zip(names, sizes, descriptors, strict=True):
                _copy(driver, address + self.offsets[name], fd, nbytes)
            self._slab = stack.enter_context(ExportedSlab(driver, address, total))
            self._rest = stack.pop_all()

    @property
    def ticket(self) -> SlabTicket:
        """Of all of it."""
        return self._slab.ticket

    def close(self) -> None:
        """Free it. May be called twice.

        Raises:
            DeviceError: that failed.
        """
        self._rest.close()


def _copy(driver: Driver, device_address: int, fd: int, nbytes: int) -> None:
    if not nbytes:
        return
    try:
        mapping = Mapping(fd, nbytes, writable=False)
    except OSError as error:
        raise NotEnoughMemory(f"{nbytes} bytes of the server's memory cannot be mapped ({error.strerror})") from error
    address = ctypes.addressof(mapping.content)
    with ExitStack() as stack:
        stream = driver.stream_create()
        stack.callback(driver.stream_destroy, stream)
        finish = partial(wait_until_done, driver, stream, _COPY_TIMEOUT_S)
        for first in range(0, nbytes, _CHUNK_NBYTES):
            n = min(_CHUNK_NBYTES, nbytes - first)
            driver.copy_to_device(device_address + first, address + first, n, stream)
            try:
                finish()
            except TimeoutError as error:
                raise DeviceError(str(error)) from error
