"""Memory: how much of it, what limits it, and whether it can be shared as a weight server shares it."""

import errno
import os
import platform
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import psutil

from sparseflow.cuda.page_lock import memlock_limit
from sparseflow.doctor.finding import Check, Finding, Found, Group, of_error
from sparseflow.engine.mapping import HUGE_NBYTES, Mapping
from sparseflow.engine.memory_plan import AUTO_SHARE, free_memory, total_memory
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import NotEnoughMemory
from sparseflow.utils.sizes import format_size

_LITTLE_NBYTES = 1 << 30  # Python, torch and a small model
_FEW_FILES = 1024  # a descriptor for each layer, and several for each session of a server
_SMALL_SHM_NBYTES = 65 << 20  # what containers have by default, and a bit
_TRIED_NBYTES = 2 * HUGE_NBYTES
_SHM = Path("/dev/shm")
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def group() -> Group:
    """All of it."""
    checks: dict[str, Callable[[], Finding | Found]] = {
        "memory": amount,
        "memory limit": group_limit,
        "address space": address_space,
        "locked memory": locked_memory,
        "open files": open_files,
        "shared memory": shared_memory,
        "huge pages": huge_pages,
        "/dev/shm": shm,
    }
    return Group("Memory", [Check(name, find) for name, find in checks.items()])


def amount() -> Found:
    """What the machine has, and what of that this process can take."""
    total, free = psutil.virtual_memory().total, free_memory()
    text = (
        f"{format_size(free)} of {format_size(total)} free to this process, "
        f"{format_size(int(AUTO_SHARE * free))} by --memory auto"
    )
    if free >= _LITTLE_NBYTES:
        finding = Finding("memory", "ok", text)
    else:
        finding = Finding("memory", "warning", text, "end what takes it, or raise the limit of this container")
    facts = {"kernel": platform.release(), "memory_nbytes": total, "free_nbytes": free}
    return Found([finding], facts)


def group_limit() -> Finding:
    """Of the memory cgroups that this process is in."""
    machine, limit = psutil.virtual_memory().total, total_memory()
    if limit >= machine:
        return Finding("memory limit", "ok", "no cgroup allows less than the machine has")
    remedy = "raise it where a model does not fit (docker --memory, systemd's MemoryMax)"
    text = f"{format_size(limit)} by a cgroup, page cache included; the machine has {format_size(machine)}"
    return Finding("memory limit", "note", text, remedy)


def address_space() -> Finding:
    """RLIMIT_AS, against which maps of weights count in full."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("address space", "ok", "unlimited")
    text = f"limited to {format_size(limit)} (RLIMIT_AS), against which weights count that are only mapped"
    return Finding("address space", "warning", text, "ulimit -v unlimited")


def locked_memory() -> Found:
    """RLIMIT_MEMLOCK: only page-locking for a GPU may need more."""
    limit = memlock_limit()
    if limit is None:
        finding = Finding("locked memory", "ok", "unlimited")
    else:
        remedy = "where page-locking for a GPU fails: ulimit -l unlimited; docker --ulimit memlock=-1"
        text = f"limited to {format_size(limit)} (RLIMIT_MEMLOCK); on the CPU nothing is locked"
        finding = Finding("locked memory", "note", text, remedy)
    return Found([finding], {"memlock_nbytes": limit})


def open_files() -> Finding:
    """RLIMIT_NOFILE."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= _FEW_FILES:
        return Finding("open files", "ok", f"{'unlimited' if limit == resource.RLIM_INFINITY else limit} at once")
    remedy = f"ulimit -n {_FEW_FILES}"
    if resource.RLIM_INFINITY != most < _FEW_FILES:
        remedy += f", for which root must raise the hard limit ({most})"
    text = f"{limit} at once (RLIMIT_NOFILE): a store takes one for each layer, a server several for each client"
    return Finding("open files", "warning", text, remedy)


