"""The calls as they reach a library: arguments, results, contexts of threads, and hosts without a driver."""

import ctypes
import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import holds_in_a_fork

from sparseflow.cuda import library as libcuda
from sparseflow.cuda.bandwidth import measure_bandwidth
from sparseflow.cuda.driver import AddressRange, CudaDriver, Driver
from sparseflow.cuda.library import Library
from sparseflow.errors import BadRequest, DeviceError, NoDevice

NBYTES = 1 << 20


@pytest.fixture
def raw(stub: Path) -> Any:
    """The stub itself."""
    return ctypes.CDLL(str(stub))


@pytest.fixture
def cuda(stub: Path, raw: Any) -> Iterator[CudaDriver]:
    with CudaDriver(library=Library(str(stub))) as driver:
        yield driver
    gc.collect()
    assert raw.stub_n_taken() == 0
    assert raw.stub_is_retained() == 0
    raw.cuCtxSetCurrent(None)


@pytest.fixture
def set_variable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """For the stub, which asks the C library's environment: os.environ sets both."""
    return monkeypatch.setenv


# --- hosts without


def test_host_without_a_driver_is_told_what_to_do() -> None:
    with pytest.raises(NoDevice, match=r"libcuda-of-nobody.so.*install NVIDIA's driver.*--gpus all"):
        Library("libcuda-of-nobody.so.1")


def test_driver_is_not_looked_for_before_it_is_needed() -> None:
    assert libcuda.LIBRARY == "libcuda.so.1"
    assert not [name for name, value in vars(libcuda).items() if isinstance(value, ctypes.CDLL)]


def test_library_that_lacks_a_call_is_too_old() -> None:
    with pytest.raises(NoDevice, match=r"has no cuInit; install a driver for CUDA 12"):
        Library("libc.so.6")


def test_no_visible_device_is_no_device(stub: Path, set_variable: Callable[[str, str], None]) -> None:
    set_variable("STUB_DEVICES", "0")
    with pytest.raises(NoDevice, match="CUDA_VISIBLE_DEVICES"):
        CudaDriver(library=Library(str(stub)))


def test_driver_that_finds_no_device_is_no_device(stub: Path, set_variable: Callable[[str, str], None]) -> None:
    set_variable("STUB_FAIL", "cuInit:100")
    with pytest.raises(NoDevice, match=r"cuInit\(\): CUDA_ERROR_NO_DEVICE \(100\)"):
        Library(str(stub))


def test_driver_that_does_not_start_is_an_error_with_its_remedy(
    stub: Path, set_variable: Callable[[str, str], None]
) -> None:
    set_variable("STUB_FAIL", "cuInit:803")
    with pytest.raises(DeviceError, match=r"SYSTEM_DRIVER_MISMATCH \(803\).*restart") as caught:
        Library(str(stub))
    assert type(caught.value) is DeviceError
    assert (caught.value.name, caught.value.number) == ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", 803)


def test_number_beyond_the_visible_devices_is_wrong_usage(stub: Path) -> None:
    for device in (1, -1):
        with pytest.raises(BadRequest, match=f"device {device}: 1 are visible"):
            CudaDriver(device, library=Library(str(stub)))


# --- each call


def test_every_call_of_the_protocol_is_there() -> None:
    names = {name for name in vars(Driver) if not name.startswith("_")}
    assert len(names) == 31
    assert names <= set(dir(CudaDriver))


def test_device_says_who_it_is(cuda: CudaDriver) -> None:
    assert cuda.version() == (13, 0)
    assert cuda.device_name() == "Stub 0"
    assert cuda.device_uuid() == bytes(range(240, 256))
    assert cuda.attribute(75) == 9
    assert cuda.pci_bus_id() == "ABCD:1B:00.0"
    assert cuda.mem_info() == (79 << 30, 80 << 30)


def test_bytes_go_to_the_device_and_come_back(cuda: CudaDriver) -> None:
    given, found = np.random.default_rng().integers(0, 256, (2, NBYTES), np.uint8)
    address, stream = cuda.mem_alloc(NBYTES), cuda.stream_create()
    assert address > 2**32  # a whole address
    assert cuda.address_range(address + 5) == AddressRange(address, NBYTES)
    cuda.copy_to_device(address, given.ctypes.data, NBYTES, stream)
    cuda.copy_to_host(found.ctypes.data, address, NBYTES, stream)
    cuda.stream_synchronize(stream)
    assert np.array_equal(given, found)
    cuda.stream_destroy(stream)
    cuda.mem_free(address)


def test_sizes_beyond_32_bits_arrive_whole(cuda: CudaDriver, raw: Any) -> None:
    raw.stub_nbytes.argtypes, raw.stub_nbytes.restype = (ctypes.c_void_p,), ctypes.c_size_t
    nbytes = 5 << 30
    address = cuda.mem_alloc(nbytes)  # of which nothing is touched
    assert raw.stub_nbytes(address) == nbytes
    assert cuda.address_range(address + nbytes - 1) == AddressRange(address, nbytes)
    cuda.mem_free(address)
    cuda.host_register(1 << 40, nbytes, 0)
    assert raw.stub_nbytes(1 << 40) == nbytes
    cuda.host_unregister(1 << 40)


