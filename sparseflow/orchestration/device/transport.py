"""How bundles come from host memory to a device.

pull        the GPU reads host memory by itself, which is page-locked for that
staging     where it cannot be page-locked: the CPU copies what is missing into a page-locked buffer, the GPU reads that
host        the device is the CPU
"""

import math
import mmap
import os
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import (
    FETCH_TIMEOUT_S,
    Fetch,
    HostBundles,
    HostMemory,
    Pusher,
    WeightSource,
)
from sparseflow.cuda.page_lock import CHUNK_NBYTES, PageLock, whole_pages
from sparseflow.errors import DeviceError, ServerError
from sparseflow.kernels.device.ops import ReachableBundles

_NO_LIMIT = 1 << 30
_PUSHED_AT_ONCE = 1024  # 16 MiB of OPT-6.7B's bundles


class Brought(NamedTuple):
    """Bundles that a device reaches. rows: (n,) int32 on the device, which of the host's each one asked for is.

    lease: to be released once the device has read them; None: there is none.
    """

    host: ReachableBundles
    rows: Tensor
    lease: Fetch | None


class HostMemoryReplaced(Exception):
    """What was fetched lies in other memory than the transport is of."""


class Transport(Protocol):
    """Makes bundles of a source reachable."""

    name: str
    reason: str
    """Why it is this one and not `pull`."""
    limit: int
    """Bundles that are brought together."""

    def resident(self, bundles: Tensor) -> ReachableBundles | None:
        """A layer that is all in host memory, read there; None: it has to be fetched."""
        ...

    def bring(self, source: WeightSource, layer: int, ids: NDArray[np.uint32]) -> Brought:
        """Fetch bundles to where the device reads them.

        Raises:
            TimeoutError, ServerError: as fetches do. HostMemoryReplaced: a server's successor has other memory.
        """
        ...

    def is_of(self, source: WeightSource) -> bool:
        """Whether it still is of the memory that the source has."""
        ...

    def close(self) -> None:
        """Before the source is closed. May be called twice."""
        ...


class Pull:
    """The GPU reads page-locked memory."""

    name = "pull"
    reason = ""
    limit = _NO_LIMIT

    def __init__(self, lock: PageLock, owner: object, device: torch.device) -> None:
        """owner: what keeps the locked memory mapped."""
        self._lock, self._owner, self._device = lock, owner, device

    def resident(self, bundles: Tensor) -> ReachableBundles:
        """As `Transport.resident`."""
        size = bundles.stride(0) * bundles.element_size()
        n_before, n_between = (bundles.data_ptr() - self._lock.address) // size, self._lock.chunk_nbytes // size
        return ReachableBundles(bundles, self._address(bundles), -n_before % n_between, n_between)

    def bring(self, source: WeightSource, layer: int, ids: NDArray[np.uint32]) -> Brought:
        """As `Transport.bring`."""
        fetch, bundles = _fetched(source, layer, ids)
        if not 0 <= bundles.base.data_ptr() - self._lock.address < self._lock.nbytes:
            fetch.release()
            raise HostMemoryReplaced
        rows = torch.from_numpy(bundles.slots.astype("int32")).to(self._device)
        return Brought(ReachableBundles(bundles.base, self._address(bundles.base)), rows, fetch)

    def is_of(self, source: WeightSource) -> bool:
        """As `Transport.is_of`."""
        memory = source.host_memory()
        return memory is not None and memory.owner is self._owner

    def close(self) -> None:
        """As `Transport.close`."""
        if self._lock.is_locked:
            torch.cuda.synchronize(self._device)
        self._lock.close()

    def _address(self, bundles: Tensor) -> int:
        base = self._lock.device_base
        assert base is not None  # looked at before
        return base + bundles.data_ptr() - self._lock.address


class Staging:
    """The CPU copies into a page-locked buffer, from which the GPU reads."""

    name = "staging"

    def __init__(self, reason: str, n_bundles: int, like: Tensor, device: torch.device) -> None:
        """n_bundles: the most of a fetch. like: a bundle."""
        self.reason, self.limit = reason, n_bundles
        self._device = device
        shape = (n_bundles, *like.shape)
        self._buffer = torch.empty(shape, dtype=like.dtype, pin_memory=device.type == "cuda")
        self._rows = torch.arange(n_bundles, dtype=torch.int32, device=device)

    def resident(self, bundles: Tensor) -> None:
        """As `Transport.resident`: None."""

    def bring(self, source: WeightSource, layer: int, ids: NDArray[np.uint32]) -> Brought:
        """As `Transport.bring`."""
        fetch, bundles = _fetched(source, layer, ids)
        n = len(bundles.slots)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # what the buffer held is read by now
        torch.index_select(bundles.base, 0, torch.from_numpy(bundles.slots.astype("int64")), out=self._buffer[:n])
        return Brought(ReachableBundles(self._buffer, self._buffer.data_ptr()), self._rows[:n], fetch)

    def is_of(self, source: WeightSource) -> bool:
        """As `Transport.is_of`."""
        return True

    def close(self) -> None:
        """As `Transport.close`."""


