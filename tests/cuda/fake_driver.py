"""CUDA's calls on host memory: copies copy, but as late as they may, and what is not given back is told.

Work on a stream is done only when somebody waits for it (or asks: then one piece of it), so that a wait that is missing
shows as wrong bytes. Two drivers of one `World` stand for two processes on one GPU.
"""

import ctypes
import itertools
import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparseflow.cuda import driver as cuda
from sparseflow.cuda.driver import AddressRange, MemInfo
from sparseflow.errors import DeviceError

INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE = (
    ("CUDA_ERROR_INVALID_VALUE", 1),
    ("CUDA_ERROR_OUT_OF_MEMORY", 2),
    ("CUDA_ERROR_INVALID_CONTEXT", 201),
    ("CUDA_ERROR_INVALID_HANDLE", 400),
)
NOT_SUPPORTED = ("CUDA_ERROR_NOT_SUPPORTED", 801)
REGISTERED, NOT_REGISTERED = (
    ("CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", 712),
    ("CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", 713),
)
INJECTED = ("CUDA_ERROR_LAUNCH_FAILED", 719)


def error(call: str, kind: tuple[str, int]) -> DeviceError:
    return DeviceError(f"{call}: {kind[0]} ({kind[1]})", name=kind[0], number=kind[1])


@dataclass(eq=False)
class Record:
    """One recording of an event, on the stream that it is done on."""

    stream: "Stream"
    is_done: bool = False


@dataclass(eq=False)
class Event:
    last: Record | None = None


@dataclass(eq=False)
class Stream:
    """What is to be done, in order."""

    work: deque[Callable[[], None]] = field(default_factory=deque)

    def step(self) -> None:
        if self.work:
            self.work.popleft()()

    def finish(self) -> None:
        while self.work:
            self.step()


@dataclass(eq=False)
class Allocation:
    """Real memory. It is never unmapped while the world stands, so that a copy that comes too late hits no one else."""

    memory: mmap.mmap
    address: int
    nbytes: int
    owner: "FakeDriver"
    n_opened: int = 0
    is_free: bool = False


class World:
    """One GPU, and what processes have exported."""

    def __init__(self) -> None:
        self.memory: dict[bytes, Allocation] = {}
        self.events: dict[bytes, tuple[Event, FakeDriver]] = {}
        self.freed: list[Allocation] = []  # still mapped: see Allocation
        self.violations: list[str] = []
        self.numbers = itertools.count(1)

    def handle(self) -> bytes:
        return next(self.numbers).to_bytes(8, "little") * 8


