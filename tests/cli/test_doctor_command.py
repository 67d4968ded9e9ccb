"""`sparseflow doctor`: what it says of a machine without a GPU, of a sound one, and of what does not work."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparseflow.cli.main import main
from sparseflow.cuda.trials import Outcome

Capture = pytest.CaptureFixture[str]
OF_A_DEVICE = ("device", "bandwidth", "page_lock", "ipc", "graphs", "pull", "push")

SOUND = {
    "device": Outcome(
        {
            "cuda": "13.0",
            "name": "A GPU",
            "uuid": "GPU-0",
            "capability": "9.0",
            "total_nbytes": 80 << 30,
            "free_nbytes": 79 << 30,
            "pci_bus_id": "0000:1B:00.0",
            "pcie": {"generation": 5, "width": 16},
            "page_locks_mapped": True,
            "page_locks_read_only": True,
            "uses_host_page_tables": False,
            "shares_events": True,
        }
    ),
    "bandwidth": Outcome({"nbytes": 1 << 28, "pageable_bytes_per_s": 11.2e9, "pinned_bytes_per_s": 55.3e9}),
    "page-lock-read-only": Outcome({"locked_bytes_per_s": 9e9, "in_one_piece": True}),
    "page-lock-writable": Outcome({"locked_bytes_per_s": 9e9, "in_one_piece": True}),
    "ipc": Outcome({}),
    "graphs": Outcome({"torch": "2.13.0", "triton": "3.6.0"}),
}
FAILED = Outcome(None, "it does not", "DeviceError")
Find = Callable[[dict[str, Outcome]], list[str]]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Find:
    """(outcomes) -> trials find this, else what a sound machine has; the list fills with those that were made."""

    def use(outcomes: dict[str, Outcome]) -> list[str]:
        made: list[str] = []

        def run_trial(arguments: Sequence[str], timeout_s: float) -> Outcome:
            assert 0 < timeout_s <= 600
            name = arguments[2] if arguments[0] == "-m" else "graphs"
            assert arguments[-1].endswith("0") or "graph_trial(0)" in arguments[-1]
            made.append(name)
            return (SOUND | outcomes)[name]

        monkeypatch.setattr("sparseflow.cuda.trials.run_trial", run_trial)
        return made

    return use


def told(capsys: Capture, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["doctor", "--json"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# --- without a GPU


def test_machine_without_a_driver_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (tmp_path / "libcuda.so.1").touch()  # hides one that this machine may have
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    result = told(capsys)
    assert result["ok"] is True
    assert all(result[name] is None for name in OF_A_DEVICE)
    assert re.search(r"libcuda.so.1.*install NVIDIA's driver", result["reason"])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("device                 none (the CUDA driver's library cannot be opened")


def test_driver_that_fails_to_start_is_not_sound(find: Find, capsys: Capture) -> None:
    made = find({"device": FAILED})
    result = told(capsys, 1)
    assert result["device"] is None
    assert result["reason"] == "it does not"
    assert made == ["device"]


def test_number_of_no_gpu_is_wrong_usage(find: Find, capsys: Capture) -> None:
    find({"device": Outcome(None, "device 0: 0 are visible", "BadRequest")})
    assert main(["doctor"]) == 2
    assert "device 0: 0 are visible" in capsys.readouterr().err


def test_host_is_described(find: Find, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFLOW_HOME", str(tmp_path / "not" / "made" / "yet"))
    find({"device": Outcome(None, "none here", "NoDevice")})
    host = told(capsys)["host"]
    assert host["memory_nbytes"] >= host["free_nbytes"] > 0
    assert host["memlock_nbytes"] is None or host["memlock_nbytes"] >= 0
    assert host["disk"] == str(tmp_path)
    assert host["direct_io"]["works"] == (host["direct_io"]["reason"] == "")
    assert list(tmp_path.iterdir()) == []


def test_disk_without_direct_io_is_told_with_what_happens_instead(
    find: Find, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseflow.cli import doctor

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(doctor.os, "preadv", refuse)
    find({"device": Outcome(None, "none here", "NoDevice")})
    assert re.search("Invalid argument; .*page cache", told(capsys)["host"]["direct_io"]["reason"])


# --- with one


def test_sound_machine_is_told_in_a_line_for_each_thing(find: Find, capsys: Capture) -> None:
    made = find({})
    assert main(["doctor"]) == 0
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert made == list(SOUND)
    assert lines["device"] == "0: A GPU, GPU-0"
    assert lines["capability"] == "9.0, driver for CUDA 13.0"
    assert lines["device memory"] == "79GiB of 80GiB free"
    assert lines["PCIe"] == "generation 5, 16 lanes, 0000:1B:00.0"
    assert lines["copies to the device"] == "55.3 GB/s from page-locked memory, 11.2 GB/s from other"
    assert lines["page-lock read-only"] == "yes; the device says yes"
    assert [lines[name] for name in ("page-lock writable", "CUDA IPC", "pull", "push")] == ["yes"] * 4
    assert lines["graphs"] == "yes (torch 2.13.0, triton 3.6.0)"
    assert lines["host"].startswith("Linux ")


def test_sound_machine_as_json(find: Find, capsys: Capture) -> None:
    find({})
    result = told(capsys)
    assert result["ok"] is True
    assert result["reason"] is None
    assert result["device"]["number"] == 0
    assert result["pull"] == result["push"] == {"works": True, "reason": ""}
    assert result["page_lock"]["read_only"] == {
        "works": True,
        "reason": "",
        "locked_bytes_per_s": 9e9,
        "in_one_piece": True,
    }


@pytest.mark.parametrize("name", ["bandwidth", "page-lock-read-only", "page-lock-writable", "ipc", "graphs"])
def test_trial_that_fails_is_told_and_the_others_are_made(find: Find, capsys: Capture, name: str) -> None:
    made = find({name: FAILED})
    result = told(capsys, 1)
    assert made == list(SOUND)
    assert "it does not" in json.dumps(result)
    assert main(["doctor"]) == 1
    assert "it does not" in capsys.readouterr().out


def test_push_needs_ipc_and_pull_needs_page_locks(find: Find, capsys: Capture) -> None:
    find({"ipc": FAILED})
    result = told(capsys, 1)
    assert result["push"] == {"works": False, "reason": "it does not"}
    assert result["pull"]["works"] is True
    find({"page-lock-read-only": FAILED, "page-lock-writable": FAILED})
    result = told(capsys, 1)
    assert result["pull"] == {"works": False, "reason": "it does not"}
    assert result["push"]["works"] is True


def test_device_that_says_it_locks_no_read_only_memory_is_sound_with_a_condition(find: Find, capsys: Capture) -> None:
    facts = SOUND["device"].found
    assert facts is not None
    find({"device": Outcome(facts | {"page_locks_read_only": False}), "page-lock-read-only": FAILED})
    result = told(capsys)
    assert result["pull"]["works"] is True
    assert "has to push" in result["pull"]["reason"]
    assert main(["doctor"]) == 0
    assert "no: it does not; the device says no" in capsys.readouterr().out


def test_what_is_not_told_of_the_link_is_not_invented(find: Find, capsys: Capture) -> None:
    facts = SOUND["device"].found
    assert facts is not None
    find({"device": Outcome(facts | {"pcie": {"generation": None, "width": None}})})
    assert main(["doctor"]) == 0
    assert "generation n/a, n/a lanes" in capsys.readouterr().out
