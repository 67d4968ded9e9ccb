"""Pushes over a real engine and a child's real work, without sockets: one reply to each request, whoever ends when."""

import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children_in_process import ChildrenInProcess
from fake_driver import FakeDriver, World
from shards import Shards, some_ids
from sparseflow_daemon.gpu.pushing import Pushing
from sparseflow_daemon.leasing import Leasing
from sparseflow_daemon.sessions import Session

from sparseflow.cuda.ipc import ExportedSlab
from sparseflow.engine.engine import Engine
from sparseflow.errors import BadRequest, ServerError, SparseFlowError
from sparseflow.protocol.device_messages import (
    DeviceRegistered,
    DeviceUnregistered,
    NeuronsPushed,
    PushNeurons,
    RegisterDevice,
    UnregisterDevice,
)
from sparseflow.protocol.messages import ErrorReply, Message

EPOCH, N_SLOTS, LIMIT, N_PLACES = 4711, 60, 15, 30


class Served:
    """What pushing needs of a model that is served."""

    name, is_resident, n_slots, fetch_limit = "m", False, N_SLOTS, LIMIT

    def __init__(self, shards: Shards) -> None:
        self.profile = shards.profile
        self.engine = Engine(shards.folder, shards.manifest, N_SLOTS, io="buffered", shared=True)
        assert self.engine.arena.memory is not None
        self.regions = {"arena": self.engine.arena.memory}


class Client:
    """A session with a slab of its own."""

    def __init__(self, desk: "Desk") -> None:
        near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.session = Session(os.urandom(16), os.getpid(), near, os.pidfd_open(os.getpid()), desk.model)  # type: ignore[arg-type]
        self.driver = FakeDriver(desk.world)
        nbytes = N_PLACES * desk.shards.bundle_nbytes
        self.address = self.driver.mem_alloc(nbytes)
        self.slab = ExportedSlab(self.driver, self.address, nbytes)
        self.line = os.urandom(8)

    def content(self, places: Any) -> Any:
        nbytes = self.driver.allocations[self.address].nbytes
        return self.driver.content(self.address, nbytes).reshape(N_PLACES, -1)[places]

    def close(self) -> None:
        self._far.close()
        self.session.close()
        self.slab.close()
        self.driver.mem_free(self.address)


