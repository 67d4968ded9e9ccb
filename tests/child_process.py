"""Python in a process of its own: what must be read at start, measured from the start, or killed."""

import os
import subprocess
import sys
from pathlib import Path

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
