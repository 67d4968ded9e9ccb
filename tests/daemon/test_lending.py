"""What is lent on a GPU: its bytes, who is told what and when, what is left of it. No GPU, no process, no socket."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from children_in_process import ChildrenInProcess
from fake_driver import FakeDriver, World
from sparseflow_daemon.gpu.lending import Lending
from sparseflow_daemon.gpu.regions import LentRegions
from sparseflow_daemon.sessions import Session

from sparseflow.cuda.ipc import OpenedSlab
from sparseflow.cuda.tickets import SlabTicket
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import BadRequest, DeviceError
from sparseflow.protocol.device_messages import BorrowDense, DenseLent, DenseReturned, ReturnDense
from sparseflow.protocol.messages import ErrorReply

EPOCH, LINE, UUID = 7, b"line-key", bytes(range(16))
SIZES = {"dense": 10_000, "predictors": 5000}


class Served:
    """What lending needs of a model that is served."""

    def __init__(self, name: str, rng: np.random.Generator) -> None:
        self.name = name
        self.regions = {region: SharedMemory(region, nbytes) for region, nbytes in SIZES.items()}
        for region in self.regions.values():
            region.bytes[:] = rng.integers(0, 256, region.nbytes)

    def close(self) -> None:
        for region in self.regions.values():
            region.close()


class Desk:
    """A server that lends, and what it has told."""

    def __init__(self, rng: np.random.Generator, device: int | None = 0) -> None:
        self.world = World()
        self.children = ChildrenInProcess(self.world)
        self.lending = Lending(self.children, device, EPOCH)  # type: ignore[arg-type]
        self.told: list[tuple[bytes, Any]] = []
        self.lending.send = self.told.extend
        self.model: Any = Served("m", rng)
        self.reader = FakeDriver(self.world)
        self.stream = self.reader.stream_create()
        self._open: list[tuple[Session, socket.socket]] = []
        self.n_requests = 0

    def session(self) -> Session:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        session = Session(os.urandom(16), os.getpid(), near, os.pidfd_open(os.getpid()), self.model)
        self._open.append((session, far))
        return session

    def borrow(self, session: Session, uuid: bytes = UUID) -> int:
        self.n_requests += 1
        self.told += self.lending.borrow(session, LINE, BorrowDense(self.n_requests, EPOCH, uuid))
        return self.n_requests

    def reply(self, number: int) -> Any:
        (found,) = [message for _, message in self.told if message.request_id == number]
        return found

    def read(self, lent: DenseLent, region: str) -> Any:
        with OpenedSlab(self.reader, SlabTicket.from_dict(lent.slab), self.stream) as slab:
            return self.reader.content(slab.address + lent.offsets[region], SIZES[region])

    def close(self) -> None:
        for session, far in self._open:
            self.lending.forget(session)
            session.close()
            far.close()
        assert not self.lending.borrowers
        for child in self.children.alive:
            self.children.works[child].close()
            assert self.children.drivers[child].leaks() == {}
        self.reader.stream_destroy(self.stream)
        assert self.reader.leaks() == {}
        assert self.world.violations == []
        self.model.close()


@pytest.fixture
def desk(rng: np.random.Generator, no_descriptor_left: None) -> Iterator[Desk]:
    made = Desk(rng)
    made.lending.begin(made.model)
    yield made
    made.close()


def test_regions_are_lent_as_they_lie_in_host_memory_one_copy_for_all(desk: Desk) -> None:
    desk.children.settle()
    lent = [desk.reply(desk.borrow(desk.session())) for _ in range(3)]
    for reply in lent:
        assert isinstance(reply, DenseLent)
        for name, region in desk.model.regions.items():
            assert np.array_equal(desk.read(reply, name), region.bytes)
            assert reply.offsets[name] % 4096 == 0
    (child,) = desk.children.alive
    assert desk.children.drivers[child].calls.count("mem_alloc") == 1
    assert len(desk.lending.borrowers) == 3


def test_who_asks_before_they_are_there_is_answered_when_they_are(desk: Desk) -> None:
    numbers = [desk.borrow(desk.session()) for _ in range(2)]
    gone = desk.session()
    desk.borrow(gone)
    desk.lending.forget(gone)
    assert desk.told == []
    desk.children.settle()
    assert [type(desk.reply(number)) for number in numbers] == [DenseLent] * 2
    assert len(desk.told) == 2


def test_another_gpu_is_refused(desk: Desk) -> None:
    desk.children.settle()
    reply = desk.reply(desk.borrow(desk.session(), bytes(16)))
    assert isinstance(reply, ErrorReply)
    assert reply.code == "bad_request"
    assert not desk.lending.borrowers


def test_what_is_returned_is_counted_no_more_and_returning_nothing_is_answered_too(desk: Desk) -> None:
    desk.children.settle()
    session = desk.session()
    desk.borrow(session)
    for _ in range(2):
        assert desk.lending.give_back(session, LINE, ReturnDense(9, EPOCH)) == [(LINE, DenseReturned(9, EPOCH))]
        assert not desk.lending.borrowers


@pytest.mark.parametrize("is_loaded", [False, True], ids=["while it loads", "when it has lent"])
def test_dead_child_answers_who_waits_and_the_next_borrower_meets_a_new_one(desk: Desk, is_loaded: bool) -> None:
    if is_loaded:
        desk.children.settle()
    first = desk.borrow(desk.session())
    desk.children.die(desk.children.alive[0])
    assert isinstance(desk.reply(first), DenseLent if is_loaded else ErrorReply)
    assert not desk.lending.borrowers
    assert "it was killed" in str(desk.lending.last_error)
    second = desk.borrow(desk.session())
    desk.children.settle()
    assert isinstance(desk.reply(second), DenseLent)
    assert desk.lending.last_error is None
    assert desk.lending.status()["models"]["m"]["state"] == "lent"  # type: ignore[index]


def test_gpu_without_room_is_an_error_to_each_and_tried_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    number = desk.borrow(desk.session())
    (child,) = desk.children.alive
    driver = desk.children.drivers[child]
    with monkeypatch.context() as patch:

        def full(nbytes: int) -> int:
            raise DeviceError(f"cuMemAlloc({nbytes} bytes): CUDA_ERROR_OUT_OF_MEMORY (2)")

        patch.setattr(driver, "mem_alloc", full)
        desk.children.settle()
    reply = desk.reply(number)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in reply.text
    assert "copy the weights" in reply.text
    again = desk.borrow(desk.session())
    desk.children.settle()
    assert isinstance(desk.reply(again), DenseLent)


def test_server_that_lends_nothing_says_so(rng: np.random.Generator) -> None:
    desk = Desk(rng, device=None)
    desk.lending.begin(desk.model)
    assert desk.children.alive == []
    assert desk.lending.status() is None
    with pytest.raises(BadRequest, match="--share-dense-gpu"):
        desk.borrow(desk.session())
    desk.close()


def test_whichever_call_fails_while_loading_nothing_is_left(rng: np.random.Generator) -> None:
    regions = Served("m", rng).regions.values()
    arguments = list(SIZES), list(SIZES.values()), [region.fd for region in regions]
    for n in range(100):
        driver = FakeDriver(fail_at=n)
        with suppress(DeviceError):
            LentRegions(driver, *arguments).close()
        assert driver.leaks() == {}, n
        assert driver.world.violations == []
        if len(driver.calls) <= n:
            break
    assert n > 8


@pytest.mark.parametrize("arguments", [(["a"], [1], []), (["a"], [0], [3]), ([], [], []), (["a", "b"], [1], [3])])
def test_regions_that_do_not_fit_their_descriptors_are_refused(arguments: Any) -> None:
    with pytest.raises(BadRequest, match="send one each"):
        LentRegions(FakeDriver(), *arguments)
