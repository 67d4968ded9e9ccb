"""The door: the socket on which connections come in, and how those are sent away that cannot be served."""

import logging
import resource
import socket
from contextlib import suppress
from pathlib import Path

from sparseflow.errors import ServerError, SparseFlowError
from sparseflow.protocol.messages import ErrorReply
from sparseflow.protocol.packets import send_packet

_log = logging.getLogger(__name__)
_BACKLOG = 64
_DESCRIPTORS_KEPT = 64  # for status, sessions that are there, and ZeroMQ, which ends the process where it gets none
_MOST_UNREAD = 4  # packets that whoever is refused may have sent


class Door:
    """`attach.sock`. It is its user's alone, and never waits."""

    def __init__(self, path: Path, epoch: int) -> None:
        self._epoch = epoch
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(_BACKLOG)

    def fileno(self) -> int:
        """Readable where somebody stands before the door."""
        return self._listener.fileno()

    def take(self) -> socket.socket | None:
        """A connection, not blocking; None where there is none, or few descriptors are left."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log.warning("a connection could not be taken: %s", error)
            return None
        sock.setblocking(False)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        is_near = most != resource.RLIM_INFINITY and sock.fileno() >= most - _DESCRIPTORS_KEPT
        if not is_near:  # by its number, which is the lowest that was free
            return sock
        text = f"the server may have {most} files open, and keeps the last {_DESCRIPTORS_KEPT} for those that it serves"
        _log.info("turned away: %s", text)
        self.refuse(sock, ServerError(f"{text}; close sessions, or start it after a larger `ulimit -n`"))
        return None

    def refuse(self, sock: socket.socket, error: SparseFlowError) -> None:
        """Say why, and close the connection."""
        with suppress(OSError, SparseFlowError):
            send_packet(sock, ErrorReply(0, self._epoch, error.wire_code, str(error)))
        with suppress(OSError):  # what is closed with something unread takes the reply back
            sock.shutdown(socket.SHUT_RD)
            for _ in range(_MOST_UNREAD):
                sock.recv(1)
        sock.close()

    def close(self) -> None:
        """May be called twice."""
        self._listener.close()
