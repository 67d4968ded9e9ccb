"""Which of the devices that are visible here is a certain GPU. No context is made for it."""

from ctypes import byref, c_int

from sparseflow.cuda.library import Library, Uuid
from sparseflow.cuda.tickets import format_uuid
from sparseflow.errors import NoDevice


def device_of_uuid(uuid: bytes, library: Library) -> int:
    """Its number here.

    Raises:
        NoDevice: it is not visible. DeviceError: the driver does not say.
    """
    n_devices, device, found = c_int(), c_int(), Uuid()
    library.call("cuDeviceGetCount", byref(n_devices))
    for number in range(n_devices.value):
        library.call("cuDeviceGet", byref(device), number, about=f"device {number}")
        library.call("cuDeviceGetUuid_v2", byref(found), device.value, about=f"device {number}")
        if bytes(found.bytes) == uuid:
            return number
    raise NoDevice(
        f"{format_uuid(uuid)} is none of the {n_devices.value} GPUs that this process sees; let it see that one "
        "(CUDA_VISIBLE_DEVICES, a container's --gpus)"
    )
