"""A server's memory, mapped: what is seen, what takes its place, when it goes, and who sees a stray write."""

import gc
import mmap
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseflow.client.shared_map import SharedMap
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import NotEnoughMemory

PAGE = 4096
NBYTES = 3 * PAGE + 100  # regions end anywhere
either = pytest.mark.parametrize("changes", [True, False], ids=["arena", "files"])

Named = tuple[str, SharedMemory]


@pytest.fixture
def named() -> Iterator[Named]:
    """A server's memory of random bytes, and the name that /proc/self/maps has for it."""
    name = f"test-{secrets.token_hex(4)}"
    memory = filled(name)
    yield name, memory
    memory.close()


def filled(name: str = "test", nbytes: int = NBYTES) -> SharedMemory:
    memory = SharedMemory(name, nbytes)
    memory.bytes[:] = np.frombuffer(secrets.token_bytes(nbytes), np.uint8)
    return memory


def n_maps(name: str) -> int:
    return sum(f"/memfd:sparseflow-{name}" in line for line in Path("/proc/self/maps").read_text().splitlines())


def seen(mapped: SharedMap) -> bytes:
    return np.frombuffer(mapped.content, np.uint8).tobytes()


# --- what is seen


@either
def test_content_is_the_server_s(named: Named, changes: bool) -> None:
    mapped = SharedMap(named[1].fd, NBYTES, changes=changes)
    assert mapped.nbytes == NBYTES
    assert len(memoryview(mapped.content)) == NBYTES
    assert seen(mapped) == named[1].bytes.tobytes()


@either
def test_content_can_be_seen_after_the_descriptor_is_closed(named: Named, changes: bool) -> None:
    mapped = SharedMap(named[1].fd, NBYTES, changes=changes)
    expected = named[1].bytes.tobytes()
    named[1].close()
    assert seen(mapped) == expected


def test_what_the_server_writes_later_is_seen(named: Named) -> None:
    mapped = SharedMap(named[1].fd, NBYTES, changes=True)
    view = torch.frombuffer(mapped.content, dtype=torch.uint8)
    named[1].bytes[:] = 7
    assert bool((view == 7).all())


@either
def test_tensors_of_every_type_show_it(named: Named, changes: bool) -> None:
    mapped = SharedMap(named[1].fd, NBYTES, changes=changes)
    for dtype in (torch.uint8, torch.float16, torch.float32):
        view = torch.frombuffer(mapped.content, dtype=dtype, count=1000, offset=PAGE)
        assert view.numpy().tobytes() == named[1].bytes[PAGE:].tobytes()[: 1000 * dtype.itemsize]


# --- stray writes


def test_stray_write_to_what_does_not_change_reaches_nobody_else(named: Named) -> None:
    ours, other = (SharedMap(named[1].fd, NBYTES, changes=False) for _ in range(2))
    expected = named[1].bytes.tobytes()
    view = torch.frombuffer(ours.content, dtype=torch.uint8)
    view.zero_()
    assert not any(seen(ours))
    assert seen(other) == expected
    assert named[1].bytes.tobytes() == expected


STRAY_WRITE = """
import sys, numpy as np
from sparseflow.client.shared_map import SharedMap
from sparseflow.engine.shared_memory import SharedMemory
memory = SharedMemory("test", 8192)
mapped = SharedMap(memory.fd, 8192, changes=sys.argv[1] == "arena")
print(np.frombuffer(mapped.content, np.uint8)[5], flush=True)
np.frombuffer(mapped.content, np.uint8)[5] = 1
print("written", flush=True)
"""