def test_not_ready_is_an_answer(cuda: CudaDriver) -> None:
    stream = cuda.stream_create()
    assert {cuda.stream_query(stream) for _ in range(2)} == {False, True}
    cuda.stream_destroy(stream)
    with pytest.raises(DeviceError, match=r"cuStreamQuery\(\): CUDA_ERROR_UNNAMED \(400\)"):
        cuda.stream_query(stream)


def test_events_are_recorded_waited_for_and_shared(cuda: CudaDriver) -> None:
    stream, event = cuda.stream_create(), cuda.event_create()
    cuda.event_record(event, stream)
    handle = cuda.ipc_get_event_handle(event)
    assert handle == bytes(range(64))
    opened = cuda.ipc_open_event_handle(handle)
    cuda.stream_wait_event(stream, opened)
    assert cuda.event_query(opened)
    for one in (opened, event):
        cuda.event_destroy(one)
    cuda.stream_destroy(stream)


def test_memory_is_opened_by_a_handle_that_travels_by_value(cuda: CudaDriver) -> None:
    address = cuda.mem_alloc(NBYTES)
    ctypes.memset(address, 7, NBYTES)
    opened = cuda.ipc_open_mem_handle(cuda.ipc_get_mem_handle(address))
    assert opened != address
    assert ctypes.string_at(opened, NBYTES) == bytes([7]) * NBYTES
    cuda.ipc_close_mem_handle(opened)
    cuda.mem_free(address)
    with pytest.raises(DeviceError, match=r"cuIpcOpenMemHandle\(\): CUDA_ERROR_INVALID_VALUE"):
        cuda.ipc_open_mem_handle(bytes(64))


def test_host_memory_is_page_locked_and_has_an_address_on_the_device(cuda: CudaDriver) -> None:
    pinned = cuda.host_alloc(NBYTES)
    cuda.host_register(pinned, NBYTES, 0xB)
    assert cuda.host_device_pointer(pinned) == pinned
    with pytest.raises(DeviceError, match=r"cuMemHostRegister\(1048576 bytes at 0x[0-9a-f]+, flags 0xb\).* \(712\)"):
        cuda.host_register(pinned, NBYTES, 0xB)
    cuda.host_unregister(pinned)
    cuda.host_free(pinned)


def test_bandwidth_is_measured_through_it(cuda: CudaDriver) -> None:
    found = measure_bandwidth(cuda, NBYTES, n_copies=2)
    assert found.pageable_bytes_per_s > 0
    assert found.pinned_bytes_per_s > 0


def test_error_names_call_size_name_number_and_remedy(
    cuda: CudaDriver, set_variable: Callable[[str, str], None]
) -> None:
    set_variable("STUB_FAIL", "cuMemAlloc_v2:2")
    with pytest.raises(DeviceError) as caught:
        cuda.mem_alloc(12345)
    assert re.match(r"cuMemAlloc\(12345 bytes\): CUDA_ERROR_OUT_OF_MEMORY \(2\); free memory", str(caught.value))


# --- contexts


def test_every_thread_may_call(cuda: CudaDriver) -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(cuda.mem_info()))
    thread.start()
    thread.join(10)
    assert found == [cuda.mem_info()]


def test_context_of_another_library_is_put_back(cuda: CudaDriver, raw: Any) -> None:
    current = ctypes.c_void_p()
    raw.cuCtxSetCurrent(ctypes.c_void_p(0x1230))
    cuda.mem_info()
    with pytest.raises(DeviceError):
        cuda.mem_free(1)
    raw.cuCtxGetCurrent(ctypes.byref(current))
    assert current.value == 0x1230


def test_context_is_given_back_once(stub: Path, raw: Any) -> None:
    library = Library(str(stub))
    drivers = [CudaDriver(library=library) for _ in range(3)]
    assert raw.stub_is_retained() == 3
    drivers[0].close()
    drivers[0].close()
    assert raw.stub_is_retained() == 2
    with pytest.raises(BadRequest, match="the device was closed"):
        drivers[0].mem_info()
    drivers.clear()
    gc.collect()
    assert raw.stub_is_retained() == 0


def test_forked_child_is_refused_before_the_driver_is_asked(cuda: CudaDriver) -> None:
    def is_refused() -> bool:
        os.environ["STUB_CRASH"] = "cuCtxGetCurrent"
        with pytest.raises(BadRequest, match="forked child"):
            cuda.mem_info()
        cuda.close()
        return True

    assert holds_in_a_fork(is_refused)


def test_handles_have_the_size_of_cudas() -> None:
    assert ctypes.sizeof(libcuda.IpcHandle) == 64
    assert ctypes.sizeof(libcuda.Uuid) == 16
