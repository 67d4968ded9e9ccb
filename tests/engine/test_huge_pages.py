"""Huge pages under shared memory: that they are there once it has begun, and that they change no byte of it."""

import ctypes
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import xxhash
from child_process import run_python
from shards import Shards

from sparseflow.client.shared_map import SharedMap
from sparseflow.engine.arena import Arena
from sparseflow.engine.engine import Engine
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import DiskError

HUGE = 2 << 20
DEADLINE_S = 20.0
_MAP_FIXED, _COLLAPSE = 0x10, 25  # linux/mman.h; Python's mmap does not name them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

Open = Callable[[int], SharedMemory]


@pytest.fixture
def shared(nothing_left: None) -> Iterator[Open]:
    """(nbytes) -> memory that is closed at the end."""
    made: list[SharedMemory] = []

    def make(nbytes: int) -> SharedMemory:
        made.append(SharedMemory(f"huge-{secrets.token_hex(4)}", nbytes))
        return made[-1]

    yield make
    for memory in made:
        memory.close()
    made.clear()


@pytest.fixture
def huge_pages() -> None:
    """Skips where the kernel refuses shared memory huge pages that are asked for one by one."""
    n_pages = 8
    with mmap.mmap(-1, (n_pages + 1) * HUGE) as reserved:  # shared memory of nobody else, put where it is aligned
        address = ctypes.addressof(ctypes.c_char.from_buffer(reserved))
        start = -(-address // HUGE) * HUGE
        fd = os.memfd_create("trial", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, n_pages * HUGE)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            assert _libc.mmap(start, n_pages * HUGE, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == start
        finally:
            os.close(fd)
        for page in range(start, start + n_pages * HUGE, HUGE):
            ctypes.c_char.from_address(page).value = b"x"
            if _libc.madvise(page, HUGE, _COLLAPSE):
                error = os.strerror(ctypes.get_errno())
                pytest.skip(f"no huge pages for shared memory on request (MADV_COLLAPSE): {error}")


def huge_nbytes(memory: SharedMemory) -> int:
    """What this process sees of it through huge pages, by all its maps of it."""
    name, found, is_its = os.readlink(f"/proc/self/fd/{memory.fd}").split()[0], 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_its = len(values) >= 5 and values[4] == name
        elif is_its and key == "ShmemPmdMapped:":
            found += int(values[0]) << 10
    return found


def taken_nbytes(memory: SharedMemory) -> int:
    """What it takes of the system's memory."""
    return os.fstat(memory.fd).st_blocks * 512


# --- that they are there


@pytest.mark.parametrize(("nbytes", "n_huge"), [(HUGE, 1), (4 * HUGE, 4), (2 * HUGE + 4096, 2), (3 * HUGE - 1, 2)])
def test_memory_that_has_begun_is_of_huge_pages_as_far_as_they_are_whole(
    shared: Open, huge_pages: None, nbytes: int, n_huge: int
) -> None:
    memory = shared(nbytes)
    assert huge_nbytes(memory) == 0
    memory.begin(nbytes)
    assert huge_nbytes(memory) == n_huge * HUGE
    memory.bytes[:] = 5
    assert huge_nbytes(memory) == n_huge * HUGE


def test_only_pages_that_have_begun_are_taken(shared: Open, huge_pages: None) -> None:
    """An arena takes memory as it fills."""
    memory = shared(64 * HUGE)
    for nbytes, n_huge in ((1, 1), (HUGE, 1), (HUGE + 1, 2), (5, 2), (4 * HUGE, 4)):
        memory.begin(nbytes)
        assert huge_nbytes(memory) == n_huge * HUGE
        assert taken_nbytes(memory) == n_huge * HUGE


def test_those_who_are_given_it_see_huge_pages_too(shared: Open, huge_pages: None) -> None:
    memory = shared(4 * HUGE)
    memory.begin(4 * HUGE)
    memory.bytes[:] = 5
    alone = huge_nbytes(memory)
    mapped = SharedMap(memory.fd, memory.nbytes, changes=True)
    assert int(np.frombuffer(mapped.content, np.uint8).min()) == 5
    assert huge_nbytes(memory) == 2 * alone


@pytest.mark.parametrize("io", ["direct", "buffered", "map"])
def test_bundles_of_a_shared_arena_are_read_into_huge_pages(
    tmp_path: Path, nothing_left: None, huge_pages: None, rng: np.random.Generator, io: str
) -> None:
    """Bundles of 17 pages lie across their borders."""
    shards = Shards(tmp_path / "store", n_layers=2, ffn_dim=60, bundle_nbytes=17 * 4096)
    try:
        engine = Engine(shards.folder, shards.manifest, shards.n_bundles, io=io, shared=True)
    except DiskError as error:
        pytest.skip(str(error))
    with closing(engine):
        memory = engine.arena.memory
        assert memory is not None
        for layer in (0, 1):
            for some in np.array_split(rng.permutation(60).astype(np.uint32), 3):
                ids = np.sort(some)
                slots = engine.wait(engine.fetch(layer, ids), DEADLINE_S)
                assert np.array_equal(engine.slots[slots], shards.content(layer, ids))
        assert huge_nbytes(memory) == memory.nbytes // HUGE * HUGE


# --- that they change nothing


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_000, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE + 12_345])
def test_memory_that_has_begun_is_zero_and_can_be_filled_to_its_end(
    shared: Open, rng: np.random.Generator, nbytes: int
) -> None:
    memory = shared(nbytes)
    memory.begin(nbytes)
    assert not memory.bytes.any()
    content = rng.integers(0, 256, nbytes, np.uint8)
    memory.bytes[:] = content
    memory.begin(nbytes)
    assert np.array_equal(memory.bytes, content)


