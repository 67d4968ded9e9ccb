"""Bundles that the server's child on a GPU copies to a slab of this process, where the GPU cannot read the arena.

The slab is device memory of this process, cut into places of one bundle each, and stays this process's. Where another
server takes the place of one that has ended, the slab is registered there too, and what was not pushed is pushed anew.
"""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseflow.client.attachment import Attachment
from sparseflow.client.line import Line
from sparseflow.cuda.driver import Driver
from sparseflow.cuda.ipc import ExportedSlab, OpenedEvent
from sparseflow.cuda.tickets import EventTicket
from sparseflow.cuda.undo import Undo
from sparseflow.errors import (
    BadRequest,
    Draining,
    Resync,
    ServerError,
    ServerNotRunning,
    SparseFlowError,
    of_wire_code,
)
from sparseflow.protocol.device_messages import (
    DeviceRegistered,
    DeviceUnregistered,
    NeuronsPushed,
    RegisterDevice,
    UnregisterDevice,
)
from sparseflow.protocol.messages import ErrorReply

if TYPE_CHECKING:
    from sparseflow.client.weight_client import WeightClient

REGISTER_TIMEOUT_S = 60.0  # the child has to start, and to make its context on the GPU
PUSH_TIMEOUT_S = 60.0
MOST_PUSHED = 16384  # of one push: what a packet holds
_UNREGISTER_TIMEOUT_S = 15.0


class DevicePush:
    """A slab that is registered with the server. Close it before the slab's memory is freed."""

    def __init__(
        self,
        client: "WeightClient",
        address: int,
        nbytes: int,
        driver: Driver,
        *,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """Register.

        Args:
            address, nbytes: of the slab, whole bundles.
            on_close: called at the end, once.

        Raises:
            BadRequest, DeviceError: the memory cannot be shared. ServerError: the server cannot push to it.
        """
        self._client, self._driver = client, driver
        self._lock = threading.Lock()
        self._undo = Undo(self, "the registered slab")
        self._undo.add(on_close)
        try:
            self._slab = ExportedSlab(driver, address, nbytes)
            self._undo.add(self._slab.close)
            self._attachment: Attachment | None = None
            self.line()
        except BaseException:
            self._undo.run()
            raise

    def push(self, layer: int, ids: NDArray[np.uint32], places: NDArray[np.uint32]) -> "DevicePushed":
        """As `WeightClient.push`."""
        self._undo.require()
        return DevicePushed(self, self._client, layer, ids, places)

    def line(self) -> tuple[Line, OpenedEvent]:
        """This thread's line to the server as it is now, and what its child records behind its copies.

        Raises:
            ServerError: it cannot push.
        """
        while True:
            attachment = self._client.attachment
            try:
                with self._lock:
                    self._undo.require()
                    line = self._client.line()
                    if line.attachment is not self._attachment:
                        self._event = self._register(line)
                        self._attachment = line.attachment
                    return line, self._event
            except (ServerNotRunning, Draining, Resync):
                self._client.recover(attachment)

    def close(self) -> None:
        """Wait until nothing is written to the slab any more. May be called twice.

        Raises:
            ServerError: the server does not say so; then the memory may be written to until it has ended.
        """
        if not self._undo.has_steps:
            return
        attachment = self._client.attachment
        try:
            if self._attachment is attachment and not attachment.has_ended():
                line = self._client.line()
                request_id = line.ask(UnregisterDevice)
                reply = line.reply(request_id, time.monotonic() + _UNREGISTER_TIMEOUT_S)
                if not isinstance(reply, DeviceUnregistered):
                    raise _error(reply)
        except ServerNotRunning:
            pass  # its child has ended with it
        finally:
            self._undo.run()

    def _register(self, line: Line) -> OpenedEvent:
        ticket = dict(self._slab.ticket.to_dict())
        request_id = line.ask(lambda request_id, epoch: RegisterDevice(request_id, epoch, ticket))
        reply = line.reply(request_id, time.monotonic() + REGISTER_TIMEOUT_S)
        if not isinstance(reply, DeviceRegistered):
            raise _error(reply)
        event = OpenedEvent(self._driver, EventTicket.from_dict(reply.event))
        self._undo.add(event.close)  # not before the end: another thread may be about to wait for it
        return event


class DevicePushed:
    """A push that was asked for."""

    __slots__ = ("_client", "_event", "_ids", "_layer", "_line", "_places", "_push", "_request_id")

    def __init__(
        self, push: DevicePush, client: "WeightClient", layer: int, ids: NDArray[np.uint32], places: NDArray[np.uint32]
    ) -> None:
        if len(ids) != len(places) or len(ids) > MOST_PUSHED:
            raise BadRequest(f"{len(ids)} neurons, {len(places)} places: as many of each, at most {MOST_PUSHED}")
        self._push, self._client = push, client
        self._layer = layer
        self._ids, self._places = ids.astype("<u4", copy=False), places.astype("<u4", copy=False)
        self._ask()

    def wait(self, timeout_s: float, stream: int = 0) -> None:
        """Wait until the copies have begun; what comes later on the stream waits until they are done.

        Args:
            stream: of the driver this was opened with, such as torch.cuda.current_stream().cuda_stream.

        Raises:
            NoAnswer: they have not within `timeout_s`; they may begin yet.
            ServerError: the server cannot push any more: nothing is written to the slab from now on, what its places
                hold is not known, and to push again needs `open_push`.
            DiskError, ShardCorrupt, ArenaBusy, BadRequest: of this push only.
        """
        deadline_s = time.monotonic() + timeout_s
        begin_s = time.monotonic()
        while True:
            try:
                reply = self._line.reply(self._request_id, deadline_s)
            except ServerNotRunning:
                self._ask_successor()
                continue
            if isinstance(reply, NeuronsPushed):
                break
            if isinstance(reply, ErrorReply) and reply.code in (Resync.wire_code, Draining.wire_code):
                self._ask_successor()
                continue
            raise _error(reply)
        self._client.note_wait(time.monotonic() - begin_s)
        self._event.hold_back(stream)

    def _ask(self) -> None:
        while True:
            self._line, self._event = self._push.line()
            try:
                self._request_id = self._line.push(self._layer, self._ids, self._places, PUSH_TIMEOUT_S)
                return
            except ServerNotRunning:
                self._client.recover(self._line.attachment)

    def _ask_successor(self) -> None:
        self._client.recover(self._line.attachment)
        self._ask()


def _error(reply: object) -> SparseFlowError:
    if isinstance(reply, ErrorReply):
        return of_wire_code(reply.code, reply.text)
    return ServerError(f"the server answered with {type(reply).__name__}; is it of our version?")
