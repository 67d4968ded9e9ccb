"""What a GPU child does, over a driver that is none: the bytes, the order of copies and event, and every failure."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver, World
from numpy.typing import NDArray
from sparseflow_daemon import gpu
from sparseflow_daemon.gpu.slab import ClientSlab
from sparseflow_daemon.gpu.work import GpuBroken, GpuWork

from sparseflow.cuda.ipc import ExportedSlab, OpenedEvent
from sparseflow.cuda.tickets import EventTicket
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import BadRequest, DeviceError
from sparseflow.protocol.device_messages import (
    BundlesCopied,
    BundlesRecorded,
    CloseSlab,
    CopyBundles,
    OpenSlab,
    SlabClosed,
    SlabOpened,
)
from sparseflow.protocol.messages import Detach, ErrorReply, Message

N_SLOTS, SLOT_NBYTES, N_PLACES = 50, 96, 20


class Client:
    """A process with a slab, and the work of the server's child, in another."""

    def __init__(self, rng: np.random.Generator, world: World | None = None) -> None:
        self.world = world or World()
        self.driver, self.childs = FakeDriver(self.world), FakeDriver(self.world)
        self.address = self.driver.mem_alloc(64 + N_PLACES * SLOT_NBYTES)
        self.slab = ExportedSlab(self.driver, self.address + 64, N_PLACES * SLOT_NBYTES)
        self.stream = self.driver.stream_create()
        self.arena = SharedMemory("arena", N_SLOTS * SLOT_NBYTES)
        self.slots: NDArray[np.uint8] = self.arena.bytes.reshape(N_SLOTS, SLOT_NBYTES)
        self.slots[:] = rng.integers(1, 256, self.slots.shape)
        self.work = GpuWork(self.childs, close_timeout_s=0.2)

    def tell(self, message: Message, *, with_arena: bool = False) -> list[Message]:
        return self.work.handle(message, [os.dup(self.arena.fd)] if with_arena else [])

    def open(self, request_id: int = 1, slab: int = 1) -> Message:
        ticket = dict(self.slab.ticket.to_dict())
        (reply,) = self.tell(OpenSlab(request_id, slab, ticket, "m", N_SLOTS, SLOT_NBYTES), with_arena=True)
        return reply

    def copy(self, request_id: int, slots: list[int], places: list[int], slab: int = 1) -> Message:
        content = [np.array(numbers, "<u4").tobytes() for numbers in (slots, places)]
        *copied, reply = self.tell(CopyBundles(request_id, slab, *content))
        assert not copied or isinstance(reply, ErrorReply)
        return reply

    def content(self) -> NDArray[np.uint8]:
        return self.driver.content(self.address + 64, N_PLACES * SLOT_NBYTES).reshape(N_PLACES, SLOT_NBYTES)

    def settle(self) -> list[Message]:
        told: list[Message] = []
        while self.work.is_copying:
            told += self.work.copied()
        return told

    def close(self) -> None:
        self.driver.stream_destroy(self.stream)
        self.slab.close()
        self.driver.mem_free(self.address)
        self.arena.close()


@pytest.fixture
def client(rng: np.random.Generator, no_descriptor_left: None) -> Iterator[Client]:
    """At the end nothing is left in either process, and nobody has misused the GPU."""
    made = Client(rng)
    yield made
    made.work.close()
    assert made.childs.leaks() == {}
    made.close()
    assert made.driver.leaks() == {}
    assert made.world.violations == []


