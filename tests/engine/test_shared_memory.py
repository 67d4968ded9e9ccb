"""Memory that others are given to read: what the seals forbid, what stays allowed, and files copied into it."""

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash

from sparseflow.engine.shared_memory import SharedMemory, read_into
from sparseflow.errors import DiskError, NotEnoughMemory, ShardCorrupt
from sparseflow.store.shard_format import FileEntry

PAGE = 4096
NBYTES = 5 * PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_PUNCH_HOLE, _KEEP_SIZE, _ZERO_RANGE = 0x02, 0x01, 0x10  # linux/falloc.h
_CACHESTAT = 451

Open = Callable[[bool], SharedMemory]


@pytest.fixture
def shared(nothing_left: None) -> Iterator[Open]:
    """(others_may_write) -> memory that holds 1, 2, 3 and so on; it is closed at the end."""
    made: list[SharedMemory] = []

    def make(others_may_write: bool) -> SharedMemory:
        memory = SharedMemory("test", NBYTES, others_may_write=others_may_write)
        memory.bytes[:] = np.arange(1, NBYTES + 1)
        made.append(memory)
        return memory

    yield make
    for memory in made:
        memory.close()
    made.clear()


def given(memory: SharedMemory) -> list[int]:
    """What somebody who was given the descriptor can make of it: a copy, and the file opened anew for writing."""
    return [os.dup(memory.fd), os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR | os.O_CLOEXEC)]


