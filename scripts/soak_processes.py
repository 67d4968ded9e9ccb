"""Processes of `soak.py`: started, stopped, killed, and looked for."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RUNTIME_DIR = "SPARSEFLOW_RUNTIME_DIR"
DEADLINE_S = 120.0


class SoakError(Exception):
    """Something that must not happen."""


@dataclass(eq=False)
class Participant:
    """A process of the soak, and where it writes what it complains of."""

    process: "subprocess.Popen[bytes]"
    log: Path
    heard: bytes = b""
    first: dict[str, int] = field(default_factory=dict)
    """Descriptors and threads once it had done everything once."""
    n_told: int = 0
    is_stopped: bool = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text("utf-8", errors="replace").strip().splitlines()[-12:])

    def stop(self) -> None:
        """Until `go_on`."""
        self.is_stopped = True
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Whether it was stopped, or is dead by now, or not."""
        self.is_stopped = False
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As nothing else does."""
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.close_pipes()

    def end(self) -> None:
        """Tell it to.

        Raises:
            SoakError: it does not end well.
        """
        self.go_on()
        self.process.terminate()
        if code := self.process.wait(DEADLINE_S):
            raise SoakError(f"{self.process.args} ended with {code}\n{self.last_words()}")

    def close_pipes(self) -> None:
        """Those that it has."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def start(log: Path, words: list[str], **pipes: int) -> Participant:
    """A program for this Python. pipes: `stdin` and `stdout`, as `Popen` takes them."""
    with open(log, "wb") as output:
        process = subprocess.Popen([sys.executable, *words], stderr=output, **{"stdout": output, **pipes})
    return Participant(process, log)


def descriptors_of(pid: int) -> dict[str, int]:
    """What a process has open: descriptors, threads, and maps of a server's memory."""
    process = psutil.Process(pid)
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    n_shared = sum("/memfd:sparseflow" in line for line in maps)
    return {"fds": process.num_fds(), "threads": process.num_threads(), "shared maps": n_shared}


def runtime_dir() -> Path:
    """Where the sockets of this soak are."""
    return Path(os.environ[RUNTIME_DIR])


def ours() -> list[psutil.Process]:
    """Processes that live and were started for this soak, by whomever."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUNTIME_DIR) == str(runtime_dir()):
                found.append(process)
    return found


def named_shared_memory() -> set[Path]:
    """What lies there by now, of whomever; processes of ours give theirs no name."""
    return {*Path("/dev/shm").glob("*")}
