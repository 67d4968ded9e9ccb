"""What is told of a machine without a GPU, of a sound one, and of what does not work."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from looking import by_name, verdicts

from sparseflow.cuda import trials
from sparseflow.cuda.trials import Outcome
from sparseflow.doctor import gpu
from sparseflow.doctor.finding import Finding, Found
from sparseflow.errors import BadRequest

DEVICE: dict[str, Any] = {
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
SOUND = {
    "device": Outcome(DEVICE),
    "bandwidth": Outcome({"nbytes": 1 << 28, "pageable_bytes_per_s": 11.2e9, "pinned_bytes_per_s": 55.3e9}),
    "page-lock-read-only": Outcome({"locked_bytes_per_s": 9e9, "in_one_piece": True}),
    "page-lock-writable": Outcome({"locked_bytes_per_s": 9e9, "in_one_piece": True}),
    "ipc": Outcome({}),
    "graphs": Outcome({"torch": "2.13.0", "triton": "3.6.0"}),
}
FAILED = Outcome(None, "it does not", "DeviceError")
NONE = Outcome(None, "the driver is not there; install it", "NoDevice")
Look = Callable[[dict[str, Outcome]], Found]


@pytest.fixture
def made() -> list[str]:
    """Trials that were made, in turn."""
    return []


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, made: list[str]) -> Look:
    """(outcomes) -> what is found where trials find this, and else what a sound machine has."""

    def found(outcomes: dict[str, Outcome]) -> Found:
        def run_trial(arguments: Sequence[str], timeout_s: float) -> Outcome:
            assert 0 < timeout_s <= 600
            name = arguments[2] if arguments[0] == "-m" else "graphs"
            assert arguments[-1] == "0"
            made.append(name)
            return (SOUND | outcomes)[name]

        monkeypatch.setattr(trials, "run_trial", run_trial)
        return gpu.look(0, gpu.first_look(0))

    return found


# --- without a GPU


def test_no_gpu_is_a_note(look: Look, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "nvidia_devices", list)
    found = look({"device": NONE})
    assert found.findings == [
        Finding(
            *("device", "note", "none (the driver is not there)"),
            "nothing to do: SparseFlow runs on the CPU; to have a GPU, install it",
        )
    ]
    assert found.facts == {"reason": NONE.reason}
    assert made == ["device"]


def test_hardware_without_a_driver_is_a_warning(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "nvidia_devices", lambda: ["0000:1b:00.0"])
    (found,) = look({"device": NONE}).findings
    assert (found.verdict, found.remedy) == ("warning", "install it")
    assert "NVIDIA's at 0000:1b:00.0" in found.text


def test_hardware_is_found_on_the_bus(tmp_path: Path) -> None:
    for bus_id, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:01:00.1", "0x10de", "0x040300"),  # the sound of a graphics card
        ("0000:02:00.0", "0x8086", "0x030000"),
    ):
        (tmp_path / bus_id).mkdir()
        (tmp_path / bus_id / "vendor").write_text(f"{vendor}\n")
        (tmp_path / bus_id / "class").write_text(f"{kind}\n")
    (tmp_path / "0000:03:00.0").mkdir()  # has just gone
    assert gpu.nvidia_devices(tmp_path) == ["0000:01:00.0"]
    assert gpu.nvidia_devices(tmp_path / "none") == []


def test_driver_that_fails_to_start_is_a_problem(look: Look, made: list[str]) -> None:
    (found,) = look({"device": FAILED}).findings
    assert found.verdict == "problem"
    assert found.text.endswith("it does not")
    assert made == ["device"]


def test_number_of_no_gpu_is_wrong_usage(look: Look) -> None:
    with pytest.raises(BadRequest, match="device 0: 0 are visible"):
        look({"device": Outcome(None, "device 0: 0 are visible", "BadRequest")})


def test_machine_that_can_start_no_process_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Outcome:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(trials, "run_trial", refuse)
    assert gpu.first_look(0).reason == "no process can be started (Resource temporarily unavailable)"


# --- with one


def test_sound_machine_is_told_in_a_line_for_each_thing(look: Look, made: list[str]) -> None:
    findings = by_name(look({}))
    assert made == list(SOUND)
    assert {finding.verdict for finding in findings.values()} == {"ok"}
    assert {name: finding.text for name, finding in findings.items()} == {
        "device": "0: A GPU, GPU-0",
        "capability": "9.0, driver for CUDA 13.0",
        "device memory": "79GiB of 80GiB free",
        "PCIe": "generation 5, 16 lanes, 0000:1B:00.0",
        "copies to the device": "55.3 GB/s from page-locked memory, 11.2 GB/s from other",
        "page-lock read-only": "yes; the device says yes",
        "page-lock writable": "yes",
        "CUDA IPC": "yes",
        "pull": "yes",
        "push": "yes",
        "graphs": "yes (torch 2.13.0, triton 3.6.0)",
    }


def test_facts_of_a_sound_machine_are_those_of_its_trials(look: Look) -> None:
    facts = look({}).facts
    assert set(facts) == set(gpu.OF_A_DEVICE)
    assert facts["device"] == {"number": 0} | DEVICE
    assert facts["pull"] == facts["push"] == {"works": True, "reason": ""}
    assert facts["page_lock"]["read_only"] == {
        "works": True,
        "reason": "",
        "locked_bytes_per_s": 9e9,
        "in_one_piece": True,
    }


@pytest.mark.parametrize(
    ("trial", "name"),
    [
        ("bandwidth", "copies to the device"),
        ("page-lock-read-only", "page-lock read-only"),
        ("page-lock-writable", "page-lock writable"),
        ("ipc", "CUDA IPC"),
        ("graphs", "graphs"),
    ],
)
def test_trial_that_fails_is_a_problem_and_the_others_are_made(
    look: Look, made: list[str], trial: str, name: str
) -> None:
    found = by_name(look({trial: FAILED}))[name]
    assert made == list(SOUND)
    assert found.verdict == "problem"
    assert "it does not" in found.text


def test_push_needs_ipc_and_pull_needs_page_locks(look: Look) -> None:
    found = look({"ipc": FAILED})
    assert found.facts["push"] == {"works": False, "reason": "it does not"}
    assert (verdicts(found)["push"], verdicts(found)["pull"]) == ("problem", "ok")
    found = look({"page-lock-read-only": FAILED, "page-lock-writable": FAILED})
    assert found.facts["pull"] == {"works": False, "reason": "it does not"}
    assert (verdicts(found)["push"], verdicts(found)["pull"]) == ("ok", "problem")


def test_device_that_says_it_locks_no_read_only_memory_is_sound_with_a_condition(look: Look) -> None:
    found = look({"device": Outcome(DEVICE | {"page_locks_read_only": False}), "page-lock-read-only": FAILED})
    assert found.facts["pull"]["works"] is True
    findings = by_name(found)
    assert "problem" not in verdicts(found).values()
    assert findings["pull"].verdict == findings["page-lock read-only"].verdict == "note"
    assert "has to push" in findings["pull"].text
    assert findings["page-lock read-only"].text == "no: it does not; the device says no"


def test_what_is_not_told_of_the_link_is_not_invented(look: Look) -> None:
    findings = by_name(look({"device": Outcome(DEVICE | {"pcie": {"generation": None, "width": None}})}))
    assert findings["PCIe"].text.startswith("generation n/a, n/a lanes")


@pytest.mark.parametrize(("capability", "verdict"), [("7.5", "problem"), ("8.0", "ok"), ("10.0", "ok")])
def test_gpu_that_is_too_old_for_the_kernels_is_a_problem(look: Look, capability: str, verdict: str) -> None:
    assert verdicts(look({"device": Outcome(DEVICE | {"capability": capability})}))["capability"] == verdict


def test_gpu_that_others_have_filled_is_a_warning(look: Look) -> None:
    found = by_name(look({"device": Outcome(DEVICE | {"free_nbytes": 100 << 20})}))["device memory"]
    assert (found.verdict, found.text) == ("warning", "100MiB of 80GiB free")
