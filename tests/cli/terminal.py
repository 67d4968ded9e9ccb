"""A program in a terminal of its own: typed at, and read as a person would."""

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from typing import Self

# The terminal is the program's, so that Ctrl-C typed there is a signal to it.
_TAKEN = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
_ROWS_AND_COLUMNS = b"\x32\x00\xc8\x00\x00\x00\x00\x00"  # 50, 200


class Terminal:
    """Python code with standard input, output and errors in one terminal. As a context; killed at its end."""

    def __init__(self, code: str, variables: Mapping[str, str] | None = None) -> None:
        self._fd, its_end = pty.openpty()
        fcntl.ioctl(its_end, termios.TIOCSWINSZ, _ROWS_AND_COLUMNS)
        environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"} | dict(variables or {})
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKEN + code],
            stdin=its_end, stdout=its_end, stderr=its_end, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(its_end)
        self.seen = ""

    def type(self, text: str) -> None:
        """As if by the keyboard."""
        os.write(self._fd, text.encode())

    def read_until(self, text: str, timeout_s: float = 60) -> str:
        """What was shown since the last call, up to this text and with it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown within {timeout_s:g} s, but {self.seen!r}"
            self.seen += os.read(self._fd, 1 << 16).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def read_to_end(self, timeout_s: float = 60) -> tuple[int, str]:
        """The exit code, and what was shown since the last call."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self._fd], [], [], 0.05)
            try:
                more = os.read(self._fd, 1 << 16) if ready else None
            except OSError:  # the other end is closed
                break
            if more:
                self.seen += more.decode(errors="replace")
        shown, self.seen = self.seen, ""
        return self._process.wait(max(1.0, deadline - time.monotonic())), shown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._fd)
