"""What is told of the disk where stores are made: room, the way to read, and speed; and that nothing is left there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from looking import by_name, verdicts

from sparseflow.doctor import disk
from sparseflow.engine.read_queue import DirectRefused

GIB = 1 << 30


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is written, for it is not the speed that is tested."""
    monkeypatch.setattr(disk, "FILE_NBYTES", disk.BLOCK_NBYTES)


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """(free bytes) -> the disk has no more."""

    def say(free_nbytes: int) -> None:
        told = os.statvfs("/")
        fields = [*told][:10]
        fields[1], fields[4] = 4096, free_nbytes // 4096  # f_frsize, f_bavail
        monkeypatch.setattr(disk.os, "statvfs", lambda _: os.statvfs_result(fields))

    return say


def facts_of(**changed: Any) -> dict[str, Any]:
    """Of a sound disk, but for this."""
    speed = {"bundle_nbytes": 8192, "random_bytes_per_s": 5e8, "reads_under_way": 64, "sequential_bytes_per_s": 2e9}
    sound = {
        "disk": "/data",
        "disk_total_nbytes": 100 * GIB,
        "disk_free_nbytes": 50 * GIB,
        "direct_io": {"works": True, "reason": "", "alignment_nbytes": 512},
        "disk_speed": speed,
        "disk_reason": "",
    }
    return sound | changed


def test_disk_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    facts = disk.measure_disk(tmp_path / "not" / "made" / "yet")
    assert facts["disk"] == str(tmp_path)
    assert facts["disk_total_nbytes"] > facts["disk_free_nbytes"] > 0
    assert facts["direct_io"]["works"] == (facts["direct_io"]["reason"] == "")
    assert facts["disk_speed"]["random_bytes_per_s"] > 0
    assert facts["disk_speed"]["sequential_bytes_per_s"] > 0
    assert facts["disk_reason"] == ""
    assert list(tmp_path.iterdir()) == []


def test_measuring_is_done_by_another_process_which_leaves_nothing_either(tmp_path: Path) -> None:
    found = disk.look(tmp_path)
    assert list(by_name(found)) == ["space", "direct I/O", "random reads", "sequential reads"]
    assert found.facts["disk"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "_TIMEOUT_S", 0.01)
    found = by_name(disk.look(tmp_path))["disk"]
    assert found.verdict == "problem"
    assert "no end within 0.01 s" in found.text
    assert "SPARSEFLOW_HOME" in found.remedy


# --- the way to read


@pytest.mark.parametrize("alignment", [512, 2048, 4096])
def test_alignment_is_found_by_trying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alignment: int) -> None:
    preadv = os.preadv

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset % alignment or len(buffers[0]) % alignment:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(disk.os, "preadv", refuse)
    facts = disk.measure_disk(tmp_path)
    assert facts["direct_io"] == {"works": True, "reason": "", "alignment_nbytes": alignment}


def test_disk_without_direct_io_is_a_note_and_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(disk.os, "open", refuse)
    facts = disk.measure_disk(tmp_path)
    assert facts["direct_io"]["alignment_nbytes"] is None
    assert facts["disk_speed"]["random_bytes_per_s"] > 0
    found = by_name(disk.findings(facts))["direct I/O"]
    assert found.verdict == "note"
    assert found.text == f"no: {tmp_path}: Invalid argument; stores there are read through the page cache"


def test_direct_reads_of_no_alignment_are_no_direct_io(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preadv = os.preadv

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if offset in (512, 1024, 2048, 4096):
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(disk.os, "preadv", refuse)
    assert disk.measure_disk(tmp_path)["direct_io"]["works"] is False


def test_kernel_without_asynchronous_reads_is_a_note_that_names_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: int) -> None:
        raise DirectRefused("Linux AIO: Resource temporarily unavailable; raise fs.aio-max-nr")

    monkeypatch.setattr(disk, "AioQueue", refuse)
    found = by_name(disk.findings(disk.measure_disk(tmp_path)))["direct I/O"]
    assert found.verdict == "note"
    assert "raise fs.aio-max-nr" in found.text


# --- room, and speed


def test_too_little_space_is_a_problem_and_nothing_is_written(
    space: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    space(100 << 20)
    monkeypatch.setattr(disk, "_fill", lambda _: pytest.fail("a disk is filled that has no room"))
    facts = disk.measure_disk(tmp_path)
    assert facts["disk_speed"] is None
    (found,) = disk.findings(facts)
    assert (found.name, found.verdict) == ("space", "problem")
    assert found.text.startswith("100MiB of ")


def test_little_space_is_a_warning(space: Callable[[int], None], tmp_path: Path) -> None:
    space(2 * GIB)
    assert verdicts(disk.findings(disk.measure_disk(tmp_path)))["space"] == "warning"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_that_cannot_be_written_to_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk.os, "pwrite", refuse)
    found = by_name(disk.findings(disk.measure_disk(tmp_path)))["files"]
    assert found.verdict == "problem"
    assert os.strerror(code) in found.text
    assert list(tmp_path.iterdir()) == []


def test_folder_where_no_file_can_be_made_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    found = by_name(disk.findings(disk.measure_disk(tmp_path)))["files"]
    assert found.verdict == "problem"
    assert found.text == f"{tmp_path}: no file can be made and read there (Permission denied)"


def test_home_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    found = by_name(disk.findings(disk.measure_disk(tmp_path / "home")))["files"]
    assert found.verdict == "problem"
    assert "Not a directory" in found.text


def test_sound_disk_is_told_in_four_lines() -> None:
    findings = by_name(disk.findings(facts_of()))
    assert {finding.verdict for finding in findings.values()} == {"ok"}
    assert findings["direct I/O"].text == "yes, from multiples of 512 bytes on"
    assert findings["random reads"].text == "500 MB/s in pieces of 8KiB, 64 of them under way"
    assert findings["sequential reads"].text == "2000 MB/s"


def test_disk_that_turns_is_a_warning() -> None:
    speed = facts_of()["disk_speed"] | {"random_bytes_per_s": 1.2e6}
    found = by_name(disk.findings(facts_of(disk_speed=speed)))["random reads"]
    assert found.verdict == "warning"
    assert found.text.startswith("1 MB/s")
