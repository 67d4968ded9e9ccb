"""The calls of CUDA that are used, on one device: what they are (`Driver`) and libcuda's (`CudaDriver`).

Addresses, streams and events are ints, sizes bytes; stream 0 is the default stream.
"""

# ruff: noqa: D102  what the calls of `Driver` do stands at those of `CudaDriver`

import os
import weakref
from ctypes import byref, c_char, c_int, c_size_t, c_uint64, c_void_p
from types import TracebackType
from typing import NamedTuple, Protocol

from sparseflow.cuda.library import NOT_READY, SUCCESS, IpcHandle, Library, Uuid
from sparseflow.errors import BadRequest, NoDevice

HANDLE_NBYTES, UUID_NBYTES = 64, 16

# cuda.h: CU_MEMHOSTREGISTER_*
REGISTER_PORTABLE, REGISTER_DEVICEMAP, REGISTER_READ_ONLY = 0x01, 0x02, 0x08

# cuda.h: CUdevice_attribute
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
HOST_REGISTER_SUPPORTED = 99
USES_HOST_PAGE_TABLES = 100
READ_ONLY_HOST_REGISTER_SUPPORTED = 113
IPC_EVENT_SUPPORTED = 125

_HOST_PORTABLE, _HOST_DEVICEMAP = 0x01, 0x02
_STREAM_NON_BLOCKING = 0x01
_EVENT_DISABLE_TIMING, _EVENT_INTERPROCESS = 0x02, 0x04
_IPC_LAZY_ENABLE_PEER_ACCESS = 0x01


class MemInfo(NamedTuple):
    """Bytes of the device's memory."""

    free: int
    total: int


class AddressRange(NamedTuple):
    """Of one allocation: where it begins, and its bytes."""

    base: int
    nbytes: int


