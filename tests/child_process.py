"""Python in a process of its own: what must be read at start, measured from the start, or killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from forked_program import ForkedProgram

import sparseflow

_SEARCHED = (Path(sparseflow.__file__).parents[1], Path(__file__).parent)


def run_python(program: str | Path, *arguments: object, timeout_s: float = 60, **variables: str) -> str:
    """Run code, or a script, with one compute thread; return what it prints. A failure shows its stderr."""
    path = os.pathsep.join([*map(str, _SEARCHED), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables
    result = subprocess.run(
        [sys.executable, *([program] if isinstance(program, Path) else ["-c", program]), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_forked(program: str | Path, *arguments: object, timeout_s: float = 60, **variables: str) -> str:
    """The same where a test says nothing of what is loaded at the start, which takes seconds. Needs `fork_server`."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as log:
        with start_forked(program, *arguments, log=log.name, **variables) as process:
            printed = process.read(timeout_s)
            code = process.wait(timeout_s)
        assert code == 0, f"exit code {code}\n{printed}\n{log.read()}"
    return printed


def start_forked(program: str | Path, *arguments: object, log: str | Path, **variables: str) -> ForkedProgram:
    """Such a process; its stderr goes to the log."""
    words = [*map(str, arguments)]
    if isinstance(program, Path):
        program, words = _SCRIPT, [str(program), *words]
    return ForkedProgram(program, words, Path(log), os.environ | variables, [*map(str, _SEARCHED)])


_SCRIPT = """
import runpy, sys
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
