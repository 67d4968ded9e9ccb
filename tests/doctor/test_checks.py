"""A check gives findings whatever becomes of it: it may fail, or wait for ever."""

import threading

import pytest

from sparseflow.doctor.finding import Check, Finding, Found, of_error, summary
from sparseflow.errors import DiskError, NoDevice

WELL = Finding("a", "ok", "all is well")


def test_what_a_check_finds_is_given_on() -> None:
    assert Check("a", lambda: WELL).found() == Found([WELL])
    both = Found([WELL, Finding("b", "note", "so", "do that")], {"b": 2})
    assert Check("a", lambda: both).found() == both


@pytest.mark.parametrize("deadline_s", [5.0, None])
def test_check_that_fails_is_a_finding(deadline_s: float | None) -> None:
    def fail() -> Finding:
        raise KeyError("flags")

    (finding,) = Check("processor", fail, deadline_s).found().findings
    assert (finding.name, finding.verdict) == ("processor", "warning")
    assert finding.text == "could not be looked at (KeyError: 'flags')"
    assert "SPARSEFLOW_LOG" in finding.remedy


def test_check_that_hangs_is_a_problem_after_its_deadline() -> None:
    over = threading.Event()

    def hang() -> Finding:
        over.wait(30)
        return WELL

    (finding,) = Check("disk", hang, deadline_s=0.05).found().findings
    assert (finding.name, finding.verdict) == ("disk", "problem")
    assert "0.05 s" in finding.text
    over.set()
    for thread in threading.enumerate():
        if thread.name == "doctor: disk":
            thread.join(10)


@pytest.mark.parametrize(("verdict", "remedy"), [("ok", "do that"), ("note", ""), ("problem", "")])
def test_what_is_not_ok_has_a_remedy_and_nothing_else_has(verdict: str, remedy: str) -> None:
    with pytest.raises(AssertionError):
        Finding("a", verdict, "so", remedy)  # type: ignore[arg-type]


def test_error_of_ours_is_split_into_what_is_and_what_to_do() -> None:
    error = DiskError("/s/x: 3 bytes; the manifest says 4; remove the store and convert the model again")
    assert of_error("file", "problem", error) == Finding(
        "file", "problem", "/s/x: 3 bytes; the manifest says 4", "remove the store and convert the model again"
    )
    assert of_error("device", "note", NoDevice("none")).text == "none"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["ok", "ok"], "no problem"),
        (["ok", "warning", "warning"], "no problem, 2 warnings"),
        (["problem", "note", "warning"], "1 problem, 1 warning, 1 note"),
        (["problem", "problem", "note", "note"], "2 problems, 2 notes"),
    ],
)
def test_summary_counts_what_is_not_ok(found: list[str], expected: str) -> None:
    findings = [Finding("a", verdict, "so", "" if verdict == "ok" else "do") for verdict in found]  # type: ignore[arg-type]
    assert summary(findings) == expected
