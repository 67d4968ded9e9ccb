"""`sparseflow serve` as a process of its own, with folders of its own. At its end nothing may be left of it."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

DEADLINE_S = 120.0

# A turn is the speaker's name in capitals and what is said, as in the plays that the demo model has read.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT\n{% endif %}"
)


def until(found: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
    """What a question gives as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < deadline, f"still {answer!r} after {timeout_s:g} s"
        time.sleep(0.02)
    return answer


class ApiServer:
    """Started at any free port; `facts` is what it says when it is ready."""

    def __init__(self, home: Path, *options: object, ready: bool = True, **variables: str) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="sf-"))
        self._log = home / f"{self.runtime_dir.name}.log"
        own = {"SPARSEFLOW_RUNTIME_DIR": str(self.runtime_dir), "SPARSEFLOW_HOME": str(home), "OMP_NUM_THREADS": "1"}
        words = ["-m", "sparseflow", "serve", "--port", "0", "--threads", "1", "--json", *map(str, options)]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=subprocess.PIPE, stderr=log, env=os.environ | own | variables
            )
        self.facts: dict[str, Any] = {}
        if ready:
            try:
                self.facts = json.loads(self._first_line())
            except BaseException:
                self.close()
                raise
        self._others = {process.pid: process for process in psutil.Process(self.process.pid).children(recursive=True)}

    def _first_line(self) -> bytes:
        assert self.process.stdout is not None
        found, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        line = self.process.stdout.readline() if found else b""
        assert line, f"not ready\n{self.log()}"
        return line

    @property
    def url(self) -> str:
        """Ends in /v1."""
        return str(self.facts["url"])

    def log(self) -> str:
        """What it and its processes have said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> str:
        """The body of an answer, `path` from the root."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=DEADLINE_S) as answer:
            return str(answer.read().decode())

    def processes(self) -> list[psutil.Process]:
        """Its own, those below it, and those that were."""
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            self._others |= {process.pid: process for process in below}
        return list(self._others.values())

    def weight_server(self) -> psutil.Process:
        """The process of its own weight server."""
        (found,) = [process for process in self.processes() if process.is_running() and _is_daemon(process)]
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to end; its exit code, once nothing of it is left."""
        self.processes()
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE_S)
        self.expect_nothing_left()
        return code

    def expect_nothing_left(self) -> None:
        """Neither processes nor files in the runtime directory."""
        until(lambda: not [process for process in self._others.values() if _lives(process)], 30)
        until(lambda: not list(self.runtime_dir.iterdir()), 10)

    def close(self) -> None:
        """Whatever happened: no process stays."""
        others = self.processes()
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for process in others:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.runtime_dir)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_daemon(process: psutil.Process) -> bool:
    try:
        return "sparseflow_daemon" in process.cmdline()
    except psutil.Error:
        return False
