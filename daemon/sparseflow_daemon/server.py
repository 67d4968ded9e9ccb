"""The server: one loop over two sockets, the sessions' connections and processes, and the disk. It never waits for any.

Loading models is left to a thread, so that status is answered from the first moment on.
"""

import gc
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import zmq

from sparseflow.errors import BadRequest, Draining, NoAnswer, NotPermitted, Resync, ServerError, SparseFlowError
from sparseflow.protocol.codec import MOST_NBYTES, Undecodable, decode, encode
from sparseflow.protocol.device_messages import ServerEnds
from sparseflow.protocol.messages import (
    Attach,
    Detach,
    Detached,
    ErrorReply,
    Join,
    Message,
    StatusReply,
    StatusRequest,
)
from sparseflow.protocol.packets import receive_packet, send_packet
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow_daemon import status
from sparseflow_daemon.admission import Greeting, greet, model_for, open_session, require_own, user_of
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.door import Door
from sparseflow_daemon.gpu.children import GpuChildren
from sparseflow_daemon.gpu.lending import Lending
from sparseflow_daemon.gpu.pushing import Pushing
from sparseflow_daemon.leasing import Leasing
from sparseflow_daemon.lines import Lines
from sparseflow_daemon.loop import Loop
from sparseflow_daemon.served_model import ServedModel
from sparseflow_daemon.sessions import Session

if TYPE_CHECKING:
    from sparseflow_daemon.metrics_endpoint import MetricsEndpoint

_log = logging.getLogger(__name__)
_TICK_S = 1.0
_WAITING_TICK_S = 0.05  # while some request waits for something that has a deadline
_MOST_AT_ONCE = 64  # messages between two looks at everything else
_LOADER_TIMEOUT_S = 1.0


