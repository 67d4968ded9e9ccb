"""`sparseflow doctor`: its page, its JSON, its exit code, and that it leaves nothing where it looked."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparseflow.cli import doctor
from sparseflow.cli.main import build_parser, main
from sparseflow.cuda import trials
from sparseflow.cuda.trials import Outcome
from sparseflow.doctor import computing, disk, gpu
from sparseflow.doctor.finding import Check, Finding, Found, Group
from sparseflow.utils import progress as utils_progress

Capture = pytest.CaptureFixture[str]
OF_A_DEVICE = ("device", "bandwidth", "page_lock", "ipc", "graphs", "pull", "push")
OF_THE_HOST = {"kernel", "memory_nbytes", "free_nbytes", "memlock_nbytes", "shm", "disk", "direct_io"}
NO_GPU = Outcome(None, "none here; install one", "NoDevice")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Outcome], None]:
    """(outcome) -> what the first look at a GPU finds. torch, the disk and others' servers are left alone."""
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(tmp_path.parent / "run"))
    for module in (computing, disk):
        monkeypatch.setattr(module, "group", lambda: Group("Left out", []))

    def use(outcome: Outcome) -> None:
        monkeypatch.setattr(trials, "run_trial", lambda *_: outcome)

    use(NO_GPU)
    return use


def told(capsys: Capture, *words: str, code: int = 0) -> dict[str, Any]:
    """What it prints as JSON."""
    capsys.readouterr()
    assert main(["doctor", *words, "--json"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# --- on this machine


def test_machine_without_a_driver_is_sound_and_told_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As people start it: one page, nothing else, and nothing left where stores are made."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcuda.so.1").touch()  # hides one that this machine may have
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    monkeypatch.setenv("SPARSEFLOW_HOME", str(tmp_path / "home" / "not" / "made"))
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(tmp_path.parent / "run"))
    begin = time.monotonic()
    command = [sys.executable, "-m", "sparseflow", "doctor"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert time.monotonic() - begin < 60  # 5 s, where nobody else has the cores
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    for title in ("Environment", "Computing", "Memory", "Disk", "GPU", "Servers"):
        assert title in lines
    assert any(re.match(r"  (note|warning) +device +none \(.*libcuda.so.1", line) for line in lines)
    assert any(re.match(r"  ok +kernels +compiled by numba", line) for line in lines)
    assert lines[-1].startswith("doctor: no problem, ")
    assert list((tmp_path / "home").iterdir()) == []


def test_json_has_the_facts_and_the_findings(
    capsys: Capture, quick: Callable[[Outcome], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSEFLOW_HOME", str(tmp_path / "not" / "made" / "yet"))
    result = told(capsys)
    assert result["ok"] is True
    assert result["reason"] == NO_GPU.reason
    assert all(result[name] is None for name in OF_A_DEVICE)
    assert set(result["host"]) >= OF_THE_HOST
    assert result["host"]["memory_nbytes"] >= result["host"]["free_nbytes"] > 0
    for finding in result["findings"]:
        assert set(finding) == {"group", "name", "verdict", "text", "remedy"}
    assert {finding["group"] for finding in result["findings"]} == {"Environment", "Memory", "GPU", "Servers"}


def test_facts_of_the_disk_are_among_those_of_the_host(
    capsys: Capture, quick: Callable[[Outcome], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = disk.measure_disk(tmp_path)
    monkeypatch.setattr(disk, "group", lambda: Group("Disk", [Check("disk", lambda: Found([], facts))]))
    host = told(capsys)["host"]
    assert host["disk"] == str(tmp_path)
    assert host["direct_io"] == facts["direct_io"]
    assert host["disk_speed"]["random_bytes_per_s"] > 0


# --- the exit code


def test_driver_that_fails_to_start_is_a_problem(capsys: Capture, quick: Callable[[Outcome], None]) -> None:
    quick(Outcome(None, "it does not", "DeviceError"))
    result = told(capsys, code=1)
    assert (result["ok"], result["device"], result["reason"]) == (False, None, "it does not")
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("doctor: 1 problem")


@pytest.mark.parametrize(("word", "number"), [("3", 3), ("cuda:3", 3), ("cuda", 0)])
def test_gpu_may_be_called_as_elsewhere(word: str, number: int) -> None:
    assert build_parser().parse_args(["doctor", "--device", word]).device == number


def test_number_of_no_gpu_is_wrong_usage(capsys: Capture, quick: Callable[[Outcome], None]) -> None:
    quick(Outcome(None, "device 7: 1 is visible", "BadRequest"))
    assert main(["doctor", "--device", "7"]) == 2
    assert "device 7: 1 is visible" in capsys.readouterr().err


def test_all_bytes_of_no_store_are_wrong_usage(capsys: Capture) -> None:
    assert main(["doctor", "--full"]) == 2
    assert "sparseflow doctor STORE --full" in capsys.readouterr().err


def test_facts_of_a_gpu_stand_at_the_top(
    capsys: Capture, quick: Callable[[Outcome], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {name: {"name": name} for name in OF_A_DEVICE}
    check = Check("device", lambda: Found([Finding("device", "ok", "0: A GPU")], facts))
    monkeypatch.setattr(gpu, "group", lambda *_: Group("GPU", [check]))
    result = told(capsys)
    assert {name: result[name] for name in OF_A_DEVICE} == facts
    assert result["reason"] is None


# --- a store


def test_store_is_looked_at_where_one_is_named(
    capsys: Capture, quick: Callable[[Outcome], None], family_store: Callable[[str, str], Path], tmp_path: Path
) -> None:
    store = str(family_store("base", "float32"))
    found = [finding for finding in told(capsys, store, "--full")["findings"] if finding["group"] == f"Store {store}"]
    assert [finding["name"] for finding in found] == ["manifest", "files", "reading", "memory", "checksums"]
    assert told(capsys, str(tmp_path / "none"), code=1)["ok"] is False


# --- the page


def test_page_has_a_line_for_a_finding_and_a_remedy_under_what_is_not_ok() -> None:
    sections: Sequence[tuple[str, list[Finding]]] = [
        ("Memory", [Finding("memory", "ok", "1GiB free"), Finding("huge pages", "note", "none", "ask for them")]),
        ("Disk", [Finding("a name that is far too long", "problem", "full", "free\nsome")]),
    ]
    assert doctor.page(sections).splitlines() == [
        "Memory",
        "  ok       memory               1GiB free",
        "  note     huge pages           none",
        "                                -> ask for them",
        "Disk",
        "  problem  a name that is far too long full",
        "                                -> free\\nsome",
        "doctor: 1 problem, 1 note",
    ]


def test_bar_is_shown_on_a_terminal_alone_once_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    check = Check("memory", lambda: Finding("memory", "ok", "enough"))
    groups = [Group("Memory", [check, check])]

    def shown(*, quiet: bool = False) -> str:
        doctor.examined(groups, quiet=quiet)
        return capsys.readouterr().err

    assert shown() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert shown() == ""
    monkeypatch.setattr(utils_progress, "DELAY_S", 1e-9)
    assert re.search(r"memory: .*1/2", shown())
    assert shown(quiet=True) == ""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert shown() == ""


def test_nothing_is_left_open(capsys: Capture, quick: Callable[[Outcome], None]) -> None:
    told(capsys)
    before = len(os.listdir("/proc/self/fd"))
    told(capsys)
    assert len(os.listdir("/proc/self/fd")) == before
