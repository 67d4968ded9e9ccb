"""What the README shows works as it is written there."""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from child_process import run_forked

from sparseflow.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_snippets_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    snippets = blocks("python")
    assert snippets
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_sparseflow_commands_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands on the demo model run; stores go to a folder of the test's own."""
    monkeypatch.chdir(ROOT)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("sparseflow ")]
    assert lines
    for line in lines:
        command = line.split("#")[0].replace("/tmp/store", str(tmp_path / "store"))
        assert main(shlex.split(command)[1:]) == 0, line


def test_server_and_clients_run_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole block, by the shell, with the environment of the tests."""
    (block,) = blocks("console")
    script = "\n".join(line.removeprefix("$ ") for line in block.splitlines()).replace("python ", f"{sys.executable} ")
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        monkeypatch.chdir(ROOT)
        command = ["bash", "-euc", script]
        result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert result.returncode == 0, result.stderr
        assert "server demo is ready" in result.stdout
        assert "demo_model: ready" in result.stdout
        deadline = time.monotonic() + 10
        while any(Path(folder).iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(Path(folder).iterdir())


def test_scripts_that_are_named_exist() -> None:
    for path in re.findall(r"(?:bash|python) (scripts/[\w/.]+)", README):
        assert (ROOT / path).is_file(), path


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.path[0] = script.rpartition("/")[0]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


def test_help_of_every_script_works(fork_server: None) -> None:
    """In one process, for most of the time is imports."""
    scripts = [
        script
        for script in (*ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/bench/*.py"))
        if '__name__ == "__main__"' in script.read_text(encoding="utf-8")  # else it is what other scripts import
    ]
    assert run_forked(HELP, *scripts, timeout_s=120).count("usage:") == len(scripts) > 5