class Push:
    """The server's process on the GPU copies to a buffer on the device, from which kernels take the bundles.

    Where that process fails, bundles are staged from then on, with a warning.
    """

    def __init__(self, reason: str, pusher: Pusher, like: Tensor, device: torch.device) -> None:
        """
        Raises:
            DeviceError, ServerError: as `Pusher.open_push`.
        """
        self.name, self.reason = "push", reason
        self.limit = min(_PUSHED_AT_ONCE, pusher.push_limit)
        self._pusher, self._like, self._device = pusher, like, device
        self._buffer = torch.empty(self.limit, *like.shape, dtype=like.dtype, device=device)
        self._rows = torch.arange(self.limit, dtype=torch.int32, device=device)
        self._instead: Staging | None = None
        pusher.open_push(self._buffer.data_ptr(), self._buffer.nbytes, device.index or 0)

    def resident(self, bundles: Tensor) -> None:
        """As `Transport.resident`: None."""

    def bring(self, source: WeightSource, layer: int, ids: NDArray[np.uint32]) -> Brought:
        """As `Transport.bring`."""
        if self._instead is None:
            try:
                self._push(layer, ids)
            except ServerError as error:
                self.name, self.reason = "staging", f"{self.reason}; and pushing failed: {error}"
                warnings.warn(f"bundles are staged from now on: {error}", stacklevel=2)
                self._instead = Staging(self.reason, self.limit, self._like, self._device)
            else:
                return Brought(ReachableBundles(self._buffer, self._buffer.data_ptr()), self._rows[: len(ids)], None)
        return self._instead.bring(source, layer, ids)

    def _push(self, layer: int, ids: NDArray[np.uint32]) -> None:
        stream = 0
        if self._device.type == "cuda":
            here = torch.cuda.current_stream(self._device)
            here.synchronize()  # what the buffer held is read by now
            stream = here.cuda_stream
        places = np.arange(len(ids), dtype=np.uint32)
        self._pusher.push(layer, ids, places).wait(FETCH_TIMEOUT_S, stream)

    def is_of(self, source: WeightSource) -> bool:
        """As `Transport.is_of`."""
        return True

    def close(self) -> None:
        """As `Transport.close`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._pusher.close_push()


class OnHost:
    """The device is the CPU."""

    name = "host"
    reason = "the device is the CPU"
    limit = _NO_LIMIT

    def resident(self, bundles: Tensor) -> ReachableBundles:
        """As `Transport.resident`."""
        return ReachableBundles(bundles, bundles.data_ptr())

    def bring(self, source: WeightSource, layer: int, ids: NDArray[np.uint32]) -> Brought:
        """As `Transport.bring`."""
        fetch, bundles = _fetched(source, layer, ids)
        rows = torch.from_numpy(bundles.slots.astype("int32"))
        return Brought(ReachableBundles(bundles.base, bundles.base.data_ptr()), rows, fetch)

    def is_of(self, source: WeightSource) -> bool:
        """As `Transport.is_of`."""
        return True

    def close(self) -> None:
        """As `Transport.close`."""


def open_transport(source: WeightSource, device: torch.device, n_staged: int) -> Transport:
    """The best that works here. n_staged: the most bundles of a fetch, where they have to be staged."""
    if device.type == "cpu":
        return OnHost()
    memory, profile = source.host_memory(), source.profile
    reason = "the weights are mapped files, which drivers may not page-lock"
    if memory is not None:
        lock = lock_memory(memory, device, profile.bundle_nbytes)
        if isinstance(lock, PageLock):
            return Pull(lock, memory.owner, device)
        reason = lock
    bundle = torch.empty(profile.parts_per_bundle, profile.hidden_dimension, dtype=getattr(torch, profile.dtype))
    pusher = source.pusher()
    if pusher is not None:
        try:
            return Push(reason, pusher, bundle, device)
        except (DeviceError, ServerError) as error:
            reason = f"{reason}; and the server cannot push: {error}"
    return Staging(reason, n_staged, bundle, device)


def _fetched(source: WeightSource, layer: int, ids: NDArray[np.uint32]) -> tuple[Fetch, HostBundles]:
    fetch = source.fetch(layer, ids)
    try:
        return fetch, fetch.wait(FETCH_TIMEOUT_S)
    except BaseException:
        fetch.release()
        raise


def lock_memory(memory: HostMemory, device: torch.device, unit_nbytes: int) -> PageLock | str:
    """Page-lock it, for the device to see in one piece; where that does not work, why.

    unit_nbytes: what no edge between chunks may cut, as a copy reaches over none.
    """
    from sparseflow.cuda.driver import CudaDriver

    whole_nbytes = math.lcm(unit_nbytes, mmap.PAGESIZE)
    try:
        lock = PageLock(
            CudaDriver(device.index or 0),
            memory.address,
            whole_pages(memory.nbytes),
            read_only=memory.is_read_only,
            turn_path=Path(tempfile.gettempdir()) / f"sparseflow-page-lock-{os.getuid()}",
            chunk_nbytes=max(1, CHUNK_NBYTES // whole_nbytes) * whole_nbytes,
        )
    except DeviceError as error:
        return str(error)
    if lock.is_locked and lock.device_base is not None:
        return lock
    lock.close()
    return lock.reason or "the device sees the page-locked memory in pieces"
