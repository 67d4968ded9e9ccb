"""One session with one run of a weight server: the handshake, the memory that was handed over, and the end."""

import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from sparseflow.client.shared_map import SharedMap
from sparseflow.core.tensor_views import view_bundles
from sparseflow.engine.mapping import Mapping
from sparseflow.errors import NoAnswer, ProtocolMismatch, ServerError, ServerNotRunning, SparseFlowError, of_wire_code
from sparseflow.protocol.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    Attach,
    Detach,
    Detached,
    ErrorReply,
    Message,
    Welcome,
)
from sparseflow.protocol.packets import receive_packet, send_packet
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow.protocol.session_counters import SessionCounters
from sparseflow.store.profile import ModelProfile

_DETACH_TIMEOUT_S = 2.0
ALWAYS_EXPECTED = {"protocol": PROTOCOL_VERSION, "layout": LAYOUT_VERSION}


class Attachment:
    """An open session, and the arena of this run of the server. It ends with this process, or by `close`."""

    def __init__(self, name: str, model: str, expected: dict[str, Any], timeout_s: float) -> None:
        """
        Args:
            model: which of the server's; empty: its only one.
            expected: fields of the server's identity that must be as given.
            timeout_s: how long to wait for the answer, which comes when the model is loaded.

        Raises:
            ServerNotRunning, NoAnswer: nobody answers. NoSuchModel, FingerprintMismatch, ProtocolMismatch, Draining,
            NotPermitted, ArenaBusy: as the server says.
        """
        self.directory = RunDirectory.of(name)
        self.is_over = False
        self.counts: list[int] = []
        """Of the session, `TOLD_COUNTS`, as its replies told last."""
        self.n_messages = 0
        """Sent and received on its lines."""
        self._counting = threading.Lock()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.descriptors: dict[str, int] = {}
        try:
            self._connect(timeout_s)
            self._ask(Attach(os.getpid(), model, ALWAYS_EXPECTED | expected))
            answer, descriptors = self._answer()
            _require_no_refusal(answer)
            if not isinstance(answer, Welcome) or len(descriptors) != len(answer.regions):
                raise ProtocolMismatch(f"server {name!r} answered with {type(answer).__name__}; is it of our version?")
            self.welcome = answer
            self.regions = {region["name"]: region for region in answer.regions}
            self.descriptors = dict(zip(self.regions, descriptors, strict=True))
            self.profile = ModelProfile(**answer.profile)
            self.bundles = view_bundles(self.mapped("arena", changes=True).content, self.profile)
            """(n_slots, 2, hidden), the store's dtype: the arena of this run of the server. Not to be written to."""
            counters = Mapping(self.descriptors["counters"], self.regions["counters"]["nbytes"], writable=True)
            self.counters = SessionCounters(counters.content)
            self.sock.settimeout(None)  # from now on it is only looked at, without waiting
        except NoAnswer as error:
            self._let_go()
            raise NoAnswer(f"server {name!r} did not open a session: {error}") from error
        except BaseException:
            self._let_go()
            raise

    def _connect(self, timeout_s: float) -> None:
        path = str(self.directory.attach_socket)
        self.sock.settimeout(timeout_s)
        try:
            self.sock.connect(path)
        except TimeoutError as error:
            raise NoAnswer(f"{path}: nobody takes the connection within {timeout_s:g} s") from error
        except OSError as error:
            raise ServerNotRunning(
                f"no server {self.directory.name!r} runs here ({path}: {error.strerror}); {self.directory.remedy}"
            ) from error

    def _ask(self, request: Attach) -> None:
        try:
            send_packet(self.sock, request)
        except TimeoutError as error:
            raise NoAnswer("it takes no request") from error
        except OSError as error:
            _require_no_refusal(self._last_words())
            raise ServerNotRunning(
                f"server {self.directory.name!r} ended before it was asked for a session ({error.strerror}); "
                f"start it again: sparseflow-daemon STORE --name {self.directory.name}"
            ) from error

    def _answer(self) -> tuple[Message, list[int]]:
        try:
            return receive_packet(self.sock)
        except ServerNotRunning:
            _require_no_refusal(self._last_words())  # what it said lies behind the news that it has closed
            raise

    def _last_words(self) -> Message | None:
        """Why the server has closed the connection, where it says so."""
        try:
            message, descriptors = receive_packet(self.sock)
        except SparseFlowError:
            return None
        for fd in descriptors:
            os.close(fd)
        return message

    def mapped(self, region: str, *, changes: bool = False) -> SharedMap:
        """Memory that was handed over. changes: the server goes on writing to it."""
        return SharedMap(self.descriptors[region], int(self.regions[region]["nbytes"]), changes=changes)

    def note_message(self, counts: list[int] | None = None) -> None:
        """One more on some line; counts: those of a reply, which may be older than another line's."""
        with self._counting:
            self.n_messages += 1
            if counts and sum(counts) >= sum(self.counts):
                self.counts = counts

    def has_ended(self) -> bool:
        """Whether the server has ended the session, or itself."""
        if not self.is_over:
            try:
                self.is_over = not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # it says nothing, as it should
            except OSError:
                self.is_over = True
        return self.is_over

    def has_news(self) -> bool:
        """Whether the server has said something on the session, which it does when it is about to end."""
        if self.is_over:
            return True
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close_descriptors(self) -> None:
        """What they stand for is mapped by now. May be called twice."""
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors = {}

    def close(self) -> None:
        """Say goodbye and wait until the server has taken everything back. May be called twice."""
        if self.sock.fileno() >= 0 and not self.has_ended():
            deadline = time.monotonic() + _DETACH_TIMEOUT_S
            self.sock.settimeout(max(0.01, deadline - time.monotonic()))
            with suppress(OSError, ServerError):
                send_packet(self.sock, Detach())
                while not isinstance(receive_packet(self.sock)[0], Detached):  # before it, maybe, that the server ends
                    pass
        self._let_go()

    def abandon(self) -> None:
        """Close without goodbye: in a forked child, whose parent goes on, and where the server is gone."""
        self._let_go()

    def _let_go(self) -> None:
        self.is_over = True
        self.sock.close()
        self.close_descriptors()

    def __del__(self) -> None:
        if hasattr(self, "sock"):
            self.sock.close()


def _require_no_refusal(answer: Message | None) -> None:
    """
    Raises:
        SparseFlowError: what the server says.
    """
    if isinstance(answer, ErrorReply):
        raise of_wire_code(answer.code, answer.text)
