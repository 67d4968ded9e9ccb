"""The weight source of a served model: `WeightClient`, a session with a weight server, its memory mapped here.

Where the server keeps every bundle in its arena, slots are fixed and no message is sent. Where not, a fetch is one
request. When the server dies, memory that is mapped stays valid; what needs the server waits for another one to come up
under the same name, attaches to it, and goes on.
"""

import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from sparseflow.client.attachment import Attachment
from sparseflow.client.device_push import MOST_PUSHED, DevicePush, DevicePushed
from sparseflow.client.lent_dense import LentDense
from sparseflow.client.line import Line
from sparseflow.client.served_fetch import ServedFetch
from sparseflow.core.config import OffloadStrategy
from sparseflow.core.host_bundles import MappedFetch
from sparseflow.core.tensor_views import predictors_by_layer, view_tensors
from sparseflow.core.weight_source import Fetch, HostBundles, HostMemory, SourceStatus
from sparseflow.cuda.driver import CudaDriver, Driver
from sparseflow.engine.counts import FetchCounts, ReadTimes
from sparseflow.errors import (
    BadRequest,
    Draining,
    NoAnswer,
    ServerError,
    ServerNotRunning,
    SparseFlowError,
)
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.measured_recall import MeasuredRecall
from sparseflow.protocol.messages import TOLD_COUNTS
from sparseflow.store.manifest import DENSE_NAME

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
LOAD_TIMEOUT_S = 600.0
RECONNECT_TIMEOUT_S = 30.0
_RETRY_S = 0.05
_STRATEGY_FIELDS = ("aggressive_offload", "arena_eviction")
_CLIENTS: "weakref.WeakSet[WeightClient]" = weakref.WeakSet()


