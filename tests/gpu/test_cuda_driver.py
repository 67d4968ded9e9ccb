"""The driver's calls, page-locking and memory shared between processes, on a real GPU: `pytest -m gpu tests/gpu`."""

import ctypes
import gc
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sparseflow.cli.main import main
from sparseflow.cuda import driver as cuda
from sparseflow.cuda.bandwidth import measure_bandwidth
from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.ipc import ExportedEvent, ExportedSlab, OpenedEvent, OpenedSlab
from sparseflow.cuda.ipc_trial import _encode, _pattern, _read_line, fill_in_child, try_ipc
from sparseflow.cuda.page_lock import PageLock
from sparseflow.cuda.tickets import EventTicket, SlabTicket
from sparseflow.cuda.trials import device_facts, try_page_lock
from sparseflow.engine.mapping import Mapping
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import BadRequest, DeviceError

pytestmark = pytest.mark.gpu

MIB = 1 << 20
SPARE = 256 * MIB  # that the driver may keep for itself


@pytest.fixture
def driver() -> Iterator[CudaDriver]:
    with CudaDriver() as made:
        yield made


@pytest.fixture
def gives_all_back(driver: CudaDriver) -> Iterator[None]:
    """For tests that repeat something: the device has as much free memory as before, once the first is over."""
    before = driver.mem_info().free
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while driver.mem_info().free < before - SPARE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert driver.mem_info().free >= before - SPARE


class Locked:
    """Shared memory of random bytes, mapped a second time as a client does."""

    def __init__(self, nbytes: int, *, writable: bool) -> None:
        self.memory = SharedMemory("gpu-test", nbytes, others_may_write=writable)
        self.memory.bytes[:] = np.random.default_rng().integers(0, 256, nbytes, np.uint8)
        self.mapping = Mapping(self.memory.fd, nbytes, writable=writable)
        self.address = ctypes.addressof(self.mapping.content)


# --- calls


def test_device_says_who_it_is(driver: CudaDriver) -> None:
    facts = device_facts(driver)
    print(json.dumps(facts, indent=1))
    assert facts["name"]
    assert len(driver.device_uuid()) == 16
    assert any(driver.device_uuid())
    assert 0 < facts["free_nbytes"] <= facts["total_nbytes"]
    assert driver.version() >= (12, 0)


@pytest.mark.parametrize("nbytes", [1, 4097, 3 * MIB + 5])
def test_bytes_go_to_the_device_and_come_back(driver: CudaDriver, nbytes: int) -> None:
    given = np.random.default_rng().integers(0, 256, nbytes, np.uint8)
    found = np.zeros_like(given)
    address, stream = driver.mem_alloc(nbytes), driver.stream_create()
    found_range = driver.address_range(address + nbytes - 1)
    assert found_range.base <= address
    assert found_range.base + found_range.nbytes >= address + nbytes
    driver.copy_to_device(address, given.ctypes.data, nbytes, stream)
    driver.copy_to_host(found.ctypes.data, address, nbytes, stream)
    driver.stream_synchronize(stream)
    assert driver.stream_query(stream)
    assert np.array_equal(given, found)
    driver.stream_destroy(stream)
    driver.mem_free(address)


def test_errors_have_cudas_names_and_the_next_call_works(driver: CudaDriver) -> None:
    with pytest.raises(DeviceError, match=r"cuMemAlloc\(1125899906842624 bytes\): CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        driver.mem_alloc(1 << 50)
    with pytest.raises(DeviceError, match=r"cuMemHostUnregister.*CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED \(713\)"):
        driver.host_unregister(4096)
    driver.mem_free(driver.mem_alloc(1))


def test_every_thread_may_call(driver: CudaDriver) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(driver.mem_alloc(MIB)))
    thread.start()
    thread.join(30)
    driver.mem_free(found[0])