def shared_memory() -> Finding:
    """A sealed memfd, as a server makes its own: written here, read through another map, closed to other writers."""
    try:
        memory = SharedMemory("doctor", _TRIED_NBYTES)
    except NotEnoughMemory as error:
        return of_error("shared memory", "problem", error)
    with closing(memory):
        memory.bytes[:] = np.arange(_TRIED_NBYTES, dtype=np.uint64) % 251
        view = np.frombuffer(Mapping(memory.fd, _TRIED_NBYTES, writable=False).content, np.uint8)
        if not np.array_equal(view, memory.bytes):
            wrong = int(np.count_nonzero(view != memory.bytes))
            return _not_shared(f"{wrong} of {_TRIED_NBYTES} bytes are others in a second map")
        if reason := _lets_others_in(memory):
            return _not_shared(reason)
    return Finding("shared memory", "ok", "sealed: others can read what a server writes, neither write nor resize it")


def huge_pages() -> Finding:
    """Whether shared memory gets huge pages as a server asks for them."""
    with _begun_memory() as memory:
        n_huge = huge_nbytes(memory) // HUGE_NBYTES
    if n_huge == _TRIED_NBYTES // HUGE_NBYTES:
        return Finding("huge pages", "ok", "shared memory gets pages of 2MiB")
    settings = ", ".join(f"{name}: {_setting(name)}" for name in ("enabled", "shmem_enabled"))
    remedy = f"Linux 6.1 or later gives them on request; else, as root: echo advise > {_THP / 'shmem_enabled'}"
    text = f"shared memory gets pages of 4KiB, with which decoding at a server is a tenth slower ({settings})"
    return Finding("huge pages", "note", text, remedy)


def shm() -> Found:
    """A file system that servers do not need; Python's locks between processes, and CUDA, may."""
    try:
        found = os.statvfs(_SHM)
    except OSError:
        remedy = "mount a tmpfs there if CUDA or another program asks for it"
        return Found([Finding("/dev/shm", "note", "none; servers do not need it", remedy)], {"shm": None})
    facts = {"total_nbytes": found.f_blocks * found.f_frsize, "free_nbytes": found.f_bavail * found.f_frsize}
    text = f"{format_size(facts['free_nbytes'])} of {format_size(facts['total_nbytes'])} free"
    if facts["free_nbytes"] >= _SMALL_SHM_NBYTES:
        finding = Finding("/dev/shm", "ok", text)
    else:
        remedy = "docker --shm-size 1g, if CUDA or another program asks for more"
        finding = Finding("/dev/shm", "note", f"{text}; servers do not need it", remedy)
    return Found([finding], {"shm": facts})


def huge_nbytes(memory: SharedMemory) -> int:
    """What this process sees of it through huge pages."""
    name, found, is_its = os.readlink(f"/proc/self/fd/{memory.fd}").split()[0], 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_its = len(values) >= 5 and values[4] == name
        elif is_its and key == "ShmemPmdMapped:":
            found += int(values[0]) << 10
    return found


@contextmanager
def _begun_memory() -> Iterator[SharedMemory]:
    with closing(SharedMemory(f"doctor-{os.getpid()}", _TRIED_NBYTES)) as memory:
        memory.begin(_TRIED_NBYTES)
        memory.bytes[:] = 1
        yield memory


def _lets_others_in(memory: SharedMemory) -> str:
    """What whoever is given the descriptor could do and must not; empty where nothing."""
    try:
        Mapping(memory.fd, memory.nbytes, writable=True)
        return "whoever is given sealed memory can write to it"
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    try:
        os.ftruncate(memory.fd, 0)
        return "whoever is given sealed memory can cut it"
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    return ""


def _not_shared(text: str) -> Finding:
    return Finding("shared memory", "problem", text, "run on Linux 5.1 or later itself, not on a sandbox's own kernel")


def _setting(name: str) -> str:
    """Of transparent huge pages: the word in brackets."""
    try:
        text = (_THP / name).read_text(encoding="ascii")
    except OSError:
        return "n/a"
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen.group(1) if chosen else "n/a"
