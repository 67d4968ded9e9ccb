"""Leases over a real engine, without sockets: every request gets its one reply, and every slot comes back."""

import os
import re
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import Shards, neurons, some_ids
from sparseflow_daemon import leasing as leasing_module
from sparseflow_daemon.leasing import Leasing
from sparseflow_daemon.sessions import Session

from sparseflow.engine import read_queue
from sparseflow.engine.engine import Engine
from sparseflow.errors import BadRequest, DiskError, SparseFlowError
from sparseflow.protocol.messages import (
    TOLD_COUNTS,
    AcquireNeurons,
    ErrorReply,
    HintNeurons,
    Message,
    NeuronsLeased,
    NeuronsReady,
)

EPOCH = 4711
DEADLINE_S = 20.0
MOST_WAITING = 256

Ids = NDArray[np.uint32]


class Clock:
    """Stands in for `time` in the leasing. It goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class HeldDisk:
    """What a buffered queue performs, held back while `is_held`; `monkeypatch` puts it in place of `read_vector`."""

    def __init__(self) -> None:
        self._gate = threading.Event()
        self._gate.set()
        self._read = read_queue.read_vector

    def hold(self) -> None:
        self._gate.clear()

    def let_go(self) -> None:
        self._gate.set()

    def __call__(self, read: Any) -> int:
        assert self._gate.wait(DEADLINE_S)
        return self._read(read)


class Served:
    """What leasing needs of a model that is served."""

    def __init__(self, shards: Shards, n_slots: int, fetch_limit: int, io: str) -> None:
        self.profile, self.fetch_limit = shards.profile, fetch_limit
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.engine = Engine(shards.folder, shards.manifest, n_slots, io=io, shared=True, event_fd=self.event_fd)

    def close(self) -> None:
        self.engine.close()
        os.close(self.event_fd)


@dataclass
class Asked:
    """A request and all that was sent for it: where something had to be read first `leased`, and then one reply."""

    session: Session
    line: bytes
    request: AcquireNeurons
    ids: Ids
    replies: list[Message] = field(default_factory=list)
    leased: NeuronsLeased | None = None
    is_released: bool = False
    is_forgotten: bool = False
    was_taken: bool = True
    """It was not refused at once."""

    @property
    def slots(self) -> Ids:
        (reply,) = self.replies
        assert isinstance(reply, NeuronsReady), reply
        return np.frombuffer((self.leased or reply).slots, "<u4")

    @property
    def code(self) -> str:
        (reply,) = self.replies
        assert isinstance(reply, ErrorReply), reply
        return reply.code

    @property
    def is_leased(self) -> bool:
        return not self.is_released and any(isinstance(reply, NeuronsReady) for reply in self.replies)

    @property
    def is_open(self) -> bool:
        return not self.replies and not self.is_released


class Desk:
    """Asks the leasing as a server does, and notes who was told what."""

    def __init__(
        self, shards: Shards, n_slots: int, fetch_limit: int, n_sessions: int = 1, io: str = "buffered"
    ) -> None:
        self.shards = shards
        self.model = Served(shards, n_slots, fetch_limit, io)
        self.engine = self.model.engine
        self.leasing = Leasing(self.model, EPOCH)  # type: ignore[arg-type]
        self.sessions: list[Session] = []
        self.asked: dict[tuple[bytes, int], Asked] = {}
        self._far_ends: list[socket.socket] = []
        self._poll = select.poll()
        self._poll.register(self.model.event_fd, select.POLLIN)
        self._n_requests = 0
        for _ in range(n_sessions):
            self.open_session()

    def open_session(self) -> Session:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._far_ends.append(far)
        session = Session(os.urandom(16), os.getpid(), near, -1, self.model)  # type: ignore[arg-type]
        self.sessions.append(session)
        return session

    # what clients say

    def acquire(
        self,
        layer: int,
        ids: Ids | bytes,
        *,
        session: Session | None = None,
        released: list[Asked] | None = None,
        timeout_s: float = 60.0,
        request_id: int | None = None,
        line: bytes = b"",
        keep: bool = True,
    ) -> Asked:
        session = session or self.sessions[0]
        self._n_requests += 1
        number = self._n_requests if request_id is None else request_id
        released = released or []
        content = ids if isinstance(ids, bytes) else ids.tobytes()
        request = AcquireNeurons(
            number, EPOCH, layer, content, [each.request.request_id for each in released], timeout_s, keep
        )
        asked = Asked(session, session.token + line, request, np.frombuffer(content[: len(content) // 4 * 4], "<u4"))
        assert (asked.line, number) not in self.asked
        self.asked[asked.line, number] = asked
        for each in released:
            each.is_released = True
        try:
            self.deliver(self.leasing.acquire(session, asked.line, request))
            self.deliver(self.leasing.release(session, request.released))
        except SparseFlowError as error:  # the server sends it as the reply
            asked.was_taken = False
            self.deliver([(asked.line, ErrorReply(number, EPOCH, error.wire_code, str(error)))])
        return asked

    def release(self, *asked: Asked) -> None:
        for each in asked:
            each.is_released = True
        for session in self.sessions:
            its = [each.request.request_id for each in asked if each.session is session]
            if its:
                self.deliver(self.leasing.release(session, its))

    def hint(self, layer: int, ids: Ids, session: Session | None = None) -> None:
        self.leasing.hint(session or self.sessions[0], HintNeurons(EPOCH, layer, ids.tobytes()))

    def forget(self, session: Session) -> None:
        self.leasing.forget(session)
        for each in self.asked.values():
            if each.session is session:
                each.is_released = each.is_forgotten = True
        self.sessions.remove(session)
        session.close()

    # what the server's loop does

    def deliver(self, out: Iterable[tuple[bytes, Message]]) -> None:
        for line, message in out:
            assert isinstance(message, NeuronsLeased | NeuronsReady | ErrorReply)
            assert message.epoch == EPOCH
            asked = self.asked[line, message.request_id]
            assert not asked.replies, f"a second reply to {asked.request}"
            assert not asked.is_forgotten, "a reply to whoever is gone"
            if isinstance(message, NeuronsLeased):
                assert asked.leased is None, "it knows that"
                self.check_leased(asked, message)
                asked.leased = message
                continue
            if isinstance(message, NeuronsReady) and asked.leased:
                assert (message.slots, message.counts) == (b"", []), "it knows that"
            asked.replies.append(message)

    def check_leased(self, asked: Asked, message: NeuronsLeased) -> None:
        """What is not said to be missing is there."""
        slots, missing = np.frombuffer(message.slots, "<u4"), np.frombuffer(message.missing, "<u4")
        assert len(slots) == len(asked.ids)
        assert 0 < len(missing) <= len(slots)
        assert (missing[1:] > missing[:-1]).all()
        here = np.delete(np.arange(len(slots)), missing)
        content = self.shards.content(asked.request.layer, asked.ids[here])
        assert np.array_equal(self.engine.slots[slots[here]], content)

    def progress(self) -> None:
        """As when the event comes."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.model.event_fd)
        self.deliver(self.leasing.progress(self.sessions))

    def settle(self) -> None:
        """Until no read is under way. The loop waits for nothing but the event."""
        self.progress()
        while self.engine.state().n_loading:
            assert self._poll.poll(int(1000 * DEADLINE_S)), "reads are under way, and no event comes"
            self.progress()
        self.progress()

    def done(self, asked: Asked) -> Asked:
        """After all reads."""
        self.settle()
        return asked

    # what must always be so

    @property
    def leased(self) -> list[Asked]:
        return [each for each in self.asked.values() if each.is_leased]

    def check(self) -> None:
        """Whoever has a lease reads the right bytes, and each session keeps to its share."""
        slot_of: dict[tuple[int, int], int] = {}
        for each in self.leased:
            assert len(each.slots) == len(each.ids)
            layer = each.request.layer
            assert np.array_equal(self.engine.slots[each.slots], self.shards.content(layer, each.ids))
            for id_, slot in zip(each.ids.tolist(), each.slots.tolist(), strict=True):
                assert slot_of.setdefault((layer, id_), slot) == slot, "a bundle in two places"
        assert len(set(slot_of.values())) == len(slot_of), "two bundles in one slot"
        for session in self.sessions:
            its = [each for each in self.leased if each.session is session]
            assert sum(len(each.ids) for each in its) <= session.n_leased
            assert session.n_leased <= self.model.fetch_limit
        assert self.engine.state().n_leased <= self.model.fetch_limit * len(self.sessions)

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        for far in self._far_ends:
            far.close()
        self.model.close()


