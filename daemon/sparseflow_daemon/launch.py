"""Starting a server that is left running."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sparseflow.errors import DiskError, ServerError
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow.utils.home import sparseflow_home

_POLL_S = 0.05
_LAST_LINES = 12


def log_path(name: str) -> Path:
    """Where a server that was left running writes its log: `$SPARSEFLOW_HOME/logs/NAME.log`."""
    return sparseflow_home() / "logs" / f"{name}.log"


def launch(arguments: Sequence[str], name: str, timeout_s: float = 600.0) -> dict[str, Any]:
    """Start `sparseflow-daemon` with these arguments in a session of its own, and wait until it is ready.

    Returns its status.

    Raises:
        DiskError: no log can be written.
        ServerError: it ended, or is not ready in time (then it is ended), or degraded.
    """
    directory, log = RunDirectory.of(name), log_path(name)
    with _open_log(log) as output:
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "sparseflow_daemon", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        return _when_ready(process, directory, log, begin, timeout_s)
    except BaseException:  # Ctrl-C too
        process.terminate()
        raise


def _open_log(log: Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return open(log, "ab")
    except OSError as error:
        raise DiskError(
            f"{log}: cannot be written ({error.strerror}); set SPARSEFLOW_HOME to a folder of your own"
        ) from error


def _when_ready(
    process: "subprocess.Popen[bytes]", directory: RunDirectory, log: Path, begin: int, timeout_s: float
) -> dict[str, Any]:
    """Its status. begin: where its words in the log begin."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server ended with exit code {process.returncode}; {log}:\n{_tail(log, begin)}")
        if directory.is_alive() and directory.owner() == process.pid:
            status = ask_status(directory.name)
            if status["state"] == "degraded":
                raise ServerError(f"the server is degraded and was ended: {'; '.join(status['reasons'])}")
            if status["state"] == "ready":
                return status
        time.sleep(_POLL_S)
    raise ServerError(f"the server was not ready within {timeout_s:g} s and was ended; {log}:\n{_tail(log, begin)}")


def _tail(log: Path, begin: int) -> str:
    with open(log, "rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_LAST_LINES:])