def test_events_order_streams(driver: CudaDriver) -> None:
    nbytes = 256 * MIB
    pinned, device = driver.host_alloc(nbytes), driver.mem_alloc(nbytes)
    ours, theirs = driver.stream_create(), driver.stream_create()
    event = driver.event_create()
    driver.copy_to_device(device, pinned, nbytes, ours)
    driver.event_record(event, ours)
    was_done = driver.event_query(event)
    driver.stream_wait_event(theirs, event)
    driver.stream_synchronize(theirs)
    assert driver.event_query(event)
    assert not was_done  # 256 MiB take milliseconds
    driver.event_destroy(event)
    for stream in (ours, theirs):
        driver.stream_destroy(stream)
    driver.host_free(pinned)
    driver.mem_free(device)


def test_page_locked_memory_is_copied_faster(driver: CudaDriver) -> None:
    found = measure_bandwidth(driver)
    print(found)
    assert found.pinned_bytes_per_s > found.pageable_bytes_per_s > 1e8


# --- page-locking


@pytest.mark.parametrize("writable", [False, True])
def test_shared_memory_is_page_locked_as_a_client_maps_it(driver: CudaDriver, writable: bool) -> None:
    locks_read_only = (cuda.READ_ONLY_HOST_REGISTER_SUPPORTED, cuda.USES_HOST_PAGE_TABLES)
    if not writable and not any(map(driver.attribute, locks_read_only)):
        with pytest.raises(DeviceError, match="read-only"):
            try_page_lock(driver, read_only=True)
        return
    print(try_page_lock(driver, read_only=not writable))


@pytest.mark.parametrize("writable", [False, True])
def test_the_gpu_reads_page_locked_memory_by_itself(driver: CudaDriver, tmp_path: Path, writable: bool) -> None:
    import torch

    memory = Locked(12 * MIB, writable=writable)
    lock = PageLock(
        driver,
        memory.address,
        12 * MIB,
        read_only=not writable,
        turn_path=tmp_path / "turn",
        chunk_nbytes=5 * MIB,
    )
    with lock:
        assert lock.is_locked, lock.reason
        for place, nbytes in ((0, 5 * MIB), (5 * MIB, 5 * MIB), (10 * MIB, 2 * MIB)):

            class Part:
                __cuda_array_interface__ = {  # noqa: RUF012
                    "shape": (nbytes,),
                    "typestr": "|u1",
                    "data": (lock.device_address(memory.address + place, nbytes), False),
                    "version": 3,
                }

            found = torch.as_tensor(Part(), device="cuda").clone().cpu().numpy()
            assert np.array_equal(found, memory.memory.bytes[place : place + nbytes])
    assert lock.reason == ""
    memory.memory.close()


def test_memory_that_cannot_be_locked_is_a_reason_and_no_error_is_left(driver: CudaDriver, tmp_path: Path) -> None:
    import torch

    torch.zeros(1, device="cuda")
    memory = Locked(8 * MIB, writable=True)
    lock_it = partial(PageLock, driver, memory.address, read_only=False, turn_path=tmp_path / "turn", chunk_nbytes=MIB)
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(memory.address + 4 * MIB, 4 * MIB, 0) == 0
    beyond = lock_it(8 * MIB)
    assert not beyond.is_locked
    assert f"{4 * MIB} of {8 * MIB} bytes page-locked, then: cuMemHostRegister({MIB} bytes" in beyond.reason
    assert "CUDA_ERROR_" in beyond.reason
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    with lock_it(4 * MIB) as lock:
        assert lock.is_locked, lock.reason
        assert "ALREADY_REGISTERED" in lock_it(4 * MIB).reason
    with lock_it(4 * MIB) as lock:
        assert lock.is_locked, lock.reason
    memory.memory.close()


# --- between processes


@pytest.mark.usefixtures("gives_all_back")
def test_bytes_come_over_again_and_again(driver: CudaDriver) -> None:
    for _ in range(5):
        try_ipc(driver, partial(fill_in_child, 0))


