"""What one GPU child was asked and has not answered yet. No socket, no process, no clock: times are told.

starting --ChildReady--> ready --a deadline passes, or it says that it ends--> ending --its process is dead--> gone
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from sparseflow.errors import ServerError
from sparseflow.protocol.device_messages import (
    BundlesCopied,
    BundlesRecorded,
    ChildReady,
    CloseSlab,
    CopyBundles,
    LoadRegions,
    OpenSlab,
    RegionsLoaded,
    SlabClosed,
    SlabOpened,
)
from sparseflow.protocol.messages import ErrorReply, Message

State = Literal["starting", "ready", "ending", "gone"]
Question = OpenSlab | CopyBundles | CloseSlab | LoadRegions

_MOST_AT_ONCE = 2  # one is done while the next lies there
_LAST_ANSWER: dict[type[Question], type[Message]] = {
    OpenSlab: SlabOpened,
    CopyBundles: BundlesCopied,
    CloseSlab: SlabClosed,
    LoadRegions: RegionsLoaded,
}


@dataclass(slots=True, eq=False)
class Ask:
    """A question. about: whose; `hear` gives it back with the answers."""

    message: Question
    about: object
    descriptors: tuple[int, ...] = ()
    more_time_s: float = 0.0
    """That it may take, beside what every question may."""
    deadline_s: float = field(default=float("inf"), init=False)
    """When the child is ended unless it has answered; set as it is sent, and again when it has answered in part."""
    is_recorded: bool = field(default=False, init=False)
    """Answered in part: the child can do something else meanwhile."""


Told = tuple[object, Message]  # about whose question, and the answer


class GpuDesk:
    """The questions to one child, in their order."""

    def __init__(self, now: float, *, start_timeout_s: float, answer_timeout_s: float) -> None:
        self.state: State = "starting"
        self.why = ""
        """Of its end."""
        self.device_name, self.device_uuid = "", b""
        self._start_timeout_s, self._answer_timeout_s = start_timeout_s, answer_timeout_s
        self._start_deadline_s = now + start_timeout_s
        self._queued: deque[Ask] = deque()
        self._sent: dict[int, Ask] = {}

    @property
    def is_usable(self) -> bool:
        """Whether it can be asked."""
        return self.state in ("starting", "ready")

    @property
    def is_waiting(self) -> bool:
        """Whether something has a deadline."""
        return self.state == "starting" or bool(self._queued or self._sent)

    def ask(self, ask: Ask) -> None:
        """Put a question at the end."""
        assert self.is_usable
        self._queued.append(ask)

    def to_send(self) -> Ask | None:
        """The next question, where the child can take one. It stays until it is `sent`."""
        n_open = sum(not ask.is_recorded for ask in self._sent.values())
        return self._queued[0] if self.state == "ready" and self._queued and n_open < _MOST_AT_ONCE else None

    def sent(self, now: float) -> None:
        """The next question is on its way."""
        ask = self._queued.popleft()
        ask.deadline_s = now + self._answer_timeout_s + ask.more_time_s
        self._sent[ask.message.request_id] = ask

    def hear(self, message: Message, now: float) -> list[Told]:
        """What the child says.

        Raises:
            ServerError: what it may not say now.
        """
        match message:
            case ChildReady() if self.state == "starting":
                self.state = "ready"
                self.device_name, self.device_uuid = message.device_name, message.device_uuid
                return []
            case ErrorReply(request_id=0):
                self.end(message.text)
                return []
        ask = self._sent.get(getattr(message, "request_id", 0))
        if ask is not None and isinstance(ask.message, CopyBundles) and isinstance(message, BundlesRecorded):
            ask.is_recorded, ask.deadline_s = True, now + self._answer_timeout_s
            return [(ask.about, message)]
        if ask is None or not isinstance(message, ErrorReply | _LAST_ANSWER[type(ask.message)]):
            raise ServerError(f"a GPU child said {type(message).__name__}, which nobody has asked for")
        del self._sent[ask.message.request_id]
        return [(ask.about, message)]

    def overdue(self, now: float) -> str:
        """Why the child must be ended: what has taken too long; empty where nothing has."""
        if self.state == "starting" and now >= self._start_deadline_s:
            return f"it was not ready within {self._start_timeout_s:g} s"
        for ask in self._sent.values():
            if now >= ask.deadline_s and self.is_usable:
                what, allowed_s = type(ask.message).__name__, self._answer_timeout_s + ask.more_time_s
                return f"it did not finish {what} within {allowed_s:g} s (--gpu-timeout)"
        return ""

    def end(self, why: str) -> None:
        """It is asked nothing more. The first reason stays."""
        if self.is_usable:
            self.state, self.why = "ending", why

    def gone(self) -> list[object]:
        """Its process is dead. Returns whose questions remain unanswered, in their order."""
        self.state = "gone"
        asks = [*self._sent.values(), *self._queued]
        self._sent.clear()
        self._queued.clear()
        return [ask.about for ask in asks]
