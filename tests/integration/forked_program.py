"""Programs in processes that have torch and transformers imported already, which takes seconds in each new one.

They are forks of one process of `multiprocessing`'s fork server, which has imported that, has one thread, and has done
nothing else. A program is the main module of its process, with pipes as standard input and output.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import FileIO
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

_PRELOADED = ("numpy", "torch", "transformers.generation.streamers", "sparseflow.models.opt_sparse")


def start_server() -> ForkServerContext:
    """The fork server's context, with the server running; it ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    ensure_running()
    return context


class _Inherited:
    """A descriptor, which the process gets with the pickle that this goes into."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (DupFd(self.fd),)


def _detach(duplicate: Any) -> int:
    fd: int = duplicate.detach()
    return fd


class ForkedProgram:
    """A running program; what tests use of `subprocess.Popen`. It leads a process group of its own."""

    def __init__(
        self, program: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], path: Sequence[str]
    ) -> None:
        self.args = program
        its_input, ours_in = os.pipe()
        ours_out, its_output = os.pipe()
        with open(log, "wb") as errors:
            fds = [_Inherited(fd) for fd in (its_input, its_output, errors.fileno())]
            self._process = start_server().Process(
                target=_run, args=(program, [*arguments], fds, dict(environment), [*path]), daemon=True
            )
            self._process.start()
        os.close(its_input)
        os.close(its_output)
        self.stdin, self.stdout = FileIO(ours_in, "wb"), FileIO(ours_out, "rb")
        pid = self._process.pid
        assert pid is not None  # it was started
        self.pid = pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout_s)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """As `Popen` does."""
        if self.poll() is None:
            os.kill(self.pid, number)


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
    sys.argv = ["-c", *arguments]
    sys.path[:0] = path
    names = vars(sys.modules["__main__"])
    exec(compile(program, "<program>", "exec"), names)
    atexit._run_exitfuncs()  # multiprocessing's processes end without