class FakeDriver:
    """`Driver`, of one process.

    fail_at: number of the call that fails, from 0. One that gives something back does so even then.
    """

    def __init__(
        self,
        world: World | None = None,
        *,
        fail_at: int | None = None,
        uuid: bytes = bytes(range(16)),
        attributes: dict[int, int] | None = None,
        gap_nbytes: int = 0,
    ) -> None:
        self.world = world or World()
        self.fail_at = fail_at
        self.calls: list[str] = []
        self.uuid = uuid
        self.gap_nbytes = gap_nbytes  # between what two registrations look like on the device
        self.attributes = {
            cuda.CAPABILITY_MAJOR: 9,
            cuda.CAPABILITY_MINOR: 0,
            cuda.HOST_REGISTER_SUPPORTED: 1,
            cuda.USES_HOST_PAGE_TABLES: 0,
            cuda.READ_ONLY_HOST_REGISTER_SUPPORTED: 1,
            cuda.IPC_EVENT_SUPPORTED: 1,
        } | (attributes or {})
        self.allocations: dict[int, Allocation] = {}
        self.host_allocations: dict[int, mmap.mmap] = {}
        self.registered: dict[int, tuple[int, int]] = {}  # address: (nbytes, flags)
        self.opened: dict[int, Allocation] = {}
        self.streams: dict[int, Stream] = {0: Stream()}
        self.events: dict[int, Event] = {}
        self.host_limit: int | None = None  # bytes that can be registered

    # --- what tests ask

    def leaks(self) -> dict[str, int]:
        """What was taken and not given back."""
        counts = {
            "allocations": len(self.allocations),
            "host_allocations": len(self.host_allocations),
            "registered": len(self.registered),
            "opened": len(self.opened),
            "streams": len(self.streams) - 1,
            "events": len(self.events),
        }
        return {name: n for name, n in counts.items() if n}

    def content(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """(nbytes,) uint8, what is there now."""
        return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), np.uint8).copy()

    def _enter(self, call: str, *, gives_back: Callable[[], object] | None = None) -> None:
        self.calls.append(call)
        fails = len(self.calls) - 1 == self.fail_at
        if gives_back is not None:
            gives_back()
        if fails:
            raise error(call, INJECTED)

    # --- the device

    def version(self) -> tuple[int, int]:
        self._enter("version")
        return 13, 0

    def device_count(self) -> int:
        self._enter("device_count")
        return 1

    def device_name(self) -> str:
        self._enter("device_name")
        return "a GPU of the tests"

    def device_uuid(self) -> bytes:
        self._enter("device_uuid")
        return self.uuid

    def attribute(self, number: int) -> int:
        self._enter("attribute")
        return self.attributes[number]

    def pci_bus_id(self) -> str:
        self._enter("pci_bus_id")
        return "FFFF:00:00.0"

    def mem_info(self) -> MemInfo:
        self._enter("mem_info")
        return MemInfo(1 << 30, 1 << 31)

    # --- memory

    def mem_alloc(self, nbytes: int) -> int:
        self._enter("mem_alloc")
        memory = mmap.mmap(-1, nbytes)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self.allocations[address] = Allocation(memory, address, nbytes, self)
        return address

    def mem_free(self, address: int) -> None:
        def free() -> None:
            allocation = self.allocations.pop(address)
            allocation.is_free = True
            if allocation.n_opened:
                self.world.violations.append("memory freed that another process has open")
            self.world.memory = {h: found for h, found in self.world.memory.items() if found is not allocation}
            self.world.freed.append(allocation)

        self._enter("mem_free", gives_back=free)

    def address_range(self, address: int) -> AddressRange:
        self._enter("address_range")
        for found in (*self.allocations.values(), *self.opened.values()):
            if found.address <= address < found.address + found.nbytes:
                return AddressRange(found.address, found.nbytes)
        raise error("address_range", INVALID_VALUE)

    def host_register(self, address: int, nbytes: int, flags: int) -> None:
        self._enter("host_register")
        if any(address < at + n and at < address + nbytes for at, (n, _) in self.registered.items()):
            raise error("host_register", REGISTERED)
        if flags & cuda.REGISTER_READ_ONLY and not self.attributes[cuda.READ_ONLY_HOST_REGISTER_SUPPORTED]:
            raise error("host_register", NOT_SUPPORTED)
        needs_write = not flags & cuda.REGISTER_READ_ONLY and not self.attributes[cuda.USES_HOST_PAGE_TABLES]
        if not is_mapped(address, nbytes, writable=needs_write):
            raise error("host_register", INVALID_VALUE)
        if self.host_limit is not None and nbytes + sum(n for n, _ in self.registered.values()) > self.host_limit:
            raise error("host_register", OUT_OF_MEMORY)
        self.registered[address] = (nbytes, flags)

    def host_unregister(self, address: int) -> None:
        if address not in self.registered:
            raise error("host_unregister", NOT_REGISTERED)
        self._enter("host_unregister", gives_back=lambda: self.registered.pop(address))

    def host_device_pointer(self, address: int) -> int:
        self._enter("host_device_pointer")
        if address not in self.registered:
            raise error("host_device_pointer", INVALID_VALUE)
        return 0x10_0000_0000_0000 + address + self.gap_nbytes * sorted(self.registered).index(address)

    def host_alloc(self, nbytes: int) -> int:
        self._enter("host_alloc")
        memory = mmap.mmap(-1, nbytes)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self.host_allocations[address] = memory
        return address

    def host_free(self, address: int) -> None:
        self._enter("host_free", gives_back=lambda: self.host_allocations.pop(address))

    # --- copies, streams, events

    def copy_to_device(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None:
        self._enter("copy_to_device")
        self._copy(device_address, host_address, nbytes, stream, device_address)

    def copy_to_host(self, host_address: int, device_address: int, nbytes: int, stream: int) -> None:
        self._enter("copy_to_host")
        self._copy(host_address, device_address, nbytes, stream, device_address)

    def _copy(self, to: int, source: int, nbytes: int, stream: int, device_address: int) -> None:
        for found in (*self.allocations.values(), *self.opened.values()):
            if found.address <= device_address and device_address + nbytes <= found.address + found.nbytes:
                break
        else:
            raise error("copy", INVALID_VALUE)

        def perform() -> None:
            if found.is_free or (found.owner is not self and not found.n_opened):
                self.world.violations.append("a copy was still to come when its memory was given back")
            else:
                ctypes.memmove(to, source, nbytes)

        self._stream(stream).work.append(perform)

    def stream_create(self) -> int:
        self._enter("stream_create")
        number = next(self.world.numbers)
        self.streams[number] = Stream()
        return number

    def stream_destroy(self, stream: int) -> None:
        self._enter("stream_destroy", gives_back=lambda: self.streams.pop(stream).finish())

    def stream_synchronize(self, stream: int) -> None:
        self._enter("stream_synchronize")
        self._stream(stream).finish()

    def stream_query(self, stream: int) -> bool:
        self._enter("stream_query")
        self._stream(stream).step()
        return not self._stream(stream).work

    def stream_wait_event(self, stream: int, event: int) -> None:
        self._enter("stream_wait_event")
        record = self._event(event).last
        if record is None:
            return  # as CUDA does

        def wait() -> None:
            while not record.is_done:
                record.stream.step()

        self._stream(stream).work.append(wait)

    def event_create(self) -> int:
        self._enter("event_create")
        number = next(self.world.numbers)
        self.events[number] = Event()
        return number

    def event_record(self, event: int, stream: int) -> None:
        self._enter("event_record")
        record = self._event(event).last = Record(self._stream(stream))

        def happen() -> None:
            record.is_done = True

        self._stream(stream).work.append(happen)

    def event_query(self, event: int) -> bool:
        self._enter("event_query")
        record = self._event(event).last
        if record is not None and not record.is_done:
            record.stream.step()
        return record is None or record.is_done

    def event_destroy(self, event: int) -> None:
        def destroy() -> None:
            gone = self.events.pop(event)
            self.world.events = {
                handle: (found, owner)
                for handle, (found, owner) in self.world.events.items()
                if found is not gone or owner is not self
            }

        self._enter("event_destroy", gives_back=destroy)

    # --- between processes

    def ipc_get_mem_handle(self, address: int) -> bytes:
        self._enter("ipc_get_mem_handle")
        if address not in self.allocations:
            raise error("ipc_get_mem_handle", INVALID_VALUE)
        handle = self.world.handle()
        self.world.memory[handle] = self.allocations[address]
        return handle

    def ipc_open_mem_handle(self, handle: bytes) -> int:
        self._enter("ipc_open_mem_handle")
        found = self.world.memory.get(handle)
        if found is None:
            raise error("ipc_open_mem_handle", INVALID_VALUE)
        if found.owner is self:
            raise error("ipc_open_mem_handle", INVALID_CONTEXT)
        found.n_opened += 1
        self.opened[found.address] = found
        return found.address

    def ipc_close_mem_handle(self, address: int) -> None:
        def close() -> None:
            self.opened.pop(address).n_opened -= 1

        self._enter("ipc_close_mem_handle", gives_back=close)

    def ipc_get_event_handle(self, event: int) -> bytes:
        self._enter("ipc_get_event_handle")
        handle = self.world.handle()
        self.world.events[handle] = (self._event(event), self)
        return handle

    def ipc_open_event_handle(self, handle: bytes) -> int:
        self._enter("ipc_open_event_handle")
        if handle not in self.world.events:
            raise error("ipc_open_event_handle", INVALID_VALUE)
        number = next(self.world.numbers)
        self.events[number] = self.world.events[handle][0]
        return number

    def _stream(self, stream: int) -> Stream:
        if stream not in self.streams:
            raise error("stream", INVALID_HANDLE)
        return self.streams[stream]

    def _event(self, event: int) -> Event:
        if event not in self.events:
            raise error("event", INVALID_HANDLE)
        return self.events[event]


def is_mapped(address: int, nbytes: int, *, writable: bool) -> bool:
    """Whether all of it is memory of this process, and may be written where that matters."""
    at = address
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        first, after = (int(text, 16) for text in span.split("-"))
        if first <= at < after:
            if rights[0] != "r" or (writable and rights[1] != "w"):
                return False
            at = after
            if at >= address + nbytes:
                return True
    return False
