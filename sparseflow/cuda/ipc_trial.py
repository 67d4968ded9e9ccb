"""Whether two processes can share device memory here: tried, with a child that fills a slab which its parent checks.

`python -m sparseflow.cuda.ipc_trial` is the child: a line of JSON in (the slab), one out (the event, or an error), and
it holds both until its input ends.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflow.cuda.driver import CudaDriver, Driver
from sparseflow.cuda.ipc import ExportedEvent, ExportedSlab, OpenedEvent, OpenedSlab, wait_until_done
from sparseflow.cuda.tickets import EventTicket, SlabTicket
from sparseflow.errors import DeviceError, SparseFlowError

_ALLOCATED_NBYTES, _OFFSET, _SLAB_NBYTES = 4 << 20, 1 << 20, 2 << 20
_TIMEOUT_S = 30.0
_LINE_NBYTES = 1 << 16

Borrow = Callable[[SlabTicket], AbstractContextManager[EventTicket]]


def try_ipc(driver: Driver, borrow: Borrow) -> None:
    """Lend a slab, wait for the event of whoever fills it, and compare the bytes.

    Args:
        borrow: fills the slab, and keeps it and the event until left.

    Raises:
        DeviceError, BadRequest: the first thing that does not work.
    """
    with ExitStack() as stack:
        stream = driver.stream_create()
        stack.callback(driver.stream_destroy, stream)
        allocated = driver.mem_alloc(_ALLOCATED_NBYTES)
        stack.callback(driver.mem_free, allocated)
        slab = stack.enter_context(ExportedSlab(driver, allocated + _OFFSET, _SLAB_NBYTES))
        found = np.zeros(_SLAB_NBYTES, np.uint8)
        stack.callback(_settle, driver, stream)  # whatever fails, no copy outlives its memory
        with borrow(slab.ticket) as ticket, OpenedEvent(driver, ticket) as event:
            event.hold_back(stream)
            driver.copy_to_host(found.ctypes.data, allocated + _OFFSET, _SLAB_NBYTES, stream)
            try:
                wait_until_done(driver, stream, _TIMEOUT_S)
            except TimeoutError as error:
                raise DeviceError(f"the other process's event did not come to pass: {error}") from error
        if n_wrong := int(np.count_nonzero(found != _pattern(_SLAB_NBYTES))):
            raise DeviceError(f"{n_wrong} of {_SLAB_NBYTES} bytes are not those that the other process copied")


@contextmanager
def fill_slab(driver: Driver, slab: SlabTicket) -> Iterator[EventTicket]:
    """The borrower's side of `try_ipc`."""
    with ExitStack() as stack:
        stream = driver.stream_create()
        stack.callback(driver.stream_destroy, stream)
        opened = stack.enter_context(OpenedSlab(driver, slab, stream))
        event = stack.enter_context(ExportedEvent(driver))
        content = _pattern(opened.nbytes)
        driver.copy_to_device(opened.address, content.ctypes.data, opened.nbytes, stream)
        event.record(stream)
        yield event.ticket


@contextmanager
def fill_in_child(device: int, slab: SlabTicket) -> Iterator[EventTicket]:
    """`fill_slab` in a process of its own, which ends when this is left.

    Raises:
        DeviceError: as the child says; or it ended, or did not answer in time.
    """
    command = [sys.executable, "-m", "sparseflow.cuda.ipc_trial", "--device", str(device)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with suppress(BrokenPipeError):  # it has ended; what it said is read below
            child.stdin.write(_encode(slab.to_dict()))
            child.stdin.flush()
        answer = json.loads(_read_line(child.stdout.fileno()) or b'{"error": "the other process ended"}')
        if "error" in answer:
            raise DeviceError(f"in the other process: {answer['error']}")
        yield EventTicket.from_dict(_decode(answer))
        child.stdin.close()
        if child.wait(_TIMEOUT_S) != 0:
            raise DeviceError(f"the other process ended with {child.returncode} after it had filled the slab")
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"the other process does not end within {_TIMEOUT_S:g} s") from error
    finally:
        child.kill()
        child.stdout.close()
        if not child.stdin.closed:
            child.stdin.close()
        child.wait(_TIMEOUT_S)


def main() -> int:
    """The child. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparseflow.cuda.ipc_trial", description=__doc__)
    parser.add_argument("--device", type=int, default=0)
    arguments = parser.parse_args()
    try:
        slab = SlabTicket.from_dict(_decode(json.loads(sys.stdin.buffer.readline(_LINE_NBYTES))))
        with CudaDriver(arguments.device) as driver, fill_slab(driver, slab) as event:
            sys.stdout.buffer.write(_encode(event.to_dict()))
            sys.stdout.buffer.flush()
            sys.stdin.buffer.read()
    except (SparseFlowError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


def _settle(driver: Driver, stream: int) -> None:
    with suppress(TimeoutError):  # freeing the memory waits, then, until this process is ended
        wait_until_done(driver, stream, _TIMEOUT_S)


def _pattern(nbytes: int) -> NDArray[np.uint8]:
    """(nbytes,) uint8 that no page of repeats."""
    return (np.arange(nbytes, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8)


def _encode(content: dict[str, Any]) -> bytes:
    texts = {name: value.hex() if isinstance(value, bytes) else value for name, value in content.items()}
    return json.dumps(texts).encode() + b"\n"


def _decode(content: Any) -> Any:
    """
    Raises:
        ValueError: a text that is not hexadecimal.
    """
    if not isinstance(content, dict):
        return content
    return {name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in content.items()}


def _read_line(fd: int) -> bytes:
    """One line; empty where the other side ends without."""
    deadline, line = time.monotonic() + _TIMEOUT_S, b""
    while not line.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise DeviceError(f"the other process does not answer within {_TIMEOUT_S:g} s")
        if not (part := os.read(fd, _LINE_NBYTES)):
            break
        line += part
    return line


if __name__ == "__main__":
    sys.exit(main())
