"""libcuda.so.1 through ctypes: which symbols, of which arguments, and what an error of theirs says.

The driver's interface keeps no last error that would meet the next call, as the runtime's does: what failed is told
once, here. ctypes lets go of the interpreter's lock during a call, so a slow one stops no other thread.
"""

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from sparseflow.errors import DeviceError, NoDevice

LIBRARY = "libcuda.so.1"
SUCCESS, NOT_READY = 0, 600
_NO_DEVICE = ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY")


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle, CUipcEventHandle: passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


# Names as the library exports them: cuda.h renames many of them to their second version. A CUdeviceptr is 64 bits, a
# CUdevice an int; contexts, streams and events are pointers.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (POINTER(c_char), c_int, c_int),
    "cuDeviceGetUuid_v2": (POINTER(Uuid), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceGetPCIBusId": (POINTER(c_char), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamQuery": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuIpcGetEventHandle": (POINTER(IpcHandle), c_void_p),
    "cuIpcOpenEventHandle": (POINTER(c_void_p), IpcHandle),
}

_REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free memory of the GPU or of the host, or ask for less",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds the GPU alone; end it, or set its compute mode to default",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start what the system needs beside the driver (nvidia-fabricmanager)",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the kernel's part of the driver is of another version; restart the machine",
    "CUDA_ERROR_NOT_PERMITTED": "give the container or user more rights",
    "CUDA_ERROR_NOT_SUPPORTED": "this device cannot do that",
}


class Library:
    """The driver's library, opened and started."""

    def __init__(self, name: str = LIBRARY) -> None:
        """
        Raises:
            NoDevice: there is no such library here, it is older than CUDA 12, or it finds no GPU.
            DeviceError: it does not start.
        """
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise NoDevice(
                f"the CUDA driver's library cannot be opened ({error}); install NVIDIA's driver, or start the "
                "container with its GPUs (--gpus all)"
            ) from error
        self._functions: dict[str, Any] = {}
        for symbol, arguments in _SIGNATURES.items():
            try:
                function = library[symbol]
            except AttributeError as error:
                raise NoDevice(f"{name} has no {symbol}; install a driver for CUDA 12 or later") from error
            function.restype, function.argtypes = c_int, arguments
            self._functions[symbol] = function
        self.call("cuInit", 0)

    def result_of(self, symbol: str, *arguments: object) -> int:
        """CUDA's number of what became of a call; 0 is success."""
        number: int = self._functions[symbol](*arguments)
        return number

    def call(self, symbol: str, *arguments: object, about: str = "") -> None:
        """Call, and check the result. about: what an error says beside the function's name, sizes first of all.

        Raises:
            DeviceError: it failed.
        """
        if (number := self.result_of(symbol, *arguments)) != SUCCESS:
            raise self.error(symbol, number, about)

    def error(self, symbol: str, number: int, about: str = "") -> DeviceError:
        """What a result that is not success means."""
        text = c_char_p()
        if self.result_of("cuGetErrorName", number, text) == SUCCESS and text.value:
            name = text.value.decode("ascii", "replace")
        else:
            name = "CUDA_ERROR_UNNAMED"
        remedy = _REMEDIES.get(name, "see what `sparseflow doctor` says of this device")
        kind = NoDevice if symbol == "cuInit" and name in _NO_DEVICE else DeviceError
        return kind(
            f"{symbol.removesuffix('_v2')}({about}): {name} ({number}); {remedy}",
            name=name,
            number=number,
        )
