"""The server: one loop over two sockets, the sessions' connections and processes, and the disk. It never waits for any.

Loading models is left to a thread, so that status is answered from the first moment on.
"""

import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import zmq

from sparseflow.errors import BadRequest, Draining, NoAnswer, NotPermitted, Resync, ServerError, SparseFlowError
from sparseflow.protocol.codec import MOST_NBYTES, Undecodable, decode, encode
from sparseflow.protocol.messages import (
    AcquireNeurons,
    Attach,
    Detach,
    Detached,
    ErrorReply,
    HintNeurons,
    Join,
    Message,
    ReleaseLeases,
    StatusReply,
    StatusRequest,
)
from sparseflow.protocol.packets import PACKET_NBYTES, receive_packet, send_packet
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow_daemon import status
from sparseflow_daemon.admission import Greeting, greet, model_for, open_session
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.leasing import Leasing, Outgoing
from sparseflow_daemon.served_model import ServedModel
from sparseflow_daemon.sessions import Session

_log = logging.getLogger(__name__)
_TICK_S = 1.0
_WAITING_TICK_S = 0.05  # while some request waits for something that has a deadline
_MOST_AT_ONCE = 64  # messages between two looks at everything else
_MOST_LINES = 64  # of one session: threads that fetch
_BACKLOG = 64
_LOADER_TIMEOUT_S = 30.0