OpenDesk = Callable[..., Desk]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldDisk]:
    held = HeldDisk()
    monkeypatch.setattr("sparseflow.engine.reading.read_vector", held)
    yield held
    held.let_go()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(leasing_module, "time", stopped)
    return stopped


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Three layers of 61 neurons, to be damaged at will."""
    return Shards(tmp_path / "store")


@pytest.fixture
def open_desk(clock: Clock) -> Iterator[OpenDesk]:
    """The arguments of `Desk` -> one that is closed at the end, with all leases back."""
    made: list[Desk] = []

    def make(*arguments: Any, **options: Any) -> Desk:
        made.append(Desk(*arguments, **options))
        return made[-1]

    yield make
    for desk in made:
        desk.close()
    made.clear()


def first(n: int) -> Ids:
    return np.arange(n, dtype=np.uint32)


# --- one request


def test_absent_bundles_are_answered_when_they_have_come(open_desk: OpenDesk, shards: Shards, disk: HeldDisk) -> None:
    desk = open_desk(shards, 60, 20)
    disk.hold()
    asked = desk.acquire(1, neurons(3, 7, 60))
    desk.progress()
    assert asked.is_open
    disk.let_go()
    desk.settle()
    assert np.array_equal(desk.engine.slots[asked.slots], shards.content(1, neurons(3, 7, 60)))
    assert desk.engine.state().n_leased == 3
    desk.check()


def test_where_bundles_will_lie_and_which_are_missing_is_told_at_once(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 60, 20)
    before = desk.done(desk.acquire(1, neurons(5, 9)))
    desk.release(before)
    disk.hold()
    asked = desk.acquire(1, neurons(3, 5, 9, 60))
    assert asked.leased is not None
    assert np.frombuffer(asked.leased.missing, "<u4").tolist() == [0, 3]
    assert np.frombuffer(asked.leased.slots, "<u4")[1:3].tolist() == before.slots.tolist()
    desk.progress()
    assert asked.is_open
    disk.let_go()
    assert len(desk.done(asked).slots) == 4
    assert told(asked)["misses"] == 2 + 2
    assert told(asked)["hits"] == 2


def test_reply_after_that_says_only_that_the_missing_ones_came(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 60, 20)
    disk.hold()
    asked = desk.acquire(1, neurons(3, 60))
    disk.let_go()
    desk.settle()
    assert asked.replies == [NeuronsReady(asked.request.request_id, EPOCH, b"", [])]


def test_bundles_on_their_way_for_somebody_else_or_a_hint_are_missing_too(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    """They are hits all the same: nothing more is read for them."""
    desk = open_desk(shards, 60, 20, n_sessions=2)
    one, other = desk.sessions
    desk.release(desk.done(desk.acquire(1, neurons(9), session=other)))
    disk.hold()
    desk.hint(1, neurons(60), one)
    desk.acquire(1, neurons(3, 7), session=one)
    asked = desk.acquire(1, neurons(3, 7, 9, 60), session=other)
    assert asked.leased is not None
    assert np.frombuffer(asked.leased.missing, "<u4").tolist() == [0, 1, 3]
    counts = told_of(asked.leased.counts)
    assert (counts["hits"], counts["misses"]) == (4, 1)
    disk.let_go()
    desk.done(asked)
    desk.check()


def test_request_that_waits_is_told_its_slots_when_it_has_them(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    """One waits for slots of the arena, one for its session's share."""
    desk = open_desk(shards, 20, 10, n_sessions=2)
    one, other = desk.sessions
    disk.hold()
    for layer in (0, 1):
        desk.release(desk.acquire(layer, first(10), session=one))
    begun, waiting = desk.acquire(2, first(10), session=other), desk.acquire(2, neurons(10), session=other)
    desk.progress()
    assert begun.leased is None
    assert waiting.leased is None
    disk.let_go()
    desk.settle()
    disk.hold()
    assert begun.leased is not None
    assert waiting.leased is None
    desk.release(begun)
    assert waiting.leased is not None
    assert waiting.is_open
    disk.let_go()
    assert len(desk.done(waiting).slots) == 1


