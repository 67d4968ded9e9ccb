"""One thread's connection to the server: requests out, replies in, each wait with its deadline.

Each thread that fetches has a line of its own: nothing is locked, and every reply reaches the thread that asked.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from sparseflow.client.attachment import Attachment
from sparseflow.errors import BadRequest, NoAnswer, Resync, ServerError, ServerNotRunning, of_wire_code
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.device_messages import (
    BorrowDense,
    DenseLent,
    DenseReturned,
    DeviceRegistered,
    DeviceUnregistered,
    NeuronsPushed,
    PushNeurons,
)
from sparseflow.protocol.messages import (
    AcquireNeurons,
    ErrorReply,
    HintNeurons,
    Join,
    Message,
    NeuronsLeased,
    NeuronsReady,
    ReleaseLeases,
)
from sparseflow.protocol.packets import PACKET_NBYTES

Reply = (
    NeuronsLeased
    | NeuronsReady
    | NeuronsPushed
    | DeviceRegistered
    | DeviceUnregistered
    | DenseLent
    | DenseReturned
    | ErrorReply
)
_SEND_TIMEOUT_S = 10.0


class Line:
    """Of one thread, to one run of the server."""

    def __init__(self, attachment: Attachment, request_ids: Iterator[int]) -> None:
        """
        Args:
            request_ids: where the session's request ids come from.

        Raises:
            ServerNotRunning: the server has ended.
        """
        self.attachment = attachment
        self._epoch = attachment.welcome.epoch
        self._request_ids = request_ids
        self._awaited: set[int] = set()
        self._replies: dict[int, list[Reply]] = {}
        self._released: list[int] = []
        self._descriptors: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_SEND_TIMEOUT_S)
        try:
            self._socket.connect(str(attachment.directory.attach_socket))
            self._send(Join(self._epoch, attachment.welcome.session))
        except OSError as error:
            self._socket.close()
            self.attachment.is_over = True
            raise ServerNotRunning(f"the server has ended ({error.strerror})") from error

    def acquire(self, layer: int, ids: NDArray[np.uint32], timeout_s: float, *, keep: bool = True) -> int:
        """Ask for bundles; returns the request's id at once.

        Args:
            timeout_s: how long the server may wait for slots.
            keep: as in `WeightSource.fetch`.
        """
        released = list(self._released)
        request_id = self.ask(
            lambda request_id, epoch: AcquireNeurons(request_id, epoch, layer, ids.tobytes(), released, timeout_s, keep)
        )
        del self._released[: len(released)]
        return request_id

    def push(self, layer: int, ids: NDArray[np.uint32], places: NDArray[np.uint32], timeout_s: float) -> int:
        """Ask for bundles to be copied to places of the registered slab; returns the request's id at once.

        Args:
            timeout_s: how long the server may wait for slots.
        """
        released = list(self._released)
        request_id = self.ask(
            lambda request_id, epoch: PushNeurons(
                request_id, epoch, layer, ids.tobytes(), places.tobytes(), released, timeout_s
            )
        )
        del self._released[: len(released)]
        return request_id

    def ask(self, build: Callable[[int, int], Message]) -> int:
        """Send what is made of a new request's id and the epoch; returns the id at once."""
        request_id = next(self._request_ids)
        self._awaited.add(request_id)
        self._send(build(request_id, self._epoch))
        return request_id

    def borrow_dense(self, device_uuid: bytes, deadline_s: float) -> tuple[Reply, int | None]:
        """What becomes of a BorrowDense; beside DenseLent a descriptor of the lender, which is the caller's to close.

        Raises:
            NoAnswer: there is no reply by then. ServerNotRunning: there will be none.
        """
        request_id = self.ask(lambda request_id, epoch: BorrowDense(request_id, epoch, device_uuid))
        try:
            while request_id not in self._replies:
                self._receive(deadline_s, with_descriptors=True)
            return self.reply(request_id, deadline_s), self._descriptors.pop() if self._descriptors else None
        finally:
            while self._descriptors:
                os.close(self._descriptors.pop())

    def reply(self, request_id: int, deadline_s: float) -> Reply:
        """What a request is told next: where its bundles are leased, or at last what became of it.

        Raises:
            NoAnswer: there is no reply by then. ServerNotRunning: there will be none.
        """
        while request_id not in self._replies:
            self._receive(deadline_s)
            if request_id not in self._replies and time.monotonic() >= deadline_s:
                raise NoAnswer("the server answered everything but this in time; is it stopped, or its disk?")
        replies = self._replies[request_id]
        reply = replies.pop(0)
        if not replies:
            del self._replies[request_id]
        if not isinstance(reply, NeuronsLeased):
            self._awaited.discard(request_id)
        return reply

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """Tell what may be asked for."""
        self._send(HintNeurons(self._epoch, layer, ids.tobytes()))

    def release(self, request_id: int, *, at_once: bool) -> None:
        """Give a lease back: with the next request, or by a message of its own."""
        if request_id in self._awaited:
            self._awaited.discard(request_id)
            self._take_what_came()
        self._replies.pop(request_id, None)
        self._released.append(request_id)
        if at_once:
            released = list(self._released)
            self._send(ReleaseLeases(self._epoch, released))
            del self._released[: len(released)]

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._socket.close()

    def __del__(self) -> None:
        """Its thread has ended."""
        if hasattr(self, "_socket"):
            self._socket.close()

    def _send(self, message: Message) -> None:
        content = encode(message)
        if len(content) > PACKET_NBYTES:
            raise BadRequest(f"{type(message).__name__} of {len(content)} bytes: a packet holds {PACKET_NBYTES}; "
                             "ask for fewer neurons at once")  # fmt: skip
        self._socket.settimeout(_SEND_TIMEOUT_S)
        try:
            self._socket.send(content)
        except TimeoutError as error:
            raise NoAnswer(f"the server took nothing within {_SEND_TIMEOUT_S:g} s; is it stopped?") from error
        except OSError as error:
            self.attachment.is_over = True
            raise ServerNotRunning(f"the server has ended ({error.strerror})") from error
        self.attachment.note_message()

    def _take_what_came(self) -> None:
        """Else replies that nobody waits for any more would fill the line."""
        with suppress(NoAnswer):
            while True:
                self._receive(0)

    def _receive(self, deadline_s: float, *, with_descriptors: bool = False) -> None:
        """Take one reply, and keep it for whoever waits; what nobody waits for any more is dropped."""
        self._socket.settimeout(max(deadline_s - time.monotonic(), 0))
        try:
            if with_descriptors:
                content, fds, _, _ = socket.recv_fds(self._socket, PACKET_NBYTES, 1)
                self._descriptors += fds
            else:
                content = self._socket.recv(PACKET_NBYTES)
        except (TimeoutError, BlockingIOError) as error:
            raise NoAnswer("the server said nothing in time; is it stopped, or its disk?") from error
        except OSError as error:
            self.attachment.is_over = True
            raise ServerNotRunning(f"the server has ended ({error.strerror})") from error
        if not content:
            self.attachment.is_over = True
            raise ServerNotRunning("the server has ended the session")
        message = decode(content)
        self.attachment.note_message(getattr(message, "counts", None))
        match message:
            case ErrorReply(request_id=0, code=Resync.wire_code):  # to Join
                self.attachment.is_over = True
                raise ServerNotRunning(f"the server has ended the session: {message.text}")
            case ErrorReply(request_id=0):
                raise of_wire_code(message.code, message.text)
            case _ if not isinstance(message, Reply):
                raise ServerError(f"the server sent {type(message).__name__}, which is no reply")
        if message.request_id in self._awaited:
            self._replies.setdefault(message.request_id, []).append(message)
