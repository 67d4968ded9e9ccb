#!/usr/bin/env python3
"""Measure what one GPU machine allows: page-locking, CUDA IPC, host-to-device transfer, CUDA graphs, memory bandwidth.

    python scripts/gpu_probe.py --out gpu_probe.json

Each section runs in a process of its own under a deadline, so a hang or a sticky CUDA error spoils only that section.
It prints each answer as soon as it has it, so a killed section keeps the answers it had. An answer that failed holds
`{"error": text}`. One JSON object goes to stdout and to `--out`. GB is 1e9 bytes, GiB 2**30.
"""

import argparse
import ctypes
import fcntl
import json
import mmap
import os
import platform
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
GIB = 1 << 30
SECTION_S = 20.0  # longest a section may take
TOTAL_S = 66.0  # longest all sections together may take
REPLY_S = 8.0  # longest a peer process may take to answer

PORTABLE, DEVICEMAP, READ_ONLY = 1, 2, 8  # flags of cuMemHostRegister
ARENA_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10  # 0x10: F_SEAL_FUTURE_WRITE

DEVICE_ATTRIBUTES = {
    "multiprocessor_count": 16,
    "can_map_host_memory": 19,
    "async_engine_count": 40,
    "unified_addressing": 41,
    "compute_capability_major": 75,
    "compute_capability_minor": 76,
    "pageable_memory_access": 88,
    "concurrent_managed_access": 89,
    "can_use_host_pointer_for_registered_mem": 91,
    "host_register_supported": 99,
    "pageable_memory_access_uses_host_page_tables": 100,
    "read_only_host_register_supported": 113,
    "ipc_event_supported": 125,
    "host_numa_id": 134,
}

# Adds up 64-bit words, modulo 2**64; numpy's uint64 sum is its slow twin. PTX needs no compiler and no torch here.
SUM_WORDS_PTX = b"""
.version 7.8
.target sm_80
.address_size 64
.visible .entry sum_words(.param .u64 source, .param .u64 n_words, .param .u64 total)
{
    .reg .pred %p<2>;
    .reg .b32 %r<7>;
    .reg .b64 %rd<10>;
    ld.param.u64 %rd1, [source];
    ld.param.u64 %rd2, [n_words];
    ld.param.u64 %rd3, [total];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mov.u32 %r4, %nctaid.x;
    mad.lo.u32 %r5, %r1, %r2, %r3;
    cvt.u64.u32 %rd4, %r5;
    mul.lo.u32 %r6, %r4, %r2;
    cvt.u64.u32 %rd5, %r6;
    mov.u64 %rd6, 0;
NEXT:
    setp.ge.u64 %p1, %rd4, %rd2;
    @%p1 bra DONE;
    shl.b64 %rd7, %rd4, 3;
    add.u64 %rd8, %rd1, %rd7;
    ld.global.u64 %rd9, [%rd8];
    add.u64 %rd6, %rd6, %rd9;
    add.u64 %rd4, %rd4, %rd5;
    bra NEXT;
DONE:
    atom.global.add.u64 %rd9, [%rd3], %rd6;
    ret;
}
"""


def answer(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Print `{name: function(*arguments)}` as one JSON line, or the error's text in its place; return the value."""
    try:
        value = function(*arguments)
    except Exception as error:
        value = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({name: value}), flush=True)
    return value


# --- The CUDA driver API ----------------------------------------------------------------------------------------------


