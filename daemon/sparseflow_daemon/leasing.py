"""Who leases what of one model: requests in, replies out. No socket, no wait.

Each session can lease `fetch_limit` slots at once, and the shares of all sessions together are less than the arena: no
request ever waits for another session's leases, and one that is stuck stops nobody. What would exceed the share waits
for the session's own leases to come back.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.counts import FetchCounts
from sparseflow.errors import ArenaBusy, BadRequest, ServerError, SparseFlowError
from sparseflow.protocol.messages import (
    TOLD_COUNTS,
    AcquireNeurons,
    ErrorReply,
    HintNeurons,
    Message,
    NeuronsLeased,
    NeuronsReady,
)
from sparseflow_daemon.served_model import ServedModel
from sparseflow_daemon.sessions import Lease, Session

Outgoing = tuple[bytes, Message]  # the line that it goes to

_MOST_WAITING = 256  # requests of one session


class Leasing:
    """The leases of one model. What it returns is to be sent."""

    def __init__(self, model: ServedModel, epoch: int) -> None:
        self._model, self._epoch = model, epoch
        self._engine = model.engine
        self._unanswered: dict[int, tuple[Session, Lease]] = {}  # by fetch: bundles are on their way
        self.n_errors = 0
        """Of reading bundles."""
        self.last_error: str | None = None

    def acquire(self, session: Session, line: bytes, request: AcquireNeurons) -> list[Outgoing]:
        """Replies to this request, if there are any yet. What it releases is for `release`, afterwards."""
        try:
            lease = self._new_lease(session, line, request)
        except SparseFlowError as error:
            return [(line, self._refusal(session, request, error))]
        if not session.waiting and session.n_leased + len(lease.ids) <= self._model.fetch_limit:
            return self._begin(session, lease)
        session.waiting.append(lease)
        return []

    def _new_lease(self, session: Session, line: bytes, request: AcquireNeurons) -> Lease:
        """
        Raises:
            ArenaBusy: it asks for more than the session may lease. BadRequest: its id is taken.
        """
        if request.request_id in session.leases or self._waiting(session, request.request_id):
            raise BadRequest(f"request {request.request_id} has a lease already; number requests without repeats")
        ids = _ids(request.ids)
        if len(ids) > self._model.fetch_limit:
            raise ArenaBusy(
                f"layer {request.layer}: {len(ids)} bundles asked for at once, this session's share of the arena is "
                f"{self._model.fetch_limit} slots; ask for them in parts, or start the server with more memory or "
                "fewer sessions (--max-sessions)"
            )
        if len(session.waiting) >= _MOST_WAITING:
            raise ArenaBusy(f"{_MOST_WAITING} requests of this session wait for slots already; release leases first")
        return Lease(line, request, ids, time.monotonic() + request.timeout_s)

    def hint(self, session: Session, request: HintNeurons) -> None:
        """Start to read what may be asked for.

        Raises:
            BadRequest: not neurons of this model.
        """
        before = self._engine.counts()
        self._engine.hint(request.layer, _ids(request.ids))
        session.counts += self._engine.counts() - before

    def release(self, session: Session, request_ids: list[int]) -> list[Outgoing]:
        """Leases are over; what waited for them begins."""
        out: list[Outgoing] = []
        for request_id in request_ids:
            out += self._unanswered_replies(session, request_id)
            self._end(session, request_id)
        return out + self._begin_waiting(session)

    def _unanswered_replies(self, session: Session, request_id: int) -> list[Outgoing]:
        """Even a request that is given up gets its one reply."""
        lease = session.leases.get(request_id)
        is_open = lease is not None and lease.fetch in self._unanswered
        lease = lease if is_open else self._waiting(session, request_id)
        if lease is None:
            return []
        text = f"request {request_id} was released before it was answered"
        return [(lease.line, ErrorReply(request_id, self._epoch, BadRequest.wire_code, text))]

    def _waiting(self, session: Session, request_id: int) -> Lease | None:
        return next((lease for lease in session.waiting if lease.request.request_id == request_id), None)

    def forget(self, session: Session) -> None:
        """The session is over: all its leases come back."""
        session.waiting.clear()
        for request_id in list(session.leases):
            self._end(session, request_id)

    def progress(self, sessions: Iterable[Session]) -> Iterator[Outgoing]:
        """Replies to what has come, or will not come, since the last time. sessions: all of this model."""
        self._engine.collect()
        for session, lease in list(self._unanswered.values()):
            yield from self._answer(session, lease)
        for session in sessions:
            yield from self._expired(session, time.monotonic())
            yield from self._begin_waiting(session)

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
        before = self._engine.counts()
        try:
            lease.fetch = self._engine.fetch(lease.request.layer, lease.ids, lease.request.keep)
        except SparseFlowError as error:
            return [(lease.line, self._refusal(session, lease.request, error))]
        session.counts += replace(self._engine.counts() - before, hits=0, misses=0)  # those when it has its slots
        session.leases[lease.request.request_id] = lease
        self._unanswered[lease.fetch] = session, lease
        return self._answer(session, lease)

    def _answer(self, session: Session, lease: Lease) -> list[Outgoing]:
        """What can be said of a request by now: where its bundles lie or will, and that all are there or never will."""
        outcome = self._engine.outcome(lease.fetch)
        request = lease.request
        if isinstance(outcome, Exception):
            self._end(session, request.request_id)
            return [(lease.line, self._refusal(session, request, outcome))]
        if outcome is None:
            leased = None if lease.is_told else self._engine.leased(lease.fetch)
            if leased is None:
                return []
            lease.is_told = True
            slots, are_filled = leased
            missing = np.flatnonzero(~are_filled)
            counts = self._count(session, lease)
            told = NeuronsLeased(request.request_id, self._epoch, _packed(slots), _packed(missing), counts)
            return [(lease.line, told)]
        del self._unanswered[lease.fetch]
        if lease.is_told:
            return [(lease.line, NeuronsReady(request.request_id, self._epoch, b"", []))]
        counts = self._count(session, lease)
        return [(lease.line, NeuronsReady(request.request_id, self._epoch, _packed(outcome), counts))]

    def _count(self, session: Session, lease: Lease) -> list[int]:
        """Count a fetch that was given its slots; returns the session's `TOLD_COUNTS`."""
        n_missed = self._engine.missed(lease.fetch)
        if n_missed is not None and lease.request.keep:
            session.counts += FetchCounts(hits=len(lease.ids) - n_missed, misses=n_missed)
        return list(_told_counts(session.counts))

    def _refusal(self, session: Session, request: AcquireNeurons, error: Exception) -> ErrorReply:
        code = error.wire_code if isinstance(error, SparseFlowError) else ServerError.wire_code
        if isinstance(error, OSError):  # of the disk
            self.n_errors += 1
            self.last_error = str(error)
        session.last_error = str(error)
        return ErrorReply(request.request_id, self._epoch, code, str(error))

    def _expired(self, session: Session, now: float) -> list[Outgoing]:
        """Requests that have waited for slots as long as they were willing to."""
        late = [lease for lease in session.waiting if lease.deadline_s <= now]
        if not late:
            return []
        session.waiting = deque(lease for lease in session.waiting if lease.deadline_s > now)
        out: list[Outgoing] = []
        for lease in late:
            error = ArenaBusy(
                f"layer {lease.request.layer}: no slots within {lease.request.timeout_s:g} s, this session leases "
                f"{session.n_leased} of its {self._model.fetch_limit}; release leases before asking for more"
            )
            out.append((lease.line, self._refusal(session, lease.request, error)))
        return out

    def _end(self, session: Session, request_id: int) -> None:
        """End a lease, or a request that waits for one; one that is not known is over already."""
        if self._waiting(session, request_id):
            session.waiting = deque(lease for lease in session.waiting if lease.request.request_id != request_id)
        lease = session.leases.pop(request_id, None)
        if lease is not None:
            if self._unanswered.pop(lease.fetch, None) is not None and not lease.is_told:
                self._count(session, lease)
            self._engine.release(lease.fetch)


_told_counts = attrgetter(*TOLD_COUNTS)


def _packed(numbers: NDArray[np.int64]) -> bytes:
    return numbers.astype("<u4").tobytes()


def _ids(content: bytes) -> NDArray[np.uint32]:
    """(n,) uint32 of a message's bytes.

    Raises:
        BadRequest: not whole numbers of 4 bytes.
    """
    if len(content) % 4:
        raise BadRequest(f"neuron ids in {len(content)} bytes; send 4 bytes each")
    return np.frombuffer(content, "<u4")
