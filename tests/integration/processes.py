"""Weight servers and their clients, as processes of their own. Every wait has a deadline."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
from forked_program import OF_WEIGHT_SERVERS, ForkedProcess, ForkedProgram

import sparseflow
from sparseflow.errors import ServerError
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.run_directory import RunDirectory

DEADLINE_S = 60.0  # imports of torch in many processes on a busy machine take long
RUNTIME_DIR = "SPARSEFLOW_RUNTIME_DIR"

_SEARCHED = (
    *(Path(sparseflow.__file__).parents[1], Path(sparseflow.__file__).parents[1] / "daemon"),
    *(Path(__file__).parent, Path(__file__).parents[1] / "engine"),
)

T = TypeVar("T")


def until(found: Callable[[], T], timeout_s: float = DEADLINE_S, pause_s: float = 0.02) -> T:
    """What a question gives as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < deadline, f"still {answer!r} after {timeout_s:g} s"
        time.sleep(pause_s)
    return answer


class OwnProcess:
    """A process of a test, with a file for what it complains of."""

    def __init__(self, process: "subprocess.Popen[bytes] | ForkedProcess", log: Path) -> None:
        self._process, self._log = process, log
        self.pid = process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; of a signal the negative number."""
        return self._process.poll()

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Its exit code, once it has ended."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._process.args}: still running after {timeout_s:g} s\n{self.log()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. A process that is gone takes none."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it as nothing else does."""
        self.signal(signal.SIGKILL)
        self.wait()

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def count(self) -> dict[str, int]:
        """What it has open."""
        process = psutil.Process(self.pid)
        with open(f"/proc/{self.pid}/maps", encoding="utf-8") as file:
            n_memory_files = sum("/memfd:sparseflow" in line for line in file)
        return {"fds": process.num_fds(), "threads": process.num_threads(), "shared maps": n_memory_files}

    def settled_count(self) -> dict[str, int]:
        """What it has open once that stays: a connection that its peer has closed goes a moment later here."""

        def stays() -> dict[str, int] | None:
            count = self.count()
            time.sleep(0.1)
            return count if self.count() == count else None

        return until(stays)


SERVE = "import sys; from sparseflow_daemon.__main__ import main; sys.exit(main())"


