"""Pushes: bundles that a child of the server copies to slabs of the sessions. Requests in, replies out. No wait.

    push       leased: its bundles come into the arena --all are there--> asked: the child copies them
               --BundlesRecorded: the session is told--> recorded --BundlesCopied--> its lease ends
    slab       opening --SlabOpened--> open --UnregisterDevice, or the session is over--> closing --SlabClosed--> none

Where the child refuses a copy or dies, every push of the slab is answered with an error and the slab is no more: the
session goes on by reading the arena itself. Its lease of a push is its own doing only in that it has asked for it: it
has a number that no message can name, and ends when the child has copied.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sparseflow.cuda.tickets import SlabTicket, format_uuid
from sparseflow.errors import BadRequest, ServerError, SparseFlowError
from sparseflow.protocol.device_messages import (
    BundlesCopied,
    BundlesRecorded,
    CloseSlab,
    CopyBundles,
    DeviceRegistered,
    DeviceUnregistered,
    NeuronsPushed,
    OpenSlab,
    PushNeurons,
    RegisterDevice,
    SlabClosed,
    SlabOpened,
    UnregisterDevice,
)
from sparseflow.protocol.messages import AcquireNeurons, ErrorReply, Message, NeuronsLeased, NeuronsReady
from sparseflow_daemon.gpu.children import GpuChild, GpuChildren
from sparseflow_daemon.gpu.desk import Ask, Told
from sparseflow_daemon.leasing import Leasing, Outgoing
from sparseflow_daemon.sessions import Session

_MOST_PUSHES = 256  # of one session that are not over
_KEY_NBYTES = 12


@dataclass(eq=False)
class Slab:
    """A session's slab. line, request_id: whom to tell when it is open, and then when it is closed."""

    number: int
    session: Session
    child: GpuChild
    n_places: int
    line: bytes
    request_id: int
    state: Literal["opening", "open", "closing"] = "opening"
    pushes: "dict[int, Push]" = field(default_factory=dict)
    """Those that are not over, by their numbers."""


@dataclass(eq=False)
class Push:
    """A push, from its request until it is copied."""

    number: int
    slab: Slab
    line: bytes
    request: PushNeurons
    slots: bytes = b""
    counts: list[int] = field(default_factory=list)
    state: Literal["leased", "asked", "recorded"] = "leased"

    @property
    def key(self) -> bytes:
        """Where the leasing sends what it has to say of it: longer than the keys of lines."""
        return self.number.to_bytes(_KEY_NBYTES, "little")