@pytest.mark.usefixtures("gives_all_back")
def test_torchs_memory_is_lent_and_its_stream_held_back(driver: CudaDriver) -> None:
    import torch

    whole = torch.zeros(8 * MIB, dtype=torch.uint8, device="cuda")
    part = whole[MIB : 3 * MIB]
    torch.cuda.synchronize()
    with (
        ExportedSlab(driver, part.data_ptr(), len(part)) as slab,
        fill_in_child(0, slab.ticket) as ticket,
        OpenedEvent(driver, ticket) as event,
    ):
        event.hold_back(torch.cuda.current_stream().cuda_stream)
        found = part.clone().cpu().numpy()
    assert np.array_equal(found, _pattern(len(part)))
    assert not whole[:MIB].any()
    assert not whole[3 * MIB :].any()


def test_handles_of_nothing_are_refused_and_the_next_call_works(driver: CudaDriver) -> None:
    uuid = driver.device_uuid()
    for handle in (bytes(64), *(secrets.token_bytes(64) for _ in range(5))):
        with pytest.raises(BadRequest, match="slab: its handle cannot be opened"):
            OpenedSlab(driver, SlabTicket(handle, 0, MIB, uuid), 0)
        with pytest.raises(BadRequest, match="event: its handle cannot be opened"):
            OpenedEvent(driver, EventTicket(handle, uuid))
    driver.mem_free(driver.mem_alloc(MIB))


def test_own_handle_is_refused(driver: CudaDriver) -> None:
    address = driver.mem_alloc(2 * MIB)
    with (
        ExportedSlab(driver, address, 2 * MIB) as slab,
        pytest.raises(BadRequest, match=r"slab: its handle cannot be opened.*another pid"),
    ):
        OpenedSlab(driver, slab.ticket, 0)
    driver.mem_free(address)


def test_ticket_beyond_the_allocation_is_refused_by_the_other_process(driver: CudaDriver) -> None:
    address = driver.mem_alloc(4 * MIB)
    with ExportedSlab(driver, address, 4 * MIB) as slab:
        ticket = slab.ticket
        for offset, nbytes in ((0, 1 << 40), (4 * MIB, 2 * MIB)):
            wrong = SlabTicket(ticket.handle, offset, nbytes, ticket.device_uuid)
            with pytest.raises(DeviceError, match="its allocation ends at"), fill_in_child(0, wrong):
                pass
        with fill_in_child(0, ticket):
            pass
    driver.mem_free(address)


@pytest.mark.usefixtures("gives_all_back")
def test_importer_that_is_killed_takes_nothing_along(driver: CudaDriver) -> None:
    for _ in range(3):
        address = driver.mem_alloc(256 * MIB)
        with ExportedSlab(driver, address, 256 * MIB) as slab:
            child = subprocess.Popen(
                [sys.executable, "-m", "sparseflow.cuda.ipc_trial"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(_encode(slab.ticket.to_dict()))
            child.stdin.flush()
            assert b"error" not in _read_line(child.stdout.fileno())
            child.kill()
            assert child.wait(30) < 0
            child.stdin.close()
            child.stdout.close()
        driver.mem_free(address)
    try_ipc(driver, partial(fill_in_child, 0))


def test_forked_child_is_refused(driver: CudaDriver) -> None:
    address = driver.mem_alloc(MIB)
    with ExportedSlab(driver, address, MIB) as slab, ExportedEvent(driver) as event:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the driver's threads do not come along
            pid = os.fork()
        if not pid:
            code = 1
            try:
                n_refused = 0
                for use in (driver.mem_info, lambda: slab.ticket, lambda: event.record(0)):
                    try:
                        use()
                    except BadRequest:
                        n_refused += 1
                code = 0 if n_refused == 3 else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    driver.mem_free(address)


# --- the command


def test_doctor_finds_all_to_work(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    result = json.loads(capsys.readouterr().out)
    print(json.dumps(result, indent=1))
    assert result["device"] is not None, result["reason"]
    assert code == 0