class ServerProcess(OwnProcess):
    """A weight server: the command, a program of its own, or a fork that has imported all of it."""

    def __init__(
        self, log: Path, program: Sequence[str] | None, stores: Sequence[Path], name: str, options: Mapping[str, Any],
        **variables: str,
    ) -> None:  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        words = [*map(str, (*stores, "--name", name, *words))]
        path = os.pathsep.join([*map(str, _SEARCHED), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables
        process: subprocess.Popen[bytes] | ForkedProcess
        with open(os.devnull, "rb") as nothing, open(log, "wb") as output:
            if program:
                command = [sys.executable, *program, *words]
                process = subprocess.Popen(command, stdin=nothing, stdout=output, stderr=output, env=environment)
            else:
                fds = nothing.fileno(), output.fileno(), output.fileno()
                process = ForkedProcess(OF_WEIGHT_SERVERS, SERVE, words, fds, environment, [])
        super().__init__(process, log)
        self.name = name

    @property
    def directory(self) -> Path:
        """Where its sockets are while it lives."""
        return RunDirectory.of(self.name).path

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        return ask_status(self.name)

    def wait_for(self, *states: str, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Its status, once it is in one of these states."""

        def arrived() -> dict[str, Any] | None:
            assert self.exit_code is None, f"the server ended with {self.exit_code}\n{self.log()}"
            if RunDirectory.of(self.name).owner() != self.pid:
                return None  # somebody else's, or nobody's yet
            try:
                status = self.status()
            except ServerError:
                return None
            return status if status["state"] in states else None

        return until(arrived, timeout_s)

    def session(self, pid: int) -> dict[str, Any] | None:
        """What it says of the session of a process; None where there is none."""
        return next((session for session in self.status()["sessions"] if session["pid"] == pid), None)

    def end(self, timeout_s: float = DEADLINE_S) -> int:
        """Tell it to end; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)


class ClientProcess(OwnProcess):
    """A program that tells what it does and waits to be told to go on, by `telling.py` on its side."""

    def __init__(self, log: Path, program: str, values: Mapping[str, Any]) -> None:
        process = ForkedProgram(program, [json.dumps(values)], log, os.environ, [*map(str, _SEARCHED)])
        super().__init__(process, log)
        self._stdin, self._stdout = process.stdin, process.stdout
        self._heard = b""

    def hear(self, timeout_s: float = DEADLINE_S) -> Any:
        """The next thing that it tells."""
        deadline = time.monotonic() + timeout_s
        pipe = self._stdout
        while b"\n" not in self._heard:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"nothing was told within {timeout_s:g} s\n{self._where()}"
            told = os.read(pipe.fileno(), 1 << 16)
            assert told, f"the client ended with {self.wait()}\n{self.log()}"
            self._heard += told
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def _where(self) -> str:
        """Its log, with what it is doing."""
        self.signal(signal.SIGUSR1)
        time.sleep(0.5)
        return self.log()

    def say(self, what: Any = None) -> None:
        """Tell it to go on."""
        self._stdin.write(json.dumps(what).encode() + b"\n")

    def finish(self, timeout_s: float = DEADLINE_S) -> None:
        """Let it run to its end, which is a good one."""
        code = self.wait(timeout_s)
        assert code == 0, f"exit code {code}\n{self.log()}"

    def let_go(self) -> None:
        """Kill it, if it lives, and close the pipes."""
        self.signal(signal.SIGKILL)
        for pipe in (self._stdin, self._stdout):
            pipe.close()
        self.wait()


class Host:
    """A runtime directory, and the servers and clients of one test."""

    def __init__(self, runtime_dir: Path, logs: Path) -> None:
        self.runtime_dir, self._logs = runtime_dir, logs
        self.program: Sequence[str] | None = None
        """Of servers: forks, which are there soonest, or what Python is told to run."""
        self.servers: list[ServerProcess] = []
        self.clients: list[ClientProcess] = []

    def begin(
        self,
        *stores: Path,
        name: str = "s",
        program: Sequence[str] | None = None,
        variables: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ServerProcess:
        """Start a server, with options of its command line. It may not be there yet."""
        log = self._logs / f"server-{len(self.servers)}.log"
        program = program or self.program
        self.servers.append(ServerProcess(log, program, stores, name, options, **(variables or {})))
        return self.servers[-1]

    def serve(self, *stores: Path, name: str = "s", **options: Any) -> ServerProcess:
        """Start a server that is ready."""
        server = self.begin(*stores, name=name, **options)
        server.wait_for("ready")
        return server

    def client(self, program: str, **values: Any) -> ClientProcess:
        """Start a program. What it is given is `given` there."""
        log = self._logs / f"client-{len(self.clients)}.log"
        self.clients.append(ClientProcess(log, program, values))
        return self.clients[-1]

    def close(self) -> None:
        """End everything.

        Servers that still run must be well, hold no lease, and end as they should; nothing may be left.
        """
        try:
            for client in self.clients:
                client.let_go()
            for server in self.servers:
                if server.exit_code is None:
                    self._end(server)
            for killed in [server for server in self.servers if server.exit_code == -signal.SIGKILL]:
                if killed.directory.exists():  # nobody came after it
                    assert {path.name for path in killed.directory.iterdir()} <= {"lock", "attach.sock", "ctl.sock"}
                    shutil.rmtree(killed.directory)
            assert list(self.runtime_dir.iterdir()) == []
            assert self._processes() == []
        finally:
            for server in self.servers:
                server.kill()
            for process in self._processes():
                process.kill()

    def _end(self, server: ServerProcess) -> None:
        server.signal(signal.SIGCONT)
        until(lambda: server.status()["sessions"] == [], 5)
        status = server.wait_for("ready", "degraded")  # what has only just begun is still loading
        assert (status["state"], status["reasons"]) == ("ready", []), server.log()
        assert status["arena"]["leased"] == 0
        assert server.end() == 0, server.log()

    def _processes(self) -> list[psutil.Process]:
        """All that were started for this runtime directory, by whomever, and what forks have begun."""
        groups = {process.pid for process in (*self.clients, *self.servers)}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                is_ours = process.environ().get(RUNTIME_DIR) == str(self.runtime_dir)
                if process.pid != os.getpid() and (is_ours or os.getpgid(process.pid) in groups):
                    found.append(process)
        return found