def test_bundles_that_are_there_are_answered_at_once(open_desk: OpenDesk, shards: Shards, disk: HeldDisk) -> None:
    desk = open_desk(shards, 60, 20)
    before = desk.done(desk.acquire(1, neurons(3, 7, 60)))
    disk.hold()
    again = desk.acquire(1, neurons(3, 60))
    assert again.leased is None
    assert again.slots.tolist() == before.slots[[0, 2]].tolist()


def test_request_of_nothing_is_answered(open_desk: OpenDesk, shards: Shards) -> None:
    assert open_desk(shards, 60, 20).acquire(1, neurons()).slots.tolist() == []


def test_reply_goes_to_the_line_that_asked(open_desk: OpenDesk, shards: Shards) -> None:
    """`deliver` looks for the request under the line that is answered."""
    desk = open_desk(shards, 60, 20)
    asked = [desk.acquire(1, neurons(n), line=bytes([n])) for n in range(5)]
    desk.settle()
    assert [len(each.slots) for each in asked] == [1] * 5


def test_slots_stay_as_long_as_they_are_leased_and_come_back_after(
    open_desk: OpenDesk, shards: Shards, rng: np.random.Generator
) -> None:
    """While others go through everything else."""
    desk = open_desk(shards, 50, 20, n_sessions=2)
    held = desk.done(desk.acquire(0, some_ids(rng, 61, 20)))
    for layer in range(3):
        for part in np.array_split(first(61), 4):
            other = desk.done(desk.acquire(layer, part, session=desk.sessions[1]))
            desk.check()
            desk.release(other)
    assert desk.engine.state().n_leased == 20
    desk.release(held)
    assert desk.engine.state().n_leased == 0


def test_released_rides_on_the_next_request_which_gets_its_share(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 60, 20)
    asked = desk.done(desk.acquire(0, first(20)))
    for layer in (1, 2, 0):
        asked = desk.done(desk.acquire(layer, first(20), released=[asked]))
        assert len(asked.slots) == 20
        assert len(desk.sessions[0].leases) == 1


def test_release_of_what_is_over_or_never_was_does_nothing(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 60, 20, n_sessions=2)
    asked = desk.done(desk.acquire(0, first(5)))
    assert desk.leasing.release(desk.sessions[1], [asked.request.request_id, 2**63]) == []
    assert desk.engine.state().n_leased == 5, "a request is its session's alone"
    for _ in range(2):
        desk.release(asked)
    assert desk.engine.state().n_leased == 0