class Server:
    """Serves models until `stop` has drained them."""

    def __init__(self, config: ServerConfig, directory: RunDirectory, models: dict[str, ServedModel]) -> None:
        """Bind the sockets of a run directory that is ours."""
        self.config, self.directory, self.models = config, directory, models
        self.epoch = secrets.randbits(63) | 1
        self.began_s = time.time()
        self.sessions: dict[bytes, Session] = {}
        self.n_past_tokens = 0
        """Decoded by sessions that are over."""
        self.metrics: MetricsEndpoint | None = None
        """What serves this server's metrics; its own owner."""
        self.leasings: dict[str, Leasing] = {}
        self.loop = Loop()
        self.children = GpuChildren(self.loop, config.gpu_timeout_s, config.log_format)
        self.pushing = Pushing(self.children, self.leasings, self.epoch)
        self.lending = Lending(self.children, config.share_dense_gpu, self.epoch)
        self._lines = Lines(self.loop, self.leasings, self.pushing, self.lending, self.epoch)
        self._were_told: set[Session] = set()
        self._n_errors = 0
        self.last_tick_s = time.monotonic()
        self.loader = threading.Thread(target=self._load, name="loader", daemon=True)
        self.on_tick: Callable[[], None] = lambda: None
        """Called about once a second."""
        self._greetings: set[Greeting] = set()
        self._drained_by_s = float("inf")
        self._next_look_s = 0.0
        self._door = Door(directory.attach_socket, self.epoch)
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 0), (zmq.ROUTER_MANDATORY, 1), (zmq.MAXMSGSIZE, MOST_NBYTES)):
            self._router.setsockopt(option, value)
        self._router.bind(directory.ctl_endpoint)
        directory.ctl_socket.chmod(0o600)
        self._loaded_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.loop.watch(self._loaded_fd, self._on_loaded)
        self.loop.watch(self._door.fileno(), self._accept)
        self.loop.watch(self._router.fileno(), self._answer_questions)

    @property
    def state(self) -> str:
        """`loading`, `ready`, `degraded` or `draining`."""
        if self.is_draining:
            return "draining"
        if any(model.state == "loading" for model in self.models.values()):
            return "loading"
        return "degraded" if status.reasons(self) else "ready"

    @property
    def is_draining(self) -> bool:
        """It begins nothing new."""
        return self._lines.is_draining

    @property
    def n_errors(self) -> int:
        """Unforeseen ones, that ended no more than what was being done."""
        return self._n_errors + self._lines.n_errors

    def stop(self) -> None:
        """Begin nothing new; end as soon as no lease is held, or when the time for that is over."""
        if not self.is_draining:
            self._lines.is_draining = True
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
                self._n_errors += 1
                _log.exception("unforeseen; going on")

    def close(self) -> None:
        """Close everything; sessions see their connection end. May be called twice.

        What a disk that hangs still loads is left to the end of the process.
        """
        for session in list(self.sessions.values()):
            self._end(session)
        for greeting in list(self._greetings):
            self._dismiss(greeting)
        self._door.close()
        self._context.destroy(linger=0)
        self.children.close()
        self.loop.close()
        for model in self.models.values():
            model.stop_loading()
        if self.loader.is_alive():
            self.loader.join(_LOADER_TIMEOUT_S)
        if not self.loader.is_alive():
            if self._loaded_fd >= 0:
                os.close(self._loaded_fd)
                self._loaded_fd = -1
            for model in self.models.values():
                model.close()

    # --- the loop

    def _turn(self) -> None:
        """Wait for something, and handle what there is."""
        has_leases = any(session.waiting or session.leases for session in self.sessions.values())
        is_waiting = has_leases or self.children.is_waiting
        timeout_s = _WAITING_TICK_S if is_waiting or self.is_draining else _TICK_S
        self.loop.turn(timeout_s)
        if is_waiting and time.monotonic() >= self._next_look_s:  # for deadlines
            self._next_look_s = time.monotonic() + _WAITING_TICK_S
            self.children.look(time.monotonic())
            for name in self.leasings:
                self._progress(name)

    def _answer_questions(self) -> None:
        """Whoever asks on `ctl.sock` is answered, whatever is wrong with the question.

        ZeroMQ's descriptor tells of news only: once it was readable, all there is must be taken.
        """
        for _ in range(_MOST_AT_ONCE):
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                require_own(user_of(peer))
                answer = self._answer([frame.bytes for frame in frames])
            except Undecodable as error:
                answer = self._error(error.request_id, error)
            except SparseFlowError as error:
                answer = self._error(0, error)
            except Exception as error:  # whoever asks is answered, and those behind it too
                self._n_errors += 1
                _log.exception("a question")
                answer = self._error(0, ServerError(f"internal: {error!r}; see the server's log"))
            with suppress(zmq.ZMQError):  # it is gone, or reads nothing
                self._router.send_multipart([peer.bytes, encode(answer)], zmq.NOBLOCK)
        self.loop.call_again(self._router.fileno())

    def _answer(self, frames: list[bytes]) -> Message:
        if len(frames) != 1:
            raise BadRequest(f"a message of {len(frames)} frames; send one")
        message = decode(frames[0])
        if not isinstance(message, StatusRequest):
            text = f"{type(message).__name__} is not taken on this socket; it answers StatusRequest"
            return self._error(getattr(message, "request_id", 0), BadRequest(text))
        return StatusReply(message.request_id, self.epoch, status.content(self))

    def _error(self, request_id: int, error: SparseFlowError) -> ErrorReply:
        return ErrorReply(request_id, self.epoch, error.wire_code, str(error))

    def _tick(self, now: float) -> None:
        for session in self.sessions.values():
            session.sample()
        for greeting in [g for g in self._greetings if g.attach is None and g.deadline_s <= now]:
            self._dismiss(greeting)
        self.children.look(now)
        gc.freeze()  # what is loaded stays, and need not be looked through again and again
        self._welcome_those_who_wait()
        self.on_tick()

    def _is_drained(self) -> bool:
        if not self.is_draining:
            return False
        self._tell_borrowers()
        is_busy = self.pushing.n_pushes or any(session.leases for session in self.sessions.values())
        if not is_busy and not self.lending.borrowers:
            return True
        is_late = time.monotonic() >= self._drained_by_s
        if is_late and (n := len(self.lending.borrowers)):
            _log.warning("%d sessions have not returned the weights on the GPU in time; they are freed now", n)
        return is_late

    def _tell_borrowers(self) -> None:
        """Once to each: what is lent to them is about to go."""
        new = self.lending.borrowers - self._were_told
        if new:
            _log.info("waiting for %d sessions to return the weights on the GPU", len(new))
        for session in new:
            self._were_told.add(session)
            with suppress(OSError):
                send_packet(session.sock, ServerEnds(self.epoch))

    # --- models

    def _load(self) -> None:
        for model in self.models.values():
            model.load()
            os.eventfd_write(self._loaded_fd, 1)

    def _on_loaded(self) -> None:
        os.eventfd_read(self._loaded_fd)
        gc.freeze()  # what is loaded stays, and need not be looked through again and again
        self._welcome_those_who_wait()
        self.on_tick()

    def _begin_serving(self, model: ServedModel) -> None:
        if model.state == "ready" and model.name not in self.leasings:
            self.leasings[model.name] = Leasing(model, self.epoch)
            self.loop.watch(model.event_fd, lambda: self._on_reads(model))
            self.lending.begin(model)

    def _on_reads(self, model: ServedModel) -> None:
        model.clear_event()
        self._progress(model.name)

    def _progress(self, name: str) -> None:
        of_model = [session for session in self.sessions.values() if session.model.name == name]
        self._lines.send(list(self.leasings[name].progress(of_model)))

    # --- sessions

    def _accept(self) -> None:
        sock = self._door.take()
        if sock is None:
            return
        try:
            greeting = greet(sock)
        except NotPermitted as error:
            self._door.refuse(sock, error)
            return
        self._greetings.add(greeting)
        self.loop.watch(sock.fileno(), lambda: self._on_greeting(greeting))

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

    def _join(self, greeting: Greeting, join: Join) -> None:
        """Make a connection a line of its session.

        Raises:
            Resync: there is no such session. BadRequest: it has lines enough.
        """
        session = self.sessions.get(join.session)
        if session is None or session.is_quarantined or join.epoch != self.epoch:
            raise Resync(f"no such session in epoch {self.epoch}; attach again")
        self._lines.add(session, greeting.sock)
        self._greetings.discard(greeting)

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
        fd = greeting.sock.fileno()
        try:
            session = open_session(greeting, model, n_open, self.config.max_sessions, self.epoch)
        except OSError as error:
            if isinstance(error, SparseFlowError):
                raise
            self.loop.unwatch(fd)  # it went away while it was welcomed
            self._dismiss(greeting)
            return
        self._greetings.discard(greeting)
        self.sessions[session.token] = session
        self.loop.unwatch(session.sock.fileno())
        self.loop.watch(session.sock.fileno(), lambda: self._on_session(session))
        self.loop.watch(session.pidfd, lambda: self._end(session))
        _log.info("session of pid %d on %s", session.pid, model.name, extra=session.log_fields)

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
        self._lines.hang_up(session)
        session.last_error = "the connection ended without goodbye"
        self.loop.unwatch(session.sock.fileno())
        session.sock.close()
        text = "pid %d broke its connection; its leases stay until it ends"
        _log.warning(text, session.pid, extra=session.log_fields)

    def _end(self, session: Session) -> None:
        """Its process is dead, or it has said goodbye: everything comes back."""
        if self.sessions.pop(session.token, None) is None:
            return
        if session.sock.fileno() >= 0:
            self.loop.unwatch(session.sock.fileno())
        self.loop.unwatch(session.pidfd)
        self._lines.hang_up(session)
        self.pushing.forget(session)
        self.lending.forget(session)
        self._were_told.discard(session)
        self.leasings[session.model.name].forget(session)
        self.n_past_tokens += session.tokens
        session.close()
        _log.info("session of pid %d is over", session.pid, extra=session.log_fields)
        self._progress(session.model.name)

    def _turn_away(self, greeting: Greeting, error: SparseFlowError) -> None:
        self.loop.unwatch(greeting.sock.fileno())
        self._greetings.discard(greeting)
        self._door.refuse(greeting.sock, error)

    def _dismiss(self, greeting: Greeting) -> None:
        self.loop.unwatch(greeting.sock.fileno())
        self._greetings.discard(greeting)
        greeting.sock.close()


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
