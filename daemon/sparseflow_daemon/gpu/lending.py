"""Dense weights and predictors that a child of the server keeps on a GPU, lent to sessions. Requests in, replies out.

    off                                       the server was not told to
    loading --RegionsLoaded--> lent --the child dies--> failed        for each model; a child of its own for all
        \\__________ErrorReply, or the child dies__________/

A child that died is started anew for the next who wants to borrow; what it had lent is lost to whom it was lent.
"""

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sparseflow.cuda.tickets import format_uuid
from sparseflow.errors import BadRequest, ServerError, SparseFlowError
from sparseflow.protocol.device_messages import (
    BorrowDense,
    DenseLent,
    DenseReturned,
    LoadRegions,
    RegionsLoaded,
    ReturnDense,
)
from sparseflow.protocol.messages import ErrorReply, Message
from sparseflow_daemon.gpu.children import GpuChild, GpuChildren
from sparseflow_daemon.gpu.desk import Ask, Told
from sparseflow_daemon.leasing import Outgoing
from sparseflow_daemon.served_model import ServedModel
from sparseflow_daemon.sessions import Session

_log = logging.getLogger(__name__)
_REGIONS = ("dense", "predictors")
_SLOWEST_BYTES_PER_S = 100 << 20  # of copying them to the GPU


@dataclass(eq=False)
class Lent:
    """One model's. child: that has them, or is loading them."""

    model: ServedModel
    child: GpuChild
    state: Literal["loading", "lent", "failed"] = "loading"
    slab: dict[str, Any] = field(default_factory=dict)
    offsets: dict[str, Any] = field(default_factory=dict)
    waiting: list[tuple[Session, bytes, BorrowDense]] = field(default_factory=list)
    borrowers: set[Session] = field(default_factory=set)


class Lending:
    """Of all models, on one GPU."""

    def __init__(self, children: GpuChildren, device: int | None, epoch: int) -> None:
        """
        Args:
            device: the GPU's number; None: nothing is lent.
        """
        self.send: Callable[[Iterable[Outgoing]], None] = lambda out: None
        """Delivers what comes later."""
        self.last_error: str | None = None
        """Why something is not lent that should be."""
        self._children, self._device, self._epoch = children, device, epoch
        self._numbers = itertools.count(1)
        self._child: GpuChild | None = None
        self._lent: dict[str, Lent] = {}
        children.on_told.append(self._on_told)
        children.on_gone.append(self._on_gone)

    def begin(self, model: ServedModel) -> None:
        """A model is in the server's memory: have it copied to the GPU."""
        if self._device is None:
            return
        try:
            self._load(model)
        except ServerError as error:
            self.last_error = str(error)

    def _load(self, model: ServedModel) -> Lent:
        assert self._device is not None
        if self._child is None or not self._child.desk.is_usable:
            self._child = self._children.start_lender(self._device)
        lent = self._lent[model.name] = Lent(model, self._child)
        regions = [model.regions[name] for name in _REGIONS]
        described = [{"name": name, "nbytes": model.regions[name].nbytes} for name in _REGIONS]
        message = LoadRegions(next(self._numbers), model.name, described)
        more_time_s = sum(region.nbytes for region in regions) / _SLOWEST_BYTES_PER_S
        ask = Ask(message, lent, tuple(region.fd for region in regions), more_time_s=more_time_s)
        self._children.ask(self._child, ask)
        return lent

    # --- requests

    def borrow(self, session: Session, line: bytes, request: BorrowDense) -> list[Outgoing]:
        """Answered once they are on the GPU.

        Raises:
            BadRequest: nothing is lent, or on another GPU. ServerError: no child can be started.
        """
        if self._device is None:
            raise BadRequest("this server lends nothing on a GPU; start it with --share-dense-gpu, or copy the weights")
        lent = self._lent.get(session.model.name)
        if lent is None or lent.state == "failed":
            lent = self._load(session.model)
        if lent.state == "loading":
            lent.waiting.append((session, line, request))
            return []
        return [self._lend(lent, session, line, request)]

    def _lend(self, lent: Lent, session: Session, line: bytes, request: BorrowDense) -> Outgoing:
        if request.device_uuid != lent.child.desk.device_uuid:
            theirs, ours = format_uuid(request.device_uuid), format_uuid(lent.child.desk.device_uuid)
            error = BadRequest(f"the server lends on {ours}, not on {theirs}; use that GPU, or copy the weights")
            return line, self._error(request.request_id, error)
        lent.borrowers.add(session)
        return line, DenseLent(request.request_id, self._epoch, lent.slab, lent.offsets)

    def give_back(self, session: Session, line: bytes, request: ReturnDense) -> list[Outgoing]:
        """Answered at once, whether anything was lent or not."""
        self.forget(session)
        return [(line, DenseReturned(request.request_id, self._epoch))]

    def forget(self, session: Session) -> None:
        """The session has returned everything, or its process is dead."""
        for lent in self._lent.values():
            lent.borrowers.discard(session)
            lent.waiting = [each for each in lent.waiting if each[0] is not session]

    @property
    def borrowers(self) -> set[Session]:
        """Sessions that may read what lies on the GPU."""
        return {session for lent in self._lent.values() for session in lent.borrowers}

    @property
    def pidfd(self) -> int:
        """Of the child that has it all."""
        assert self._child is not None  # it has lent something
        return self._child.pidfd

    # --- what is told

    def _on_told(self, told: Told) -> None:
        lent, message = told
        if not isinstance(lent, Lent):
            return
        if isinstance(message, RegionsLoaded):
            lent.state, lent.slab, lent.offsets = "lent", message.slab, message.offsets
            self.last_error = None
            waiting, lent.waiting = lent.waiting, []
            self.send([self._lend(lent, *each) for each in waiting])
        elif isinstance(message, ErrorReply):
            self._fail(lent, message.text)

    def _on_gone(self, child: GpuChild, unanswered: list[object]) -> None:
        if child is not self._child:
            return
        self._child = None
        for lent in self._lent.values():
            if lent.child is child and lent.state != "failed":
                n_lost = len(lent.borrowers)
                lent.borrowers.clear()
                lost = f"; {n_lost} sessions have lost what it had lent" if n_lost else ""
                self._fail(lent, f"the child that has them has ended: {child.desk.why}{lost}")

    def _fail(self, lent: Lent, why: str) -> None:
        lent.state = "failed"
        self.last_error = f"{lent.model.name}: weights are not on GPU {self._device}: {why}"
        _log.error("%s", self.last_error, extra={"model": lent.model.name})
        error = ServerError(f"{self.last_error}; copy the weights instead")
        waiting, lent.waiting = lent.waiting, []
        self.send([(line, self._error(request.request_id, error)) for _, line, request in waiting])

    def status(self) -> dict[str, Any] | None:
        """What status tells; None where nothing is to be lent."""
        if self._device is None:
            return None
        child = self._child
        return {
            "device": self._device,
            "uuid": format_uuid(child.desk.device_uuid) if child is not None and child.desk.device_uuid else None,
            "pid": None if child is None else child.process.pid,
            "models": {
                name: {"state": lent.state, "nbytes": lent.slab.get("nbytes"), "borrowers": len(lent.borrowers)}
                for name, lent in self._lent.items()
            },
            "last_error": self.last_error,
        }

    def _error(self, request_id: int, error: SparseFlowError) -> Message:
        return ErrorReply(request_id, self._epoch, error.wire_code, str(error))
