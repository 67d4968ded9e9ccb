"""Device memory and events that one process lends to another, by handles that any socket can carry.

    exporting process                          importing process
    ExportedSlab: exported  --- SlabTicket -->  OpenedSlab: opened
                                                written on a stream
    OpenedEvent: opened    <-- EventTicket ---  ExportedEvent: exported, recorded on that stream
    its own stream held back; closed  --------> closed
    closed, then the memory is freed  <-------  closed

An exporter outlives those who opened: memory that is freed, or an event that is destroyed, before they close is
undefined behaviour. A ticket of an event is given after recording: to wait for one that was not recorded is no wait.
Both processes use the same GPU. Each object is of one process: used in a forked child or after `close` it raises.
"""

import time
from functools import partial
from types import TracebackType
from typing import Any, Self

from sparseflow.cuda.driver import Driver
from sparseflow.cuda.tickets import EventTicket, SlabTicket, format_uuid
from sparseflow.cuda.undo import Undo
from sparseflow.errors import BadRequest, DeviceError

_CLOSE_TIMEOUT_S = 10.0
_FIRST_POLL_S, _LONGEST_POLL_S = 20e-6, 1e-3


class _Owner:
    """Of something of the driver's: usable until closed, by this process alone."""

    def __init__(self, driver: Driver, what: str) -> None:
        self._driver = driver
        self._undo = Undo(self, what)

    def close(self) -> None:
        """Give it back. May be called twice; in a forked child it does nothing.

        Raises:
            DeviceError: that failed; it is closed all the same.
        """
        if errors := self._undo.run():
            raise errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ExportedSlab(_Owner):
    """Device memory of this process that another may open. It stays its owner's, who frees it after `close`."""

    def __init__(self, driver: Driver, address: int, nbytes: int) -> None:
        """
        Args:
            address, nbytes: device memory from cuMemAlloc, such as torch's allocator hands out where it has no
                expandable segments. Whoever opens it can reach the whole allocation that it lies in.

        Raises:
            BadRequest: it is not in one allocation. DeviceError: that allocation has no handle.
        """
        super().__init__(driver, "the exported slab")
        found = driver.address_range(address)
        offset = address - found.base
        if nbytes < 1 or offset < 0 or offset + nbytes > found.nbytes:
            raise BadRequest(
                f"slab of {nbytes} bytes at {address:#x}: its allocation has {found.nbytes} bytes at {found.base:#x}; "
                "export memory of one allocation"
            )
        try:
            handle = driver.ipc_get_mem_handle(found.base)
        except DeviceError as error:
            raise _further(
                error, "memory to share is allocated without expandable segments (PYTORCH_CUDA_ALLOC_CONF)"
            ) from error
        self._ticket = SlabTicket(handle, offset, nbytes, driver.device_uuid())

    @property
    def ticket(self) -> SlabTicket:
        """For the process that is to open it.

        Raises:
            BadRequest: closed, or a forked child.
        """
        self._undo.require()
        return self._ticket


