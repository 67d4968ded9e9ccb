"""Signals, and what systemd is told."""

import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

from sparseflow_daemon import status
from sparseflow_daemon.claim import Claim
from sparseflow_daemon.server import Server

_log = logging.getLogger(__name__)
_EXIT_FORCED = 130
_PR_SET_PDEATHSIG = 1


class Lifecycle:
    """TERM and INT drain, a second one ends at once; USR1 writes status and stacks to the log."""

    def __init__(self, server: Server, claim: Claim) -> None:
        self._server, self._claim = server, claim
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        server.loop.watch(self._woken.fileno(), self._clear)
        server.on_tick = self._tick
        self._told_ready = False
        self._is_watched = "WATCHDOG_USEC" in os.environ

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs between two steps of the loop's thread, whatever it is doing."""
        if number == signal.SIGUSR1:
            self.write_report()
        elif self._server.is_draining:
            self._claim.release()
            os._exit(_EXIT_FORCED)
        else:
            notify("STOPPING=1")
            self._server.stop()

    def _clear(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def _tick(self) -> None:
        if not self._told_ready and self._server.state in ("ready", "degraded"):
            self._told_ready = True
            notify(f"READY=1\nSTATUS={self._server.state}: {', '.join(self._server.models)}")
        if self._told_ready and self._is_watched:
            notify("WATCHDOG=1")

    def write_report(self) -> None:
        """Status and the stacks of all threads, to the log."""
        _log.warning("status: %s", json.dumps(status.content(self._server)))
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)


def end_with_parent(parent: int) -> None:
    """Have the system send TERM when `parent`, which started this process, has ended, however it did (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


def notify(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
