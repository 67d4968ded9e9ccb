"""Who leases what of one model: requests in, replies out. No socket, no wait.

Each session can lease `fetch_limit` slots at once, and the shares of all sessions together are less than the arena: no
request ever waits for another session's leases, and one that is stuck stops nobody. What would exceed the share waits
for the session's own leases to come back.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sparseflow.errors import ArenaBusy, BadRequest, Resync, ServerError, SparseFlowError
from sparseflow.protocol.messages import (
    FULL_SET,
    TOLD_COUNTS,
    AcquireNeurons,
    BundlesArrived,
    BundlesFailed,
    ErrorReply,
    HintNeurons,
    Message,
    NeuronsGranted,
)
from sparseflow_daemon.served_model import ServedModel
from sparseflow_daemon.sessions import LastSet, Lease, Session

Outgoing = tuple[bytes, Message]  # routing id, message

_MOST_SETS = 4096  # of one session: layers times threads
_MOST_WAITING = 256


class Leasing:
    """The leases of one model. What it returns is to be sent."""

    def __init__(self, model: ServedModel, epoch: int) -> None:
        self._model, self._epoch = model, epoch
        self._engine = model.engine
        self._n_neurons = model.profile.ffn_dimension
        self._ungranted: dict[int, tuple[Session, Lease]] = {}  # by fetch: they wait for slots
        self._unfilled: dict[int, tuple[Session, Lease]] = {}  # by fetch: granted, some bundles are on their way
        self.n_errors = 0
        """Of reading bundles."""
        self.last_error: str | None = None

    @property
    def has_ungranted(self) -> bool:
        """Whether a request was begun that has no slots yet."""
        return bool(self._ungranted)

    def acquire(self, session: Session, identity: bytes, request: AcquireNeurons) -> list[Outgoing]:
        """
        Raises:
            Resync: the request builds on a set that is not known.
            ArenaBusy: it asks for more than the session may lease. BadRequest: not neurons of this model.
        """
        for request_id in request.released:
            self._end(session, request_id)
        if request.request_id in session.leases:
            raise BadRequest(f"request {request.request_id} has a lease already; number requests without repeats")
        ids, base = self._whole_set(session, identity, request)
        if len(ids) > self._model.fetch_limit:
            raise ArenaBusy(
                f"layer {request.layer}: {len(ids)} bundles asked for at once, this session's share of the arena is "
                f"{self._model.fetch_limit} slots; ask for them in parts, or start the server with more memory or "
                "fewer sessions (--max-sessions)"
            )
        if len(session.waiting) >= _MOST_WAITING:
            raise ArenaBusy(f"{_MOST_WAITING} requests of this session wait for slots already; release leases first")
        session.waiting.append(Lease(identity, request, ids, base, time.monotonic() + request.timeout_s))
        return self._begin_waiting(session)

    def hint(self, session: Session, request: HintNeurons) -> None:
        """Start to read what may be asked for.

        Raises:
            BadRequest: not neurons of this model.
        """
        before = self._engine.counts()
        self._engine.hint(request.layer, _ids(request.ids))
        session.counts += replace(self._engine.counts() - before, wait_s=0.0)

    def release(self, session: Session, request_ids: list[int]) -> list[Outgoing]:
        """Leases are over; what waited for them begins."""
        for request_id in request_ids:
            self._end(session, request_id)
        return self._begin_waiting(session)

    def forget(self, session: Session) -> None:
        """The session is over: all its leases come back."""
        session.waiting.clear()
        for request_id in list(session.leases):
            self._end(session, request_id)
        session.sets.clear()

    def progress(self, sessions: Iterable[Session]) -> list[Outgoing]:
        """What has come since the last time: bundles, slots, deadlines. sessions: all of this model."""
        out: list[Outgoing] = []
        self._engine.collect()
        for fetch, (session, lease) in list(self._unfilled.items()):
            outcome = self._engine.outcome(fetch)
            if outcome is None:
                continue
            del self._unfilled[fetch]
            if isinstance(outcome, Exception):
                out.append((lease.identity, self._failed(session, lease, outcome)))
            else:
                out.append((lease.identity, BundlesArrived(lease.request.request_id, self._epoch)))
        for fetch, (session, lease) in list(self._ungranted.items()):
            del self._ungranted[fetch]
            out += self._grant(session, lease)
        for session in sessions:
            if session.waiting or self._ungranted:
                out += self._expired(session, time.monotonic())
        return out

    def _whole_set(
        self, session: Session, identity: bytes, request: AcquireNeurons
    ) -> tuple[NDArray[np.uint32], LastSet | None]:
        added = _ids(request.added)
        if not 0 <= request.layer < self._model.profile.num_layers:
            raise BadRequest(f"layer {request.layer}: the model has {self._model.profile.num_layers}")
        if request.base_version == FULL_SET:
            return added, None
        last = session.sets.get((identity, request.layer))
        if last is None or last.version != request.base_version:
            have = None if last is None else last.version
            raise Resync(f"layer {request.layer}: the set of version {request.base_version} is not known, {have} is")
        keeps = np.ones(len(last.ids), bool)
        dropped = _ids(request.dropped)
        places = np.searchsorted(last.ids, dropped)
        if len(dropped) and (places[-1] >= len(last.ids) or not np.array_equal(last.ids[places], dropped)):
            raise Resync(f"layer {request.layer}: neurons are dropped that version {last.version} does not hold")
        keeps[places] = False
        return np.sort(np.concatenate([last.ids[keeps], added])), last

    def _begin_waiting(self, session: Session) -> list[Outgoing]:
        """Begin requests in their order, as far as the session's share goes."""
        out: list[Outgoing] = []
        while session.waiting:
            lease = session.waiting[0]
            if session.leases and session.n_leased + len(lease.ids) > self._model.fetch_limit:
                break
            session.waiting.popleft()
            out += self._begin(session, lease)
        return out

    def _begin(self, session: Session, lease: Lease) -> list[Outgoing]:
        request = lease.request
        before = self._engine.counts()
        try:
            lease.fetch = self._engine.fetch(request.layer, lease.ids)
        except SparseFlowError as error:
            return [(lease.identity, self._refusal(session, request, error))]
        session.counts += replace(self._engine.counts() - before, wait_s=0.0)
        session.leases[request.request_id] = lease
        return self._grant(session, lease)

    def _grant(self, session: Session, lease: Lease) -> list[Outgoing]:
        """The reply, if the engine has given slots; else the lease is kept for later."""
        request, engine = lease.request, self._engine
        outcome = engine.outcome(lease.fetch)
        if isinstance(outcome, Exception):
            self._end(session, request.request_id)
            return [(lease.identity, self._refusal(session, request, outcome))]
        leased = engine.leased(lease.fetch) if outcome is None else outcome
        if leased is None:
            self._ungranted[lease.fetch] = session, lease
            return []
        slots = leased.astype(np.uint32)
        is_loading = np.zeros(len(slots), bool)
        if outcome is None:
            is_loading[:] = True
            is_loading[engine.early(lease.fetch)[0]] = False
            self._unfilled[lease.fetch] = session, lease
        return [(lease.identity, self._granted(session, lease, slots, is_loading))]

    def _granted(
        self, session: Session, lease: Lease, slots: NDArray[np.uint32], is_loading: NDArray[np.bool_]
    ) -> NeuronsGranted:
        request, key, base = lease.request, (lease.identity, lease.request.layer), lease.base
        if base is None or not len(base.ids):
            new, moved = slots, _NONE
        else:
            places = np.minimum(np.searchsorted(base.ids, lease.ids), len(base.ids) - 1)
            is_kept = base.ids[places] == lease.ids
            new, moved = slots[~is_kept], np.flatnonzero(is_kept & (base.slots[places] != slots)).astype(np.uint32)
        last = session.sets.get(key)
        version = (last.version if last else 0) + 1
        if last is None and len(session.sets) >= _MOST_SETS:
            session.sets.clear()  # they will be sent again in full
        session.sets[key] = LastSet(version, lease.ids, slots)
        return NeuronsGranted(
            *(request.request_id, self._epoch, version),
            *(new.tobytes(), moved.tobytes(), slots[moved].tobytes()),
            np.flatnonzero(is_loading).astype(np.uint32).tobytes(),
            [getattr(session.counts, name) for name in TOLD_COUNTS],
        )

    def _failed(self, session: Session, lease: Lease, error: Exception) -> BundlesFailed:
        self._end(session, lease.request.request_id)
        refusal = self._refusal(session, lease.request, error)
        return BundlesFailed(refusal.request_id, refusal.epoch, refusal.code, refusal.text)

    def _refusal(self, session: Session, request: AcquireNeurons, error: Exception) -> ErrorReply:
        code = error.wire_code if isinstance(error, SparseFlowError) else ServerError.wire_code
        if isinstance(error, OSError):  # of the disk
            self.n_errors += 1
            self.last_error = str(error)
        session.last_error = str(error)
        return ErrorReply(request.request_id, self._epoch, code, str(error))

    def _expired(self, session: Session, now: float) -> list[Outgoing]:
        """Requests that have waited for slots as long as they were willing to."""
        out: list[Outgoing] = []
        late = [lease for lease in session.waiting if lease.deadline_s <= now]
        session.waiting = deque(lease for lease in session.waiting if lease.deadline_s > now)
        for owner, lease in list(self._ungranted.values()):
            if owner is session and lease.deadline_s <= now:
                self._end(session, lease.request.request_id)
                late.append(lease)
        for lease in late:
            request = lease.request
            error = ArenaBusy(
                f"layer {request.layer}: no slots within {request.timeout_s:g} s, this session leases "
                f"{session.n_leased} of its {self._model.fetch_limit}; release leases before asking for more"
            )
            out.append((lease.identity, self._refusal(session, request, error)))
        return out

    def _end(self, session: Session, request_id: int) -> None:
        """End a lease, or a request that waits for one; one that is not known is over already."""
        if any(lease.request.request_id == request_id for lease in session.waiting):
            session.waiting = deque(lease for lease in session.waiting if lease.request.request_id != request_id)
        lease = session.leases.pop(request_id, None)
        if lease is not None:
            self._ungranted.pop(lease.fetch, None)
            self._unfilled.pop(lease.fetch, None)
            self._engine.release(lease.fetch)


_NONE = np.empty(0, np.uint32)


def _ids(content: bytes) -> NDArray[np.uint32]:
    """(n,) uint32 of a message's bytes.

    Raises:
        BadRequest: not whole numbers of 4 bytes.
    """
    if len(content) % 4:
        raise BadRequest(f"neuron ids in {len(content)} bytes; send 4 bytes each")
    return np.frombuffer(content, "<u4")
