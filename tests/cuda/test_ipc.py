"""Slabs and events between two processes: the bytes that come over, what is refused, nothing left whatever fails."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import msgpack
import numpy as np
import pytest
from fake_driver import FakeDriver, World
from forking import holds_in_a_fork
from hypothesis import given
from hypothesis import strategies as st

from sparseflow.cuda.ipc import ExportedEvent, ExportedSlab, OpenedEvent, OpenedSlab
from sparseflow.cuda.ipc_trial import fill_slab, try_ipc
from sparseflow.cuda.tickets import EventTicket, SlabTicket, format_uuid
from sparseflow.errors import BadRequest, DeviceError

HANDLE, UUID = bytes(range(64)), bytes(range(16))
SLAB = SlabTicket(HANDLE, 4096, 8192, UUID)
EVENT = EventTicket(HANDLE, UUID)
NBYTES = 1 << 16


@pytest.fixture
def exported(driver: FakeDriver) -> Iterator[ExportedSlab]:
    """The second half of an allocation."""
    address = driver.mem_alloc(2 * NBYTES)
    with ExportedSlab(driver, address + NBYTES, NBYTES) as slab:
        yield slab
    driver.mem_free(address)


@pytest.fixture
def stream(other: FakeDriver) -> Iterator[int]:
    made = other.stream_create()
    yield made
    other.stream_destroy(made)


# --- tickets


def test_tickets_travel_as_plain_values() -> None:
    for ticket in (SLAB, EVENT):
        content = msgpack.unpackb(msgpack.packb(ticket.to_dict()))
        assert type(ticket).from_dict(content) == ticket


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"handle": HANDLE[:-1]}, "handle is 63 bytes; it must be 64"),
        ({"handle": HANDLE + b"x"}, "handle is 65 bytes"),
        ({"handle": HANDLE.hex()}, "handle is str"),
        ({"handle": bytearray(HANDLE)}, "handle is bytearray"),
        ({"device_uuid": b""}, "device_uuid is 0 bytes; it must be 16"),
        ({"offset": -1}, "offset=-1"),
        ({"offset": True}, "offset=True"),
        ({"offset": 0.0}, "offset=0.0"),
        ({"offset": 1 << 63}, "offset=9223372036854775808"),
        ({"nbytes": 0}, "nbytes=0"),
        ({"nbytes": 1 << 64}, "nbytes=18446744073709551616"),
        ({"nbytes": None}, "nbytes=None"),
        ({"more": 1}, "'more'.*nothing else"),
    ],
)
def test_wrong_slab_ticket_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        SlabTicket.from_dict(SLAB.to_dict() | change)


@pytest.mark.parametrize("content", [None, [], b"", 7, {}, {"handle": HANDLE}, {1: 2}, "handle"])
def test_what_is_no_ticket_at_all_is_refused(content: object) -> None:
    for kind in (SlabTicket, EventTicket):
        with pytest.raises(BadRequest, match="ticket: has"):
            kind.from_dict(content)


@given(
    st.dictionaries(
        st.sampled_from(["handle", "offset", "nbytes", "device_uuid"]), st.none() | st.binary() | st.integers()
    )
)
def test_any_values_make_a_ticket_or_a_refusal(content: dict[str, object]) -> None:
    for kind in (SlabTicket, EventTicket):
        with suppress(BadRequest):
            assert kind.from_dict(content).to_dict() == content


def test_uuid_is_written_as_others_write_it() -> None:
    assert format_uuid(UUID) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


# --- what comes over


def test_bytes_copied_by_one_process_are_what_the_other_reads_after_the_event(world: World) -> None:
    driver, other = FakeDriver(world), FakeDriver(world)
    try_ipc(driver, partial(fill_slab, other))
    assert driver.leaks() == other.leaks() == {}


def test_without_the_event_the_bytes_would_be_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above could fail."""
    monkeypatch.setattr(OpenedEvent, "hold_back", lambda *_: None)
    with pytest.raises(DeviceError, match="bytes are not those"):
        try_ipc(FakeDriver(world), partial(fill_slab, FakeDriver(world)))