class OpenedSlab(_Owner):
    """Another process's device memory, mapped here."""

    def __init__(self, driver: Driver, ticket: SlabTicket, stream: int) -> None:
        """
        Args:
            stream: the one that uses it; it is destroyed after this is closed.

        Raises:
            BadRequest: the ticket is of another GPU, of no memory that is there now, or of more than there is.
        """
        super().__init__(driver, "the opened slab")
        self.nbytes = ticket.nbytes
        self._stream = stream
        _require_same_device(driver, ticket.device_uuid)
        base = _opened("slab", partial(driver.ipc_open_mem_handle, ticket.handle))
        self._undo.add(partial(_unmap, driver, base, stream))
        try:
            found = driver.address_range(base)
            if ticket.offset + ticket.nbytes > found.base + found.nbytes - base:
                raise BadRequest(
                    f"slab of {ticket.nbytes} bytes at {ticket.offset}: its allocation ends at "
                    f"{found.base + found.nbytes - base}; export what is there"
                )
        except BaseException:
            self._undo.run()
            raise
        self._address = base + ticket.offset

    @property
    def address(self) -> int:
        """Where it begins here.

        Raises:
            BadRequest: closed, or a forked child.
        """
        self._undo.require()
        return self._address

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Wait for what is on the stream, then unmap. May be called twice; in a forked child it does nothing.

        Raises:
            DeviceError: either failed. If the wait takes longer than `timeout_s` the slab is still open: end the
                process rather than unmap what the GPU may be writing.
        """
        failure: DeviceError | None = None
        if self._undo.has_steps:
            try:
                wait_until_done(self._driver, self._stream, timeout_s)
            except TimeoutError as error:
                raise DeviceError(f"{error}; the slab stays open, end this process") from error
            except DeviceError as error:
                failure = error
        errors = self._undo.run()
        if failure or errors:
            raise failure or errors[0]


class ExportedEvent(_Owner):
    """An event of this process for another to wait for."""

    def __init__(self, driver: Driver) -> None:
        """
        Raises:
            DeviceError: there is none to be had, or none that others can open.
        """
        super().__init__(driver, "the exported event")
        self._event = driver.event_create()
        self._undo.add(partial(driver.event_destroy, self._event))
        self._is_recorded = False
        try:
            self._ticket = EventTicket(driver.ipc_get_event_handle(self._event), driver.device_uuid())
        except BaseException:
            self._undo.run()
            raise

    def record(self, stream: int) -> None:
        """It happens when all is done that is on the stream now. Again and again, as it is used again."""
        self._undo.require()
        self._driver.event_record(self._event, stream)
        self._is_recorded = True

    @property
    def ticket(self) -> EventTicket:
        """For the process that is to wait for it.

        Raises:
            BadRequest: never recorded, closed, or a forked child.
        """
        self._undo.require()
        if not self._is_recorded:
            raise BadRequest("the event was not recorded: nobody would wait for it; record it first")
        return self._ticket

    def is_done(self) -> bool:
        """Whether what was recorded last is done."""
        self._undo.require()
        return self._driver.event_query(self._event)


class OpenedEvent(_Owner):
    """Another process's event."""

    def __init__(self, driver: Driver, ticket: EventTicket) -> None:
        """
        Raises:
            BadRequest: the ticket is of another GPU, or of no event that is there now.
        """
        super().__init__(driver, "the opened event")
        _require_same_device(driver, ticket.device_uuid)
        self._event = _opened("event", partial(driver.ipc_open_event_handle, ticket.handle))
        self._undo.add(partial(driver.event_destroy, self._event))

    def hold_back(self, stream: int) -> None:
        """What comes later on the stream waits for what its owner recorded last."""
        self._undo.require()
        self._driver.stream_wait_event(stream, self._event)

    def is_done(self) -> bool:
        """Whether what was recorded last is done."""
        self._undo.require()
        return self._driver.event_query(self._event)


def wait_until_done(driver: Driver, stream: int, timeout_s: float) -> None:
    """Wait for all that is on a stream.

    Raises:
        TimeoutError: it takes longer. DeviceError: the work failed.
    """
    deadline, poll_s = time.monotonic() + timeout_s, _FIRST_POLL_S
    while not driver.stream_query(stream):
        if time.monotonic() > deadline:
            raise TimeoutError(f"work on the GPU did not end within {timeout_s:g} s")
        time.sleep(poll_s)
        poll_s = min(2 * poll_s, _LONGEST_POLL_S)


def _unmap(driver: Driver, base: int, stream: int) -> None:
    try:
        wait_until_done(driver, stream, _CLOSE_TIMEOUT_S)
    except TimeoutError as error:
        raise DeviceError(f"{error}; what it may be writing stays mapped") from error
    except DeviceError:
        driver.ipc_close_mem_handle(base)
        raise
    driver.ipc_close_mem_handle(base)


def _opened(what: str, call: Any) -> int:
    try:
        address: int = call()
    except DeviceError as error:
        raise BadRequest(
            f"{what}: its handle cannot be opened ({error}); it must come from a living process, of another "
            "pid, that uses the same GPU and has not freed it"
        ) from error
    return address


def _require_same_device(driver: Driver, uuid: bytes) -> None:
    if (own := driver.device_uuid()) != uuid:
        raise BadRequest(
            f"the ticket is of GPU {format_uuid(uuid)}, this process uses {format_uuid(own)}; both must use the same"
        )


def _further(error: DeviceError, advice: str) -> DeviceError:
    return DeviceError(f"{error}; {advice}", name=error.name, number=error.number)
