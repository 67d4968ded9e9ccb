"""What a GPU can do here, each thing tried in a process of its own: `python -m sparseflow.cuda.trials WHAT`.

A trial prints one line of JSON. It may fail, crash or hang: `run_trial` tells of all three, and leaves nothing running.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparseflow.cuda.bandwidth import measure_bandwidth
from sparseflow.cuda.driver import (
    CAPABILITY_MAJOR,
    CAPABILITY_MINOR,
    HOST_REGISTER_SUPPORTED,
    IPC_EVENT_SUPPORTED,
    READ_ONLY_HOST_REGISTER_SUPPORTED,
    USES_HOST_PAGE_TABLES,
    CudaDriver,
    Driver,
)
from sparseflow.cuda.ipc_trial import fill_in_child, try_ipc
from sparseflow.cuda.page_lock import PageLock
from sparseflow.cuda.pcie import pcie_link
from sparseflow.cuda.tickets import format_uuid
from sparseflow.engine.mapping import Mapping
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import DeviceError, SparseFlowError

_LOCKED_NBYTES, _CHUNK_NBYTES = 64 << 20, 32 << 20
_KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial found; or why it found nothing, and which error of ours that was, if it was one."""

    found: dict[str, Any] | None
    reason: str = ""
    kind: str = ""


def run_trial(arguments: Sequence[str], timeout_s: float) -> Outcome:
    """Run Python with these arguments until its deadline; its last line is JSON, of what was found or an `error`."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # its children end with it
    )
    try:
        out, err = process.communicate(timeout=timeout_s)  # the end of all that have its stderr
    except BaseException as error:
        _kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            return Outcome(None, f"no end within {timeout_s:g} s")
        raise
    lines = out.strip().splitlines()
    try:
        found = json.loads(lines[-1])
        if "error" in found:
            return Outcome(None, found["error"], found.get("kind", ""))
        if process.returncode == 0:
            return Outcome(found)
    except (IndexError, ValueError, TypeError):
        pass
    code = process.returncode
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Outcome(None, ": ".join([how, *err.strip().splitlines()[-1:]]))


def _kill(process: "subprocess.Popen[str]") -> None:
    """With its children. One that the kernel does not let go is left to it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_TIMEOUT_S)
    for pipe in filter(None, (process.stdout, process.stderr)):
        pipe.close()


def device_facts(driver: Driver) -> dict[str, Any]:
    """Who the device is, and what it says that it can do."""
    memory, bus_id = driver.mem_info(), driver.pci_bus_id()
    return {
        "cuda": ".".join(map(str, driver.version())),
        "name": driver.device_name(),
        "uuid": format_uuid(driver.device_uuid()),
        "capability": f"{driver.attribute(CAPABILITY_MAJOR)}.{driver.attribute(CAPABILITY_MINOR)}",
        "total_nbytes": memory.total,
        "free_nbytes": memory.free,
        "pci_bus_id": bus_id,
        "pcie": asdict(pcie_link(bus_id)),
        "page_locks_mapped": bool(driver.attribute(HOST_REGISTER_SUPPORTED)),
        "page_locks_read_only": bool(driver.attribute(READ_ONLY_HOST_REGISTER_SUPPORTED)),
        "uses_host_page_tables": bool(driver.attribute(USES_HOST_PAGE_TABLES)),
        "shares_events": bool(driver.attribute(IPC_EVENT_SUPPORTED)),
    }


def try_page_lock(
    driver: Driver, *, read_only: bool, nbytes: int = _LOCKED_NBYTES, chunk_nbytes: int = _CHUNK_NBYTES
) -> dict[str, Any]:
    """Page-lock shared memory as a client of a weight server sees it, copy from it, and compare.

    Args:
        nbytes, chunk_nbytes: whole pages.

    Raises:
        DeviceError: it cannot be locked, read or unlocked.
    """
    with ExitStack() as stack:
        memory = SharedMemory("trial", nbytes, others_may_write=not read_only)
        stack.callback(memory.close)
        memory.bytes[:] = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        view = Mapping(memory.fd, nbytes, writable=not read_only)
        address = ctypes.addressof(view.content)
        turn_path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "turn"
        stream = driver.stream_create()
        stack.callback(driver.stream_destroy, stream)
        device = driver.mem_alloc(nbytes)
        stack.callback(driver.mem_free, device)
        begin = time.perf_counter()
        lock = stack.enter_context(
            PageLock(driver, address, nbytes, read_only=read_only, turn_path=turn_path, chunk_nbytes=chunk_nbytes)
        )
        took_s = time.perf_counter() - begin
        if not lock.is_locked:
            raise DeviceError(lock.reason)
        stack.callback(driver.stream_synchronize, stream)  # whatever fails, no copy outlives the lock
        is_in_one_piece = lock.device_base is not None
        found = np.zeros(nbytes, np.uint8)
        for place in range(0, nbytes, chunk_nbytes):
            n = min(chunk_nbytes, nbytes - place)
            driver.copy_to_device(device + place, address + place, n, stream)
        driver.copy_to_host(found.ctypes.data, device, nbytes, stream)
        driver.stream_synchronize(stream)
        if n_wrong := int(np.count_nonzero(found != memory.bytes)):
            raise DeviceError(f"{n_wrong} of {nbytes} bytes copied from page-locked memory are wrong")
        lock.close()
        if lock.reason:
            raise DeviceError(lock.reason)
    return {"locked_bytes_per_s": nbytes / took_s, "in_one_piece": is_in_one_piece}


def _try_ipc(driver: Driver, device: int) -> dict[str, Any]:
    try_ipc(driver, partial(fill_in_child, device))
    return {}


_TRIALS: dict[str, Callable[[Driver, int], dict[str, Any]]] = {
    "device": lambda driver, _: device_facts(driver),
    "bandwidth": lambda driver, _: asdict(measure_bandwidth(driver)),
    "page-lock-read-only": lambda driver, _: try_page_lock(driver, read_only=True),
    "page-lock-writable": lambda driver, _: try_page_lock(driver, read_only=False),
    "ipc": _try_ipc,
}


def main() -> int:
    """One trial. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparseflow.cuda.trials", description=__doc__)
    parser.add_argument("trial", choices=_TRIALS)
    parser.add_argument("--device", type=int, default=0)
    arguments = parser.parse_args()
    try:
        with CudaDriver(arguments.device) as driver:
            print(json.dumps(_TRIALS[arguments.trial](driver, arguments.device)))
    except SparseFlowError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
