"""What a check on a GPU came to is right only if all of it is; and without a GPU one line says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseflow.bench.gpu.outcome import main

ROOT = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="skips"><skipped message="why"/></testcase>
{more}
</testsuite></testsuites>"""
FAILED = '<testcase classname="a" name="fails"><failure message="assert 1 == 2&#10;more">text</failure></testcase>'
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACE = "========= Error: Race reported\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"


def outcome(folder: Path, steps: str, **files: str) -> tuple[int, dict]:
    (folder / "part.steps").write_text(steps)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    code = main(["part", str(folder)])
    return code, json.loads((folder / "part.json").read_bytes())


def test_tests_that_pass_are_right(tmp_path: Path) -> None:
    code, result = outcome(tmp_path, "one\t0\t3\n", one__xml=JUNIT.format(more=""))
    [step] = result["steps"]
    assert (code, result["ok"]) == (0, True)
    assert (step["n_passed"], step["n_failed"], step["n_skipped"], step["seconds"]) == (1, 0, 1, 3)


def test_one_step_of_two_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = outcome(
        tmp_path, "one\t0\t3\ntwo\t1\t4\n", one__xml=JUNIT.format(more=""), two__xml=JUNIT.format(more=FAILED)
    )
    assert (code, result["ok"]) == (1, False)
    assert result["steps"][1]["failures"] == {"a::fails": "assert 1 == 2"}
    assert "a::fails: assert 1 == 2" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["", "one\t124\t9\n", "one\t5\t9\n"])
def test_nothing_done_and_time_run_out_are_not_right(tmp_path: Path, steps: str) -> None:
    code, result = outcome(tmp_path, steps)
    assert (code, result["ok"]) == (1, False)


def test_tests_that_were_all_skipped_are_not_right(tmp_path: Path) -> None:
    junit = JUNIT.format(more="").replace('<testcase classname="a" name="passes"/>', "")
    assert outcome(tmp_path, "one\t0\t3\n", one__xml=junit)[0] == 1


@pytest.mark.parametrize(("text", "n", "code"), [(CLEAN, 0, 0), (RACE, 2, 1), ("========= began\n", None, 1)])
def test_findings_of_the_sanitizer_are_counted(tmp_path: Path, text: str, n: int | None, code: int) -> None:
    junit = JUNIT.format(more="")
    found, result = outcome(tmp_path, "one\t0\t3\n", one__xml=junit, one__sanitizer__txt=text)
    assert found == code
    assert result["steps"][0]["n_findings"] == n
    assert bool(result["steps"][0]["findings"]) == (n == 2)


def check(*words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--part", "none"], 2, "tests, sanitizer or bench"),
        (["--out"], 2, "--out takes a value"),
        (["--wrong"], 2, "--wrong is not known"),
        (["--part", "tests"], 1, "sees no GPU here"),
        (["--part", "bench", "--quick"], 1, "sees no GPU here"),
    ],
)
def test_the_script_refuses_with_one_line(tmp_path: Path, words: list[str], code: int, says: str) -> None:
    finished = check(*words, *(["--out", str(tmp_path / "out")] if code == 1 else []))
    assert finished.returncode == code
    [line] = finished.stderr.splitlines()
    assert says in line
    assert not (tmp_path / "out").exists()


def test_a_python_without_torch_is_named() -> None:
    finished = check(python="/bin/false")
    assert finished.returncode == 1
    assert "/bin/false has no torch" in finished.stderr