class Server:
    """Serves models until `stop` has drained them."""

    def __init__(self, config: ServerConfig, directory: RunDirectory, models: dict[str, ServedModel]) -> None:
        """Bind the sockets of a run directory that is ours."""
        self.config, self.directory, self.models = config, directory, models
        self.epoch = secrets.randbits(63) | 1
        self.began_s = time.time()
        self.sessions: dict[bytes, Session] = {}
        self.leasings: dict[str, Leasing] = {}
        self._lines: dict[bytes, socket.socket] = {}
        self.is_draining = False
        self.n_loop_errors = 0
        self.last_tick_s = time.monotonic()
        self.loader = threading.Thread(target=self._load, name="loader", daemon=True)
        self.on_tick: Callable[[], None] = lambda: None
        """Called about once a second."""
        self._greetings: set[Greeting] = set()
        self._drained_by_s = float("inf")
        self._next_look_s = 0.0
        self._handlers: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(str(directory.attach_socket))
        self._listener.listen(_BACKLOG)
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 0), (zmq.ROUTER_MANDATORY, 1), (zmq.MAXMSGSIZE, MOST_NBYTES)):
            self._router.setsockopt(option, value)
        self._router.bind(directory.ctl_endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._epoll.fileno(), zmq.POLLIN)
        self._loaded_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.watch(self._loaded_fd, self._on_loaded)
        self.watch(self._listener.fileno(), self._accept)

    @property
    def state(self) -> str:
        """`loading`, `ready`, `degraded` or `draining`."""
        if self.is_draining:
            return "draining"
        if any(model.state == "loading" for model in self.models.values()):
            return "loading"
        return "degraded" if status.reasons(self) else "ready"

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call a handler whenever a descriptor is readable."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """No more."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def stop(self) -> None:
        """Begin nothing new; end as soon as no lease is held, or when the time for that is over."""
        if not self.is_draining:
            self.is_draining = True
            self._drained_by_s = time.monotonic() + self.config.drain_timeout_s
            _log.info("draining: %d sessions", len(self.sessions))

    def run(self) -> None:
        """Load the models and serve until stopped."""
        self.loader.start()
        next_tick_s = 0.0
        while not self._is_drained():
            try:
                self._turn()
                self.last_tick_s = now = time.monotonic()
                if now >= next_tick_s:
                    next_tick_s = now + _TICK_S
                    self._tick(now)
            except Exception:  # one bad peer must not end the service of all; what it was is in status and log
                self.n_loop_errors += 1
                _log.exception("unforeseen; going on")

    def close(self) -> None:
        """Close everything; sessions see their connection end. May be called twice."""
        for session in list(self.sessions.values()):
            self._end(session)
        for greeting in list(self._greetings):
            self._dismiss(greeting)
        self._listener.close()
        self._context.destroy(linger=0)
        self._epoll.close()
        self.loader.join(_LOADER_TIMEOUT_S)
        os.close(self._loaded_fd)
        for model in self.models.values():
            model.close()

    # --- the loop

    def _turn(self) -> None:
        """Wait for something, and handle what there is."""
        is_waiting = any(session.waiting or session.leases for session in self.sessions.values())
        timeout_s = _WAITING_TICK_S if is_waiting or self.is_draining else _TICK_S
        ready = dict(self._poller.poll(int(1000 * timeout_s)))
        if self._epoll.fileno() in ready:
            for fd, handler in [(fd, self._handlers.get(fd)) for fd, _ in self._epoll.poll(0)]:
                if handler is not None and self._handlers.get(fd) is handler:  # not closed by one before it
                    handler()
        if self._router in ready:
            self._answer_questions()
        if is_waiting and time.monotonic() >= self._next_look_s:  # for deadlines
            self._next_look_s = time.monotonic() + _WAITING_TICK_S
            for name in self.leasings:
                self._progress(name)

    def _answer_questions(self) -> None:
        """Whoever asks on `ctl.sock` is answered, whatever is wrong with the question."""
        for _ in range(_MOST_AT_ONCE):
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                answer = self._answer(frames)
            except Undecodable as error:
                answer = self._error(error.request_id, error)
            except SparseFlowError as error:
                answer = self._error(0, error)
            with suppress(zmq.ZMQError):  # it is gone, or reads nothing
                self._router.send_multipart([peer, encode(answer)], zmq.NOBLOCK)

    def _answer(self, frames: list[bytes]) -> Message:
        if len(frames) != 1:
            raise BadRequest(f"a message of {len(frames)} frames; send one")
        message = decode(frames[0])
        if not isinstance(message, StatusRequest):
            text = f"{type(message).__name__} is not taken on this socket; it answers StatusRequest"
            return self._error(getattr(message, "request_id", 0), BadRequest(text))
        return StatusReply(message.request_id, self.epoch, status.content(self))

    # --- lines

    def _join(self, greeting: Greeting, join: Join) -> None:
        """Make a connection a line of its session.

        Raises:
            Resync: there is no such session. BadRequest: it has lines enough.
        """
        session = self.sessions.get(join.session)
        if session is None or session.is_quarantined or join.epoch != self.epoch:
            raise Resync(f"no such session in epoch {self.epoch}; attach again")
        if len(session.lines) >= _MOST_LINES:
            raise BadRequest(f"{len(session.lines)} lines of this session are open; close some, or use fewer threads")
        key = secrets.token_bytes(8)
        session.lines.add(key)
        self._lines[key] = greeting.sock
        self._greetings.discard(greeting)
        self._handlers[greeting.sock.fileno()] = lambda: self._on_line(session, key)

    def _on_line(self, session: Session, key: bytes) -> None:
        """Serve what a line asks."""
        for _ in range(_MOST_AT_ONCE):
            try:
                content = self._lines[key].recv(PACKET_NBYTES)
            except (BlockingIOError, KeyError):  # nothing more; or it was hung up on
                break
            except OSError:
                content = b""
            if not content:
                self._hang_up(session, key)
                break
            self._send(self._answers(session, key, content))

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
            self.n_loop_errors += 1
            _log.exception("request %d", request_id)
            return [(key, self._error(request_id, ServerError(f"internal: {error!r}; see the server's log")))]

    def _handle(self, session: Session, key: bytes, message: Message) -> list[Outgoing]:
        if getattr(message, "epoch", self.epoch) != self.epoch:
            raise Resync(f"this is epoch {self.epoch}; attach again")
        leasing = self.leasings[session.model.name]
        match message:
            case AcquireNeurons():
                if self.is_draining:
                    leasing.release(session, message.released)
                    raise Draining("the server is ending; attach to its successor")
                return leasing.acquire(session, key, message)
            case HintNeurons():
                leasing.hint(session, message)
                return []
            case ReleaseLeases():
                return leasing.release(session, message.released)
        raise BadRequest(f"{type(message).__name__} is not taken on a line")

    def _send(self, out: list[Outgoing]) -> None:
        for key, message in out:
            sock = self._lines.get(key)
            if sock is None:
                continue
            try:
                sock.send(encode(message))
            except OSError as error:  # it is gone; or does not read its answers, and will see that it missed some
                _log.debug("%s was not delivered: %s", type(message).__name__, error)
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _hang_up(self, session: Session, key: bytes) -> None:
        sock = self._lines.pop(key)
        session.lines.discard(key)
        self.unwatch(sock.fileno())
        sock.close()

    def _error(self, request_id: int, error: SparseFlowError) -> ErrorReply:
        return ErrorReply(request_id, self.epoch, error.wire_code, str(error))

    def _tick(self, now: float) -> None:
        for session in self.sessions.values():
            session.sample()
        for greeting in [g for g in self._greetings if g.attach is None and g.deadline_s <= now]:
            self._dismiss(greeting)
        self._welcome_those_who_wait()
        self.on_tick()

    def _is_drained(self) -> bool:
        has_leases = any(session.leases for session in self.sessions.values())
        return self.is_draining and (not has_leases or time.monotonic() >= self._drained_by_s)

    # --- models

    def _load(self) -> None:
        for model in self.models.values():
            model.load()
            os.eventfd_write(self._loaded_fd, 1)

    def _on_loaded(self) -> None:
        os.eventfd_read(self._loaded_fd)
        self._welcome_those_who_wait()

    def _begin_serving(self, model: ServedModel) -> None:
        if model.state == "ready" and model.name not in self.leasings:
            self.leasings[model.name] = Leasing(model, self.epoch)
            self.watch(model.event_fd, lambda: self._on_reads(model))

    def _on_reads(self, model: ServedModel) -> None:
        model.clear_event()
        self._progress(model.name)

    def _progress(self, name: str) -> None:
        of_model = [session for session in self.sessions.values() if session.model.name == name]
        self._send(self.leasings[name].progress(of_model))

    # --- sessions

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log.warning("a connection could not be taken: %s", error)
            return
        sock.setblocking(False)
        try:
            greeting = greet(sock)
        except NotPermitted as error:
            self._refuse(sock, error)
            return
        self._greetings.add(greeting)
        self.watch(sock.fileno(), lambda: self._on_greeting(greeting))

    def _on_greeting(self, greeting: Greeting) -> None:
        try:
            message, descriptors = receive_packet(greeting.sock)
            _close(descriptors)
            if isinstance(message, Join) and greeting.attach is None:
                self._join(greeting, message)
                return
            if greeting.attach is not None or not isinstance(message, Attach):
                raise BadRequest(f"{type(message).__name__}: a connection begins with one Attach or Join")
            greeting.attach = message
            self._welcome(greeting)
        except ServerError:  # it has closed
            self._dismiss(greeting)
        except SparseFlowError as error:
            self._turn_away(greeting, error)

    def _welcome_those_who_wait(self) -> None:
        for model in self.models.values():
            self._begin_serving(model)
        for greeting in [g for g in self._greetings if g.attach is not None]:
            try:
                self._welcome(greeting)
            except SparseFlowError as error:
                self._turn_away(greeting, error)

    def _welcome(self, greeting: Greeting) -> None:
        """Make a greeting a session, or leave it where its model is still loading."""
        assert greeting.attach is not None  # it has asked
        if self.is_draining:
            raise Draining("the server is ending; attach to its successor")
        model = model_for(greeting.attach, self.models)
        if model.state == "loading":
            return
        self._begin_serving(model)
        n_open = sum(session.model is model for session in self.sessions.values())
        try:
            session = open_session(greeting, model, n_open, self.config.max_sessions, self.epoch)
        except OSError as error:
            if isinstance(error, SparseFlowError):
                raise
            self._dismiss(greeting)  # it went away while it was welcomed
            return
        self._greetings.discard(greeting)
        self.sessions[session.token] = session
        self.unwatch(session.sock.fileno())
        self.watch(session.sock.fileno(), lambda: self._on_session(session))
        self.watch(session.pidfd, lambda: self._end(session))
        _log.info("session of pid %d on %s", session.pid, model.name)

    def _on_session(self, session: Session) -> None:
        """Its connection says something: goodbye, or nothing more."""
        try:
            message, descriptors = receive_packet(session.sock)
            _close(descriptors)
        except NoAnswer:
            return
        except SparseFlowError:
            message = None
        if isinstance(message, Detach):
            with suppress(OSError):
                send_packet(session.sock, Detached(self.epoch))
            self._end(session)
            return
        session.is_quarantined = True
        for key in list(session.lines):
            self._hang_up(session, key)
        session.last_error = "the connection ended without goodbye"
        self.unwatch(session.sock.fileno())
        session.sock.close()
        _log.warning("pid %d broke its connection; its leases stay until it ends", session.pid)

    def _end(self, session: Session) -> None:
        """Its process is dead, or it has said goodbye: everything comes back."""
        if self.sessions.pop(session.token, None) is None:
            return
        if session.sock.fileno() >= 0:
            self.unwatch(session.sock.fileno())
        self.unwatch(session.pidfd)
        for key in list(session.lines):
            self._hang_up(session, key)
        self.leasings[session.model.name].forget(session)
        session.close()
        _log.info("session of pid %d is over", session.pid)
        self._progress(session.model.name)

    def _turn_away(self, greeting: Greeting, error: SparseFlowError) -> None:
        self.unwatch(greeting.sock.fileno())
        self._greetings.discard(greeting)
        self._refuse(greeting.sock, error)

    def _refuse(self, sock: socket.socket, error: SparseFlowError) -> None:
        with suppress(OSError, SparseFlowError):
            send_packet(sock, self._error(0, error))
        sock.close()

    def _dismiss(self, greeting: Greeting) -> None:
        self.unwatch(greeting.sock.fileno())
        self._greetings.discard(greeting)
        greeting.sock.close()


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