# --- refused


def test_more_than_the_share_is_refused_at_once_naming_share_and_remedy(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 60, 20)
    (reply,) = desk.acquire(2, first(21)).replies
    assert isinstance(reply, ErrorReply)
    assert reply.code == "arena_busy"
    assert "layer 2: 21 bundles asked for at once" in reply.text
    assert re.search(r"share .* is 20 slots; .*--max-sessions", reply.text)
    assert len(desk.done(desk.acquire(2, first(20))).slots) == 20


@pytest.mark.parametrize(
    ("layer", "ids"),
    [
        (3, neurons(1)),
        (2**63, neurons(1)),
        (0, neurons(61)),
        (0, neurons(2**32 - 1)),
        (0, neurons(5, 5)),
        (0, neurons(7, 5)),
        (0, b"abcde"),
        (0, b"a"),
    ],
    ids=str,
)
def test_what_is_no_set_of_neurons_is_refused_and_leases_nothing(
    open_desk: OpenDesk, shards: Shards, layer: int, ids: Any
) -> None:
    desk = open_desk(shards, 60, 20)
    asked = desk.acquire(layer, ids)
    assert asked.code == "bad_request"
    assert desk.engine.state().n_leased == 0
    assert not desk.sessions[0].leases
    assert not desk.sessions[0].waiting
    assert len(desk.done(desk.acquire(0, neurons(1))).slots) == 1


@pytest.mark.parametrize(("layer", "ids"), [(3, neurons(1)), (0, neurons(61)), (0, neurons(7, 5))], ids=str)
def test_hint_of_what_is_no_set_of_neurons_is_refused(
    open_desk: OpenDesk, shards: Shards, layer: int, ids: Ids
) -> None:
    desk = open_desk(shards, 60, 20)
    with pytest.raises(BadRequest):
        desk.hint(layer, ids)


def test_request_id_that_has_a_lease_is_refused(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 60, 20)
    desk.done(desk.acquire(0, neurons(1), request_id=5))
    assert desk.acquire(0, neurons(2), request_id=5, line=b"2").code == "bad_request"
    assert desk.engine.state().n_leased == 1


def test_request_id_that_waits_is_refused(open_desk: OpenDesk, shards: Shards) -> None:
    """Else its second lease would take the first one's place, which would never come back."""
    desk = open_desk(shards, 60, 20)
    held = desk.done(desk.acquire(0, first(20)))
    one = desk.acquire(1, neurons(1), request_id=5)
    other = desk.acquire(1, neurons(2), request_id=5, line=b"2")
    assert other.code == "bad_request"
    desk.release(held)
    desk.done(one)
    desk.forget(desk.sessions[0])
    assert desk.engine.state().n_leased == 0


def test_too_many_waiting_requests_are_refused(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 60, 20)
    held = desk.done(desk.acquire(0, first(20)))
    waiting = [desk.acquire(1, neurons(1)) for _ in range(MOST_WAITING)]
    assert desk.acquire(1, neurons(1)).code == "arena_busy"
    assert all(each.is_open for each in waiting)
    desk.release(held)
    desk.settle()
    assert len([each for each in waiting if each.is_leased]) == 20


# --- the share


def test_requests_beyond_the_share_wait_and_are_answered_in_their_order(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20)
    held = [desk.done(desk.acquire(0, neurons(*range(n, n + 10)))) for n in (0, 10)]
    waiting = [desk.acquire(1, ids) for ids in (first(15), first(5), first(5), first(12))]
    desk.settle()
    assert all(each.is_open for each in waiting)
    desk.release(held[0])
    desk.settle()
    assert all(each.is_open for each in waiting), "the first has no room, and the others do not overtake it"
    desk.release(held[1])
    desk.settle()
    assert [each.is_leased for each in waiting] == [True, True, False, False]
    desk.release(waiting[0])
    desk.settle()
    assert [each.is_leased for each in waiting] == [False, True, True, False]
    desk.release(waiting[1], waiting[2])
    desk.settle()
    assert waiting[3].is_leased


def test_waiting_request_that_is_released_makes_way_for_those_behind_it(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20)
    desk.done(desk.acquire(0, first(15)))
    large, small = desk.acquire(1, first(10)), desk.acquire(1, first(5))
    desk.settle()
    assert small.is_open
    desk.release(large)
    assert len(desk.done(small).slots) == 5


def test_waiting_request_is_refused_once_at_its_deadline(open_desk: OpenDesk, shards: Shards, clock: Clock) -> None:
    desk = open_desk(shards, 61, 20)
    held = desk.done(desk.acquire(0, first(20)))
    patient, hasty = desk.acquire(1, neurons(1), timeout_s=30.0), desk.acquire(1, neurons(2), timeout_s=10.0)
    clock.now_s += 9.9
    desk.progress()
    assert hasty.is_open
    clock.now_s += 0.2
    desk.progress()
    (reply,) = hasty.replies
    assert isinstance(reply, ErrorReply)
    assert reply.code == "arena_busy"
    assert "layer 1: no slots within 10 s, this session leases 20 of its 20; release" in reply.text
    desk.progress()
    assert patient.is_open
    desk.release(held)
    assert len(desk.done(patient).slots) == 1
    assert desk.engine.state().n_leased == 1