def checked(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# --- what others may not do


def map_for_writing(fd: int) -> None:
    mmap.mmap(fd, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()


def make_a_map_writable(fd: int) -> None:
    with mmap.mmap(fd, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        checked(_libc.mprotect(address, NBYTES, mmap.PROT_READ | mmap.PROT_WRITE))


def remove_pages_of_a_map(fd: int) -> None:
    with mmap.mmap(fd, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        mapping.madvise(mmap.MADV_REMOVE)


def copy_a_file_into_it(fd: int) -> None:
    source = os.open("/proc/self/exe", os.O_RDONLY)
    try:
        os.sendfile(fd, source, 0, PAGE)
    finally:
        os.close(source)


WRITES: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.pwrite(fd, b"x", 3),
    "write_many": lambda fd: os.pwritev(fd, [b"x", b"y"], 3),
    "copy": copy_a_file_into_it,
    "map": map_for_writing,
    "mprotect": make_a_map_writable,
    "punch_hole": lambda fd: checked(_libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, 0, PAGE)),
    "remove_pages": remove_pages_of_a_map,
}
RESIZES: dict[str, Callable[[int], object]] = {
    "shrink": lambda fd: os.ftruncate(fd, NBYTES - 1),
    "empty": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, NBYTES + 1),
    "grow_by_reserving": lambda fd: os.posix_fallocate(fd, NBYTES, PAGE),
    "grow_by_writing": lambda fd: fully_written(fd, NBYTES),
}


def fully_written(fd: int, offset: int) -> None:
    if os.pwrite(fd, b"x", offset) != 1:
        raise OSError(errno.EFBIG, "nothing was written")


def seal(seals: int) -> Callable[[int], object]:
    return lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


SEALS = {"no_seal": seal(0), "seal_size": seal(fcntl.F_SEAL_GROW), "seal_content": seal(fcntl.F_SEAL_WRITE)}


@pytest.mark.parametrize("attempt", (WRITES | RESIZES | SEALS).values(), ids=WRITES | RESIZES | SEALS)
def test_whoever_is_given_it_can_neither_write_nor_resize_nor_seal_it(
    shared: Open, attempt: Callable[[int], object]
) -> None:
    memory = shared(False)
    before = memory.bytes.copy()
    for fd in given(memory):
        try:
            with pytest.raises(OSError, match=r"\[Errno"):
                attempt(fd)
            assert os.fstat(fd).st_size == NBYTES
        finally:
            os.close(fd)
    assert np.array_equal(memory.bytes, before)


@pytest.mark.parametrize("attempt", (RESIZES | SEALS).values(), ids=RESIZES | SEALS)
def test_where_others_may_write_the_size_is_fixed_all_the_same(shared: Open, attempt: Callable[[int], object]) -> None:
    memory = shared(True)
    before = memory.bytes.copy()
    for fd in given(memory):
        try:
            with pytest.raises(OSError, match=r"\[Errno"):
                attempt(fd)
            assert os.fstat(fd).st_size == NBYTES
        finally:
            os.close(fd)
    assert np.array_equal(memory.bytes, before)


def test_its_maker_is_bound_by_the_seals_too(shared: Open) -> None:
    """Whoever reads it need not trust the server not to cut it under them (SIGBUS)."""
    memory = shared(False)
    for resize in RESIZES.values():
        with pytest.raises(OSError, match=r"\[Errno"):
            resize(memory.fd)


def test_seals_are_these(shared: Open) -> None:
    size = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    future_write = 0x10
    assert fcntl.fcntl(shared(False).fd, fcntl.F_GET_SEALS) == size | future_write
    assert fcntl.fcntl(shared(True).fd, fcntl.F_GET_SEALS) == size


# --- what they may


def test_what_its_maker_writes_after_sealing_is_seen_by_those_who_map_it(
    shared: Open, rng: np.random.Generator
) -> None:
    memory = shared(False)
    for fd in given(memory):
        with mmap.mmap(fd, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            os.close(fd)
            memory.bytes[:] = rng.integers(0, 256, NBYTES)
            assert mapping[:] == memory.bytes.tobytes()


def test_private_map_can_be_written_and_nobody_else_sees_it(shared: Open) -> None:
    memory = shared(False)
    before = memory.bytes.copy()
    with mmap.mmap(memory.fd, NBYTES, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        mapping[:3] = b"\0\0\0"
        assert np.array_equal(memory.bytes, before)


def test_where_others_may_write_its_maker_sees_it(shared: Open) -> None:
    memory = shared(True)
    for fd in given(memory):
        with mmap.mmap(fd, NBYTES) as mapping:
            os.close(fd)
            mapping[7:9] = b"\xaa\xbb"
            assert memory.bytes[7:9].tolist() == [0xAA, 0xBB]
            memory.bytes[7:9] = 0


# --- what it is


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 1 << 20])
def test_it_is_zero_at_first_and_of_the_size_asked_for(nothing_left: None, nbytes: int) -> None:
    memory = SharedMemory("test", nbytes)
    assert (memory.nbytes, memory.bytes.shape, memory.bytes.dtype) == (nbytes, (nbytes,), np.uint8)
    assert not memory.bytes.any()
    memory.close()


def test_it_begins_on_a_page_has_no_name_and_is_not_inherited(shared: Open) -> None:
    memory = shared(False)
    assert memory.bytes.ctypes.data % PAGE == 0
    assert os.readlink(f"/proc/self/fd/{memory.fd}").startswith("/memfd:sparseflow-test")
    assert not os.get_inheritable(memory.fd)


def test_size_that_cannot_be_had_is_refused_and_leaves_nothing_open(nothing_left: None) -> None:
    for nbytes in (1 << 50, 1 << 62):
        with pytest.raises(NotEnoughMemory, match=f"{nbytes} bytes of shared memory: .*give less memory"):
            SharedMemory("test", nbytes)


def test_close_may_be_called_twice_and_closes_no_other_descriptor(nothing_left: None) -> None:
    memory = SharedMemory("test", NBYTES)
    number = memory.fd
    memory.close()
    other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    assert other == number, "the kernel gives the lowest number that is free"
    memory.close()
    del memory
    gc.collect()
    os.fstat(other)
    os.close(other)


def test_descriptor_goes_with_the_object(nothing_left: None) -> None:
    SharedMemory("test", NBYTES)
    gc.collect()


def test_content_stays_after_closing_until_nobody_maps_it(nothing_left: None) -> None:
    name = f"test-{secrets.token_hex(4)}"
    memory = SharedMemory(name, NBYTES)
    memory.bytes[:] = 5
    with mmap.mmap(memory.fd, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ) as reader:
        memory.close()
        assert memory.bytes.all()
        del memory
        gc.collect()
        assert is_mapped(name), "by the reader"
        assert reader[:] == b"\5" * NBYTES
    assert not is_mapped(name)


def is_mapped(name: str) -> bool:
    return f"/memfd:sparseflow-{name}" in Path("/proc/self/maps").read_text()


# --- files


def written(path: Path, content: bytes) -> FileEntry:
    path.write_bytes(content)
    return FileEntry(len(content), xxhash.xxh3_64(content).hexdigest())


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 9_000_001])
def test_file_is_copied_whole(tmp_path: Path, rng: np.random.Generator, nbytes: int) -> None:
    content = rng.bytes(nbytes)
    entry = written(tmp_path / "file", content)
    around = np.full(nbytes + 20, 7, np.uint8)
    read_into(around[10 : 10 + nbytes], tmp_path / "file", entry)
    assert around[10 : 10 + nbytes].tobytes() == content
    assert around[:10].tolist() == around[10 + nbytes :].tolist() == [7] * 10