class Pushing:
    """The slabs of all sessions."""

    def __init__(self, children: GpuChildren, leasings: Mapping[str, Leasing], epoch: int) -> None:
        self.send: Callable[[Iterable[Outgoing]], None] = lambda out: None
        """Delivers what comes later."""
        self._children, self._leasings, self._epoch = children, leasings, epoch
        self._numbers = itertools.count(1)
        self._slabs: dict[Session, Slab] = {}
        self._pushes: dict[bytes, Push] = {}
        self._lost: dict[Session, ServerError] = {}  # why a session has no slab any more
        children.on_told.append(self._on_told)
        children.on_gone.append(self._on_gone)

    @property
    def n_pushes(self) -> int:
        """Those that are not over."""
        return len(self._pushes)

    def transport(self, session: Session) -> str:
        """How a session's bundles travel: `push`, or it reads the `arena` itself."""
        slab = self._slabs.get(session)
        return "push" if slab is not None and slab.state == "open" else "arena"

    # --- requests

    def register(self, session: Session, line: bytes, request: RegisterDevice) -> None:
        """Answered later.

        Raises:
            BadRequest: no ticket, none of whole bundles, or there is one already. ServerError: no child can be started.
        """
        if session in self._slabs:
            raise BadRequest("this session has registered a slab already; unregister it first")
        ticket = SlabTicket.from_dict(request.slab)
        model = session.model
        nbytes = model.profile.bundle_nbytes
        if ticket.nbytes % nbytes:
            raise BadRequest(f"slab of {ticket.nbytes} bytes: bundles have {nbytes}; export whole ones")
        child = self._children.of(ticket.device_uuid)
        slab = Slab(next(self._numbers), session, child, ticket.nbytes // nbytes, line, request.request_id)
        self._slabs[session] = slab
        self._lost.pop(session, None)
        child.slabs.add(slab.number)
        message = OpenSlab(next(self._numbers), slab.number, request.slab, model.name, model.n_slots, nbytes)
        self._children.ask(child, Ask(message, slab, (model.regions["arena"].fd,)))

    def unregister(self, session: Session, line: bytes, request: UnregisterDevice) -> list[Outgoing]:
        """Answered now where there is nothing to be closed."""
        slab = self._slabs.get(session)
        if slab is None:
            return [(line, DeviceUnregistered(request.request_id, self._epoch))]
        if slab.state != "open":
            raise BadRequest(f"the slab is {slab.state}; wait for the answer to that")
        return self._close(slab, line, request.request_id)

    def push(self, session: Session, line: bytes, request: PushNeurons) -> list[Outgoing]:
        """Replies to this request, if there are any yet. What it releases is for the leasing, afterwards.

        Raises:
            BadRequest: no slab, no such neurons or places. ServerError: the slab was lost.
        """
        slab = self._slabs.get(session)
        if slab is None or slab.state != "open":
            raise self._lost.get(session) or BadRequest(
                "this session has no open slab; register the device first, or fetch instead"
            )
        places = _numbers(request.places)
        if len(places) * 4 != len(request.ids):
            raise BadRequest(f"{len(request.ids) // 4} neurons, {len(places)} places; name one each")
        if len(places) and int(places.max()) >= slab.n_places:
            raise BadRequest(f"place {places.max()}: the slab has {slab.n_places}")
        if len(slab.pushes) >= _MOST_PUSHES:
            raise BadRequest(f"{len(slab.pushes)} pushes of this session are under way; wait for some")
        push = Push(next(self._numbers), slab, line, request)
        if session.model.is_resident:
            push.slots = self._slots_of(session, request)
            slab.pushes[push.number] = self._pushes[push.key] = push
            self._copy(push)
            return []
        slab.pushes[push.number] = self._pushes[push.key] = push
        acquire = AcquireNeurons(-push.number, self._epoch, request.layer, request.ids, [], request.timeout_s, True)
        return self.divert(self._leasings[session.model.name].acquire(session, push.key, acquire))

    def _slots_of(self, session: Session, request: PushNeurons) -> bytes:
        """Where every bundle is for good.

        Raises:
            BadRequest: not neurons of this model.
        """
        profile, ids = session.model.profile, _numbers(request.ids)
        if request.layer >= profile.num_layers or (len(ids) and int(ids.max()) >= profile.ffn_dimension):
            raise BadRequest(
                f"layer {request.layer}, {len(ids)} neurons: the model has {profile.num_layers} layers of "
                f"{profile.ffn_dimension} neurons"
            )
        return (ids.astype(np.int64) + request.layer * profile.ffn_dimension).astype("<u4").tobytes()

    def forget(self, session: Session) -> None:
        """The session is over; its leases are ended by the leasing."""
        self._lost.pop(session, None)
        slab = self._slabs.get(session)
        if slab is None:
            return
        for push in slab.pushes.values():
            del self._pushes[push.key]
        slab.pushes.clear()
        del self._slabs[session]
        if slab.state != "closing":
            slab.state = "closing"
            self._ask(slab, CloseSlab(next(self._numbers), slab.number), slab)

    # --- what is told

    def divert(self, out: Iterable[Outgoing]) -> list[Outgoing]:
        """What is for lines; what the leasing says of pushes is taken."""
        rest: list[Outgoing] = []
        for key, message in out:
            push = self._pushes.get(key)
            if push is not None:
                rest += self._on_leasing(push, message)
            elif len(key) != _KEY_NBYTES:  # else it is over already
                rest.append((key, message))
        return rest

    def _on_leasing(self, push: Push, message: Message) -> list[Outgoing]:
        match message:
            case NeuronsLeased():
                push.slots, push.counts = message.slots, message.counts
            case NeuronsReady():
                push.slots, push.counts = push.slots or message.slots, push.counts or message.counts
                self._copy(push)
            case ErrorReply():  # of the disk, or of the request: the slab stays
                return self._over(push, ErrorReply(push.request.request_id, self._epoch, message.code, message.text))
        return []

    def _copy(self, push: Push) -> None:
        push.state = "asked"
        self._ask(push.slab, CopyBundles(push.number, push.slab.number, push.slots, push.request.places), push)

    def _ask(self, slab: Slab, message: CopyBundles | CloseSlab, about: object) -> None:
        if slab.child.desk.is_usable:  # else it is about to be gone, and all of it will be answered
            self._children.ask(slab.child, Ask(message, about))

    def _on_told(self, told: Told) -> None:
        about, message = told
        if isinstance(about, Push):
            self.send(self._of_push(about, message))
        elif isinstance(about, Slab):
            self.send(self._of_slab(about, message))

    def _of_push(self, push: Push, message: Message) -> list[Outgoing]:
        record, session = push.slab.child.record, push.slab.session
        match message:
            case BundlesRecorded() if push.key in self._pushes:
                push.state = "recorded"
                return [(push.line, NeuronsPushed(push.request.request_id, self._epoch, push.counts))]
            case BundlesCopied():
                record.pushes += 1
                record.nbytes_pushed += len(push.slots) // 4 * session.model.profile.bundle_nbytes
                return self._over(push) if push.key in self._pushes else []
            case ErrorReply() if push.key in self._pushes:
                record.errors += 1
                record.last_error = message.text
                why = f"the server's GPU child refused: {message.text}; register the device again, or fetch instead"
                return self._lose(push.slab, ServerError(why))
        return []

    def _of_slab(self, slab: Slab, message: Message) -> list[Outgoing]:
        match message:
            case SlabOpened():
                if slab.state == "opening":
                    slab.state = "open"
                    return [(slab.line, DeviceRegistered(slab.request_id, self._epoch, message.event))]
            case SlabClosed():
                slab.child.slabs.discard(slab.number)
                if self._slabs.get(slab.session) is slab:
                    del self._slabs[slab.session]
                    return [(slab.line, DeviceUnregistered(slab.request_id, self._epoch))]
            case ErrorReply() if slab.state == "opening":
                slab.child.slabs.discard(slab.number)
                del self._slabs[slab.session]
                slab.session.last_error = slab.child.record.last_error = message.text
                slab.child.record.errors += 1
                return [(slab.line, ErrorReply(slab.request_id, self._epoch, message.code, message.text))]
        return []

    def _on_gone(self, child: GpuChild, unanswered: list[object]) -> None:
        """Nothing of it writes to any slab any more."""
        why = f"the server's child on {format_uuid(child.uuid)} has ended: {child.desk.why}"
        for slab in [slab for slab in self._slabs.values() if slab.child is child]:
            n_lost = sum(push.state == "recorded" for push in slab.pushes.values())
            lost = f"; {n_lost} pushes were not copied to their end, compute their step again" if n_lost else ""
            self.send(self._lose(slab, ServerError(f"{why}{lost}; register the device again, or fetch instead")))

    # --- ends

    def _close(self, slab: Slab, line: bytes, request_id: int) -> list[Outgoing]:
        """What waits for the arena is given up; what the child was asked comes before it closes."""
        slab.state, slab.line, slab.request_id = "closing", line, request_id
        out: list[Outgoing] = []
        for push in list(slab.pushes.values()):
            if push.state == "leased":  # still: the end of one may begin the next
                out += self._over(push, self._error(push.request.request_id, BadRequest("the slab is being closed")))
        self._ask(slab, CloseSlab(next(self._numbers), slab.number), slab)
        return out

    def _lose(self, slab: Slab, error: ServerError) -> list[Outgoing]:
        """The slab is no more, and not by its session's will."""
        if self._slabs.get(slab.session) is not slab:
            return []
        del self._slabs[slab.session]
        slab.child.slabs.discard(slab.number)
        self._lost[slab.session] = error
        slab.session.last_error = str(error)
        out: list[Outgoing] = []
        for push in list(slab.pushes.values()):
            is_answered = push.state == "recorded"
            out += self._over(push, None if is_answered else self._error(push.request.request_id, error))
        match slab.state:
            case "opening":
                out.append((slab.line, self._error(slab.request_id, error)))
            case "closing":
                out.append((slab.line, DeviceUnregistered(slab.request_id, self._epoch)))
        return out

    def _over(self, push: Push, reply: Message | None = None) -> list[Outgoing]:
        """A push is over, and so is its lease; begins what has waited for that."""
        del self._pushes[push.key], push.slab.pushes[push.number]
        out: list[Outgoing] = [] if reply is None else [(push.line, reply)]
        session = push.slab.session
        if not session.model.is_resident:
            out += self.divert(self._leasings[session.model.name].release(session, [-push.number]))
        return out

    def _error(self, request_id: int, error: SparseFlowError) -> ErrorReply:
        return ErrorReply(request_id, self._epoch, error.wire_code, str(error))


def _numbers(content: bytes) -> NDArray[np.uint32]:
    """
    Raises:
        BadRequest: not whole numbers of 4 bytes.
    """
    if len(content) % 4:
        raise BadRequest(f"neuron ids or places in {len(content)} bytes; send 4 bytes each")
    return np.frombuffer(content, "<u4")