def test_request_that_was_begun_is_not_refused_at_its_deadline(
    open_desk: OpenDesk, shards: Shards, clock: Clock, disk: HeldDisk
) -> None:
    """Its bundles are on their way."""
    desk = open_desk(shards, 61, 20)
    disk.hold()
    asked = desk.acquire(0, first(5), timeout_s=1.0)
    clock.now_s += 100
    desk.progress()
    disk.let_go()
    assert len(desk.done(asked).slots) == 5


def test_those_behind_a_request_that_gave_up_begin(open_desk: OpenDesk, shards: Shards, clock: Clock) -> None:
    desk = open_desk(shards, 61, 20)
    desk.done(desk.acquire(0, first(15)))
    large, small = desk.acquire(1, first(10), timeout_s=1.0), desk.acquire(1, first(5), timeout_s=100.0)
    clock.now_s += 2
    desk.settle()
    assert large.code == "arena_busy"
    assert len(small.slots) == 5, "there has been room for it ever since"


def test_those_that_wait_begin_when_a_lease_ends_because_its_bundles_failed(
    open_desk: OpenDesk, shards: Shards
) -> None:
    desk = open_desk(shards, 61, 20)
    with shards.flipped(0, 3):
        failing, waiting = desk.acquire(0, first(20)), desk.acquire(1, first(5))
        desk.settle()
    assert failing.code == "shard_corrupt"
    assert len(waiting.slots) == 5


@pytest.mark.parametrize("wrong", [b"a", first(21).tobytes()], ids=["no ids", "too many"])
def test_those_that_wait_begin_when_a_request_that_releases_is_itself_refused(
    open_desk: OpenDesk, shards: Shards, wrong: bytes
) -> None:
    desk = open_desk(shards, 61, 20)
    held = desk.done(desk.acquire(0, first(20)))
    waiting = desk.acquire(1, first(5))
    refused = desk.acquire(2, wrong, released=[held])
    desk.settle()
    assert isinstance(refused.replies[0], ErrorReply)
    assert len(waiting.slots) == 5


