"""What is told of Python, packages, kernel, processor and variables."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest
from looking import by_name, verdicts

from sparseflow.doctor import computing, environment
from sparseflow.doctor.environment import Asked

OF_A_CPU = "processor : 0\nmodel name : A CPU\nflags : fpu {}\n\npower management:\n"


def test_this_environment_has_no_problem() -> None:
    for check in environment.group("1.2").checks:
        assert "problem" not in verdicts(check.found()).values()


# --- packages


def test_packages_that_fit_are_told_in_one_line() -> None:
    findings = by_name(environment.packages(["numpy>=2", "torch>=2", "pytest"]))
    assert list(findings) == ["packages"]
    assert findings["packages"].text == f"3 are there in versions that fit: torch {importlib.metadata.version('torch')}"


def test_package_of_another_version_is_a_warning_with_both_versions() -> None:
    findings = by_name(environment.packages(["numpy>=99,<100", "torch>=2"]))
    assert findings["packages"].text.startswith("1 are there")
    found = findings["numpy"]
    assert found.verdict == "warning"
    assert importlib.metadata.version("numpy") in found.text
    assert ">=99" in found.text
    assert found.remedy == "pip install 'numpy<100,>=99'"


def test_package_that_is_not_there_is_a_problem() -> None:
    found = by_name(environment.packages(["no-such-package-as-this>=1"]))["no-such-package-as-this"]
    assert (found.verdict, found.remedy) == ("problem", "pip install 'no-such-package-as-this>=1'")


def test_package_that_one_command_needs_is_a_warning_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "fastapi":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    found = by_name(environment.packages(["fastapi>=0.1", "numpy"]))["fastapi"]
    assert found.verdict == "warning"
    assert "only `sparseflow serve` needs it" in found.text


def test_package_of_an_extra_or_another_system_is_not_asked_for() -> None:
    wanted = ['no-such-package>=1; extra == "test"', "none-such; sys_platform == 'win32'", "numpy"]
    assert verdicts(environment.packages(wanted)) == {"packages": "ok"}


def test_checkout_is_asked_before_what_was_installed_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "sparseflow"\nrequires-python = ">=3.11"\ndependencies = ["numpy>=2"]\n', encoding="utf-8"
    )
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path / "sparseflow")
    assert environment.asked() == Asked(">=3.11", ["numpy>=2"])


@pytest.mark.parametrize("beside", [None, '[project]\nname = "other"\n', "[tool.black]\n"])
def test_where_there_is_no_checkout_metadata_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beside: str | None
) -> None:
    if beside is not None:
        (tmp_path / "pyproject.toml").write_text(beside, encoding="utf-8")
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path / "sparseflow")
    asked = environment.asked()
    assert "torch" in " ".join(asked.packages)
    assert ">=3.11" in asked.python


# --- Python, kernel, processor


def test_python_that_is_not_asked_for_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.python().verdict == "ok"
    monkeypatch.setattr(environment, "asked", lambda: Asked(">=2,<3", []))
    found = environment.python()
    assert found.verdict == "warning"
    assert ">=2,<3" in found.text


def test_kernel_without_pidfd_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(environment.os, "pidfd_open", refuse)
    found = environment.system()
    assert found.verdict == "problem"
    assert "Function not implemented" in found.text


def test_machine_that_was_never_tried_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    assert environment.system().verdict == "warning"


def test_processor_is_told_with_the_vectors_that_kernels_use(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(OF_A_CPU.format("avx avx2 fma f16c avx512f sse"), encoding="utf-8")
    found = environment.processor(tmp_path / "cpuinfo")
    assert found.verdict == "ok"
    assert found.text.startswith("A CPU, ")
    assert found.text.endswith("avx2, fma, f16c, avx512f")


def test_processor_without_some_of_them_is_a_warning_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(OF_A_CPU.format("avx fma"), encoding="utf-8")
    found = environment.processor(tmp_path / "cpuinfo")
    assert found.verdict == "warning"
    assert found.text.endswith("slow without avx2, f16c")


# --- variables


def test_no_variable_is_ok() -> None:
    assert verdicts(environment.variables({"PATH": "/bin", "HOME": "/root"})) == {"variables": "ok"}


def test_variables_are_shown_and_secrets_are_not() -> None:
    given = {"HF_HOME": "/models", "HF_TOKEN": "hf_abc", "SPARSEFLOW_LOG": "INFO", "OMP_NUM_THREADS": "2", "PATH": "/"}
    (found,) = environment.variables(given).findings
    assert found.verdict == "ok"
    assert found.text == "HF_HOME=/models, HF_TOKEN=(set), OMP_NUM_THREADS=2, SPARSEFLOW_LOG=INFO"


@pytest.mark.parametrize(
    ("name", "part"), [("SPARSEFLOW_HOEM", "nothing reads that"), ("SPARSEFLOW_FAULT", "wrong on purpose")]
)
def test_variable_that_is_misspelt_or_does_harm_is_a_warning(name: str, part: str) -> None:
    shown, warned = environment.variables({name: "read-error:1:1"}).findings
    assert shown.verdict == "ok"
    assert warned.verdict == "warning"
    assert part in warned.text


# --- torch and kernels


def test_a_kernel_is_compiled_and_right_here() -> None:
    findings = by_name(computing.look())
    assert {name: finding.verdict for name, finding in findings.items()} == {"torch": "ok", "kernels": "ok"}
    assert importlib.metadata.version("torch") in findings["torch"].text
    assert importlib.metadata.version("numba") in findings["kernels"].text


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended by SIGILL"),
        ("raise ImportError('libcudart.so: cannot open')", "libcudart.so: cannot open"),
    ],
)
def test_torch_that_cannot_be_loaded_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch: str, told: str
) -> None:
    (tmp_path / "torch.py").write_text(torch, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = by_name(computing.look())["torch"]
    assert found.verdict == "problem"
    assert told in found.text


def test_kernel_that_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseflow.kernels import linear

    right: Callable[..., object] = linear.linear_ref
    monkeypatch.setattr(linear, "linear_ref", lambda x, weight: right(x, weight) + 0.01)  # type: ignore[operator]
    computing.kernel_trial()
    assert "a kernel's product is wrong by 0.01" in capsys.readouterr().out
