"""Lines: the connections on which threads of inference processes fetch. One packet in, at most one reply out."""

import logging
import secrets
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress

from sparseflow.errors import BadRequest, Draining, Resync, ServerError, SparseFlowError
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.device_messages import (
    BorrowDense,
    DenseLent,
    PushNeurons,
    RegisterDevice,
    ReturnDense,
    UnregisterDevice,
)
from sparseflow.protocol.messages import AcquireNeurons, ErrorReply, HintNeurons, Message, ReleaseLeases
from sparseflow.protocol.packets import PACKET_NBYTES
from sparseflow_daemon.gpu.lending import Lending
from sparseflow_daemon.gpu.pushing import Pushing
from sparseflow_daemon.leasing import Leasing, Outgoing
from sparseflow_daemon.loop import Loop
from sparseflow_daemon.sessions import Session

_log = logging.getLogger(__name__)
_MOST_LINES = 64  # of one session: threads that fetch


class Lines:
    """Those of all sessions."""

    def __init__(
        self, loop: Loop, leasings: Mapping[str, Leasing], pushing: Pushing, lending: Lending, epoch: int
    ) -> None:
        """
        Args:
            leasings: by the models' names.
        """
        self.is_draining = False
        """Nothing more is leased."""
        self.n_errors = 0
        """Unforeseen ones."""
        self._loop, self._leasings, self._pushing, self._epoch = loop, leasings, pushing, epoch
        self._lending = lending
        pushing.send = lending.send = self.send
        self._sockets: dict[bytes, socket.socket] = {}

    def add(self, session: Session, sock: socket.socket) -> None:
        """Make a watched connection a line of a session.

        Raises:
            BadRequest: it has lines enough.
        """
        if len(session.lines) >= _MOST_LINES:
            raise BadRequest(f"{len(session.lines)} lines of this session are open; close some, or use fewer threads")
        key = secrets.token_bytes(8)
        session.lines.add(key)
        self._sockets[key] = sock
        self._loop.watch(sock.fileno(), lambda: self._on_packet(session, key))

    def send(self, out: Iterable[Outgoing]) -> None:
        """Deliver replies; what cannot be delivered ends its line."""
        for key, message in self._pushing.divert(out):
            sock = self._sockets.get(key)
            if sock is None:
                continue
            try:
                if isinstance(message, DenseLent):
                    socket.send_fds(sock, [encode(message)], [self._lending.pidfd])
                else:
                    sock.send(encode(message))
            except OSError as error:  # it is gone; or does not read its answers, and will see that it missed some
                _log.debug("%s was not delivered: %s", type(message).__name__, error)
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def hang_up(self, session: Session) -> None:
        """Close all lines of a session."""
        for key in list(session.lines):
            self._close(session, key)

    def _close(self, session: Session, key: bytes) -> None:
        sock = self._sockets.pop(key)
        session.lines.discard(key)
        self._loop.unwatch(sock.fileno())
        sock.close()

    def _on_packet(self, session: Session, key: bytes) -> None:
        try:
            content = self._sockets[key].recv(PACKET_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if content:
            self.send(self._answers(session, key, content))
        else:
            self._close(session, key)

    def _answers(self, session: Session, key: bytes, content: bytes) -> list[Outgoing]:
        """Replies to one packet; exactly one to a request, whatever is wrong with it."""
        request_id, message = 0, None
        try:
            message = decode(content)
            request_id = getattr(message, "request_id", 0)
            return self._handle(session, key, message)
        except SparseFlowError as error:
            if not isinstance(error, Resync):
                session.last_error = str(error)
            if isinstance(message, HintNeurons | ReleaseLeases):  # notices have no reply
                return []
            return [(key, self._error(getattr(error, "request_id", request_id), error))]
        except Exception as error:
            self.n_errors += 1
            _log.exception("request %d", request_id, extra=session.log_fields | {"request_id": request_id})
            return [(key, self._error(request_id, ServerError(f"internal: {error!r}; see the server's log")))]

    def _handle(self, session: Session, key: bytes, message: Message) -> list[Outgoing]:
        if getattr(message, "epoch", self._epoch) != self._epoch:
            raise Resync(f"this is epoch {self._epoch}; attach again")
        leasing = self._leasings[session.model.name]
        match message:
            case AcquireNeurons():
                self._require_going_on(session, leasing, message.released)
                self.send(leasing.acquire(session, key, message))  # first of all: the client waits for it
                return leasing.release(session, message.released)
            case PushNeurons():
                self._require_going_on(session, leasing, message.released)
                try:
                    self.send(self._pushing.push(session, key, message))
                finally:
                    self.send(leasing.release(session, message.released))
                return []
            case RegisterDevice():
                self._require_going_on(session, leasing, [])
                self._pushing.register(session, key, message)
                return []
            case UnregisterDevice():
                return self._pushing.unregister(session, key, message)
            case BorrowDense():
                self._require_going_on(session, leasing, [])
                return self._lending.borrow(session, key, message)
            case ReturnDense():
                return self._lending.give_back(session, key, message)
            case HintNeurons():
                leasing.hint(session, message)
                return []
            case ReleaseLeases():
                return leasing.release(session, message.released)
        raise BadRequest(f"{type(message).__name__} is not taken on a line")

    def _require_going_on(self, session: Session, leasing: Leasing, released: list[int]) -> None:
        """
        Raises:
            Draining: nothing new is begun; what the request releases is over all the same.
        """
        if self.is_draining:
            self.send(leasing.release(session, released))
            raise Draining("the server is ending; attach to its successor")

    def _error(self, request_id: int, error: SparseFlowError) -> ErrorReply:
        return ErrorReply(request_id, self._epoch, error.wire_code, str(error))
