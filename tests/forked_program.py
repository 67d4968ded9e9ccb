"""Processes that have imported what they need already: torch and transformers alone take seconds in each new one.

They are forks of processes of `multiprocessing`'s fork server, which have imported that, have one thread, and have done
nothing else. A program is the main module of its process.
"""

import atexit
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest.mock import patch


def _having_imported(*modules: str) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload([*modules])
    return server


OF_MODELS = _having_imported("numpy", "torch", "transformers.generation.streamers", "sparseflow.models.opt_sparse")
OF_WEIGHT_SERVERS = _having_imported("sparseflow_daemon.__main__")


def start_servers() -> None:
    """Each ends with this process."""
    for server in (OF_MODELS, OF_WEIGHT_SERVERS):
        server.ensure_running()


class _Inherited:
    """A descriptor, which the process gets with the pickle that this goes into."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (DupFd(self.fd),)


def _detach(duplicate: Any) -> int:
    fd: int = duplicate.detach()
    return fd


class ForkedProcess:
    """A running program; what tests use of `subprocess.Popen`. It leads a process group of its own."""

    def __init__(
        self,
        server: forkserver.ForkServer,
        program: str,
        arguments: Sequence[str],
        standard_fds: tuple[int, int, int],
        environment: Mapping[str, str],
        path: Sequence[str],
    ) -> None:
        self.args = program
        self._exit_code: int | None = None
        fds = [_Inherited(fd) for fd in standard_fds]
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(program, [*arguments], fds, dict(environment), [*path]), daemon=True
        )
        with patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            self._process.start()
        pid = self._process.pid
        assert pid is not None  # it was started
        self.pid = pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs. With its end, the descriptors go by which that is seen."""
        if self._exit_code is None and (code := self._process.exitcode) is not None:
            self._exit_code = code
            self._process.close()
        return self._exit_code

    def wait(self, timeout_s: float) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        if self._exit_code is None:
            self._process.join(timeout_s)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout_s)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """As `Popen` does."""
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkedProgram(ForkedProcess):
    """One that has imported what models take, with pipes as standard input and output.

    As a context: on leaving it is killed, if it still runs.
    """

    def __init__(
        self, program: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], path: Sequence[str]
    ) -> None:
        its_input, ours_in = os.pipe()
        ours_out, its_output = os.pipe()
        with open(log, "wb") as errors:
            fds = its_input, its_output, errors.fileno()
            super().__init__(OF_MODELS, program, arguments, fds, environment, path)
        os.close(its_input)
        os.close(its_output)
        self.stdin, self.stdout = FileIO(ours_in, "wb"), FileIO(ours_out, "rb")

    def __enter__(self) -> "ForkedProgram":
        return self

    def __exit__(self, *_: object) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait(30)
        self.stdin.close()
        self.stdout.close()

    def read(self, timeout_s: float) -> str:
        """All that it writes from now on.

        Raises:
            subprocess.TimeoutExpired: it does not end its output.
        """
        deadline = time.monotonic() + timeout_s
        content = b""
        while select.select([self.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            more = self.stdout.read(1 << 16)
            if not more:
                return content.decode()
            content += more
        raise subprocess.TimeoutExpired(self.args, timeout_s, content)


def _run(program: str, arguments: list[str], fds: list[int], environment: dict[str, str], path: list[str]) -> None:
    """What the process does: as `python -c program arguments` with these descriptors."""
    os.setpgid(0, 0)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate(("r", "w", "w"))
    )
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as TMPDIR says now, not when the server began
    sys.argv = ["-c", *arguments]
    sys.path[:0] = path
    names = vars(sys.modules["__main__"])
    try:
        exec(compile(program, "<program>", "exec"), names)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes end without