@pytest.fixture
def small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bundles a half."""
    monkeypatch.setattr(ClientSlab.__init__, "__defaults__", (8 * SLOT_NBYTES,))


# --- what comes over


def test_event_is_there_from_the_beginning(client: Client) -> None:
    reply = client.open()
    assert isinstance(reply, SlabOpened)
    with OpenedEvent(client.driver, EventTicket.from_dict(reply.event)) as event:
        event.hold_back(client.stream)
        client.driver.stream_synchronize(client.stream)


def test_places_hold_their_bundles_once_the_event_has_passed(
    client: Client, rng: np.random.Generator, small_staging: None
) -> None:
    reply = client.open()
    assert isinstance(reply, SlabOpened)
    expected = np.zeros((N_PLACES, SLOT_NBYTES), np.uint8)
    with OpenedEvent(client.driver, EventTicket.from_dict(reply.event)) as event:
        for push in range(2, 40):
            n = int(rng.integers(0, N_PLACES + 1))
            slots, places = rng.permutation(N_SLOTS)[:n], rng.permutation(N_PLACES)[:n]
            assert client.copy(push, slots.tolist(), places.tolist()) == BundlesRecorded(push)
            expected[places] = client.slots[slots]
            event.hold_back(client.stream)
            client.driver.stream_synchronize(client.stream)
            assert np.array_equal(client.content(), expected)


def test_without_the_event_the_bytes_would_not_be_there(client: Client, small_staging: None) -> None:
    """That the test above could fail."""
    client.open()
    client.copy(2, [1, 2], [3, 4])
    assert not client.content().any()


def test_arena_has_been_read_when_that_is_said(client: Client, small_staging: None) -> None:
    """What the arena holds afterwards, another bundle maybe, does not come over."""
    client.open()
    expected = client.slots[:12].copy()
    client.copy(2, list(range(12)), list(range(12)))
    client.slots[:] = 0
    assert client.settle() == [BundlesCopied(2)]
    assert np.array_equal(client.content()[:12], expected)


def test_a_push_is_told_as_copied_once_and_not_before_it_is(client: Client, small_staging: None) -> None:
    client.open()
    for push in (2, 3, 4):
        client.copy(push, [push] * 3, [push, push + 5, push + 10])
    told: list[int] = []
    while client.work.is_copying:
        told += [message.request_id for message in client.work.copied() if isinstance(message, BundlesCopied)]
        content = client.content()
        assert all(np.array_equal(content[push], client.slots[push]) for push in told)
    assert told == [2, 3, 4]
    assert client.work.copied() == []


def test_neighbouring_places_go_in_one_copy(client: Client) -> None:
    client.open()
    before = client.childs.calls.count("copy_to_device")
    client.copy(2, [9, 8, 7, 6, 5], [5, 3, 4, 10, 11])
    assert client.childs.calls.count("copy_to_device") == before + 2
    client.settle()
    assert np.array_equal(client.content()[[5, 3, 4, 10, 11]], client.slots[[9, 8, 7, 6, 5]])


def test_push_of_nothing_is_recorded_and_copied(client: Client) -> None:
    client.open()
    assert client.copy(2, [], []) == BundlesRecorded(2)
    assert client.settle() == [BundlesCopied(2)]


def test_slabs_of_several_sessions_do_not_meet(client: Client, rng: np.random.Generator) -> None:
    other = Client(rng, client.world)
    client.open()
    ticket = dict(other.slab.ticket.to_dict())
    (reply,) = client.tell(OpenSlab(5, 2, ticket, "m", N_SLOTS, SLOT_NBYTES), with_arena=True)
    assert isinstance(reply, SlabOpened)
    client.copy(6, [1], [0])
    client.copy(7, [2], [0], slab=2)
    assert sorted(message.request_id for message in client.settle() if isinstance(message, BundlesCopied)) == [6, 7]
    assert np.array_equal(client.content()[0], client.slots[1])
    assert np.array_equal(other.content()[0], client.slots[2])
    client.work.close()
    other.close()


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_uuid": bytes(16)}, "GPU-00000000-"),
        ({"handle": bytes(64)}, "cannot be opened"),
        ({"nbytes": SLOT_NBYTES + 1}, "export whole ones"),
        ({"offset": 1 << 40}, "its allocation ends"),
        ({"offset": None}, "offset=None"),
    ],
)
def test_wrong_ticket_is_an_error_and_leaves_nothing(client: Client, change: dict[str, object], message: str) -> None:
    ticket = client.slab.ticket.to_dict() | change
    (reply,) = client.tell(OpenSlab(1, 1, ticket, "m", N_SLOTS, SLOT_NBYTES), with_arena=True)
    assert isinstance(reply, ErrorReply)
    assert (reply.request_id, reply.code) == (1, "bad_request")
    assert message in reply.text
    assert client.childs.leaks() == {}


def test_arena_comes_with_one_descriptor(client: Client) -> None:
    ticket = dict(client.slab.ticket.to_dict())
    (reply,) = client.tell(OpenSlab(1, 1, ticket, "m", N_SLOTS, SLOT_NBYTES))
    assert isinstance(reply, ErrorReply)
    assert "0 descriptors" in reply.text


@pytest.mark.parametrize(
    ("slots", "places", "message"),
    [
        ([N_SLOTS], [0], "slot 50"),
        ([0], [N_PLACES], "place 20"),
        ([0], [2**32 - 1], "place"),
        ([0, 1], [0], "one each"),
    ],
)
def test_what_lies_outside_is_never_copied_and_the_slab_is_closed(
    client: Client, slots: list[int], places: list[int], message: str
) -> None:
    """The server has looked at it before: a child that is asked so trusts it no more."""
    client.open()
    reply = client.copy(2, slots, places)
    assert isinstance(reply, ErrorReply)
    assert message in reply.text
    assert "copy_to_device" not in client.childs.calls
    assert client.childs.leaks() == {}


def test_unknown_slab_and_message_are_errors(client: Client) -> None:
    assert isinstance(client.copy(2, [0], [0], slab=9), ErrorReply)
    assert client.tell(CloseSlab(3, 9)) == [SlabClosed(3)]
    (reply,) = client.tell(Detach())
    assert isinstance(reply, ErrorReply)
    client.open()
    assert isinstance(client.open(7), ErrorReply), "number 1 is taken"


def test_closed_slab_is_given_back_after_its_copies(client: Client) -> None:
    client.open()
    client.copy(2, [1, 2, 3], [4, 5, 6])
    assert client.tell(CloseSlab(3, 1)) == [BundlesCopied(2), SlabClosed(3)], "no push stays without its end"
    assert np.array_equal(client.content()[4:7], client.slots[1:4])
    assert client.childs.leaks() == {}


# --- a driver that fails


@pytest.mark.parametrize("what", ["open", "copy", "close"])
def test_whichever_call_fails_there_is_one_answer_and_nothing_is_left(
    rng: np.random.Generator, small_staging: None, what: str
) -> None:
    n_failed = 0
    for n in range(200):
        client = Client(rng)
        is_broken = False
        if what != "open":
            client.open()
        if what == "close":
            client.copy(2, list(range(10)), list(range(10)))
        before = len(client.childs.calls)
        client.childs.fail_at = before + n
        try:
            if what == "open":
                reply = client.open()
            elif what == "copy":
                reply = client.copy(2, list(range(10)), list(range(10)))
            else:
                reply = client.tell(CloseSlab(3, 1))[-1]
        except GpuBroken:
            is_broken = True
        n_calls = len(client.childs.calls) - before
        client.childs.fail_at = None
        if n_calls <= n:
            client.work.close()
            client.close()
            break
        n_failed += 1
        if is_broken:  # the process ends, and the driver takes all back
            assert what == "close"
            continue
        assert isinstance(reply, ErrorReply), (n, client.childs.calls[before + n])
        assert "CUDA_ERROR_LAUNCH_FAILED" in reply.text
        assert client.childs.leaks() == {}, (n, client.childs.calls[before + n])
        assert client.world.violations == []
        client.close()
    assert n_failed > 3


def test_device_that_does_not_get_over_an_error_ends_the_child(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise DeviceError("cu: CUDA_ERROR_ILLEGAL_ADDRESS (700)", name="CUDA_ERROR_ILLEGAL_ADDRESS", number=700)

    client.open()
    with monkeypatch.context() as patch:
        for call in ("copy_to_device", "mem_info"):
            patch.setattr(client.childs, call, fails)
        with pytest.raises(GpuBroken, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            client.copy(2, [0], [0])


def test_copies_that_fail_after_they_were_recorded_end_the_child(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.open()
    client.copy(2, [0], [0])

    def fails(event: int) -> bool:
        raise DeviceError("cuEventQuery(): CUDA_ERROR_ECC_UNCORRECTABLE (214)")

    with monkeypatch.context() as patch:
        patch.setattr(client.childs, "event_query", fails)
        with pytest.raises(GpuBroken, match=r"copying failed.*ECC"):
            client.work.copied()


def test_slab_that_does_not_come_to_rest_ends_the_child(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.open()
    client.copy(2, [0], [0])
    slab = client.work._slabs[1]
    with monkeypatch.context() as patch:
        patch.setattr(client.childs, "stream_query", lambda stream: False)
        with pytest.raises(GpuBroken, match=r"cannot be closed.*within 0\.2 s"):
            client.tell(CloseSlab(3, 1))
    assert client.childs.opened, "it is not unmapped under what writes to it"
    slab.close(1.0)


def test_copy_that_never_ends_is_an_error_after_a_while(
    client: Client, small_staging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.open()
    with monkeypatch.context() as patch:
        patch.setattr("sparseflow_daemon.gpu.slab._COPY_TIMEOUT_S", 0.1)
        patch.setattr(client.childs, "event_query", lambda event: False)
        reply = client.copy(2, list(range(12)), list(range(12)))
    assert isinstance(reply, ErrorReply)
    assert "did not end within 0.1 s" in reply.text


def test_push_that_is_refused_lets_those_before_it_end(client: Client) -> None:
    client.open()
    client.copy(2, [1], [1])
    copied, refused = client.tell(CopyBundles(3, 1, bytes(4), b"\xff" * 4))
    assert copied == BundlesCopied(2)
    assert isinstance(refused, ErrorReply)
    assert np.array_equal(client.content()[1], client.slots[1])


def test_more_staging_is_taken_than_one_bundle_needs_only_where_there_is_more(rng: np.random.Generator) -> None:
    """A bundle larger than all staging still goes."""
    client = Client(rng)
    arena = client.slots
    slab = ClientSlab(client.childs, client.slab.ticket, arena, staging_nbytes=1)
    slab.copy(1, np.arange(5, dtype=np.uint32), np.arange(5, dtype=np.uint32))
    while slab.is_copying:
        slab.copied()
    assert np.array_equal(client.content()[:5], arena[:5])
    slab.close(1.0)
    with pytest.raises(BadRequest):
        slab.copy(2, np.arange(1, dtype=np.uint32), np.arange(1, dtype=np.uint32))
    client.close()


def test_sources_name_no_library_path() -> None:
    for name in ("child", "work", "slab"):
        path = Path(gpu.__file__).with_name(f"{name}.py")
        assert "stub" not in path.read_text(encoding="utf-8")