class Driver(Protocol):
    """What `CudaDriver` does, whoever does it. Each call raises `DeviceError` with CUDA's name for what went wrong."""

    # fmt: off
    def version(self) -> tuple[int, int]: ...                               # of CUDA, that the driver is for
    def device_count(self) -> int: ...
    def device_name(self) -> str: ...
    def device_uuid(self) -> bytes: ...                                     # UUID_NBYTES
    def attribute(self, number: int) -> int: ...
    def pci_bus_id(self) -> str: ...                                        # domain:bus:device.function
    def mem_info(self) -> MemInfo: ...
    def mem_alloc(self, nbytes: int) -> int: ...
    def mem_free(self, address: int) -> None: ...
    def address_range(self, address: int) -> AddressRange: ...
    def host_register(self, address: int, nbytes: int, flags: int) -> None: ...
    def host_unregister(self, address: int) -> None: ...
    def host_device_pointer(self, address: int) -> int: ...
    def host_alloc(self, nbytes: int) -> int: ...                           # page-locked
    def host_free(self, address: int) -> None: ...
    def copy_to_device(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None: ...
    def copy_to_host(self, host_address: int, device_address: int, nbytes: int, stream: int) -> None: ...
    def stream_create(self) -> int: ...                                     # waits for no default stream
    def stream_destroy(self, stream: int) -> None: ...
    def stream_synchronize(self, stream: int) -> None: ...
    def stream_query(self, stream: int) -> bool: ...                        # whether all is done
    def stream_wait_event(self, stream: int, event: int) -> None: ...
    def event_create(self) -> int: ...                                      # for several processes, without timing
    def event_record(self, event: int, stream: int) -> None: ...
    def event_query(self, event: int) -> bool: ...                          # whether what was recorded is done
    def event_destroy(self, event: int) -> None: ...
    def ipc_get_mem_handle(self, address: int) -> bytes: ...                # HANDLE_NBYTES
    def ipc_open_mem_handle(self, handle: bytes) -> int: ...
    def ipc_close_mem_handle(self, address: int) -> None: ...
    def ipc_get_event_handle(self, event: int) -> bytes: ...                # HANDLE_NBYTES
    def ipc_open_event_handle(self, handle: bytes) -> int: ...              # ended by event_destroy
    # fmt: on


class CudaDriver:
    """One device through libcuda, in its primary context, which is also torch's.

    Any thread may call; where another context is current there, it is again after the call. A forked child cannot.
    """

    def __init__(self, device: int = 0, library: Library | None = None) -> None:
        """
        Args:
            device: its number among those that are visible here (CUDA_VISIBLE_DEVICES).
            library: one that was opened already.

        Raises:
            NoDevice: no driver, or no GPU. BadRequest: no GPU of that number. DeviceError: it cannot be used.
        """
        self._library = library or Library()
        self._pid = os.getpid()
        n_devices = self.device_count()
        if not n_devices:
            raise NoDevice("the CUDA driver shows no GPU; look at CUDA_VISIBLE_DEVICES")
        if not 0 <= device < n_devices:
            raise BadRequest(f"device {device}: {n_devices} are visible; give a number from 0 to {n_devices - 1}")
        found, context = c_int(), c_void_p()
        self._library.call("cuDeviceGet", byref(found), device, about=f"device {device}")
        self._device = found.value
        self._library.call("cuDevicePrimaryCtxRetain", byref(context), self._device, about=f"device {device}")
        self._context = context.value
        self._release = weakref.finalize(self, _release, self._library, self._device, self._pid)
        self._release.atexit = False  # what others close at exit still needs it

    # --- the device

    def version(self) -> tuple[int, int]:
        """Of CUDA, that the driver is for, such as (13, 0)."""
        number = c_int()
        self._library.call("cuDriverGetVersion", byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def device_count(self) -> int:
        """GPUs that are visible here."""
        number = c_int()
        self._library.call("cuDeviceGetCount", byref(number))
        return number.value

    def device_name(self) -> str:
        """As its maker calls it."""
        text = (c_char * 256)()
        self._library.call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode("utf-8", "replace")

    def device_uuid(self) -> bytes:
        """16 bytes. A part of a GPU (MIG) has one of its own."""
        uuid = Uuid()
        self._library.call("cuDeviceGetUuid_v2", byref(uuid), self._device)
        return bytes(uuid.bytes)

    def attribute(self, number: int) -> int:
        """One of cuda.h's CUdevice_attribute."""
        value = c_int()
        self._library.call("cuDeviceGetAttribute", byref(value), number, self._device, about=f"attribute {number}")
        return value.value

    def pci_bus_id(self) -> str:
        """Such as 0000:1B:00.0."""
        text = (c_char * 32)()
        self._library.call("cuDeviceGetPCIBusId", text, len(text), self._device)
        return text.value.decode("ascii", "replace")

    # --- memory

    def mem_info(self) -> MemInfo:
        """Of the whole device, other processes counted."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return MemInfo(free.value, total.value)

    def mem_alloc(self, nbytes: int) -> int:
        """The address of new device memory, its content anything."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), nbytes, about=f"{nbytes} bytes")
        return address.value

    def mem_free(self, address: int) -> None:
        """Of `mem_alloc`; not before other processes have closed it."""
        self._call("cuMemFree_v2", address, about=f"{address:#x}")

    def address_range(self, address: int) -> AddressRange:
        """The allocation that a device address lies in."""
        base, nbytes = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", byref(base), byref(nbytes), address, about=f"{address:#x}")
        return AddressRange(base.value, nbytes.value)

    def host_register(self, address: int, nbytes: int, flags: int) -> None:
        """Page-lock memory of this process. flags: REGISTER_*."""
        about = f"{nbytes} bytes at {address:#x}, flags {flags:#x}"
        self._call("cuMemHostRegister_v2", address, nbytes, flags, about=about)

    def host_unregister(self, address: int) -> None:
        """The address is that of `host_register`."""
        self._call("cuMemHostUnregister", address, about=f"{address:#x}")

    def host_device_pointer(self, address: int) -> int:
        """Where the device sees page-locked memory."""
        found = c_uint64()
        self._call("cuMemHostGetDevicePointer_v2", byref(found), address, 0, about=f"{address:#x}")
        return found.value

    def host_alloc(self, nbytes: int) -> int:
        """The address of new page-locked host memory."""
        address = c_void_p()
        flags = _HOST_PORTABLE | _HOST_DEVICEMAP
        self._call("cuMemHostAlloc", byref(address), nbytes, flags, about=f"{nbytes} bytes")
        return address.value or 0

    def host_free(self, address: int) -> None:
        """Of `host_alloc`."""
        self._call("cuMemFreeHost", address, about=f"{address:#x}")

    def copy_to_device(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None:
        """Begin a copy. Memory that is not page-locked may be read before this returns, or be staged."""
        about = f"{nbytes} bytes from {host_address:#x} to {device_address:#x}"
        self._call("cuMemcpyHtoDAsync_v2", device_address, host_address, nbytes, stream, about=about)

    def copy_to_host(self, host_address: int, device_address: int, nbytes: int, stream: int) -> None:
        """Begin a copy."""
        about = f"{nbytes} bytes from {device_address:#x} to {host_address:#x}"
        self._call("cuMemcpyDtoHAsync_v2", host_address, device_address, nbytes, stream, about=about)

    # --- streams and events

    def stream_create(self) -> int:
        """One that does not wait for the default stream."""
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), _STREAM_NON_BLOCKING)
        return stream.value or 0

    def stream_destroy(self, stream: int) -> None:
        """What is on it still runs."""
        self._call("cuStreamDestroy_v2", stream)

    def stream_synchronize(self, stream: int) -> None:
        """Wait, for as long as it takes, until all is done."""
        self._call("cuStreamSynchronize", stream)

    def stream_query(self, stream: int) -> bool:
        """Whether all is done."""
        return self._is_done("cuStreamQuery", stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        """What comes later on the stream waits for what was recorded; nothing recorded yet: for nothing."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def event_create(self) -> int:
        """For several processes, without timing."""
        event = c_void_p()
        self._call("cuEventCreate", byref(event), _EVENT_DISABLE_TIMING | _EVENT_INTERPROCESS)
        return event.value or 0

    def event_record(self, event: int, stream: int) -> None:
        """It happens when all is done that is on the stream now."""
        self._call("cuEventRecord", event, stream)

    def event_query(self, event: int) -> bool:
        """Whether what was recorded is done; also if nothing was."""
        return self._is_done("cuEventQuery", event)

    def event_destroy(self, event: int) -> None:
        """Also of one that another process exported."""
        self._call("cuEventDestroy_v2", event)

    # --- between processes

    def ipc_get_mem_handle(self, address: int) -> bytes:
        """For the whole allocation that begins at a device address."""
        handle = IpcHandle()
        self._call("cuIpcGetMemHandle", byref(handle), address, about=f"{address:#x}")
        return bytes(handle.reserved)

    def ipc_open_mem_handle(self, handle: bytes) -> int:
        """Map another process's allocation; returns where it begins here."""
        address = c_uint64()
        content = IpcHandle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", byref(address), content, _IPC_LAZY_ENABLE_PEER_ACCESS)
        return address.value

    def ipc_close_mem_handle(self, address: int) -> None:
        """Unmap; the address is that of `ipc_open_mem_handle`."""
        self._call("cuIpcCloseMemHandle", address, about=f"{address:#x}")

    def ipc_get_event_handle(self, event: int) -> bytes:
        """Of an event of this process."""
        handle = IpcHandle()
        self._call("cuIpcGetEventHandle", byref(handle), event)
        return bytes(handle.reserved)

    def ipc_open_event_handle(self, handle: bytes) -> int:
        """Another process's event; ended by `event_destroy`."""
        event = c_void_p()
        self._call("cuIpcOpenEventHandle", byref(event), IpcHandle.from_buffer_copy(handle))
        return event.value or 0

    # --- the context

    def close(self) -> None:
        """Give the context back; it ends where nobody else uses it. May be called twice."""
        self._release()

    def __enter__(self) -> "CudaDriver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, symbol: str, *arguments: object, about: str = "") -> None:
        if (number := self._in_context(symbol, *arguments)) != SUCCESS:
            raise self._library.error(symbol, number, about)

    def _is_done(self, symbol: str, handle: int) -> bool:
        number = self._in_context(symbol, handle)
        if number not in (SUCCESS, NOT_READY):
            raise self._library.error(symbol, number)
        return number == SUCCESS

    def _in_context(self, symbol: str, *arguments: object) -> int:
        """A thread without a context keeps ours; another's is put back."""
        if os.getpid() != self._pid:
            raise BadRequest(f"CUDA of process {self._pid} cannot be used in its forked child; open the device there")
        if not self._release.alive:
            raise BadRequest("the device was closed; open it again")
        before = c_void_p()
        self._library.call("cuCtxGetCurrent", byref(before))
        if before.value == self._context:
            return self._library.result_of(symbol, *arguments)
        self._library.call("cuCtxSetCurrent", self._context)
        try:
            return self._library.result_of(symbol, *arguments)
        finally:
            if before.value is not None:
                self._library.call("cuCtxSetCurrent", before)


def _release(library: Library, device: int, pid: int) -> None:
    if os.getpid() == pid:
        library.result_of("cuDevicePrimaryCtxRelease_v2", device)  # nobody is left to be told of an error