class WeightClient:
    """A model that a weight server serves: a `WeightSource`."""

    def __init__(
        self,
        name: str,
        model: str | None = None,
        *,
        expected: Mapping[str, Any] | None = None,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> None:
        """Attach.

        Args:
            name: of the server.
            model: which of its models; None: its only one.
            expected: fields that must be as given, such as `dtype` or `weights` (the fingerprint).
            load_timeout_s: how long to wait for a server that is still loading.
            reconnect_timeout_s: how long a fetch waits for another server, when this one has ended.

        Raises:
            ServerNotRunning, NoAnswer, NoSuchModel, FingerprintMismatch, ProtocolMismatch, ArenaBusy: as they say.
        """
        self.name = name
        self._reconnect_timeout_s = reconnect_timeout_s
        self._lock = threading.RLock()
        self._request_ids = itertools.count(1)
        self._own = threading.local()
        self._lines: weakref.WeakSet[Line] = weakref.WeakSet()  # each is kept by its thread
        self._is_closed = self._is_forked = False
        self._earlier = FetchCounts()  # of earlier sessions
        self._wait_s = 0.0
        self._looked_s = 0.0
        self._pushing: DevicePush | None = None
        self._lent: list[LentDense] = []
        self.attachment = Attachment(name, model or "", dict(expected or {}), load_timeout_s)
        self.model = self.attachment.welcome.model
        self.profile = self.attachment.profile
        names = ("dense", "predictors", "files")
        self._parts = {name: self.attachment.regions[name]["parts"] for name in names}
        self._maps = {name: self.attachment.mapped(name) for name in names}
        files = self._parts["files"]
        self.model_files: Mapping[str, bytes] = {name: bytes(self._part("files", name)) for name in files}
        self.attachment.close_descriptors()
        _CLIENTS.add(self)

    # --- the seam

    @property
    def fetch_limit(self) -> int:
        """As `WeightSource.fetch_limit`: this session's share of the arena."""
        return self.attachment.welcome.fetch_limit

    @property
    def read_times(self) -> ReadTimes:
        """As `WeightSource.read_times`, measured by the server."""
        return ReadTimes(self.attachment.welcome.layer_s, self.attachment.welcome.scattered_s)

    @property
    def strategy(self) -> OffloadStrategy:
        """What the server was started with."""
        return OffloadStrategy(**self.attachment.welcome.strategy)

    def use_strategy(self, strategy: OffloadStrategy) -> None:
        """As `WeightSource.use_strategy`: the server decides, so the strategy must allow what it does."""
        served = self.strategy
        differing = [name for name in _STRATEGY_FIELDS if getattr(strategy, name) != getattr(served, name)]
        if served.cpu_cache_ratio > strategy.cpu_cache_ratio:
            differing.append("cpu_cache_ratio")
        if differing:
            raise BadRequest(
                f"server {self.name!r} keeps bundles by {served}, the model asks for other {', '.join(differing)}; "
                "leave them out, or start a server with them"
            )

    def dense(self) -> "Mapping[str, Tensor]":
        """As `WeightSource.dense`: the server's own memory."""
        self._require_own()
        return view_tensors(self._part("dense", DENSE_NAME), Path(DENSE_NAME))

    def predictor_tensors(self) -> "Mapping[str, Tensor]":
        """As `WeightSource.predictor_tensors`: the server's own memory."""
        self._require_own()
        return predictors_by_layer(
            self.profile,
            self._parts["predictors"],
            lambda name, *how: view_tensors(self._part("predictors", name), Path(name), *how),
        )

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """As `WeightSource.hint`."""
        self._require_own()
        if not self.attachment.welcome.is_resident and not self.attachment.has_ended():
            try:
                self.line().hint(layer, ids)
            except ServerError:  # the fetch that follows will find out, and wait for another server
                self.attachment.has_ended()

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> Fetch:
        """As `WeightSource.fetch`."""
        bundles = self.resident_bundles(layer)
        return ServedFetch(self, layer, ids, keep) if bundles is None else MappedFetch(HostBundles(bundles, ids))

    def resident_bundles(self, layer: int) -> "Tensor | None":
        """As `WeightSource.resident_bundles`. At the first layer another server is looked for, where this one ended."""
        self._require_own()
        if layer == 0 and self.attachment.welcome.is_resident and self.attachment.has_ended():
            self._look_for_successor()
        if not self.attachment.welcome.is_resident:
            return None
        first = layer * self.profile.ffn_dimension
        return self.attachment.bundles[first : first + self.profile.ffn_dimension]

    def host_memory(self) -> HostMemory:
        """As `WeightSource.host_memory`: the server's arena, as it is mapped here."""
        bundles = self.attachment.bundles
        return HostMemory(bundles.data_ptr(), bundles.nbytes, is_read_only=True, owner=bundles)

    # --- pushes

    @property
    def push_limit(self) -> int:
        """Bundles that one push may ask for."""
        return min(self.fetch_limit, MOST_PUSHED)

    def open_push(
        self, slab_address: int, slab_nbytes: int, device_index: int = 0, *, driver: Driver | None = None
    ) -> None:
        """Have the server push bundles to a slab on a GPU: device memory of one allocation, whole bundles, one a place.

        The slab stays its owner's, who frees it after `close_push` or `close`.

        Args:
            device_index: among the GPUs that are visible here.
            driver: of that device, where there is one already.

        Raises:
            NoDevice, DeviceError, BadRequest: the memory cannot be shared.
            ServerError: the server cannot push to this GPU; `fetch` works as before.
        """
        self.close_push()
        if driver is None:
            own = CudaDriver(device_index)
            self._pushing = DevicePush(self, slab_address, slab_nbytes, own, on_close=own.close)
        else:
            self._pushing = DevicePush(self, slab_address, slab_nbytes, driver)

    def push(self, layer: int, ids: NDArray[np.uint32], places: NDArray[np.uint32]) -> DevicePushed:
        """Ask for bundles in places of the slab; returns at once. `wait` of what it returns tells more.

        The device must be done with what lies in these places: they are written to from now on.

        Args:
            ids: (n,) uint32, ascending, no repeats; at most `push_limit`.
            places: (n,) uint32, in the order of the ids, no repeats; neighbouring ones are copied together.

        Raises:
            BadRequest: `open_push` comes first. ServerError: the server cannot push any more.
        """
        self._require_own()
        if self._pushing is None:
            raise BadRequest("no slab is registered; call open_push first, or fetch instead")
        return self._pushing.push(layer, ids, places)

    def close_push(self) -> None:
        """Wait until nothing is written to the slab any more. May be called twice.

        Raises:
            ServerError: the server does not say so.
        """
        pushing, self._pushing = self._pushing, None
        if pushing is not None and not self._is_forked:
            pushing.close()

    def borrow_dense(self, device_index: int = 0, *, driver: Driver | None = None) -> LentDense:
        """Dense weights and predictors as the server has them on a GPU (`--share-dense-gpu`).

        It is returned by its own `close`, at the latest by that of this source.

        Args:
            device_index: among the GPUs that are visible here.
            driver: of that device, where there is one already.

        Raises:
            NoDevice, DeviceError, BadRequest: the server lends nothing, or on another GPU. ServerError: it cannot.
        """
        self._require_own()
        parts = {name: self._parts[name] for name in ("dense", "predictors")}
        if driver is not None:
            lent = LentDense(self, driver, self._part, parts)
        else:
            own = CudaDriver(device_index)
            lent = LentDense(self, own, self._part, parts, on_close=own.close)
        self._lent.append(lent)
        return lent

    def pusher(self) -> Self:
        """As `WeightSource.pusher`: the server does, if asked by this client."""
        return self

    def counts(self) -> FetchCounts:
        """As `WeightSource.counts`: of this session."""
        attachment = self.attachment
        told = dict(zip(TOLD_COUNTS, attachment.counts, strict=False))
        return self._earlier + FetchCounts(**told, wait_s=self._wait_s, messages=attachment.n_messages)

    def note_tokens(self, n: int) -> None:
        """As `WeightSource.note_tokens`: `sparseflow status` shows them."""
        self.attachment.counters.add_tokens(n)

    def note_recall(self, measured: MeasuredRecall) -> None:
        """As `WeightSource.note_recall`: `sparseflow status` shows it."""
        self.attachment.counters.set_recall(measured)

    def status(self) -> SourceStatus:
        """As `WeightSource.status`, asked of the server."""
        if self._is_closed:
            return SourceStatus("closed", 0, 0, {"shared": 0, "private": 0})
        welcome = self.attachment.welcome
        told = ask_status(self.name)
        model = next(model for model in told["models"] if model["name"] == self.model)
        return SourceStatus(
            told["state"],
            self.profile.num_layers * self.profile.ffn_dimension,
            model["n_resident"] or 0,
            {"shared": sum(region["nbytes"] for region in self.attachment.regions.values()), "private": 0},
            welcome.io,
            None if welcome.is_resident else welcome.disk_bytes_per_s,
            tuple(told["disk"]["reasons"]),
            self.counts(),
        )

    def close(self) -> None:
        """Give everything back: the session, its leases, sockets and descriptors. May be called twice.

        Memory that tensors still show stays mapped until they are gone.
        """
        with self._lock:
            if self._is_closed:
                return
            for close in [self.close_push, *(lent.close for lent in self._lent)]:
                try:
                    close()
                except SparseFlowError as error:
                    _log.warning("what a GPU has of this session was not closed: %s", error)
            self._lent.clear()
            self._is_closed = True
            if self._is_forked:
                return
            for line in list(self._lines):
                line.close()
            self._lines.clear()
            self.attachment.close()
            self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise BadRequest("a session belongs to one process; attach again in the other (from_server)")

    # --- memory

    def _part(self, region: str, name: str) -> memoryview:
        start, nbytes = self._parts[region][name]
        return memoryview(self._maps[region].content)[start : start + nbytes]

    # --- the session

    def line(self) -> Line:
        """This thread's line to the server as it is now."""
        line: Line | None = getattr(self._own, "line", None)
        if line is None or line.attachment is not self.attachment:
            with self._lock:
                self._require_own()
                if line is not None:
                    line.close()
                    self._lines.discard(line)
                line = self._own.line = Line(self.attachment, self._request_ids)
                self._lines.add(line)
        return line

    def _require_own(self) -> None:
        if self._is_closed:
            raise BadRequest("the model was closed; open it again (from_server)")
        if self._is_forked:
            raise BadRequest(
                "a forked process cannot use its parent's session; open the model there again (from_server)"
            )

    def recover(self, lost: Attachment) -> None:
        """Attach to the server that comes up in the place of one that ended.

        Raises:
            ServerNotRunning: none does within `reconnect_timeout_s`. FingerprintMismatch: it holds other weights.
        """
        deadline_s = time.monotonic() + self._reconnect_timeout_s
        with self._lock:
            while self.attachment is lost:
                self._require_own()
                left_s = deadline_s - time.monotonic()
                try:
                    self._attach_to_successor(max(left_s, _RETRY_S))
                except (ServerNotRunning, Draining, NoAnswer) as error:
                    if left_s <= _RETRY_S:
                        raise ServerNotRunning(
                            f"server {self.name!r} (pid {lost.welcome.server_pid}) ended, and none took its place "
                            f"within {self._reconnect_timeout_s:g} s; start it again (sparseflow-daemon STORE --name "
                            f"{self.name}) and repeat the call"
                        ) from error
                    time.sleep(_RETRY_S)

    def _look_for_successor(self) -> None:
        """All bundles are mapped, so nothing has to be waited for; but a new server should know of us."""
        now = time.monotonic()
        if now - self._looked_s >= 1.0 and self._lock.acquire(blocking=False):
            self._looked_s = now
            try:
                self._attach_to_successor(1.0)
            except (ServerNotRunning, Draining, NoAnswer):
                pass  # later, then
            finally:
                self._lock.release()

    def _attach_to_successor(self, timeout_s: float) -> None:
        """Change over to the server that runs now; what tensors show stays where it is."""
        lost = self.attachment
        expected = {name: value for name, value in lost.welcome.identity.items() if name not in ("protocol", "layout")}
        found = Attachment(self.name, self.model, expected, timeout_s)
        try:
            for name, shared in self._maps.items():
                if found.regions[name]["nbytes"] != shared.nbytes or found.regions[name]["parts"] != self._parts[name]:
                    raise ServerError(f"server {self.name!r} lays {name} out otherwise; open the model again")
            for name, shared in self._maps.items():
                shared.replace(found.descriptors[name])
            self._earlier, self._wait_s = self.counts(), 0.0
            self.attachment = found
        except BaseException:
            found.close()
            raise
        found.close_descriptors()
        found.counters.add_tokens(lost.counters.tokens)
        found.counters.set_recall(lost.counters.recall)
        lost.close()

    def _after_fork(self) -> None:
        """In the child: the session stays the parent's alone."""
        self._is_forked = True
        self.attachment.abandon()

    def note_wait(self, seconds: float) -> None:
        """Count time that a fetch was waited for."""
        self._wait_s += seconds


def _after_fork() -> None:
    for client in list(_CLIENTS):
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork)
