"""One thread's socket to the server: requests out, replies and notices in, each wait with its deadline.

ZeroMQ sockets belong to one thread, so each thread that fetches has a line of its own, and with it the sets that
differences build on.
"""

import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from sparseflow.client.attachment import Attachment
from sparseflow.errors import NoAnswer, ServerError, ServerNotRunning
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import (
    FULL_SET,
    AcquireNeurons,
    BundlesArrived,
    BundlesFailed,
    ErrorReply,
    HintNeurons,
    Message,
    NeuronsGranted,
    ReleaseLeases,
)

NOWHERE = -1

Arrival = BundlesArrived | BundlesFailed


@dataclass(slots=True)
class LastSet:
    """What was granted last of one layer. slot_of: (ffn_dim,) int32, NOWHERE for what is not in it."""

    slot_of: NDArray[np.int32]
    ids: NDArray[np.uint32]
    version: int = FULL_SET
    n_unanswered: int = 0


@dataclass(slots=True)
class Asked:
    """A request under way. guessed: slots of the whole set, NOWHERE for what was added."""

    layer: int
    last: LastSet
    ids: NDArray[np.uint32]
    guessed: NDArray[np.int32] | None


@dataclass(slots=True)
class Granted:
    """slots: (n,) uint32, in the order of the ids. loading: positions of those that are on their way."""

    slots: NDArray[np.uint32]
    loading: NDArray[np.uint32]