class DriverError(RuntimeError):
    """A driver call returned a code other than CUDA_SUCCESS."""


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle and CUipcEventHandle: 64 opaque bytes, passed by value."""

    _fields_ = (("raw", ctypes.c_ubyte * 64),)

    @classmethod
    def from_hex(cls, text: str) -> "IpcHandle":
        """Return the handle that `hex` wrote."""
        return cls.from_buffer_copy(bytes.fromhex(text))

    def hex(self) -> str:
        """Return the handle as 128 hexadecimal digits."""
        return bytes(self.raw).hex()


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes; the two location hints stay zero."""

    _fields_ = (("source_order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint))


class Driver:
    """libcuda with the first device's primary context, the one torch uses too, made current in this thread."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.device = device.value
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        """Call `name`; plain integers travel as 64-bit words. Raises DriverError with the error's name and code."""
        words = [ctypes.c_uint64(value) if isinstance(value, int) else value for value in arguments]
        code = getattr(self.library, name)(*words)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown').decode()} ({code})")

    def word(self, name: str, *arguments: Any) -> int:
        """Call `name`, whose first parameter is where it writes one word or pointer, and return that."""
        result = ctypes.c_uint64()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value

    def new_handle(self, name: str, address: int) -> IpcHandle:
        """Return what cuIpcGetMemHandle or cuIpcGetEventHandle writes for `address`."""
        handle = IpcHandle()
        self.call(name, ctypes.byref(handle), address)
        return handle

    def open_slab(self, handle: IpcHandle) -> int:
        """Return the device address of another process's allocation."""
        return self.word("cuIpcOpenMemHandle_v2", handle, 1)  # 1: CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS

    def new_stream(self) -> int:
        """Return a stream that the default stream does not wait for."""
        return self.word("cuStreamCreate", 1)

    def memory(self) -> tuple[int, int]:
        """Return free and total device bytes."""
        total = ctypes.c_uint64()
        free = self.word("cuMemGetInfo_v2", ctypes.byref(total))
        return free, total.value

    def sum_words(self, address: int, nbytes: int) -> tuple[int, float]:
        """Return the sum, modulo 2**64, of the words a kernel reads at `address`, and the second run's seconds."""
        module = self.word("cuModuleLoadData", ctypes.c_char_p(SUM_WORDS_PTX))
        function = self.word("cuModuleGetFunction", module, ctypes.c_char_p(b"sum_words"))
        total = self.word("cuMemAlloc_v2", 8)
        values = [ctypes.c_uint64(value) for value in (address, nbytes // 8, total)]
        parameters = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
        for _ in range(2):
            self.call("cuMemsetD8_v2", total, 0, 8)
            self.call("cuCtxSynchronize")
            start = time.perf_counter()
            self.call("cuLaunchKernel", function, 528, 1, 1, 256, 1, 1, 0, 0, parameters, 0)
            self.call("cuCtxSynchronize")
            seconds = time.perf_counter() - start
        return self.word("cuMemcpyDtoH_v2", total, 8), seconds

    def next_call(self) -> str:
        """Return "works", or the error that an earlier failure left behind."""
        try:
            self.call("cuCtxSynchronize")
            self.call("cuMemFree_v2", self.word("cuMemAlloc_v2", MIB))
        except DriverError as error:
            return str(error)
        return "works"


# --- Host memory ------------------------------------------------------------------------------------------------------


def bytes_at(mapping: mmap.mmap) -> np.ndarray:
    """Return a mapping as bytes; `.ctypes.data` of it is the mapping's address, read-only mappings included."""
    return np.frombuffer(mapping, np.uint8)


def map_shared(fd: int, nbytes: int, *, writable: bool) -> np.ndarray:
    """Return a MAP_SHARED mapping of a file as bytes."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return bytes_at(mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection))


def new_memfd(nbytes: int) -> tuple[int, np.ndarray]:
    """Return an unsealed memfd filled with random bytes, and its writable mapping."""
    fd = os.memfd_create("gpu_probe", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    mapped = map_shared(fd, nbytes, writable=True)
    fill(mapped)
    return fd, mapped


def fill(mapped: np.ndarray) -> None:
    """Write random bytes."""
    mapped.view(np.uint64)[:] = np.random.default_rng().integers(0, 1 << 63, mapped.nbytes // 8, dtype=np.uint64)


def page_lock(driver: Driver, mapped: np.ndarray, flags: int, chunk_nbytes: int = 0) -> dict[str, Any]:
    """Register a mapping, copy from its middle, unregister it; return seconds per GiB and what held, or the error."""
    address, nbytes = mapped.ctypes.data, mapped.nbytes
    step = chunk_nbytes or nbytes
    offsets, locked = range(0, nbytes, step), []
    report: dict[str, Any] = {"flags": flags}
    try:
        start = time.perf_counter()
        for offset in offsets:
            driver.call("cuMemHostRegister_v2", address + offset, step, flags)
            locked.append(address + offset)
        report["register_s_per_gib"] = round((time.perf_counter() - start) * GIB / nbytes, 4)
        pointers = [driver.word("cuMemHostGetDevicePointer_v2", chunk, 0) for chunk in locked]
        report["device_pointer_is_host_address"] = pointers == locked
        report["copied_right"] = copied_right(driver, mapped)
    except DriverError as error:
        report["error"] = str(error)
    start = time.perf_counter()
    for chunk in locked:
        driver.call("cuMemHostUnregister", chunk)
    if locked:
        report["unregister_s_per_gib"] = round((time.perf_counter() - start) * GIB / nbytes, 4)
    return report | {"next_call": driver.next_call()}


def copied_right(driver: Driver, mapped: np.ndarray) -> bool:
    """Return whether 1 MiB from a page-locked mapping's middle reaches the device and comes back unchanged."""
    sent = mapped[mapped.nbytes // 2 :][:MIB]
    received = np.zeros(MIB, np.uint8)
    target, stream = driver.word("cuMemAlloc_v2", MIB), driver.new_stream()
    driver.call("cuMemcpyHtoDAsync_v2", target, sent.ctypes.data, MIB, stream)
    driver.call("cuStreamSynchronize", stream)
    driver.call("cuMemcpyDtoH_v2", received.ctypes.data, target, MIB)
    driver.call("cuMemFree_v2", target)
    return bool(np.array_equal(sent, received))


# --- An unrelated process ---------------------------------------------------------------------------------------------


class Peer:
    """A process with its own CUDA context that serves one request a line; ended by SIGKILL, so as to test that too."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--section", "peer"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=tuple(fds)
        )

    def send(self, request: str, **values: Any) -> None:
        """Send a request: the name of one of PeerServer's methods and its arguments."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"request": request} | values) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the reply to the oldest request without one. Raises TimeoutError, or EOFError when it died."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], REPLY_S)[0]:
            raise TimeoutError(f"no reply from the peer process in {REPLY_S} s")
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the peer process ended with status {self.process.wait(REPLY_S)}")
        return json.loads(line)

    def ask(self, request: str, **values: Any) -> dict[str, Any]:
        """Send a request and return its reply. Raises RuntimeError with the peer's error."""
        self.send(request, **values)
        reply = self.receive()
        if "error" in reply:
            raise RuntimeError(f"peer: {reply['error']}")
        return reply

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait(REPLY_S)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class PeerServer:
    """What a Peer process does: each method is one request."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.stream = self.driver.new_stream()
        self.event = self.driver.word("cuEventCreate", 2 | 4)  # DISABLE_TIMING | INTERPROCESS
        self.slab = 0
        self.mapped = np.zeros(0, np.uint8)

    def allocate(self, nbytes: int) -> dict[str, Any]:
        """Allocate device memory; reply with this process's id."""
        self.driver.word("cuMemAlloc_v2", nbytes)
        return {"pid": os.getpid()}

    def open(self, slab: str) -> dict[str, Any]:
        """Open a slab by its handle."""
        start = time.perf_counter()
        self.slab = self.driver.open_slab(IpcHandle.from_hex(slab))
        return {"open_us": round((time.perf_counter() - start) * 1e6, 1), "address": self.slab}

    def write(self, offset: int, nbytes: int, byte: int) -> dict[str, Any]:
        """Start copying page-locked bytes into the slab and record the event; reply without waiting for either."""
        source = self.driver.word("cuMemAllocHost_v2", nbytes)
        ctypes.memset(source, byte, nbytes)
        self.driver.call("cuMemcpyHtoDAsync_v2", self.slab + offset, source, nbytes, self.stream)
        self.driver.call("cuEventRecord", self.event, self.stream)
        return {"event": self.driver.new_handle("cuIpcGetEventHandle", self.event).hex()}

    def lock(self, fd: int, nbytes: int, chunk_nbytes: int, flags: int) -> dict[str, Any]:
        """Map a memfd read-only and page-lock it in chunks."""
        self.mapped = map_shared(fd, nbytes, writable=False)
        for offset in range(0, nbytes, chunk_nbytes):
            self.driver.call("cuMemHostRegister_v2", self.mapped.ctypes.data + offset, chunk_nbytes, flags)
        return {}

    def sum(self) -> dict[str, Any]:
        """Add up the locked mapping's words by one kernel that reads host memory across the chunks."""
        pointer = self.driver.word("cuMemHostGetDevicePointer_v2", self.mapped.ctypes.data, 0)
        total, seconds = self.driver.sum_words(pointer, self.mapped.nbytes)
        return {"sum": str(total), "gb_s": round(self.mapped.nbytes / seconds / 1e9, 2)}

    def serve(self) -> None:
        """Answer requests until stdin ends."""
        for line in sys.stdin:
            values = json.loads(line)
            try:
                reply = getattr(self, values.pop("request"))(**values)
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), flush=True)


# --- Sections without torch -------------------------------------------------------------------------------------------


def nvidia_smi(*arguments: str) -> str:
    """Return what nvidia-smi prints as CSV without header."""
    command = ["nvidia-smi", *arguments, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=6, check=True).stdout.strip()


def query_gpu(*fields: str) -> dict[str, str]:
    """Return fields of the first device as nvidia-smi words them."""
    row = nvidia_smi(f"--query-gpu={','.join(fields)}").splitlines()[0]
    return dict(zip(fields, (value.strip() for value in row.split(",")), strict=False))


def probe_host() -> dict[str, Any]:
    """Return limits and sizes of the host."""
    pages = Path("/sys/kernel/mm/transparent_hugepage")
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "shm_free_gib": round(shutil.disk_usage("/dev/shm").free / GIB, 1),
        "memlock_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "huge_pages": {name: (pages / name).read_text().strip() for name in ("enabled", "shmem_enabled")},
        "c_compiler": shutil.which("cc") or shutil.which("gcc"),
    }


def probe_device() -> None:
    """Name the machine and its abilities."""
    answer("host", probe_host)
    links = ("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max")
    answer("gpu", query_gpu, "name", "driver_version", "memory.total", "compute_mode", "mig.mode.current")
    answer("pcie", query_gpu, *links)
    before = answer("used_before_context", query_gpu, "memory.used")
    start = time.perf_counter()
    driver = Driver()
    answer("context_s", lambda: round(time.perf_counter() - start, 3))
    after = answer("used_after_context", query_gpu, "memory.used")
    answer("context_mib", lambda: int(after["memory.used"].split()[0]) - int(before["memory.used"].split()[0]))
    answer("driver_cuda_version", driver.word, "cuDriverGetVersion")
    answer("free_and_total_bytes", driver.memory)
    for name, number in DEVICE_ATTRIBUTES.items():
        answer(
            name, lambda number: ctypes.c_int(driver.word("cuDeviceGetAttribute", number, driver.device)).value, number
        )


def probe_page_lock() -> None:
    """Page-lock each kind of mapping with and without READ_ONLY."""
    driver, nbytes, both = Driver(), 256 * MIB, PORTABLE | DEVICEMAP
    fd, writable = new_memfd(nbytes)
    answer("unsealed_writable", page_lock, driver, writable, both)
    unsealed = map_shared(fd, nbytes, writable=False)
    answer("unsealed_read_only_with_flag", page_lock, driver, unsealed, both | READ_ONLY)
    answer("unsealed_read_only_without_flag", page_lock, driver, unsealed, both)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ARENA_SEALS)
    sealed = map_shared(fd, nbytes, writable=False)
    answer("sealed_read_only_with_flag", page_lock, driver, sealed, both | READ_ONLY)
    answer("sealed_read_only_without_flag", page_lock, driver, sealed, both)
    answer("sealed_mapped_writable_before", page_lock, driver, writable, both)
    answer("sealed_chunks_of_64_mib", page_lock, driver, sealed, both | READ_ONLY, 64 * MIB)

    anonymous = bytes_at(mmap.mmap(-1, nbytes))
    fill(anonymous)
    answer("anonymous", page_lock, driver, anonymous, both)
    huge = mmap.mmap(-1, nbytes)
    answer("madvise_huge", huge.madvise, mmap.MADV_HUGEPAGE)
    fill(bytes_at(huge))
    answer("anonymous_huge", page_lock, driver, bytes_at(huge), both)

    with tempfile.TemporaryFile(dir=".") as file:
        file.write(sealed)
        file.flush()
        for name, sharing in (("private", mmap.MAP_PRIVATE), ("shared", mmap.MAP_SHARED)):
            mapped = bytes_at(mmap.mmap(file.fileno(), nbytes, flags=sharing, prot=mmap.PROT_READ))
            answer(f"file_{name}_read_only_with_flag", page_lock, driver, mapped, both | READ_ONLY)
            answer(f"file_{name}_read_only_without_flag", page_lock, driver, mapped, both)
    answer("registered_twice", lock_twice, driver, anonymous, both)
    answer("next_call", driver.next_call)


def lock_twice(driver: Driver, mapped: np.ndarray, flags: int) -> dict[str, Any]:
    """Register the same range twice; return the second call's outcome."""
    driver.call("cuMemHostRegister_v2", mapped.ctypes.data, mapped.nbytes, flags)
    second = page_lock(driver, mapped, flags)
    driver.call("cuMemHostUnregister", mapped.ctypes.data)
    return second


def probe_page_lock_two() -> None:
    """Let two processes page-lock one memfd at the same time and read all of it by a kernel."""
    nbytes, both = 256 * MIB, PORTABLE | DEVICEMAP
    fd, writable = new_memfd(nbytes)
    total = str(int(writable.view(np.uint64).sum(dtype=np.uint64)))
    answer("unsealed", read_by_two, fd, nbytes, nbytes, both | READ_ONLY, total)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ARENA_SEALS)
    answer("sealed", read_by_two, fd, nbytes, nbytes, both | READ_ONLY, total)
    answer("sealed_chunks_of_64_mib", read_by_two, fd, nbytes, 64 * MIB, both | READ_ONLY, total)