class Desk:
    """Asks as sessions do, and notes who was told what."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.world = shards, World()
        self.model = Served(shards)
        self.leasing = Leasing(self.model, EPOCH)  # type: ignore[arg-type]
        self.children = ChildrenInProcess(self.world)
        self.pushing = Pushing(self.children, {"m": self.leasing}, EPOCH)  # type: ignore[arg-type]
        self.pushing.send = self.deliver
        self.replies: dict[tuple[bytes, int], list[Message]] = {}
        self.clients: list[Client] = []
        self.n_requests = 0

    def deliver(self, out: Any) -> None:
        for key, message in self.pushing.divert(list(out)):
            request_id = message.request_id
            assert (key, request_id) in self.replies, (key, message)
            self.replies[key, request_id].append(message)

    def client(self) -> Client:
        self.clients.append(Client(self))
        return self.clients[-1]

    def ask(self, client: Client, make: Any, *fields: Any) -> list[Message]:
        """Whose replies come in time."""
        self.n_requests += 1
        request = make(self.n_requests, EPOCH, *fields)
        replies = self.replies[client.line, self.n_requests] = []
        try:
            match request:
                case RegisterDevice():
                    self.pushing.register(client.session, client.line, request)
                case UnregisterDevice():
                    self.deliver(self.pushing.unregister(client.session, client.line, request))
                case PushNeurons():
                    self.deliver(self.pushing.push(client.session, client.line, request))
        except SparseFlowError as error:  # as a line does
            replies.append(ErrorReply(self.n_requests, EPOCH, error.wire_code, str(error)))
        return replies

    def register(self, client: Client) -> list[Message]:
        return self.ask(client, RegisterDevice, dict(client.slab.ticket.to_dict()))

    def push(self, client: Client, layer: int, ids: Any, places: Any) -> list[Message]:
        packed = [np.asarray(numbers, "<u4").tobytes() for numbers in (ids, places)]
        return self.ask(client, PushNeurons, layer, *packed, [], 5.0)

    def progress(self) -> None:
        """Everything that is read has come."""
        self.model.engine.settle(20)
        self.deliver(self.leasing.progress([client.session for client in self.clients]))

    def settle(self) -> None:
        for _ in range(100):
            self.progress()
            self.children.settle()
            if not self.pushing.n_pushes:
                break

    def forget(self, client: Client) -> None:
        self.clients.remove(client)
        self.pushing.forget(client.session)
        self.leasing.forget(client.session)

    def close(self) -> None:
        for client in list(self.clients):
            self.forget(client)
            self.children.settle()
            client.close()
        self.children.settle()
        for child in self.children.alive:
            assert not child.slabs
            self.children.works[child].close()
            assert self.children.drivers[child].leaks() == {}
        assert self.model.engine.state().n_leased == 0
        assert self.pushing.n_pushes == 0
        assert self.world.violations == []
        self.model.engine.close()


@pytest.fixture
def desk(tmp_path: Path, no_descriptor_left: None) -> Iterator[Desk]:
    made = Desk(Shards(tmp_path / "store"))
    yield made
    made.close()


@pytest.fixture
def open_client(desk: Desk) -> Client:
    client = desk.client()
    replies = desk.register(client)
    assert replies == []
    desk.settle()
    assert isinstance(replies[0], DeviceRegistered)
    return client


def code(replies: list[Message]) -> str:
    (reply,) = replies
    assert isinstance(reply, ErrorReply), reply
    return reply.code


def test_session_is_told_when_the_event_is_recorded_and_the_lease_ends_when_all_is_copied(
    desk: Desk, open_client: Client
) -> None:
    replies = desk.push(open_client, 1, [3, 4, 5], [7, 8, 9])
    assert replies == []
    desk.progress()
    (child,) = desk.children.alive
    told: list[int] = []
    while not told:
        ask = child.desk.to_send()
        assert ask is not None
        child.desk.sent(0.0)
        for reply in desk.children.works[child].handle(ask.message, []):
            desk.children.hear(child, reply)
            told.append(1)
    assert isinstance(replies[0], NeuronsPushed)
    assert open_client.session.n_leased == 3
    assert not open_client.content([7, 8, 9]).any()
    desk.children.settle()
    assert len(replies) == 1
    assert open_client.session.n_leased == 0
    assert np.array_equal(open_client.content([7, 8, 9]), desk.shards.content(1, np.array([3, 4, 5])))
    assert child.record.nbytes_pushed == 3 * desk.shards.bundle_nbytes


def test_a_lease_of_a_push_has_no_number_that_a_session_could_release(desk: Desk, open_client: Client) -> None:
    desk.push(open_client, 1, [3], [7])
    desk.deliver(desk.leasing.release(open_client.session, list(range(1000))))
    desk.progress()
    assert open_client.session.n_leased == 1
    assert all(number < 0 for number in open_client.session.leases)
    desk.settle()


def test_pushes_wait_for_the_share_of_their_session(desk: Desk, open_client: Client) -> None:
    asked = [desk.push(open_client, layer, range(LIMIT), range(LIMIT)) for layer in (0, 1, 2)]
    desk.progress()
    assert open_client.session.n_leased == LIMIT
    desk.settle()
    assert [type(replies[0]) for replies in asked] == [NeuronsPushed] * 3
    assert np.array_equal(open_client.content(range(LIMIT)), desk.shards.content(2, np.arange(LIMIT)))


def test_unregister_answers_what_waits_for_the_arena_with_an_error_and_lets_the_rest_be_copied(
    desk: Desk, open_client: Client
) -> None:
    first = desk.push(open_client, 0, range(LIMIT), range(LIMIT))
    desk.progress()  # it is for the child now
    second = desk.push(open_client, 1, range(LIMIT), range(LIMIT))
    done = desk.ask(open_client, UnregisterDevice)
    again = desk.ask(open_client, UnregisterDevice)
    third = desk.push(open_client, 1, [1], [1])
    assert (code(second), code(again), code(third)) == ("bad_request",) * 3
    assert first == done == []
    desk.settle()
    assert isinstance(first[0], NeuronsPushed)
    assert isinstance(done[0], DeviceUnregistered)
    assert [len(replies) for replies in (first, second, done, again, third)] == [1] * 5
    assert np.array_equal(open_client.content(range(LIMIT)), desk.shards.content(0, np.arange(LIMIT)))


def test_unregister_of_nothing_is_answered_at_once(desk: Desk) -> None:
    (reply,) = desk.ask(desk.client(), UnregisterDevice)
    assert isinstance(reply, DeviceUnregistered)


def test_second_slab_and_push_before_the_first_is_open_are_errors(desk: Desk) -> None:
    client = desk.client()
    assert code(desk.push(client, 0, [1], [1])) == "bad_request"
    desk.register(client)
    assert code(desk.register(client)) == "bad_request"
    assert code(desk.push(client, 0, [1], [1])) == "bad_request"
    desk.settle()


def test_dead_child_answers_everything_once_and_says_what_was_not_copied_to_its_end(
    desk: Desk, open_client: Client
) -> None:
    other = desk.client()
    opening = desk.register(other)
    recorded = desk.push(open_client, 0, range(5), range(5))
    desk.progress()
    (child,) = desk.children.alive
    for _ in range(2):
        ask = child.desk.to_send()
        assert ask is not None
        child.desk.sent(0.0)
        if ask.about.__class__.__name__ == "Push":
            desk.children.hear(child, desk.children.works[child].handle(ask.message, [])[0])
    assert isinstance(recorded[0], NeuronsPushed)
    asked = desk.push(open_client, 1, range(5), range(5))
    desk.progress()
    waiting = desk.push(open_client, 2, range(LIMIT), range(LIMIT))
    closing = desk.ask(open_client, UnregisterDevice)
    desk.children.die(child)
    assert [code(replies) for replies in (opening, asked)] == ["internal"] * 2
    assert code(waiting) == "bad_request"
    assert isinstance(closing[0], DeviceUnregistered)
    assert len(recorded) == 1
    assert open_client.session.n_leased == 0
    assert "1 pushes were not copied to their end" in str(open_client.session.last_error)
    desk.settle()


def test_after_a_loss_each_push_says_why_until_a_slab_is_registered_anew(desk: Desk, open_client: Client) -> None:
    (child,) = desk.children.alive
    desk.children.die(child)
    for _ in range(2):
        (reply,) = desk.push(open_client, 0, [1], [1])
        assert isinstance(reply, ErrorReply)
        assert reply.code == ServerError.wire_code
        assert "it was killed" in reply.text
    desk.register(open_client)
    desk.settle()
    replies = desk.push(open_client, 0, [1], [1])
    desk.settle()
    assert isinstance(replies[0], NeuronsPushed)


def test_copy_that_is_refused_costs_the_slab_of_its_session_only(
    desk: Desk, open_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = desk.client()
    desk.register(other)
    desk.settle()
    (child,) = desk.children.alive
    with monkeypatch.context() as patch:
        patch.setattr(
            "sparseflow_daemon.gpu.slab.ClientSlab.copy", lambda *_: (_ for _ in ()).throw(BadRequest("no such thing"))
        )
        replies = [desk.push(open_client, layer, [1], [1]) for layer in (0, 1)]
        desk.settle()
    assert [code(each) for each in replies] == ["internal"] * 2
    assert desk.pushing.transport(open_client.session) == "arena"
    assert desk.pushing.transport(other.session) == "push"
    assert len(child.slabs) == 1
    good = desk.push(other, 0, [1], [1])
    desk.settle()
    assert isinstance(good[0], NeuronsPushed)


def test_whatever_happens_in_whatever_order_each_request_has_one_reply(desk: Desk, rng: np.random.Generator) -> None:
    """Sessions come, register, push, unregister and die; so do children. Bytes are those of the store all the while."""
    gone: set[bytes] = set()
    done: Counter[str] = Counter()
    for _ in range(1500):
        what = rng.choice(["come", "register", "push", "push", "push", "unregister", "progress", "step", "step", "step",
                           "end", "die"], p=[.04, .1, .1, .1, .1, .03, .15, .12, .12, .12, .015, .005])  # fmt: skip
        client = desk.clients[int(rng.integers(len(desk.clients)))] if desk.clients else None
        if what == "come" and len(desk.clients) < 3:
            desk.client()
        elif what == "progress":
            desk.progress()
        elif what == "step" and desk.children.alive:
            desk.children.step(desk.children.alive[0])
        elif what == "die" and desk.children.alive:
            desk.children.die(desk.children.alive[0])
        elif client is None:
            continue
        elif what == "register":
            desk.register(client)
        elif what == "unregister":
            desk.ask(client, UnregisterDevice)
        elif what == "push":
            n = int(rng.integers(0, LIMIT + 1))
            places = rng.permutation(N_PLACES)[:n]
            desk.push(client, int(rng.integers(3)), some_ids(rng, 61, n), places)
        elif what == "end":
            gone.add(client.line)
            desk.forget(client)
            desk.children.settle()
            client.close()
        done[what] += 1
    desk.settle()
    desk.children.settle()
    for (line, number), replies in desk.replies.items():
        assert len(replies) <= 1, (number, replies)
        assert replies or line in gone, number
        done.update(type(reply).__name__ for reply in replies)
    assert done["NeuronsPushed"] > 20, done


def test_bytes_are_right_while_slots_are_taken_again_and_again(
    desk: Desk, open_client: Client, rng: np.random.Generator
) -> None:
    """An arena of a third of all bundles; each push is compared when it is said to be copied."""
    for _ in range(100):
        layer, n = int(rng.integers(3)), int(rng.integers(1, LIMIT + 1))
        ids, places = some_ids(rng, 61, n), rng.permutation(N_PLACES)[:n]
        desk.push(open_client, layer, ids, places)
        desk.settle()
        assert np.array_equal(open_client.content(places), desk.shards.content(layer, ids))
    (child,) = desk.children.alive
    assert child.record.pushes == 100