def test_only_the_slab_is_written_and_exactly(
    driver: FakeDriver, other: FakeDriver, exported: ExportedSlab, stream: int
) -> None:
    content = np.random.default_rng().integers(1, 256, NBYTES, np.uint8)
    with OpenedSlab(other, exported.ticket, stream) as slab:
        other.copy_to_device(slab.address, content.ctypes.data, NBYTES, stream)
    (base,) = driver.allocations
    assert not driver.content(base, NBYTES).any()
    assert np.array_equal(driver.content(base + NBYTES, NBYTES), content)


def test_closing_waits_for_what_is_on_the_stream(
    other: FakeDriver, exported: ExportedSlab, stream: int, world: World
) -> None:
    content = np.ones(NBYTES, np.uint8)
    slab = OpenedSlab(other, exported.ticket, stream)
    for _ in range(5):
        other.copy_to_device(slab.address, content.ctypes.data, NBYTES, stream)
    slab.close()
    assert not other.streams[stream].work
    assert world.violations == []


def test_copies_that_do_not_end_leave_the_slab_open(
    other: FakeDriver, exported: ExportedSlab, stream: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = OpenedSlab(other, exported.ticket, stream)
    with monkeypatch.context() as patch:
        patch.setattr(other, "stream_query", lambda _: False)
        with pytest.raises(DeviceError, match=r"within 0\.05 s; the slab stays open"):
            slab.close(timeout_s=0.05)
    assert slab.address
    slab.close()


def test_an_event_is_waited_for_again_each_time_it_is_recorded(driver: FakeDriver, other: FakeDriver) -> None:
    ours, theirs, address = driver.stream_create(), other.stream_create(), driver.mem_alloc(1)
    with ExportedEvent(driver) as event:
        event.record(ours)
        driver.stream_synchronize(ours)
        with OpenedEvent(other, event.ticket) as opened:
            for value in range(1, 4):
                content = np.full(1, value, np.uint8)
                driver.copy_to_device(address, content.ctypes.data, 1, ours)
                event.record(ours)
                opened.hold_back(theirs)
                assert not opened.is_done()
                other.stream_synchronize(theirs)
                assert driver.content(address, 1) == value
                assert opened.is_done()
                assert event.is_done()
    driver.mem_free(address)
    driver.stream_destroy(ours)
    other.stream_destroy(theirs)


# --- what is refused


def test_slab_beyond_its_allocation_is_not_exported(driver: FakeDriver) -> None:
    address = driver.mem_alloc(NBYTES)
    for first, nbytes in ((0, NBYTES + 1), (1, NBYTES), (0, 0), (0, -1)):
        with pytest.raises(BadRequest, match=f"its allocation has {NBYTES} bytes"):
            ExportedSlab(driver, address + first, nbytes)
    driver.mem_free(address)
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
        ExportedSlab(driver, address, 1)


@pytest.mark.parametrize(("offset", "nbytes"), [(NBYTES + 1, NBYTES), (0, 2 * NBYTES + 1), (1 << 62, 1 << 62)])
def test_ticket_for_more_than_there_is_opens_nothing(
    other: FakeDriver, exported: ExportedSlab, stream: int, offset: int, nbytes: int
) -> None:
    ticket = exported.ticket
    with pytest.raises(BadRequest, match=f"its allocation ends at {2 * NBYTES}"):
        OpenedSlab(other, SlabTicket(ticket.handle, offset, nbytes, ticket.device_uuid), stream)
    assert other.opened == {}


def test_handle_of_nothing_is_one_error_and_the_next_one_opens(
    other: FakeDriver, exported: ExportedSlab, stream: int
) -> None:
    with pytest.raises(BadRequest, match=r"slab: its handle cannot be opened.*CUDA_ERROR_INVALID_VALUE"):
        OpenedSlab(other, SLAB, stream)
    with pytest.raises(BadRequest, match=r"event: its handle cannot be opened.*CUDA_ERROR_INVALID_VALUE"):
        OpenedEvent(other, EVENT)
    OpenedSlab(other, exported.ticket, stream).close()


def test_own_handle_is_refused_with_what_would_do(driver: FakeDriver, exported: ExportedSlab) -> None:
    with pytest.raises(BadRequest, match=r"CUDA_ERROR_INVALID_CONTEXT.*another pid"):
        OpenedSlab(driver, exported.ticket, 0)


def test_ticket_of_another_gpu_is_not_opened(world: World, exported: ExportedSlab) -> None:
    elsewhere = FakeDriver(world, uuid=bytes(16))
    for open_it in (
        lambda: OpenedSlab(elsewhere, exported.ticket, 0),
        lambda: OpenedEvent(elsewhere, EventTicket(HANDLE, UUID)),
    ):
        with pytest.raises(BadRequest, match=r"GPU-00010203-.* uses GPU-00000000-"):
            open_it()
    assert set(elsewhere.calls) == {"device_uuid"}


def test_event_that_was_not_recorded_has_no_ticket(driver: FakeDriver) -> None:
    with ExportedEvent(driver) as event, pytest.raises(BadRequest, match="record it first"):
        _ = event.ticket


# --- closed, forgotten, forked


@contextmanager
def all_four(
    driver: FakeDriver, other: FakeDriver
) -> Iterator[tuple[list[Callable[[], object]], list[ExportedSlab | OpenedSlab | ExportedEvent | OpenedEvent]]]:
    """One of each, opened: what uses them, and they, importers first. Closed twice at the end."""
    address, stream = driver.mem_alloc(NBYTES), other.stream_create()
    slab, event = ExportedSlab(driver, address, NBYTES), ExportedEvent(other)
    event.record(stream)
    opened, opened_event = OpenedSlab(other, slab.ticket, stream), OpenedEvent(driver, event.ticket)
    owners = [opened_event, opened, event, slab]
    uses = [
        lambda: slab.ticket,
        lambda: opened.address,
        lambda: event.ticket,
        lambda: event.record(stream),
        event.is_done,
        lambda: opened_event.hold_back(0),
        opened_event.is_done,
    ]
    yield uses, owners
    for _ in range(2):
        for owner in owners:
            owner.close()
    other.stream_destroy(stream)
    driver.mem_free(address)


def test_use_after_close_is_an_error(driver: FakeDriver, other: FakeDriver) -> None:
    with all_four(driver, other) as (uses, _):
        for use in uses:
            use()
    n_calls = len(driver.calls) + len(other.calls)
    for use in uses:
        with pytest.raises(BadRequest, match="is closed"):
            use()
    assert len(driver.calls) + len(other.calls) == n_calls


def test_a_forked_child_can_use_nothing_and_gives_nothing_back(driver: FakeDriver, other: FakeDriver) -> None:
    with all_four(driver, other) as (uses, owners):

        def is_refused_and_left_alone() -> bool:
            n_calls = len(driver.calls) + len(other.calls)
            for use in uses:
                with pytest.raises(BadRequest, match="forked child"):
                    use()
            for owner in owners:
                owner.close()
            return len(driver.calls) + len(other.calls) == n_calls

        assert holds_in_a_fork(is_refused_and_left_alone)
        for use in uses:
            use()


def test_what_is_forgotten_is_given_back(driver: FakeDriver, other: FakeDriver) -> None:
    address, stream = driver.mem_alloc(NBYTES), other.stream_create()
    slab, event = ExportedSlab(driver, address, NBYTES), ExportedEvent(other)
    event.record(stream)
    opened, opened_event = OpenedSlab(other, slab.ticket, stream), OpenedEvent(driver, event.ticket)
    content = np.ones(NBYTES, np.uint8)
    other.copy_to_device(opened.address, content.ctypes.data, NBYTES, stream)
    del opened, opened_event, event, slab
    gc.collect()
    assert other.leaks() == {"streams": 1}
    assert driver.leaks() == {"allocations": 1}
    other.stream_destroy(stream)
    driver.mem_free(address)


# --- whatever fails


@pytest.mark.parametrize("who", ["exporter", "importer"])
def test_whichever_call_fails_there_is_one_error_and_nothing_is_left(who: str) -> None:
    for n in range(100):
        world = World()
        driver, other = FakeDriver(world), FakeDriver(world)
        failing = driver if who == "exporter" else other
        failing.fail_at = n
        failures: list[Exception] = []
        try:
            try_ipc(driver, partial(fill_slab, other))
        except (DeviceError, BadRequest) as failure:
            failures.append(failure)
        assert len(failures) == (len(failing.calls) > n)
        assert all("CUDA_ERROR_LAUNCH_FAILED (719)" in str(failure) for failure in failures), n
        assert driver.leaks() == other.leaks() == {}, (n, failing.calls[n])
        assert world.violations == [], n
        if len(failing.calls) <= n:
            break
    assert n > 10
