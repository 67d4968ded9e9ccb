"""A fetch through a server: one request; asked of the successor where the server ends meanwhile."""

import time
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.weight_source import FETCH_TIMEOUT_S, Early, HostBundles
from sparseflow.errors import Draining, Resync, ServerError, ServerNotRunning, of_wire_code
from sparseflow.protocol.messages import ErrorReply, NeuronsLeased, NeuronsReady

if TYPE_CHECKING:
    from sparseflow.client.weight_client import WeightClient

_NONE = np.empty(0, np.uint32)


class ServedFetch:
    """A fetch of the server's engine: asked for when it is made, leased until it is released."""

    __slots__ = ("_client", "_ids", "_is_ready", "_keep", "_layer", "_line", "_missing", "_request_id", "_slots")

    def __init__(self, client: "WeightClient", layer: int, ids: NDArray[np.uint32], keep: bool) -> None:
        self._client, self._layer, self._ids, self._keep = client, layer, ids, keep
        self._ask()

    def early(self) -> Early:
        """As `Fetch.early`; waits until the server says where the bundles are leased."""
        deadline_s = time.monotonic() + FETCH_TIMEOUT_S
        while self._slots is None:
            self._hear(deadline_s)
        positions = np.arange(len(self._slots))
        if len(self._missing):
            is_there = np.ones(len(self._slots), bool)
            is_there[self._missing] = False
            positions = is_there.nonzero()[0]
        return Early(HostBundles(self._line.attachment.bundles, self._slots[positions]), positions)

    def wait(self, timeout_s: float) -> HostBundles:
        """As `Fetch.wait`."""
        begin_s = time.monotonic()
        while not self._is_ready or self._slots is None:
            self._hear(begin_s + timeout_s)
        self._client.note_wait(time.monotonic() - begin_s)
        return HostBundles(self._line.attachment.bundles, self._slots)

    def release(self) -> None:
        """As `Fetch.release`; told with the next request, after the last layer at once."""
        self._release(at_once=self._layer + 1 == self._client.profile.num_layers)

    def __enter__(self) -> "ServedFetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.release()
        else:
            self._release(at_once=True)

    def _ask(self) -> None:
        self._slots: NDArray[np.uint32] | None = None
        self._missing = _NONE
        self._is_ready = False
        while True:
            attachment = self._client.attachment
            try:
                self._line = self._client.line()
                self._request_id = self._line.acquire(self._layer, self._ids, FETCH_TIMEOUT_S, keep=self._keep)
                return
            except ServerNotRunning:
                self._client.recover(attachment)

    def _hear(self, deadline_s: float) -> None:
        """Take one more reply, from this server or from the one that takes its place."""
        try:
            reply = self._line.reply(self._request_id, deadline_s)
        except ServerNotRunning:
            self._ask_successor()
            return
        if isinstance(reply, ErrorReply):
            error = of_wire_code(reply.code, reply.text)
            if not isinstance(error, Resync | Draining):
                raise error
            self._ask_successor()
            return
        if not isinstance(reply, NeuronsLeased | NeuronsReady):
            raise ServerError(f"the server answered a fetch with {type(reply).__name__}; is it of our version?")
        if self._slots is None:
            self._slots = self._checked(reply.slots, len(self._line.attachment.bundles))
            if len(self._slots) != len(self._ids):
                raise ServerError(f"the server leased {len(self._slots)} slots for {len(self._ids)} neurons")
        if isinstance(reply, NeuronsLeased):
            self._missing = self._checked(reply.missing, len(self._ids))
        else:
            self._is_ready = True

    def _checked(self, content: bytes, limit: int) -> NDArray[np.uint32]:
        numbers = np.frombuffer(content, "<u4")
        if len(numbers) and int(numbers.max()) >= limit:
            raise ServerError(f"the server named {numbers.max()} of {limit} slots or neurons; is it of our version?")
        return numbers

    def _ask_successor(self) -> None:
        self._client.recover(self._line.attachment)
        self._ask()

    def _release(self, *, at_once: bool) -> None:
        request_id, self._request_id = self._request_id, 0
        if request_id and not self._line.attachment.is_over:
            try:
                self._line.release(request_id, at_once=at_once)
            except ServerError:  # it has ended, and its leases with it
                self._line.attachment.is_over = True