@pytest.mark.parametrize(("region", "code"), [("arena", -signal.SIGSEGV), ("files", 0)])
def test_stray_write_to_what_changes_is_a_fault(region: str, code: int) -> None:
    """Of the process that writes: the arena is everybody's."""
    result = subprocess.run(
        [sys.executable, "-c", STRAY_WRITE, region],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[0] == "0", "it could be read"


# --- another server's memory in its place


@either
def test_replacing_keeps_the_address_and_changes_what_tensors_show(named: Named, changes: bool) -> None:
    mapped = SharedMap(named[1].fd, NBYTES, changes=changes)
    whole = torch.frombuffer(mapped.content, dtype=torch.uint8)
    part = whole[PAGE + 7 : 2 * PAGE]
    address = whole.data_ptr()
    for _ in range(3):
        successor = filled()
        mapped.replace(successor.fd)
        successor.close()
        assert whole.data_ptr() == torch.frombuffer(mapped.content, dtype=torch.uint8).data_ptr() == address
        assert whole.numpy().tobytes() == seen(mapped) == successor.bytes.tobytes()
        assert part.numpy().tobytes() == successor.bytes[PAGE + 7 : 2 * PAGE].tobytes()


@either
def test_replacing_lets_the_old_memory_go(named: Named, changes: bool) -> None:
    name, memory = named
    mapped = SharedMap(memory.fd, NBYTES, changes=changes)
    before = n_maps(name)
    successor = filled()
    mapped.replace(successor.fd)
    assert n_maps(name) == before - 1
    successor.close()


def test_what_was_written_by_mistake_is_gone_after_replacing(named: Named) -> None:
    mapped = SharedMap(named[1].fd, NBYTES, changes=False)
    torch.frombuffer(mapped.content, dtype=torch.uint8).zero_()
    successor = filled()
    mapped.replace(successor.fd)
    assert seen(mapped) == successor.bytes.tobytes()
    successor.close()


def test_replaced_arena_still_cannot_be_written(named: Named) -> None:
    mapped = SharedMap(named[1].fd, NBYTES, changes=True)
    successor = filled("successor")
    mapped.replace(successor.fd)
    address = f"{torch.frombuffer(mapped.content, dtype=torch.uint8).data_ptr():x}-"
    (line,) = (each for each in Path("/proc/self/maps").read_text().splitlines() if each.startswith(address))
    assert line.split()[1] == "r--s"
    successor.close()


# --- the end

USERS: dict[str, Callable[[Any], Any]] = {
    "content": lambda content: content,
    "array": lambda content: np.frombuffer(content, np.uint8),
    "part of an array": lambda content: np.frombuffer(content, np.uint8)[:PAGE],
    "tensor": lambda content: torch.frombuffer(content, dtype=torch.uint8),
    "part of a tensor": lambda content: torch.frombuffer(content, dtype=torch.uint8)[:PAGE],
}


@either
@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
def test_it_is_unmapped_when_the_last_user_is_gone(
    named: Named, nothing_left: None, changes: bool, user: Callable[[Any], Any]
) -> None:
    """Not before: a tensor may outlive the model and its session."""
    name, memory = named
    before = n_maps(name)
    mapped = SharedMap(memory.fd, NBYTES, changes=changes)
    assert n_maps(name) == before + 1
    last = user(mapped.content)
    del mapped
    gc.collect()
    assert n_maps(name) == before + 1
    assert np.asarray(last, np.uint8).tobytes() == memory.bytes[: len(last)].tobytes()
    del last
    gc.collect()
    assert n_maps(name) == before


@either
def test_it_is_unmapped_when_nobody_ever_used_it_also_after_replacing(named: Named, changes: bool) -> None:
    name, memory = named
    before = n_maps(name)
    mapped = SharedMap(memory.fd, NBYTES, changes=changes)
    mapped.replace(memory.fd)
    assert n_maps(name) == before + 1
    del mapped
    gc.collect()
    assert n_maps(name) == before


def test_replacing_reaches_a_tensor_whose_map_object_lives_on(named: Named) -> None:
    """And nothing that is unmapped is touched: the address may be another's by then."""
    mapped = SharedMap(named[1].fd, NBYTES, changes=False)
    view = torch.frombuffer(mapped.content, dtype=torch.uint8)
    successor = filled()
    mapped.replace(successor.fd)
    del mapped
    gc.collect()
    assert view.numpy().tobytes() == successor.bytes.tobytes()
    successor.close()


AT_EXIT = """
import atexit, torch
from sparseflow.client.shared_map import SharedMap
from sparseflow.engine.shared_memory import SharedMemory
memory = SharedMemory("test", 8192)
view = torch.frombuffer(SharedMap(memory.fd, 8192, changes=False).content, dtype=torch.uint8)
atexit.register(lambda: print(int(view.sum()), flush=True))
class Late:
    def __init__(self, view): self.view = view
    def __del__(self): print(int(self.view[0]), flush=True)
late = Late(view)
"""


def test_tensors_can_be_read_until_the_interpreter_ends() -> None:
    result = subprocess.run(
        [sys.executable, "-c", AT_EXIT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0\n")


# --- refusals


@either
def test_memory_that_cannot_be_mapped_is_refused(named: Named, changes: bool) -> None:
    with pytest.raises(NotEnoughMemory, match=r"bytes of the server's memory cannot be mapped .*ulimit -v"):
        SharedMap(named[1].fd, 1 << 60, changes=changes)
    with open("/dev/null", "rb") as other, pytest.raises(NotEnoughMemory):
        SharedMap(other.fileno(), NBYTES, changes=changes)


@either
def test_map_of_a_large_region_takes_no_memory_of_its_own(changes: bool) -> None:
    """Pages are the server's until they are written to."""
    memory = filled(nbytes=64 << 20)
    mapped = SharedMap(memory.fd, 64 << 20, changes=changes)
    private_before = private_kib()
    assert int(np.frombuffer(mapped.content, np.uint8)[::PAGE].sum()) > 0
    assert private_kib() - private_before < 8 << 10
    memory.close()


def private_kib() -> int:
    """Of this process alone."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def test_region_of_nothing_is_mapped_too() -> None:
    """A store without further files has such a region; its memory is one page all the same."""
    memory = SharedMemory("test", 0)
    with mmap.mmap(memory.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ):
        pass
    mapped = SharedMap(memory.fd, memory.nbytes, changes=False)
    assert len(memoryview(mapped.content)) == 0
    memory.close()