def read_by_two(fd: int, nbytes: int, chunk_nbytes: int, flags: int, total: str) -> list[dict[str, Any]]:
    """Return each process's outcome; both hold the lock before either reads, and they read together."""
    with Peer([fd]) as first, Peer([fd]) as second:
        for peer in (first, second):
            peer.send("lock", fd=fd, nbytes=nbytes, chunk_nbytes=chunk_nbytes, flags=flags)
        locks = [peer.receive() for peer in (first, second)]
        for peer in (first, second):
            peer.send("sum")
        sums = [peer.receive() for peer in (first, second)]
    return [lock | read | {"right": read.get("sum") == total} for lock, read in zip(locks, sums, strict=True)]


def probe_ipc() -> None:
    """Share a slab and an event between unrelated processes by raw CUDA IPC; then the ways it can fail."""
    driver, nbytes = Driver(), 64 * MIB
    slab = driver.word("cuMemAlloc_v2", nbytes)
    handle = driver.new_handle("cuIpcGetMemHandle", slab)
    with Peer() as peer:
        answer("open", lambda: peer.ask("open", slab=handle.hex()))
        answer("written_by_peer", written_by_peer, driver, peer, slab)
        answer("opened_twice", lambda: peer.ask("open", slab=handle.hex()))
    answer("killed_while_open", outlive_peer, driver, handle, slab)
    answer("opened_after_free", open_after_free, driver)
    answer("next_call", driver.next_call)
    answer("opened_by_its_owner", driver.open_slab, handle)
    answer("next_call_after_owner", driver.next_call)
    answer("random_handle", driver.open_slab, IpcHandle.from_buffer_copy(os.urandom(64)))
    answer("next_call_after_random", driver.next_call)
    answer("free", driver.call, "cuMemFree_v2", slab)


