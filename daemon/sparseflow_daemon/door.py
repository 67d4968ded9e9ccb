"""The door: the socket on which connections come in, and how those are sent away that cannot be served."""

import errno
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from sparseflow.errors import ServerError, SparseFlowError
from sparseflow.protocol.messages import ErrorReply
from sparseflow.protocol.packets import send_packet

_log = logging.getLogger(__name__)
_BACKLOG = 64
_MOST_UNREAD = 4  # packets that whoever is refused may have sent


class Door:
    """`attach.sock`. It is its user's alone, and never waits."""

    def __init__(self, path: Path, epoch: int) -> None:
        self._epoch = epoch
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(_BACKLOG)
        self._spare_fd = _spare_descriptor()

    def fileno(self) -> int:
        """Readable where somebody stands before the door."""
        return self._listener.fileno()

    def take(self) -> socket.socket | None:
        """A connection, not blocking; None where there is none, or no descriptor for it."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            else:
                _log.warning("a connection could not be taken: %s", error)
            return None
        sock.setblocking(False)
        return sock

    def refuse(self, sock: socket.socket, error: SparseFlowError) -> None:
        """Say why, and close the connection."""
        with suppress(OSError, SparseFlowError):
            send_packet(sock, ErrorReply(0, self._epoch, error.wire_code, str(error)))
        with suppress(OSError):  # what is closed with something unread takes the reply back
            sock.setblocking(False)
            for _ in range(_MOST_UNREAD):
                sock.recv(1)
        sock.close()

    def _turn_away(self) -> None:
        """A connection that is not taken would call the loop again and again: so the spare descriptor takes it."""
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
        with suppress(OSError):
            sock, _ = self._listener.accept()
            text = f"server (pid {os.getpid()}) has as many files open as it may; close sessions, or start it after a "
            self.refuse(sock, ServerError(f"{text}larger `ulimit -n`"))
        self._spare_fd = _spare_descriptor()

    def close(self) -> None:
        """May be called twice."""
        self._listener.close()
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
            self._spare_fd = -1


def _spare_descriptor() -> int:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # somebody else was quicker; next time, then
        return -1