def test_request_that_is_released_before_its_reply_is_answered_all_the_same(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    """One that waits for its share, and one whose bundles are on their way: a request gets a reply on every path."""
    desk = open_desk(shards, 61, 20)
    disk.hold()
    loading, waiting = desk.acquire(0, first(20)), desk.acquire(1, first(5))
    desk.release(waiting)
    desk.release(loading)
    disk.let_go()
    desk.settle()
    assert [len(each.replies) for each in (loading, waiting)] == [1, 1]


def test_request_that_is_released_after_it_was_told_its_slots_gets_its_one_reply(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    """At once, and no other when its bundles have come."""
    desk = open_desk(shards, 61, 20)
    disk.hold()
    asked = desk.acquire(0, first(5))
    assert asked.leased is not None
    desk.release(asked)
    assert asked.code == "bad_request"
    assert desk.engine.state().n_leased == 0
    disk.let_go()
    desk.settle()
    assert len(asked.replies) == 1
    assert len(desk.acquire(0, first(5)).slots) == 5, "they came all the same"


def test_session_that_is_stuck_with_its_share_stops_nobody(
    open_desk: OpenDesk, shards: Shards, rng: np.random.Generator, clock: Clock
) -> None:
    """Three of four hold all they can, and ask for more."""
    desk = open_desk(shards, 50, 10, n_sessions=4)
    for session in desk.sessions[1:]:
        desk.done(desk.acquire(int(rng.integers(3)), some_ids(rng, 61, 10), session=session))
        desk.acquire(0, some_ids(rng, 61, 10), session=session)
    asked: list[Asked] = []
    for layer in range(3):
        for part in np.array_split(first(61), 7):
            asked = [desk.done(desk.acquire(layer, part, released=asked))]
            assert np.array_equal(desk.engine.slots[asked[0].slots], shards.content(layer, part))
    desk.check()


def test_slots_that_are_being_filled_for_nobody_are_waited_for(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    """Released while on their way, they cannot be given to others before the disk has written to them."""
    desk = open_desk(shards, 20, 10)
    disk.hold()
    for layer in (0, 1):
        desk.release(desk.acquire(layer, first(10)))
    asked = desk.acquire(2, first(10))
    desk.progress()
    assert asked.is_open
    disk.let_go()
    desk.settle()
    assert np.array_equal(desk.engine.slots[asked.slots], shards.content(2, first(10)))


# --- several sessions


def test_two_that_ask_for_the_same_absent_bundles_cause_one_read(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 61, 20, n_sessions=2)
    before = desk.engine.counts()
    disk.hold()
    one, other = (desk.acquire(1, neurons(3, 7, 60), session=session) for session in desk.sessions)
    disk.let_go()
    desk.settle()
    since = desk.engine.counts() - before
    assert one.slots.tolist() == other.slots.tolist()
    assert (since.misses, since.hits) == (3, 3)
    assert desk.engine.state().n_bundles_read == 3
    assert desk.engine.state().n_leased == 3
    desk.release(one)
    assert desk.engine.state().n_leased == 3, "the other's"
    desk.check()


def test_bundles_that_one_has_are_the_other_s_without_a_read(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20, n_sessions=2)
    one = desk.done(desk.acquire(1, first(20)))
    before = desk.engine.counts()
    other = desk.acquire(1, first(20), session=desk.sessions[1])
    assert other.slots.tolist() == one.slots.tolist()
    assert (desk.engine.counts() - before).reads == 0


def test_forgotten_session_gives_everything_back_and_others_keep_theirs(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 61, 20, n_sessions=2)
    gone, stays = desk.sessions
    desk.done(desk.acquire(0, first(5), session=gone))
    kept = desk.done(desk.acquire(0, neurons(3, 4, 5), session=stays))
    disk.hold()
    desk.acquire(1, first(10), session=gone)  # on its way
    desk.acquire(2, first(20), session=gone)  # waits for its share
    shared = desk.acquire(1, neurons(1, 2), session=stays)
    desk.forget(gone)
    assert not gone.leases
    assert not gone.waiting
    assert desk.engine.state().n_leased == 5
    disk.let_go()
    desk.settle()
    desk.check()
    desk.release(kept, shared)
    assert desk.engine.state().n_leased == 0
    assert len(desk.done(desk.acquire(2, first(20), session=stays)).slots) == 20


# --- a disk that fails


def test_failing_bundle_is_told_once_and_the_lease_is_over(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20)
    with shards.flipped(1, 7):
        asked = desk.done(desk.acquire(1, neurons(3, 7, 60)))
        (reply,) = asked.replies
        assert isinstance(reply, ErrorReply)
        assert reply.code == "shard_corrupt"
        assert "layer 1, neuron 7" in reply.text
        assert desk.engine.state().n_leased == 0
        assert not desk.sessions[0].leases
        assert len(desk.done(desk.acquire(1, neurons(3, 60))).slots) == 2, "its neighbours are intact"
        assert desk.done(desk.acquire(1, neurons(7))).code == "shard_corrupt", "and it still is not"
    assert len(desk.done(desk.acquire(1, neurons(7))).slots) == 1
    desk.check()


def test_failure_is_told_to_those_that_know_their_slots_already(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 61, 20)
    desk.release(desk.done(desk.acquire(1, neurons(3, 60))))
    disk.hold()
    with shards.flipped(1, 7):
        asked = desk.acquire(1, neurons(3, 7, 60))
        assert asked.leased is not None
        assert np.frombuffer(asked.leased.missing, "<u4").tolist() == [1]
        disk.let_go()
        assert desk.done(asked).code == "shard_corrupt"
    assert desk.engine.state().n_leased == 0


def test_failure_is_told_to_each_that_asked_and_to_nobody_else(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 61, 20, n_sessions=3)
    disk.hold()
    with shards.flipped(1, 7):
        hurt = [desk.acquire(1, neurons(3, 7), session=session) for session in desk.sessions[:2]]
        fine = desk.acquire(1, neurons(3, 8), session=desk.sessions[2])
        disk.let_go()
        desk.settle()
    assert [each.code for each in hurt] == ["shard_corrupt"] * 2
    assert len(fine.slots) == 2
    assert desk.engine.state().n_leased == 2


def test_failures_of_the_disk_are_counted_and_kept_for_status(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20, n_sessions=2)
    assert (desk.leasing.n_errors, desk.leasing.last_error) == (0, None)
    desk.acquire(0, first(21))
    desk.acquire(7, first(2))
    assert desk.leasing.n_errors == 0, "of clients"
    with shards.flipped(1, 7):
        desk.done(desk.acquire(1, neurons(7)))
    assert desk.leasing.n_errors == 1
    assert "layer 1, neuron 7" in str(desk.leasing.last_error)
    assert "layer 1, neuron 7" in str(desk.sessions[0].last_error)
    assert desk.sessions[1].last_error is None


# --- hints and counts


def test_hinted_bundles_are_read_without_a_lease(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20)
    desk.hint(1, neurons(3, 7))
    desk.settle()
    assert desk.engine.state().n_leased == 0
    assert len(desk.acquire(1, neurons(3, 7)).slots) == 2, "at once"


def told(asked: Asked) -> dict[str, int]:
    (reply,) = asked.replies
    assert isinstance(reply, NeuronsReady)
    return told_of((asked.leased or reply).counts)


def told_of(counts: list[int]) -> dict[str, int]:
    return dict(zip(TOLD_COUNTS, counts, strict=True))


def test_bundles_that_are_not_kept_are_gone_with_their_lease_and_no_count_tells_of_them(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 60, 20)
    desk.release(desk.done(desk.acquire(1, neurons(3, 7))))
    disk.hold()
    look = desk.acquire(1, neurons(3, 7, 20, 21), keep=False)
    assert look.leased is not None
    assert np.frombuffer(look.leased.missing, "<u4").tolist() == [2, 3]
    disk.let_go()
    desk.done(look)
    desk.check()
    desk.release(look)
    assert desk.engine.state().n_resident == 2
    again = desk.done(desk.acquire(1, neurons(3, 20)))
    assert (told(again)["hits"], told(again)["misses"]) == (1, 3)


def test_bundles_that_are_not_kept_are_gone_with_a_session_that_is_forgotten(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    desk = open_desk(shards, 60, 20, n_sessions=2)
    disk.hold()
    desk.acquire(1, neurons(3, 7), keep=False)
    desk.forget(desk.sessions[0])
    disk.let_go()
    desk.settle()
    assert desk.engine.state().n_resident == 0


def test_counts_told_are_those_of_the_session(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20, n_sessions=2)
    one, other = desk.sessions
    desk.hint(0, neurons(1, 2), one)
    desk.settle()
    asked = desk.done(desk.acquire(0, neurons(1, 3, 5), session=one))
    counts = told(asked)
    assert (counts["hits"], counts["misses"]) == (1, 2)
    assert (counts["hinted"], counts["hints_useful"]) == (2, 1)
    assert counts["bytes_from_disk"] >= 4 * shards.bundle_nbytes
    counts = told(desk.acquire(0, neurons(1, 2, 3), session=other))
    assert (counts["hits"], counts["misses"], counts["hinted"], counts["reads"]) == (3, 0, 0, 0)


@pytest.mark.parametrize("end", ["comes", "fails", "is released", "is forgotten"])
def test_request_is_counted_once_however_it_ends(open_desk: OpenDesk, shards: Shards, disk: HeldDisk, end: str) -> None:
    desk = open_desk(shards, 61, 20)
    session = desk.sessions[0]
    desk.release(desk.done(desk.acquire(1, neurons(3, 60))))
    before = session.counts
    disk.hold()
    with shards.flipped(1, 7) if end == "fails" else nullcontext():
        asked = desk.acquire(1, neurons(3, 7, 8, 60))
        assert asked.leased is not None
        counts = told_of(asked.leased.counts)
        assert (counts["hits"], counts["misses"]) == (before.hits + 2, before.misses + 2)
        if end == "is released":
            desk.release(asked)
        elif end == "is forgotten":
            desk.forget(session)
        disk.let_go()
        desk.settle()
    since = session.counts - before
    assert (since.hits, since.misses) == (2, 2)


def test_counts_of_a_request_that_waited_for_its_share_are_told_with_it(open_desk: OpenDesk, shards: Shards) -> None:
    desk = open_desk(shards, 61, 20)
    held = desk.done(desk.acquire(0, first(20)))
    waiting = desk.acquire(1, first(5))
    desk.release(held)
    counts = told(desk.done(waiting))
    assert (counts["hits"], counts["misses"]) == (0, 25)


def test_counts_of_a_request_that_waited_for_slots_are_its_session_s(
    open_desk: OpenDesk, shards: Shards, disk: HeldDisk
) -> None:
    """Its bundles are counted when it gets its slots, which may be while somebody else is served."""
    desk = open_desk(shards, 20, 10, n_sessions=2)
    one, other = desk.sessions
    disk.hold()
    for layer in (0, 1):
        desk.release(desk.acquire(layer, first(10), session=one))
    waiting = desk.acquire(2, first(10), session=other)
    disk.let_go()
    counts = told(desk.done(waiting))
    assert (counts["hits"], counts["misses"]) == (0, 10)
    last = told(desk.acquire(2, neurons(1), session=one))
    assert (last["hits"], last["misses"]) == (1, 20)


# --- any order of anything


class AnyOrder:
    """Clients that do anything at any time, with a disk that is slow or spoiled at times."""

    def __init__(self, desk: Desk, rng: np.random.Generator, clock: Clock, disk: HeldDisk) -> None:
        self.desk, self.rng, self.clock, self.disk = desk, rng, clock, disk
        self.spoiled: list[tuple[int, int]] = []
        self.ever_spoiled: set[tuple[int, int]] = set()

    def step(self) -> None:
        rng, desk = self.rng, self.desk
        session = desk.sessions[int(rng.integers(len(desk.sessions)))]
        layer, line = int(rng.integers(3)), bytes([int(rng.integers(3))])
        its = [each for each in desk.asked.values() if each.session is session and not each.is_released]
        match int(rng.integers(20)):
            case 0 | 1 | 2 | 3 | 4 | 5:
                most = desk.model.fetch_limit + 1 if rng.random() < 0.3 else desk.model.fetch_limit // 2
                ids = some_ids(rng, 61, int(rng.integers(0, most + 1)))
                released = self.some_of(its)
                timeout_s = float(rng.choice([0.0, 3.0, 50.0]))
                desk.acquire(layer, ids, session=session, released=released, timeout_s=timeout_s, line=line)
            case 6 | 7 | 8 if its:
                desk.release(*self.some_of(its))
            case 9:
                desk.hint(layer, some_ids(rng, 61, int(rng.integers(0, 30))), session)
            case 10 | 11 | 12:
                desk.progress()
            case 13:
                self.disk.hold()
            case 14 | 15:
                self.disk.let_go()
            case 16:
                self.clock.now_s += float(rng.choice([0.5, 5.0]))
            case 17 if rng.random() < 0.3:
                desk.forget(session)
                desk.open_session()
            case 18:
                self.spoil()
            case 19:
                self.repair()
        desk.check()

    def some_of(self, asked: list[Asked]) -> list[Asked]:
        """More of those that have their lease than of those that have no reply yet."""
        return [each for each in asked if self.rng.random() < (0.03 if each.is_open else 0.6)]

    def spoil(self) -> None:
        for id_ in some_ids(self.rng, 61, 6).tolist():
            bundle = (int(self.rng.integers(3)), id_)
            if bundle not in self.spoiled:
                self.desk.shards.flip(*bundle)
                self.spoiled.append(bundle)
                self.ever_spoiled.add(bundle)

    def repair(self) -> None:
        for bundle in self.spoiled:
            self.desk.shards.flip(*bundle)
        self.spoiled.clear()

    def wind_down(self) -> None:
        """All reads end, and whoever has a lease gives it back, until all are answered or refused."""
        desk = self.desk
        self.disk.let_go()
        self.repair()
        for _ in range(10_000):
            desk.settle()
            desk.check()
            if not desk.leased:
                break
            desk.release(*desk.leased)
        assert not desk.leased
        self.clock.now_s += 1000
        desk.settle()


def check_replies(desk: Desk, ever_spoiled: set[tuple[int, int]]) -> None:
    """One reply each, and refusals only for what they name."""
    for each in desk.asked.values():
        assert len(each.replies) == 1 or each.is_released, f"no reply to {each.request}"
        for reply in each.replies:
            if isinstance(reply, NeuronsReady):
                assert each.was_taken
            elif each.is_released:
                pass  # it was given up before
            elif reply.code == "shard_corrupt":
                assert ever_spoiled & {(each.request.layer, id_) for id_ in each.ids.tolist()}
            else:
                assert reply.code == "arena_busy"
                is_too_large = len(each.ids) > desk.model.fetch_limit
                assert is_too_large or each.request.timeout_s < 50 or "no slots within 50 s" in reply.text


@pytest.mark.parametrize(
    ("n_slots", "fetch_limit", "n_sessions"), [(61, 15, 3), (30, 10, 2), (20, 4, 4), (12, 12, 1), (183, 60, 2)]
)
def test_every_request_gets_its_one_reply_and_every_slot_comes_back(
    open_desk: OpenDesk,
    shards: Shards,
    rng: np.random.Generator,
    clock: Clock,
    disk: HeldDisk,
    n_slots: int,
    fetch_limit: int,
    n_sessions: int,
) -> None:
    desk = open_desk(shards, n_slots, fetch_limit, n_sessions)
    clients = AnyOrder(desk, rng, clock, disk)
    for _ in range(800):
        clients.step()
    clients.wind_down()
    check_replies(desk, clients.ever_spoiled)
    assert desk.engine.state().n_leased == 0
    assert not any(session.leases or session.waiting for session in desk.sessions)
    assert not desk.leasing._unanswered
    replies = [reply for each in desk.asked.values() for reply in each.replies]
    assert sum(isinstance(reply, NeuronsReady) for reply in replies) > 15, "hardly anything was granted"


def test_direct_reads_serve_any_order_too(
    open_desk: OpenDesk, shards: Shards, rng: np.random.Generator, clock: Clock, disk: HeldDisk
) -> None:
    try:
        desk = open_desk(shards, 61, 15, 3, io="direct")
    except DiskError as error:
        pytest.skip(str(error))
    clients = AnyOrder(desk, rng, clock, disk)
    for _ in range(300):
        clients.step()
    clients.wind_down()
    check_replies(desk, clients.ever_spoiled)
    assert desk.engine.state().n_leased == 0


def test_all_sessions_forgotten_at_any_moment_leave_no_lease(
    no_descriptor_left: None,
    open_desk: OpenDesk,
    shards: Shards,
    rng: np.random.Generator,
    clock: Clock,
    disk: HeldDisk,
) -> None:
    desk = open_desk(shards, 61, 15, 3)
    clients = AnyOrder(desk, rng, clock, disk)
    for _ in range(10):
        for _ in range(int(rng.integers(1, 40))):
            clients.step()
        for session in list(desk.sessions):
            desk.forget(session)
        assert desk.engine.state().n_leased == 0
        assert not desk.leasing._unanswered
        for _ in range(3):
            desk.open_session()
    disk.let_go()
    desk.settle()