def written_by_peer(driver: Driver, peer: Peer, slab: int) -> list[dict[str, Any]]:
    """Let the peer write 48 MiB twice, with one event; wait on the device for that event, and check the bytes."""
    offset, nbytes = 8 * MIB, 48 * MIB
    stream, event, rounds = driver.new_stream(), 0, []
    received = driver.word("cuMemAllocHost_v2", nbytes)
    for byte in (0x5A, 0xC3):
        reply = peer.ask("write", offset=offset, nbytes=nbytes, byte=byte)
        start = time.perf_counter()
        event = event or driver.word("cuIpcOpenEventHandle", IpcHandle.from_hex(reply["event"]))
        driver.call("cuStreamWaitEvent", stream, event, 0)
        wait_us = (time.perf_counter() - start) * 1e6
        driver.call("cuMemcpyDtoHAsync_v2", received, slab + offset, nbytes, stream)
        driver.call("cuStreamSynchronize", stream)
        right = ctypes.string_at(received, nbytes) == bytes([byte]) * nbytes
        rounds.append({"right": right, "open_and_wait_call_us": round(wait_us, 1)})
    driver.call("cuEventDestroy_v2", event)
    return rounds


def outlive_peer(driver: Driver, handle: IpcHandle, slab: int) -> dict[str, Any]:
    """Kill a peer that has the slab open and a copy under way; return whether the owner still reads and writes it."""
    with Peer() as peer:
        peer.ask("open", slab=handle.hex())
        peer.ask("write", offset=0, nbytes=48 * MIB, byte=1)
        os.kill(peer.process.pid, signal.SIGKILL)
        peer.process.wait(REPLY_S)
    driver.call("cuMemsetD8_v2", slab, 0x77, MIB)
    received = np.zeros(MIB, np.uint8)
    driver.call("cuMemcpyDtoH_v2", received.ctypes.data, slab, MIB)
    return {"right": bool((received == 0x77).all()), "next_call": driver.next_call()}


