"""In a GPU child: one client's slab, and copying bundles to it, through memory that the GPU can read by itself.

    arena (mapped, read only) --CPU--> half A, half B (page-locked, in turn) --GPU's stream--> places of the slab

A half is filled again when what was copied from it is done. After the last copy of a push the event is recorded for
which the client's own stream waits.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sparseflow.cuda.driver import Driver
from sparseflow.cuda.ipc import ExportedEvent, OpenedSlab
from sparseflow.cuda.tickets import EventTicket, SlabTicket
from sparseflow.errors import BadRequest, DeviceError
from sparseflow.utils.sizes import format_size

STAGING_NBYTES = 8 << 20  # both halves of one client's
_COPY_TIMEOUT_S = 60.0  # whoever asked has lost patience long before
_FIRST_POLL_S, _LONGEST_POLL_S = 20e-6, 1e-3


class ClientSlab:
    """Open until `close`; used by one thread."""

    def __init__(
        self, driver: Driver, ticket: SlabTicket, arena: NDArray[np.uint8], staging_nbytes: int = STAGING_NBYTES
    ) -> None:
        """
        Args:
            arena: (n_slots, slot_nbytes), which another process fills.

        Raises:
            BadRequest: the ticket opens nothing, or no whole bundles. DeviceError: the device has no room, or fails.
        """
        self._driver, self._arena = driver, arena
        slot_nbytes = arena.shape[1]
        if ticket.nbytes % slot_nbytes:
            raise BadRequest(
                f"slab of {format_size(ticket.nbytes)}: bundles have {slot_nbytes} bytes; export whole ones"
            )
        self._n_places = ticket.nbytes // slot_nbytes
        self._n_half = max(1, staging_nbytes // 2 // slot_nbytes)
        self._turn = 0
        self._n_recorded, self._n_done = 0, 0  # copies from a half, counted
        self._last_of_half = [0, 0]  # which of these was the last from it
        self._copying: deque[tuple[int, int]] = deque()  # pushes, and the last copy of each
        with ExitStack() as stack:
            self._stream = driver.stream_create()
            stack.callback(driver.stream_destroy, self._stream)
            self._halves = [self._host_memory(stack) for _ in range(2)]
            self._half_events = [self._local_event(stack) for _ in range(2)]
            self._event = stack.enter_context(ExportedEvent(driver))
            self._event.record(self._stream)
            self._slab = OpenedSlab(driver, ticket, self._stream)
            self._rest = stack.pop_all()

    def _host_memory(self, stack: ExitStack) -> NDArray[np.uint8]:
        """(n, slot_nbytes), page-locked."""
        nbytes = self._n_half * self._arena.shape[1]
        address = self._driver.host_alloc(nbytes)
        stack.callback(self._driver.host_free, address)
        content = np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), np.uint8)
        return content.reshape(self._n_half, -1)

    def _local_event(self, stack: ExitStack) -> int:
        event = self._driver.event_create()
        stack.callback(self._driver.event_destroy, event)
        return event

    @property
    def event_ticket(self) -> EventTicket:
        """Of the event that is recorded after the copies of each push."""
        return self._event.ticket

    def copy(self, push: int, slots: NDArray[np.uint32], places: NDArray[np.uint32]) -> None:
        """Begin to copy, and record the event behind it. When it returns, the arena has been read.

        Args:
            push: what `copied` calls it.
            slots, places: (n,), of the arena and of the slab; no place twice.

        Raises:
            BadRequest: closed, or no such slot or place. DeviceError: the device fails; some may be copied.
        """
        address = self._slab.address  # it is open
        self._require(slots, places)
        order = np.argsort(places, kind="stable")  # so that neighbours go in one copy
        slots, places = slots[order], places[order]
        for first in range(0, len(places), self._n_half):
            self._copy_half(slots[first : first + self._n_half], places[first : first + self._n_half], address)
        self._event.record(self._stream)
        self._copying.append((push, self._n_recorded))

    def _copy_half(self, slots: NDArray[np.uint32], places: NDArray[np.uint32], address: int) -> None:
        half, self._turn = self._turn, 1 - self._turn
        self._wait_for(half)
        memory, nbytes = self._halves[half], self._arena.shape[1]
        np.take(self._arena, slots, axis=0, out=memory[: len(slots)], mode="clip")  # other modes copy once more
        here = memory.ctypes.data
        begins = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        for begin, end in pairwise(begins):
            to = address + int(places[begin]) * nbytes
            self._driver.copy_to_device(to, here + begin * nbytes, (end - begin) * nbytes, self._stream)
        self._driver.event_record(self._half_events[half], self._stream)
        self._n_recorded += 1
        self._last_of_half[half] = self._n_recorded

    def copied(self) -> list[int]:
        """Pushes whose copies are done, each told once.

        Raises:
            DeviceError: copying failed.
        """
        if not self._copying:
            return []
        for half in (0, 1):
            self._look_at(half)
        done = []
        while self._copying and self._copying[0][1] <= self._n_done:
            done.append(self._copying.popleft()[0])
        return done

    @property
    def is_copying(self) -> bool:
        """Whether `copied` has something to tell, now or later."""
        return bool(self._copying)

    def close(self, timeout_s: float) -> list[int]:
        """Wait until nothing writes to the slab, and give everything back. May be called twice.

        Returns pushes that are copied by now, and were not told as that.

        Raises:
            DeviceError: that failed, or takes longer; then end this process.
        """
        self._slab.close(timeout_s)
        self._rest.close()
        copied = [push for push, _ in self._copying]
        self._copying.clear()
        return copied

    def _look_at(self, half: int) -> bool:
        """Whether nothing is under way from a half."""
        last = self._last_of_half[half]
        if last <= self._n_done or self._driver.event_query(self._half_events[half]):
            self._n_done = max(self._n_done, last)
            return True
        return False

    def _wait_for(self, half: int) -> None:
        if not _comes_true(partial(self._look_at, half), _COPY_TIMEOUT_S):
            raise DeviceError(f"a copy to the GPU did not end within {_COPY_TIMEOUT_S:g} s; look at the GPU's log")

    def _require(self, slots: NDArray[np.uint32], places: NDArray[np.uint32]) -> None:
        if len(slots) != len(places):
            raise BadRequest(f"{len(slots)} bundles for {len(places)} places; name one each")
        for what, numbers, limit in (("slot", slots, len(self._arena)), ("place", places, self._n_places)):
            if len(numbers) and int(numbers.max()) >= limit:
                raise BadRequest(f"{what} {numbers.max()}: there are {limit}")


def _comes_true(question: Callable[[], bool], timeout_s: float) -> bool:
    deadline, poll_s = time.monotonic() + timeout_s, _FIRST_POLL_S
    while not question():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
        poll_s = min(2 * poll_s, _LONGEST_POLL_S)
    return True
