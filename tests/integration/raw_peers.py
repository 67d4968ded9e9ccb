"""Peers that say to a server whatever a test wants, packet by packet."""

import os
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import msgpack
import zmq

from sparseflow.client.attachment import ALWAYS_EXPECTED
from sparseflow.errors import ServerNotRunning
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import AcquireNeurons, Attach, Join, Message, NeuronsLeased, Welcome
from sparseflow.protocol.packets import receive_packet
from sparseflow.protocol.run_directory import RunDirectory

REPLY_TIMEOUT_S = 20.0


class Connection:
    """To `attach.sock`. What comes in is decoded; what goes out need not be a message."""

    def __init__(self, name: str = "s") -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(REPLY_TIMEOUT_S)
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while True:
            try:
                self._sock.connect(str(RunDirectory.of(name).attach_socket))
                break
            except BlockingIOError:  # as many wait to be taken as the server lets wait
                assert time.monotonic() < deadline
                time.sleep(0.01)
            except OSError:
                self._sock.close()
                raise

    def send(self, packet: Message | bytes, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self._sock, [packet if isinstance(packet, bytes) else encode(packet)], descriptors)

    def receive(self) -> Message:
        """The next message; descriptors that come with it are closed."""
        message, descriptors = receive_packet(self._sock)
        for fd in descriptors:
            os.close(fd)
        return message

    def reply_or_end(self) -> Message | None:
        """The next message, or None where the server has closed the connection."""
        try:
            return self.receive()
        except ServerNotRunning:
            return None

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RawSession(Connection):
    """A connection that is a session."""

    def __init__(self, name: str = "s") -> None:
        super().__init__(name)
        self.send(attach())
        welcome = self.receive()
        assert isinstance(welcome, Welcome), welcome
        self.welcome = welcome

    def acquire(self, request_id: int, ids: bytes, **changed: Any) -> AcquireNeurons:
        """A request of this session."""
        fields = {"epoch": self.welcome.epoch, "layer": 0, "released": [], "timeout_s": 20.0, "keep": True}
        return AcquireNeurons(request_id=request_id, ids=ids, **fields | changed)


class RawLine(Connection):
    """A connection that is a line of a session."""

    def __init__(self, of: RawSession, **changed: Any) -> None:
        super().__init__()
        self.send(Join(**{"epoch": of.welcome.epoch, "session": of.welcome.session} | changed))

    def reply(self) -> Message:
        """What became of a request, after what may be said before it."""
        while isinstance(message := self.receive(), NeuronsLeased):
            pass
        return message


def attach(model: str = "", **expected: Any) -> Attach:
    """As a client of this version says it."""
    return Attach(os.getpid(), model, ALWAYS_EXPECTED | expected)


def packed(*parts: Any) -> bytes:
    """msgpack of an array of anything."""
    result: bytes = msgpack.packb(list(parts))
    return result


def nested(depth: int) -> bytes:
    """msgpack of an array in an array in an array ..."""
    return b"\x91" * depth + b"\x01"


def ask_ctl(frames: Sequence[bytes], name: str = "s", timeout_s: float = REPLY_TIMEOUT_S) -> Message | None:
    """What `ctl.sock` says to one message of some frames; None where it says nothing."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(RunDirectory.of(name).ctl_endpoint)
        sock.send_multipart(list(frames))
        return decode(sock.recv()) if sock.poll(int(1000 * timeout_s)) else None