def open_after_free(driver: Driver) -> dict[str, Any]:
    """Let a peer open a handle whose slab its owner has freed."""
    slab = driver.word("cuMemAlloc_v2", 4 * MIB)
    handle = driver.new_handle("cuIpcGetMemHandle", slab)
    driver.call("cuMemFree_v2", slab)
    with Peer() as peer:
        return peer.ask("open", slab=handle.hex())


# --- Triton kernels ---------------------------------------------------------------------------------------------------


class Kernels:
    """The Triton kernels, compiled where first used. Made on demand: sections without torch start faster."""

    def __init__(self) -> None:
        import triton
        import triton.language as tl

        @triton.jit
        def gather_bundles(source, ids, count, target, n_words: tl.constexpr):
            """target[row] = bundle ids[row] at the address `source`, for row < count[0]; words of 64 bits."""
            offsets = tl.arange(0, n_words)
            n_rows = tl.load(count)
            for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
                bundle = tl.load(ids + row)
                words = (source + bundle * (n_words * 8)).to(tl.pointer_type(tl.int64))
                words = tl.multiple_of(words, 16)
                tl.store(target + row * n_words + offsets, tl.load(words + offsets))

        @triton.jit
        def multiply_rows(
            weight, vector, product, n_rows, n_columns: tl.constexpr, n_block: tl.constexpr, n_step: tl.constexpr
        ):
            """product = weight @ vector; weight (n_rows, n_columns), n_block rows a program, sums in float32."""
            rows = tl.program_id(0) * n_block + tl.arange(0, n_block)
            columns = tl.arange(0, n_step)
            sums = tl.zeros((n_block, n_step), tl.float32)
            for start in range(0, n_columns, n_step):
                at = rows[:, None] * n_columns + (start + columns)[None, :]
                weights = tl.load(weight + at, mask=(rows < n_rows)[:, None], other=0.0)
                sums += weights.to(tl.float32) * tl.load(vector + start + columns).to(tl.float32)[None, :]
            tl.store(product + rows, tl.sum(sums, 1).to(tl.float16), mask=rows < n_rows)

        @triton.jit
        def do_nothing(target):
            """Take one argument and end."""

        self.gather_bundles = gather_bundles
        self.multiply_rows = multiply_rows
        self.do_nothing = do_nothing


# --- Sections with torch ----------------------------------------------------------------------------------------------


