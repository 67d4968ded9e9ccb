"""The limit holds, page cache counts, cold is cold, and bytes are counted."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseflow.bench import memory_cgroup
from sparseflow.bench.child import read_nbytes
from sparseflow.bench.memory_cgroup import GroupParent, MemoryGroup

DEADLINE_S = 120
MIB = 1 << 20


@pytest.fixture
def file_on_disk(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{tmp_path} has no O_DIRECT, so it is no disk")
    return path


def run_in(group: MemoryGroup, program: str, *arguments: object) -> int:
    command = group.command([sys.executable, "-S", "-c", program, *map(str, arguments)])
    return subprocess.run(command, timeout=DEADLINE_S, check=False).returncode


def groups_in(parent: GroupParent) -> list[Path]:
    return list(parent.folder.glob(f"{memory_cgroup.NAME_PREFIX}{os.getpid()}-*"))


def test_program_over_the_limit_is_killed_and_counted(group_parent: GroupParent) -> None:
    with MemoryGroup(group_parent, 32 * MIB) as group:
        assert run_in(group, "bytearray(64 << 20)") == -9
        assert group.usage().oom_kills == 1
    assert not groups_in(group_parent)


def test_page_cache_counts_and_is_taken_back(group_parent: GroupParent, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(64 * MIB))
    assert memory_cgroup.drop_page_cache([path]) == 0
    with MemoryGroup(group_parent, 32 * MIB) as group:
        assert run_in(group, "import sys; f = open(sys.argv[1], 'rb')\nwhile f.read(1 << 20): pass", path) == 0
        usage = group.usage()
    assert usage.limit_hits > 0
    assert usage.peak_nbytes is None or 16 * MIB < usage.peak_nbytes <= 32 * MIB
    assert memory_cgroup.cached_nbytes(path) < 32 * MIB


def test_leaving_the_group_kills_what_is_inside(group_parent: GroupParent) -> None:
    with MemoryGroup(group_parent, 64 * MIB) as group:
        process = subprocess.Popen(group.command(["sleep", "1000"]))
        while str(process.pid) not in (group.folder / "cgroup.procs").read_text().split():
            assert process.poll() is None
    assert process.wait(DEADLINE_S) == -9
    assert not group.folder.exists()
    group.close()  # may be called twice


def test_version_2_files_are_read(tmp_path: Path) -> None:
    group = MemoryGroup.__new__(MemoryGroup)
    group.folder, group._interface = tmp_path, memory_cgroup.V2
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n")
    assert group.usage() == memory_cgroup.GroupUsage(None, 7, 1)  # before Linux 5.19
    (tmp_path / "memory.peak").write_text("4096\n")
    assert group.usage() == memory_cgroup.GroupUsage(4096, 7, 1)


def test_without_any_group_the_error_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_cgroup, "_candidates", lambda: iter(()))
    with pytest.raises(memory_cgroup.NoMemoryGroupError, match=r"no memory controller is mounted.*run as root"):
        memory_cgroup.find_group_parent()


def test_dropped_file_is_cold(file_on_disk: Path) -> None:
    file_on_disk.read_bytes()
    assert memory_cgroup.cached_nbytes(file_on_disk) == 8 * MIB
    assert memory_cgroup.drop_page_cache([file_on_disk]) == 0
    before = read_nbytes()
    file_on_disk.read_bytes()
    assert read_nbytes() - before == 8 * MIB


@pytest.mark.parametrize("read", [memory_cgroup.read_queued, memory_cgroup.read_threaded])
def test_direct_reads_are_counted_and_leave_no_cache(read: Callable[..., float], file_on_disk: Path) -> None:
    memory_cgroup.drop_page_cache([file_on_disk])
    fd, before = os.open(file_on_disk, os.O_RDONLY | os.O_DIRECT), read_nbytes()
    try:
        assert read([(fd, offset) for offset in range(0, 8 * MIB, 8192)], 8192) > 0
    except OSError as error:
        if read is memory_cgroup.read_threaded:
            raise
        pytest.skip(f"{error}: read_threaded takes its place")
    finally:
        os.close(fd)
    assert read_nbytes() - before == 8 * MIB
    assert memory_cgroup.cached_nbytes(file_on_disk) == 0