class Line:
    """Of one thread, to one run of the server."""

    def __init__(self, attachment: Attachment, context: "zmq.Context[Any]", ids: "itertools.count[int]") -> None:
        """
        Args:
            ids: where the session's request ids come from.
        """
        self.attachment = attachment
        self.n_messages = 0
        self.counts: list[int] = []
        """Of the session, as the last reply told."""
        self._request_ids = ids
        self._socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.IMMEDIATE, 1), (zmq.RCVHWM, 0)):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.ROUTING_ID, attachment.welcome.session + os.urandom(8))
        self._socket.connect(attachment.directory.ctl_endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(attachment.sock.fileno(), zmq.POLLIN)
        self._ffn_dim = int(attachment.welcome.profile["ffn_dimension"])
        self._n_slots = attachment.welcome.n_slots
        self._sets: dict[int, LastSet] = {}
        self._asked: dict[int, Asked] = {}
        self._answers: dict[int, NeuronsGranted | ErrorReply] = {}
        self._unfilled: set[int] = set()
        self._arrivals: dict[int, Arrival] = {}
        self._released: list[int] = []

    def acquire(self, layer: int, ids: NDArray[np.uint32], timeout_s: float, *, whole: bool = False) -> int:
        """Ask for bundles; returns the request's id at once. whole: send all ids, whatever the server knows."""
        request_id = next(self._request_ids)
        last = self._sets.get(layer)
        base, added, dropped, guessed = FULL_SET, ids, _NO_IDS, None
        if last is not None and not whole and not last.n_unanswered and last.version != FULL_SET:
            slots = last.slot_of[ids]
            is_new = slots == NOWHERE
            new, gone = ids[is_new], _without(last, ids)
            if len(new) + len(gone) < len(ids):
                base, added, dropped, guessed = last.version, new, gone, slots
        if last is None:
            last = self._sets[layer] = LastSet(np.full(self._ffn_dim, NOWHERE, np.int32), _NO_IDS)
        last.n_unanswered += 1
        self._asked[request_id] = Asked(layer, last, ids, guessed)
        released, self._released = self._released, []
        epoch = self.attachment.welcome.epoch
        self._send(
            AcquireNeurons(
                *(request_id, epoch, layer, base),
                *(added.tobytes(), dropped.tobytes(), released, timeout_s),
            )
        )
        return request_id

    def granted(self, request_id: int, deadline_s: float) -> Granted | ErrorReply:
        """The reply to `acquire`.

        Raises:
            NoAnswer: there is none by then. ServerNotRunning: there will be none.
        """
        while request_id not in self._answers:
            self._receive(deadline_s)
        answer = self._answers.pop(request_id)
        asked = self._asked.pop(request_id)
        asked.last.n_unanswered -= 1
        return answer if isinstance(answer, ErrorReply) else self._apply(asked, answer)

    def arrived(self, request_id: int, deadline_s: float) -> Arrival:
        """What became of the bundles that were on their way when a request was granted.

        Raises:
            NoAnswer, ServerNotRunning: as `granted`.
        """
        while request_id not in self._arrivals:
            self._receive(deadline_s)
        return self._arrivals.pop(request_id)

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """Tell what may be asked for."""
        self._send(HintNeurons(self.attachment.welcome.epoch, layer, ids.tobytes()))

    def release(self, request_id: int, *, at_once: bool) -> None:
        """Give a lease back: with the next request, or by a message of its own."""
        asked = self._asked.pop(request_id, None)
        if asked is not None:  # nobody waited for the answer, so what it says of the set will not be known
            self._sets.pop(asked.layer, None)
            asked.last.n_unanswered -= 1
        self._unfilled.discard(request_id)
        self._answers.pop(request_id, None)
        self._arrivals.pop(request_id, None)
        self._released.append(request_id)
        if at_once:
            released, self._released = self._released, []
            self._send(ReleaseLeases(self.attachment.welcome.epoch, released))

    def close(self) -> None:
        """Close the socket. May be called twice."""
        self._socket.close(linger=0)

    def _send(self, message: Message) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again as error:  # not connected (yet), or it takes nothing any more
            if self.attachment.has_ended():
                raise ServerNotRunning("the server has ended") from error
            self._send_when_connected(encode(message))
        self.n_messages += 1

    def _send_when_connected(self, content: bytes) -> None:
        self._socket.setsockopt(zmq.SNDTIMEO, _SEND_TIMEOUT_MS)
        try:
            self._socket.send(content)
        except zmq.Again as error:
            raise NoAnswer(f"the server took nothing within {_SEND_TIMEOUT_MS / 1000:g} s; is it stopped?") from error

    def _receive(self, deadline_s: float) -> None:
        """Take one message, and put it where it is waited for; what nobody waits for any more is dropped."""
        while True:
            try:
                message = decode(self._socket.recv(zmq.NOBLOCK))
                break
            except zmq.Again:
                pass
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise NoAnswer("the server said nothing in time; is it stopped, or its disk?")
            ready = [what for what, _ in self._poller.poll(max(1, int(1000 * left_s)))]
            if ready and self._socket not in ready:  # the session's connection says something: its end
                self.attachment.is_over = True
                raise ServerNotRunning("the server has ended the session")
        self.n_messages += 1
        match message:
            case NeuronsGranted() | ErrorReply():
                if message.request_id in self._asked:
                    self._answers[message.request_id] = message
            case BundlesArrived() | BundlesFailed():
                if message.request_id in self._unfilled or message.request_id in self._answers:
                    self._arrivals[message.request_id] = message
            case _:
                raise ServerError(f"the server sent {type(message).__name__}, which is no answer")

    def _apply(self, asked: Asked, answer: NeuronsGranted) -> Granted:
        """Slots of the whole set, and the set as the next difference will build on it."""
        slots, loading = np.frombuffer(answer.slots, "<u4"), np.frombuffer(answer.loading, "<u4")
        try:
            if asked.guessed is not None:
                whole = asked.guessed.astype(np.uint32)
                whole[asked.guessed == NOWHERE] = slots
                whole[np.frombuffer(answer.moved, "<u4")] = np.frombuffer(answer.moved_slots, "<u4")
                slots = whole
            if len(slots) != len(asked.ids) or (len(slots) and int(slots.max()) >= self._n_slots):
                raise ValueError(f"{len(slots)} slots for {len(asked.ids)} neurons")
        except (ValueError, IndexError) as error:
            raise ServerError(f"the server granted what was not asked for ({error}); restart it") from error
        last = asked.last
        last.slot_of[last.ids] = NOWHERE
        last.slot_of[asked.ids] = slots
        last.ids, last.version = asked.ids, answer.version
        self.counts = answer.counts
        if len(loading):
            self._unfilled.add(answer.request_id)
        return Granted(slots, loading)


_NO_IDS = np.empty(0, np.uint32)
_SEND_TIMEOUT_MS = 10_000


def _without(last: LastSet, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """What is in the last set and not in `ids`."""
    slots = last.slot_of[ids]
    last.slot_of[ids] = NOWHERE
    gone = last.ids[last.slot_of[last.ids] != NOWHERE]
    last.slot_of[ids] = slots
    return np.asarray(gone)
