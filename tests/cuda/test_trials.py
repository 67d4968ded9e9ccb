"""Trials in processes of their own: what they find, and what is said of those that fail, crash or hang."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fake_driver import FakeDriver

from sparseflow.cuda import driver as cuda
from sparseflow.cuda.pcie import PcieLink, pcie_link
from sparseflow.cuda.trials import Outcome, device_facts, run_trial, try_page_lock
from sparseflow.errors import DeviceError

PAGE = 4096
Set = Callable[[str, str], None]


def trial(name: str, timeout_s: float = 30.0) -> Outcome:
    return run_trial(["-m", "sparseflow.cuda.trials", name], timeout_s)


# --- through the stub of libcuda, in real processes


@pytest.mark.usefixtures("stub")
def test_device_is_described() -> None:
    found = trial("device").found
    assert found is not None
    assert found["name"] == "Stub 0"
    assert found["uuid"] == "GPU-f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff"
    assert (found["capability"], found["cuda"]) == ("9.0", "13.0")
    assert found["page_locks_read_only"] is True
    assert found["uses_host_page_tables"] is False


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("name", ["page-lock-read-only", "page-lock-writable", "ipc"])
def test_what_works_is_found_to_work(name: str) -> None:
    outcome = trial(name)
    assert outcome.reason == ""
    assert outcome.found is not None


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("ipc", "cuIpcGetMemHandle", "cuIpcGetMemHandle(0x"),
        (
            "ipc",
            "cuIpcOpenMemHandle_v2",
            "in the other process: slab: its handle cannot be opened (cuIpcOpenMemHandle(",
        ),
        ("ipc", "cuIpcOpenEventHandle", "event: its handle cannot be opened"),
        ("page-lock-writable", "cuMemHostUnregister", "unlocking failed: cuMemHostUnregister("),
    ],
)
def test_failure_says_where_it_was(monkeypatch: pytest.MonkeyPatch, name: str, call: str, message: str) -> None:
    monkeypatch.setenv("STUB_FAIL", f"{call}:719")
    outcome = trial(name)
    assert outcome.found is None
    assert message in outcome.reason
    assert "CUDA_ERROR_LAUNCH_FAILED (719)" in outcome.reason
    assert outcome.kind in ("DeviceError", "BadRequest")


def test_no_driver_is_told_from_a_broken_one(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FAIL", "cuInit:803")
    assert trial("device").kind == "DeviceError"
    monkeypatch.setenv("STUB_FAIL", "cuInit:100")
    assert trial("device").kind == "NoDevice"


def test_crash_in_the_driver_is_a_reason(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_CRASH", "cuMemGetInfo_v2")
    assert trial("device").reason.startswith("ended by SIGABRT")


def test_crash_of_the_other_process_is_a_reason(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_CRASH", "cuIpcOpenMemHandle_v2")
    assert "the other process ended" in trial("ipc").reason


@pytest.mark.parametrize("call", ["cuMemHostRegister_v2", "cuIpcOpenMemHandle_v2"])
def test_hang_in_the_driver_ends_at_the_deadline_with_all_its_processes(
    stub: Path, monkeypatch: pytest.MonkeyPatch, call: str, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("STUB_HANG", call)
    shared = Path(os.environ["STUB_FOLDER"])
    begin = time.monotonic()
    outcome = trial("ipc" if "Ipc" in call else "page-lock-writable", timeout_s=2.0)
    assert outcome == Outcome(None, "no end within 2 s")
    assert time.monotonic() - begin < 20
    deadline = time.monotonic() + 10
    while (left := processes_with("STUB_HANG", call)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    for path in shared.iterdir():  # what was killed could not remove it
        path.unlink()


def processes_with(name: str, value: str) -> list[int]:
    """Others that were started with this in their environment, and still run."""
    found = []
    for process in psutil.process_iter():
        try:
            is_one = process.pid != os.getpid() and process.environ().get(name) == value
            if is_one and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


# --- any program


def test_last_line_is_what_was_found() -> None:
    assert run_trial(["-c", "print('a warning'); print('{\"a\": 1}')"], 30) == Outcome({"a": 1})


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError('no such thing')", "ended with exit code 1: ValueError: no such thing"),
        ("print('no JSON')", "ended with exit code 0"),
        ("pass", "ended with exit code 0"),
        ("print(7)", "ended with exit code 0"),
        ("print('{}'); raise SystemExit(3)", "ended with exit code 3"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "ended by SIGSEGV"),
    ],
)
def test_program_that_finds_nothing_is_told_of(program: str, reason: str) -> None:
    assert run_trial(["-c", program], 30) == Outcome(None, reason)


def test_trial_is_of_this_very_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import sparseflow

    code = "import json, sparseflow; print(json.dumps({'file': sparseflow.__file__}))"
    assert run_trial(["-c", code], 30) == Outcome({"file": sparseflow.__file__})
    assert Path(sys.executable).exists()


# --- on host memory


@pytest.mark.parametrize("read_only", [True, False])
def test_page_lock_trial_copies_and_gives_all_back(driver: FakeDriver, read_only: bool) -> None:
    found = try_page_lock(driver, read_only=read_only, nbytes=5 * PAGE, chunk_nbytes=2 * PAGE)
    assert found["locked_bytes_per_s"] > 0
    assert found["in_one_piece"] is True
    assert driver.calls.count("host_register") == 3


def test_whichever_call_of_the_page_lock_trial_fails_nothing_is_left(driver: FakeDriver) -> None:
    try_page_lock(driver, read_only=True, nbytes=5 * PAGE, chunk_nbytes=2 * PAGE)
    for n in range(len(driver.calls)):
        failing = FakeDriver(fail_at=n)
        with pytest.raises(DeviceError, match="719"):
            try_page_lock(failing, read_only=True, nbytes=5 * PAGE, chunk_nbytes=2 * PAGE)
        assert failing.leaks() == {}, n
        assert failing.world.violations == [], n


def test_device_that_locks_no_read_only_mapping_says_so() -> None:
    driver = FakeDriver(attributes={cuda.READ_ONLY_HOST_REGISTER_SUPPORTED: 0})
    with pytest.raises(DeviceError, match="read-only"):
        try_page_lock(driver, read_only=True, nbytes=PAGE, chunk_nbytes=PAGE)
    assert driver.leaks() == {}
    assert device_facts(driver)["page_locks_read_only"] is False


# --- the link


def test_link_is_read_from_the_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "001b:0a:00.0"
    folder.mkdir()
    (folder / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (folder / "max_link_width").write_text("16\n")
    assert pcie_link("0000001B:0A:00.0", tmp_path) == PcieLink(5, 16)


@pytest.mark.parametrize(
    ("script", "expected"), [("echo 4, 8", (4, 8)), ("echo '[N/A], 8'", (None, None)), ("exit 9", (None, None))]
)
def test_link_that_the_kernel_does_not_tell_is_asked_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: tuple[int | None, int | None]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert pcie_link("0000:1B:00.0", tmp_path / "none") == PcieLink(*expected)


def test_link_that_nobody_tells_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for bus_id in ("0000:1B:00.0", "none", ""):
        assert pcie_link(bus_id, tmp_path) == PcieLink(None, None)