class Bundles:
    """Page-locked memfd memory as bundles of 64-bit words, each word its own index, so that any copy can be checked."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        import torch

        fd = os.memfd_create("gpu_probe", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        self.words = map_shared(fd, nbytes, writable=True).view(np.int64)
        torch.arange(self.words.size, out=torch.from_numpy(self.words))
        start = time.perf_counter()
        try:
            driver.call("cuMemHostRegister_v2", self.words.ctypes.data, nbytes, PORTABLE | DEVICEMAP)
            self.locking = {"register_s_per_gib": round((time.perf_counter() - start) * GIB / nbytes, 4)}
        except DriverError as error:
            self.locking = {"error": f"{error}; the driver's own page-locked memory was used in place of a memfd"}
            self.words = torch.from_numpy(self.words).pin_memory().numpy()
        self.pointer = driver.word("cuMemHostGetDevicePointer_v2", self.words.ctypes.data, 0)

    def random_ids(self, n_words: int, n_ids: int) -> Any:
        """Return `n_ids` different bundle numbers (n_ids,) int64 on the device, for bundles of `n_words`."""
        import torch

        return torch.randperm(self.words.size // n_words, device="cuda")[:n_ids].contiguous()

    @staticmethod
    def are_right(gathered: Any, ids: Any) -> bool:
        """Return whether each row of `gathered` (n_ids, n_words) is the bundle that `ids` (n_ids,) names."""
        import torch

        n_words = gathered.shape[1]
        expected = ids[:, None] * n_words + torch.arange(n_words, device=gathered.device)
        return bool(torch.equal(gathered, expected))


def device_us(function: Callable[[int], Any], n_runs: int = 7) -> float:
    """Return the median microseconds between events around `function(run)`, after one warm-up run."""
    import torch

    times = []
    for run in range(n_runs + 1):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        function(run)
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    return statistics.median(times[1:])


def host_us(function: Callable[[int], Any], n_runs: int = 7) -> float:
    """Return the median microseconds `function(run)` keeps the host, after one warm-up run; the device idle before."""
    import torch

    times = []
    for run in range(n_runs + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(run)
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def speed(nbytes: int, us: float) -> dict[str, float]:
    """Return a duration and the GB/s it means."""
    return {"us": round(us, 1), "gb_s": round(nbytes / us / 1e3, 2)}


def capture(function: Callable[[], Any]) -> Any:
    """Return a CUDA graph of `function`, after one run outside of it."""
    import torch

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def probe_transfer() -> None:
    """Time host-to-device copies: whole, bundle by bundle, as a batch, by a reading kernel, by a CPU gather."""
    import torch

    driver, kernels = Driver(), Kernels()
    torch.cuda.init()
    with torch.cuda.stream(torch.cuda.Stream()):  # a batch copy refuses the default stream
        answer("big_copy", time_big_copies)
        bundles = Bundles(driver, 2 * GIB)
        answer("memfd", lambda: bundles.locking)
        copies = BundleCopies(driver, bundles)
        answer("copy_each", copies.time_each)
        answer("copy_batch", copies.time_batch)
        for n_words in (2048, 1024):
            answer(f"kernel_reads_{n_words * 8}_byte_bundles", time_gathers, kernels, bundles, n_words)
        answer("cpu_gather", copies.time_cpu_gather)
        answer("latency", time_latencies, kernels, bundles)


def time_big_copies() -> dict[str, Any]:
    """Time one copy of 256 MiB from page-locked and from pageable memory, and back."""
    import torch

    nbytes = 256 * MIB
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    pinned = torch.ones(nbytes, dtype=torch.uint8).pin_memory()
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    return {
        "pinned": speed(nbytes, device_us(lambda _: target.copy_(pinned, non_blocking=True))),
        "pageable": speed(nbytes, device_us(lambda _: target.copy_(pageable), 5)),
        "to_pinned_host": speed(nbytes, device_us(lambda _: pinned.copy_(target, non_blocking=True))),
    }


class BundleCopies:
    """Ways to bring 4096 bundles of 16 KiB to the device without a kernel; each run takes other bundles."""

    N_BUNDLES, N_WORDS, N_SETS = 4096, 2048, 8

    def __init__(self, driver: Driver, bundles: Bundles) -> None:
        import torch

        self.driver, self.bundles = driver, bundles
        self.bundle_nbytes = self.N_WORDS * 8
        self.nbytes = self.N_BUNDLES * self.bundle_nbytes
        ids = bundles.random_ids(self.N_WORDS, self.N_BUNDLES * self.N_SETS)
        self.id_sets = list(ids.view(self.N_SETS, self.N_BUNDLES))
        self.target = torch.empty(self.N_BUNDLES, self.N_WORDS, dtype=torch.int64, device="cuda")
        base = bundles.words.ctypes.data
        self.sources = [[base + i * self.bundle_nbytes for i in chosen.tolist()] for chosen in self.id_sets]
        self.targets = [self.target.data_ptr() + row * self.bundle_nbytes for row in range(self.N_BUNDLES)]
        self.stream = torch.cuda.current_stream().cuda_stream

    def report(self, copy: Callable[[int], None], n_runs: int) -> dict[str, Any]:
        """Time `copy(run)` on the device and on the host, and check what the last run brought."""
        self.target.zero_()
        times = speed(self.nbytes, device_us(copy, n_runs))
        return times | {
            "host_us": round(host_us(copy, n_runs), 1),
            "right": self.bundles.are_right(self.target, self.id_sets[n_runs % self.N_SETS]),
        }

    def time_each(self) -> dict[str, Any]:
        """One cuMemcpyHtoDAsync a bundle."""
        copy, word = self.driver.library.cuMemcpyHtoDAsync_v2, ctypes.c_uint64
        nbytes, stream, targets = word(self.bundle_nbytes), word(self.stream), [word(value) for value in self.targets]
        sources = [[word(value) for value in chosen] for chosen in self.sources]

        def copy_all(run: int) -> None:
            for target, source in zip(targets, sources[run % self.N_SETS], strict=True):
                if copy(target, source, nbytes, stream):
                    raise DriverError("cuMemcpyHtoDAsync_v2 failed within the loop")

        return self.report(copy_all, 5)

    def time_batch(self) -> dict[str, Any]:
        """One cuMemcpyBatchAsync for all bundles."""
        words = ctypes.c_uint64 * self.N_BUNDLES
        targets, sizes = words(*self.targets), words(*[self.bundle_nbytes] * self.N_BUNDLES)
        sources = [words(*chosen) for chosen in self.sources]
        attributes, first = CopyAttributes(source_order=3), ctypes.c_uint64(0)  # 3: sources may be read out of order
        name, failed = "cuMemcpyBatchAsync_v2", ()
        if not hasattr(self.driver.library, name):  # the first version also tells which copy failed
            name, failed = "cuMemcpyBatchAsync", (ctypes.byref(ctypes.c_uint64()),)

        def copy_all(run: int) -> None:
            described = (ctypes.byref(attributes), ctypes.byref(first), 1, *failed, self.stream)
            self.driver.call(name, targets, sources[run % self.N_SETS], sizes, self.N_BUNDLES, *described)

        return {"function": name} | self.report(copy_all, 7)

    def time_cpu_gather(self) -> dict[str, Any]:
        """Gather by numpy and by torch into a page-locked staging buffer, then one copy."""
        import torch

        matrix = self.bundles.words.reshape(-1, self.N_WORDS)
        tensor = torch.from_numpy(matrix)
        staging = torch.empty(self.N_BUNDLES, self.N_WORDS, dtype=torch.int64, pin_memory=True)
        ids = [chosen.cpu() for chosen in self.id_sets]
        out = staging.numpy()
        numpy_us = host_us(lambda run: np.take(matrix, ids[run % 8].numpy(), axis=0, out=out, mode="clip"), 5)
        torch_us = host_us(lambda run: torch.index_select(tensor, 0, ids[run % 8], out=staging))
        copy_us = device_us(lambda _: self.target.copy_(staging, non_blocking=True))
        return {
            "numpy_take": speed(self.nbytes, numpy_us),
            "torch_index_select": speed(self.nbytes, torch_us) | {"threads": torch.get_num_threads()},
            "copy": speed(self.nbytes, copy_us),
            "right": self.bundles.are_right(self.target, self.id_sets[7]),
        }


def time_gathers(kernels: Kernels, bundles: Bundles, n_words: int) -> list[dict[str, Any]]:
    """Time a kernel that reads 4096 bundles straight from host memory, by number of programs and of warps."""
    import torch

    n_bundles, n_sets = 4096, 8
    id_sets = bundles.random_ids(n_words, n_bundles * n_sets).view(n_sets, n_bundles)
    count = torch.tensor([n_bundles], device="cuda")
    target = torch.empty(n_bundles, n_words, dtype=torch.int64, device="cuda")
    rows = []
    for n_warps in (4, 8):
        for n_programs in (16, 32, 64, 132, 264, 528):

            def gather(run: int, n_programs: int = n_programs, n_warps: int = n_warps) -> None:
                ids = id_sets[run % n_sets]
                kernels.gather_bundles[(n_programs,)](bundles.pointer, ids, count, target, n_words, num_warps=n_warps)

            target.zero_()
            times = speed(target.nbytes, device_us(gather))
            right = bundles.are_right(target, id_sets[7])
            rows.append({"programs": n_programs, "warps": n_warps, "right": right} | times)
    return rows


def time_latencies(kernels: Kernels, bundles: Bundles) -> dict[str, Any]:
    """Time the smallest steps, in microseconds; those `in_graph` are a replay's time over its number of kernels."""
    import torch

    target = torch.zeros(1, 2048, dtype=torch.int64, device="cuda")
    ids = bundles.random_ids(2048, 100).repeat_interleave(
        2
    )  # every other element is 16-byte aligned, as allocations are
    one, device_word = torch.tensor([1], device="cuda"), torch.zeros(1, device="cuda")
    there, back = torch.ones(4096, dtype=torch.uint8).pin_memory(), torch.zeros(4096, dtype=torch.uint8).pin_memory()
    middle = torch.empty(4096, dtype=torch.uint8, device="cuda")

    def read_bundles() -> None:
        for i in range(100):
            kernels.gather_bundles[(1,)](bundles.pointer, ids[2 * i : 2 * i + 1], one, target, 2048, num_warps=8)

    def add_ones() -> None:
        for _ in range(300):
            device_word.add_(1)

    def do_nothing(_: int = 0) -> None:
        for _ in range(300):
            kernels.do_nothing[(1,)](target)

    def round_trip(_: int) -> None:
        middle.copy_(there, non_blocking=True)
        back.copy_(middle, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def replay_us(function: Callable[[], None], n_kernels: int) -> float:
        graph = capture(function)
        return round(device_us(lambda _: graph.replay()) / n_kernels, 2)

    return {
        "read_16_kib_bundle_in_graph": replay_us(read_bundles, 100),
        "empty_kernel_in_graph": replay_us(do_nothing, 300),
        "torch_add_in_graph": replay_us(add_ones, 300),
        "empty_kernel_launch_host": round(host_us(do_nothing) / 300, 2),
        "round_trip_4_kib_host": round(host_us(round_trip, 200), 2),
    }


def probe_graph() -> None:
    """Capture a gather whose ids and count live on the device; replay it for others, and check every byte."""
    import torch

    driver, kernels = Driver(), Kernels()
    torch.cuda.init()
    bundles = Bundles(driver, 256 * MIB)
    ids, count = torch.zeros(4096, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    target = torch.zeros(4096, 2048, dtype=torch.int64, device="cuda")
    graph = capture(lambda: kernels.gather_bundles[(132,)](bundles.pointer, ids, count, target, 2048, num_warps=8))
    for n_ids in (0, 1, 999, 4096):

        def replay(n_ids: int = n_ids) -> dict[str, Any]:
            chosen = bundles.random_ids(2048, n_ids)
            ids[:n_ids] = chosen
            count.fill_(n_ids)
            target.fill_(-1)
            graph.replay()
            right = bundles.are_right(target[:n_ids], chosen) and bool((target[n_ids:] == -1).all())
            return {"right": right, "replay_us": round(device_us(lambda _: graph.replay()), 1)}

        answer(f"{n_ids}_bundles", replay)
    answer("replay_call_host_us", lambda: round(host_us(lambda _: graph.replay(), 50), 1))


def probe_bandwidth() -> None:
    """Time device memory: a copy, and matrix times vector by torch and by Triton."""
    import torch

    kernels = Kernels()
    answer("copy_read_plus_write", time_device_copy)
    weights = {}
    for n_rows, n_copies in ((12288, 4), (4096, 12), (50272, 2)):  # together far more than the L2 cache holds
        weights[n_rows] = [torch.randn(n_rows, 4096, device="cuda").mul_(0.02).half() for _ in range(n_copies)]
        answer(f"linear_{n_rows}x4096", time_linear, weights[n_rows])
    deadline = time.perf_counter() + 12
    for n_rows, copies in weights.items():
        answer(f"triton_{n_rows}x4096", time_triton_products, kernels, copies, deadline)


def time_device_copy() -> dict[str, float]:
    """Time a copy of 1 GiB within the device; its bytes count twice."""
    import torch

    source = torch.ones(GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return speed(2 * GIB, device_us(lambda _: target.copy_(source)))


def time_linear(weights: list[Any]) -> dict[str, Any]:
    """Time torch's linear of one row, in a graph over all copies of the weight."""
    import torch

    vector = torch.randn(1, 4096, device="cuda").half()
    graph = capture(lambda: [torch.nn.functional.linear(vector, weight) for weight in weights])
    return speed(weights[0].nbytes, device_us(lambda _: graph.replay()) / len(weights))


def time_triton_products(kernels: Kernels, weights: list[Any], deadline: float) -> dict[str, Any]:
    """Time the Triton product by setting until the deadline; tell the best, and how far the last is from torch's."""
    import torch

    n_rows, n_columns = weights[0].shape
    vector = torch.randn(1, n_columns, device="cuda").half()
    product = torch.empty(n_rows, dtype=torch.float16, device="cuda")
    settings = [(8, 512, 4), (4, 1024, 4), (16, 512, 8), (4, 512, 4), (8, 1024, 8), (4, 2048, 8), (16, 512, 4)]
    settings += [(8, 1024, 4), (4, 2048, 4), (16, 1024, 8), (8, 2048, 8), (16, 2048, 8)]
    rows = []
    for n_block_rows, n_block_columns, n_warps in settings:
        if time.perf_counter() > deadline and rows:
            break
        grid, blocks = (-(-n_rows // n_block_rows),), (n_columns, n_block_rows, n_block_columns)

        def multiply(weight: Any, grid: Any = grid, blocks: Any = blocks, n_warps: int = n_warps) -> None:
            kernels.multiply_rows[grid](weight, vector, product, n_rows, *blocks, num_warps=n_warps)

        graph = capture(lambda multiply=multiply: [multiply(weight) for weight in weights])
        times = speed(weights[0].nbytes, device_us(lambda _, graph=graph: graph.replay()) / len(weights))
        rows.append(times | {"rows": n_block_rows, "block_columns": n_block_columns, "warps": n_warps})
    expected = torch.nn.functional.linear(vector, weights[-1])[0]
    rows.sort(key=lambda row: row["us"])
    return {"best": rows[0], "max_difference": float((product - expected).abs().max()), "all": rows}


def probe_torch_memory() -> None:
    """Share memory that torch allocated, and see which counts of device memory include other processes."""
    import torch

    driver = Driver()
    tensor = torch.zeros(16 * MIB, dtype=torch.uint8, device="cuda")[MIB:]
    answer("torch_slab", share_torch_slab, driver, tensor)
    free_before = torch.cuda.mem_get_info()[0]
    answer("smi_used_before", query_gpu, "memory.used")
    with Peer() as peer:
        pid = answer("peer_allocates_1_gib", lambda: peer.ask("allocate", nbytes=GIB))
        free_after = torch.cuda.mem_get_info()[0]
        answer("mem_get_info_fell_by_mib", lambda: (free_before - free_after) // MIB)
        answer("smi_used_after", query_gpu, "memory.used")
        answer("smi_processes", lambda: nvidia_smi("--query-compute-apps=pid,used_memory").splitlines())
        answer("own_pid_and_peer_pid", lambda: [os.getpid(), pid["pid"]])
    answer("mem_get_info_after_kill_differs_by_mib", lambda: (free_before - torch.cuda.mem_get_info()[0]) // MIB)


def share_torch_slab(driver: Driver, tensor: Any) -> dict[str, Any]:
    """Export the allocation beneath a torch tensor, let a peer write into it, and check the tensor."""
    import torch

    size = ctypes.c_uint64()
    base = driver.word("cuMemGetAddressRange_v2", ctypes.byref(size), tensor.data_ptr())
    handle = driver.new_handle("cuIpcGetMemHandle", base)
    offset = tensor.data_ptr() - base
    torch.cuda.synchronize()
    with Peer() as peer:
        peer.ask("open", slab=handle.hex())
        written = peer.ask("write", offset=offset, nbytes=MIB, byte=7)
        event = driver.word("cuIpcOpenEventHandle", IpcHandle.from_hex(written["event"]))
        driver.call("cuStreamWaitEvent", torch.cuda.current_stream().cuda_stream, event, 0)
        right = bool((tensor[:MIB] == 7).all()) and bool((tensor[MIB:] == 0).all())
    return {"base_offset": offset, "slab_nbytes": size.value, "right": right}


# --- Running the sections ---------------------------------------------------------------------------------------------


def probe_imports() -> None:
    """Import torch and Triton for the first time, so that the sections after find them in the page cache."""
    start = time.perf_counter()
    import torch
    import triton

    answer("import_s", lambda: round(time.perf_counter() - start, 2))
    answer("versions", lambda: {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__})


SECTIONS: dict[str, Callable[[], None]] = {
    "device": probe_device,
    "imports": probe_imports,
    "page_lock": probe_page_lock,
    "page_lock_by_two_processes": probe_page_lock_two,
    "ipc": probe_ipc,
    "transfer": probe_transfer,
    "graph": probe_graph,
    "bandwidth": probe_bandwidth,
    "torch_memory": probe_torch_memory,
}


def run_section(name: str, timeout_s: float) -> dict[str, Any]:
    """Run a section in a process group of its own; return the answers it gave, and how it ended when not well."""
    command = [sys.executable, os.path.abspath(__file__), "--section", name]
    start, ending = time.perf_counter(), ""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        ending = f"killed after {timeout_s:.1f} s; "
        printed, errors = end_group(process)
    answers: dict[str, Any] = {}
    for line in printed.splitlines():
        try:
            answers |= json.loads(line)
        except (TypeError, ValueError):
            continue  # a library's own words, or a line cut short by the kill
    if process.returncode or ending:
        answers["error"] = f"{ending}status {process.returncode}: {errors[-1500:]}"
    return answers | {"section_s": round(time.perf_counter() - start, 2)}


def end_group(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill a section with its peers; return what it had printed."""
    os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=2)
    except subprocess.TimeoutExpired:
        return "", "did not end within 2 s of SIGKILL"


def main() -> None:
    """Run every section, or the one named, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument(
        "--section", choices=[*SECTIONS, "peer"], help="run this section in this process, a line an answer"
    )
    arguments = parser.parse_args()
    if arguments.section == "peer":
        PeerServer().serve()
    elif arguments.section:
        SECTIONS[arguments.section]()
    else:
        end = time.perf_counter() + TOTAL_S
        report: dict[str, Any] = {}
        for name in SECTIONS:
            left_s = end - time.perf_counter()
            report[name] = run_section(name, min(SECTION_S, left_s)) if left_s > 3 else {"error": "no time left"}
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