@pytest.mark.parametrize("nbytes", [1, 4096, (4 << 20) + 5])
def test_each_wrong_bit_is_found_and_the_file_named(tmp_path: Path, rng: np.random.Generator, nbytes: int) -> None:
    content = rng.bytes(nbytes)
    entry = written(tmp_path / "dense.safetensors", content)
    spoiled = bytearray(content)
    spoiled[int(rng.integers(nbytes))] ^= 1 << int(rng.integers(8))
    (tmp_path / "dense.safetensors").write_bytes(spoiled)
    with pytest.raises(ShardCorrupt, match=r"dense\.safetensors: .*not those that were written; remove the store"):
        read_into(np.empty(nbytes, np.uint8), tmp_path / "dense.safetensors", entry)


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_file_of_another_size_is_refused(tmp_path: Path, rng: np.random.Generator, change: int) -> None:
    nbytes = 10_000
    content = rng.bytes(nbytes)
    entry = written(tmp_path / "file", content)
    (tmp_path / "file").write_bytes((content + b"\0" * 4096)[: nbytes + change])
    with pytest.raises(ShardCorrupt, match=rf"{min(nbytes, nbytes + change)} bytes of {nbytes} read"):
        read_into(np.empty(nbytes, np.uint8), tmp_path / "file", entry)


def test_file_that_cannot_be_read_is_a_disk_error_and_named(tmp_path: Path, nothing_left: None) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("missing", "folder"):
        with pytest.raises(DiskError, match=rf"{tmp_path / name}: cannot be read \(.*\); check the disk"):
            read_into(np.empty(10, np.uint8), tmp_path / name, FileEntry(10, "0" * 16))


def n_cached_pages(path: Path) -> int | None:
    """Of a file, by cachestat(2); None where the kernel does not have it."""
    whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        arguments = (ctypes.c_uint(fd), ctypes.byref(whole), ctypes.byref(found), ctypes.c_uint(0))
        return None if _libc.syscall(ctypes.c_long(_CACHESTAT), *arguments) else int(found[0])
    finally:
        os.close(fd)


@pytest.mark.parametrize("nbytes", [100, 4096, (9 << 20) + 100])
def test_nothing_of_the_file_stays_in_the_page_cache(tmp_path: Path, rng: np.random.Generator, nbytes: int) -> None:
    path, content = tmp_path / "file", rng.bytes(nbytes)
    entry = written(path, content)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what is not written out cannot leave
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if n_cached_pages(path) != 0:
        pytest.skip("the kernel does not count cached pages, or keeps files in memory here")
    path.read_bytes()
    assert n_cached_pages(path)
    read_into(np.empty(nbytes, np.uint8), path, entry)
    assert n_cached_pages(path) == 0


def test_copying_takes_no_second_copy_of_the_file(tmp_path: Path) -> None:
    nbytes = 64 << 20
    content = bytes(nbytes)
    entry = written(tmp_path / "file", content)
    del content
    memory = np.ones(nbytes, np.uint8)
    before = psutil.Process().memory_info().rss
    read_into(memory, tmp_path / "file", entry)
    assert psutil.Process().memory_info().rss - before < nbytes // 4
    assert not memory.any()
