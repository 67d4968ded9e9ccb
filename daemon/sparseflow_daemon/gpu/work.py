"""What a GPU child does for its server: messages in, messages out. No socket, no process: any driver will do."""

import logging
import os

import numpy as np
from numpy.typing import NDArray

from sparseflow.cuda.driver import Driver
from sparseflow.cuda.tickets import SlabTicket
from sparseflow.engine.mapping import Mapping
from sparseflow.errors import BadRequest, DeviceError, NotEnoughMemory, ServerError, SparseFlowError
from sparseflow.protocol.device_messages import (
    BundlesCopied,
    BundlesRecorded,
    CloseSlab,
    CopyBundles,
    LoadRegions,
    OpenSlab,
    RegionsLoaded,
    SlabClosed,
    SlabOpened,
)
from sparseflow.protocol.messages import ErrorReply, Message
from sparseflow_daemon.gpu.regions import LentRegions
from sparseflow_daemon.gpu.slab import ClientSlab

_log = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 5.0


class GpuBroken(DeviceError):
    """Nothing more can be done by this process: it has to end."""


class GpuWork:
    """Slabs of clients, by the numbers that the server gives them, and the arenas that they are filled from."""

    def __init__(self, driver: Driver, close_timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """
        Args:
            close_timeout_s: how long what is under way to a slab may take until it is closed.
        """
        self._driver, self._close_timeout_s = driver, close_timeout_s
        self._slabs: dict[int, ClientSlab] = {}
        self._arenas: dict[str, NDArray[np.uint8]] = {}
        self._lent: dict[str, LentRegions] = {}

    def handle(self, message: Message, descriptors: list[int]) -> list[Message]:
        """Replies to one message. Descriptors are closed.

        Raises:
            GpuBroken: this process cannot go on.
        """
        request_id = getattr(message, "request_id", 0)
        try:
            return self._handle(message, descriptors)
        except GpuBroken:
            raise
        except SparseFlowError as error:
            return [self._refusal(request_id, error)]
        finally:
            for fd in descriptors:
                os.close(fd)

    def _handle(self, message: Message, descriptors: list[int]) -> list[Message]:
        match message:
            case OpenSlab():
                return [self._open(message, descriptors)]
            case CopyBundles():
                return self._copy(message)
            case CloseSlab():
                return [*self._close(message.slab), SlabClosed(message.request_id)]
            case LoadRegions():
                return [self._load(message, descriptors)]
        raise ServerError(f"{type(message).__name__} is not taken by a GPU child")

    def copied(self) -> list[Message]:
        """What came to its end since the last time.

        Raises:
            GpuBroken: this process cannot go on.
        """
        try:
            return [BundlesCopied(push) for slab in self._slabs.values() for push in slab.copied()]
        except DeviceError as error:  # of copies that had begun: whose bytes came is not known
            raise GpuBroken(f"copying failed: {error}") from error

    @property
    def is_copying(self) -> bool:
        """Whether `copied` has something to tell, now or later."""
        return any(slab.is_copying for slab in self._slabs.values())

    def close(self) -> None:
        """Close all slabs, and free what was lent: others have unmapped it by now. May be called twice.

        Raises:
            GpuBroken: the device does not come to an end.
        """
        for number in list(self._slabs):
            self._close(number)
        while self._lent:
            self._lent.popitem()[1].close()

    def _open(self, message: OpenSlab, descriptors: list[int]) -> Message:
        if message.slab in self._slabs:
            raise BadRequest(f"slab {message.slab} is open; close it first")
        arena = self._arena(message, descriptors)
        slab = ClientSlab(self._driver, SlabTicket.from_dict(message.ticket), arena)
        self._slabs[message.slab] = slab
        return SlabOpened(message.request_id, dict(slab.event_ticket.to_dict()))

    def _arena(self, message: OpenSlab, descriptors: list[int]) -> NDArray[np.uint8]:
        """(n_slots, slot_nbytes), mapped once for each model."""
        if message.model not in self._arenas:
            if len(descriptors) != 1:
                raise BadRequest(f"{len(descriptors)} descriptors; an arena has one")
            nbytes = message.n_slots * message.slot_nbytes
            try:
                mapping = Mapping(descriptors[0], nbytes, writable=False)
            except OSError as error:
                raise NotEnoughMemory(f"the arena of {nbytes} bytes cannot be mapped ({error.strerror})") from error
            content = np.frombuffer(mapping.content, np.uint8)
            self._arenas[message.model] = content.reshape(message.n_slots, message.slot_nbytes)
        return self._arenas[message.model]

    def _copy(self, message: CopyBundles) -> list[Message]:
        """Where it fails, the slab is closed before that is said."""
        slab = self._slabs.get(message.slab)
        if slab is None:
            raise BadRequest(f"slab {message.slab} is not open; register the device again")
        slots, places = (np.frombuffer(content, "<u4") for content in (message.slots, message.places))
        try:
            slab.copy(message.request_id, slots, places)
        except SparseFlowError as error:
            return [*self._close(message.slab), self._refusal(message.request_id, error)]
        return [BundlesRecorded(message.request_id)]

    def _close(self, number: int) -> list[Message]:
        """What was under way to it is copied by then."""
        slab = self._slabs.pop(number, None)
        if slab is None:
            return []
        try:
            return [BundlesCopied(push) for push in slab.close(self._close_timeout_s)]
        except DeviceError as error:
            raise GpuBroken(f"a slab cannot be closed: {error}") from error

    def _load(self, message: LoadRegions, descriptors: list[int]) -> Message:
        if message.model in self._lent:
            raise BadRequest(f"model {message.model} is loaded")
        names, sizes = ([region[key] for region in message.regions] for key in ("name", "nbytes"))
        lent = self._lent[message.model] = LentRegions(self._driver, names, sizes, descriptors)
        return RegionsLoaded(message.request_id, dict(lent.ticket.to_dict()), dict(lent.offsets))

    def _refusal(self, request_id: int, error: SparseFlowError) -> ErrorReply:
        """
        Raises:
            GpuBroken: it is an error that the device does not get over, which meets every later call.
        """
        if isinstance(error, DeviceError):
            try:
                self._driver.mem_info()
            except DeviceError as again:
                raise GpuBroken(str(error)) from again
        return ErrorReply(request_id, 0, error.wire_code, str(error))