def test_what_was_filled_before_stays_as_more_and_more_begins(shared: Open, rng: np.random.Generator) -> None:
    nbytes = 6 * HUGE + 4321
    memory, expected = shared(nbytes), np.zeros(nbytes, np.uint8)
    begun = 0
    while begun < nbytes:
        begun = min(nbytes, begun + int(rng.integers(1, HUGE)))
        memory.begin(begun)
        memory.begin(int(rng.integers(begun)))
        first = int(rng.integers(begun))
        expected[first:begun] = memory.bytes[first:begun] = rng.integers(0, 256, begun - first)
        assert np.array_equal(memory.bytes, expected)


def test_memory_that_begins_after_it_was_filled_keeps_what_it_holds(shared: Open, rng: np.random.Generator) -> None:
    memory = shared(2 * HUGE + 100)
    expected = rng.integers(0, 256, memory.nbytes, np.uint8)
    memory.bytes[:] = expected
    memory.begin(memory.nbytes)
    assert np.array_equal(memory.bytes, expected)


@pytest.mark.parametrize("slot_nbytes", [96, 1600, 17 * 4096, 700_001])
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "private"])
def test_slots_across_borders_of_huge_pages_hold_what_was_put_there(
    nothing_left: None, rng: np.random.Generator, slot_nbytes: int, is_shared: bool
) -> None:
    """Begun a few at a time, in any order among those."""
    n_slots = 3 * HUGE // slot_nbytes + 2
    arena = Arena(n_slots, slot_nbytes, shared=is_shared)
    expected = rng.integers(0, 256, (n_slots, slot_nbytes), np.uint8)
    for some in np.array_split(np.arange(n_slots), 5):
        slots = rng.permutation(some)
        arena.begin(slots)
        assert not arena.slots[slots].any()
        arena.slots[slots] = expected[slots]
    arena.begin(np.empty(0, np.int64))
    assert np.array_equal(arena.slots, expected)
    arena.close()


READER = """
import mmap, sys, xxhash
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
    print(xxhash.xxh3_64_hexdigest(content))
"""


def test_other_maps_and_processes_see_the_same_bytes(shared: Open, rng: np.random.Generator) -> None:
    """Those that mapped it before it began, and those that do after."""
    memory = shared(3 * HUGE + 4096)
    before = SharedMap(memory.fd, memory.nbytes, changes=True)
    assert not np.frombuffer(before.content, np.uint8)[::4096].any(), "its pages are mapped, before they are huge"
    memory.begin(HUGE + 1)
    memory.bytes[: HUGE + 1] = rng.integers(0, 256, HUGE + 1)
    private = SharedMap(memory.fd, memory.nbytes, changes=False)
    memory.begin(memory.nbytes)
    memory.bytes[HUGE + 1 :] = rng.integers(0, 256, memory.nbytes - HUGE - 1)
    after = mmap.mmap(memory.fd, memory.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
    expected = memory.bytes.tobytes()
    for content in (before.content, private.content, after):
        assert np.frombuffer(content, np.uint8).tobytes() == expected
    after.close()
    told = run_python(READER, f"/proc/{os.getpid()}/fd/{memory.fd}")
    assert told.split() == [xxhash.xxh3_64_hexdigest(expected)]
