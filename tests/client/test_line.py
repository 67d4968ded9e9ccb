"""One thread's connection to a server, against one made by hand: what is sent, who gets which reply, and every end."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from server_by_hand import (
    DEADLINE_S,
    EPOCH,
    PROFILE,
    ServerByHand,
    came,
    ids,
    leased,
    read,
    ready,
    says_nothing,
    soon,
)

from sparseflow.client import line as line_module
from sparseflow.client.attachment import Attachment
from sparseflow.client.line import Line
from sparseflow.errors import NoAnswer, ServerError, ServerNotRunning, SparseFlowError
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import (
    PROTOCOL_VERSION,
    AcquireNeurons,
    Detached,
    ErrorReply,
    HintNeurons,
    Message,
    NeuronsLeased,
    NeuronsReady,
    ReleaseLeases,
)


@pytest.fixture
def attachment(server: ServerByHand) -> Iterator[Attachment]:
    made = server.attach()
    yield made
    made.abandon()


Opened = tuple[Line, socket.socket]


@pytest.fixture
def opened(server: ServerByHand, attachment: Attachment) -> Iterator[Opened]:
    """A line, and the server's end of it."""
    made = Line(attachment, itertools.count(100))
    yield made, server.take_line()
    made.close()


# --- what is sent


def test_line_joins_its_session_and_waits_for_nothing(server: ServerByHand, attachment: Attachment) -> None:
    begin = time.monotonic()
    line = Line(attachment, itertools.count(1))
    assert time.monotonic() - begin < 5
    server.take_line()
    line.close()


def test_request_names_all_its_neurons_and_a_number_of_its_own(opened: Opened) -> None:
    line, far = opened
    assert line.acquire(1, ids(2, 5), 7.5) == 100
    assert read(far) == AcquireNeurons(100, EPOCH, 1, ids(2, 5).tobytes(), [], 7.5, True)
    assert line.acquire(0, ids(), 60.0, keep=False) == 101
    assert read(far) == AcquireNeurons(101, EPOCH, 0, b"", [], 60.0, False)


def test_ids_travel_as_they_are_whatever_lies_behind_them_in_memory(opened: Opened) -> None:
    line, far = opened
    line.acquire(1, np.arange(12, dtype=np.uint32)[::3], 1.0)
    message = read(far)
    assert isinstance(message, AcquireNeurons)
    assert message.ids == ids(0, 3, 6, 9).tobytes()


def test_hint_is_sent_and_not_answered(opened: Opened) -> None:
    line, far = opened
    line.hint(1, ids(2, 5))
    assert read(far) == HintNeurons(EPOCH, 1, ids(2, 5).tobytes())


def test_releases_ride_on_the_next_request(opened: Opened) -> None:
    line, far = opened
    numbers = [line.acquire(0, ids(n), 1.0) for n in range(3)]
    for _ in numbers:
        read(far)
    line.release(numbers[2], at_once=False)
    line.release(numbers[0], at_once=False)
    assert says_nothing(far)
    line.acquire(1, ids(1), 1.0)
    message = read(far)
    assert isinstance(message, AcquireNeurons)
    assert message.released == [numbers[2], numbers[0]]
    line.acquire(1, ids(1), 1.0)
    message = read(far)
    assert isinstance(message, AcquireNeurons)
    assert message.released == [], "once"


def test_release_at_once_is_a_message_of_its_own_and_takes_the_others_along(opened: Opened) -> None:
    line, far = opened
    numbers = [line.acquire(0, ids(n), 1.0) for n in range(2)]
    for _ in numbers:
        read(far)
    line.release(numbers[0], at_once=False)
    line.release(numbers[1], at_once=True)
    assert read(far) == ReleaseLeases(EPOCH, numbers)
    line.acquire(1, ids(1), 1.0)
    message = read(far)
    assert isinstance(message, AcquireNeurons)
    assert message.released == []


@pytest.mark.parametrize("at_once", [True, False])
def test_releases_that_could_not_be_sent_are_sent_later(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """A server that is stopped for a while must not keep leases that nobody holds."""
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    monkeypatch.setattr(line_module, "_SEND_TIMEOUT_S", 0.05)
    with pytest.raises(NoAnswer):
        fill(line)
    with suppress(NoAnswer):
        line.release(number, at_once=at_once)
    with pytest.raises(NoAnswer):
        line.acquire(0, ids(1), 1.0)
    far.setblocking(False)
    assert released_in(far) == []
    line.acquire(0, ids(1), 1.0)
    assert released_in(far) == [number]


def fill(line: Line) -> None:
    for _ in range(100_000):
        line.hint(0, np.arange(PROFILE.ffn_dimension, dtype=np.uint32))
        line.acquire(0, ids(1), 1.0)


def released_in(sock: socket.socket) -> list[int]:
    """Of all messages that have come."""
    found: list[int] = []
    while True:
        try:
            message = decode(sock.recv(1 << 18))
        except BlockingIOError:
            return found
        found += getattr(message, "released", [])


# --- replies


def test_reply_is_given_to_whoever_asks_for_it(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(1, ids(2, 5), 1.0)
    far.send(encode(ready(number, 7, 3)))
    reply = line.reply(number, soon())
    assert isinstance(reply, NeuronsReady)
    assert np.frombuffer(reply.slots, "<u4").tolist() == [7, 3]


def test_error_is_a_reply_too(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(1, ids(2, 5), 1.0)
    error = ErrorReply(number, EPOCH, "arena_busy", "no slots")
    far.send(encode(error))
    assert line.reply(number, soon()) == error
    assert not line.attachment.is_over


def test_request_is_told_where_its_bundles_lie_and_then_that_the_missing_ones_came(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(1, ids(2, 5), 1.0)
    far.send(encode(leased(number, [7, 3], [1])))
    assert line.reply(number, soon()) == leased(number, [7, 3], [1])
    with pytest.raises(NoAnswer):
        line.reply(number, soon(0.05))
    far.send(encode(came(number)))
    assert line.reply(number, soon()) == came(number)


def test_both_parts_of_replies_reach_their_requests_in_their_order(opened: Opened, rng: np.random.Generator) -> None:
    line, far = opened
    numbers = [line.acquire(0, ids(n), 1.0) for n in range(12)]
    for number in rng.permutation(numbers).tolist():
        far.send(encode(leased(number, [number % 12], [0])))
    for number in rng.permutation(numbers).tolist():
        far.send(encode(came(number)))
    for number in rng.permutation(numbers).tolist():
        assert line.reply(number, soon()) == leased(number, [number % 12], [0])
        assert line.reply(number, soon()) == came(number)


def test_error_may_follow_where_bundles_were_leased(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(1, ids(2, 5), 1.0)
    error = ErrorReply(number, EPOCH, "shard_corrupt", "layer 1, neuron 5")
    far.send(encode(leased(number, [7, 3], [1])))
    far.send(encode(error))
    assert isinstance(line.reply(number, soon()), NeuronsLeased)
    assert line.reply(number, soon()) == error


def test_replies_in_any_order_reach_their_requests(opened: Opened, rng: np.random.Generator) -> None:
    line, far = opened
    numbers = [line.acquire(0, ids(n), 1.0) for n in range(12)]
    for number in rng.permutation(numbers).tolist():
        far.send(encode(ready(number, number % 12)))
    for number in rng.permutation(numbers).tolist():
        assert line.reply(number, soon()) == ready(number, number % 12)


def test_late_and_unknown_replies_are_dropped(opened: Opened) -> None:
    line, far = opened
    given_up, wanted = line.acquire(0, ids(1), 1.0), line.acquire(0, ids(2), 1.0)
    line.release(given_up, at_once=False)
    for number in (given_up, 1, 2**63, wanted, given_up):
        far.send(encode(ready(number, 3)))
    far.send(encode(ErrorReply(given_up, EPOCH, "draining", "")))
    assert line.reply(wanted, soon()) == ready(wanted, 3)
    last = line.acquire(0, ids(3), 1.0)
    far.send(encode(ready(last, 4)))
    assert line.reply(last, soon()) == ready(last, 4)
    assert not line._replies
    assert not line._awaited


def test_reply_that_came_before_its_request_was_given_up_is_dropped(opened: Opened) -> None:
    line, far = opened
    given_up, wanted = line.acquire(0, ids(1), 1.0), line.acquire(0, ids(2), 1.0)
    far.send(encode(ready(given_up, 3)))
    far.send(encode(ready(wanted, 4)))
    line.reply(wanted, soon())
    line.release(given_up, at_once=False)
    assert not line._replies


def test_rest_of_a_reply_whose_request_was_given_up_is_dropped(opened: Opened) -> None:
    line, far = opened
    given_up, wanted = line.acquire(0, ids(1), 1.0), line.acquire(0, ids(2), 1.0)
    far.send(encode(leased(given_up, [3], [0])))
    line.reply(given_up, soon())
    line.release(given_up, at_once=False)
    far.send(encode(came(given_up)))
    far.send(encode(ready(wanted, 4)))
    assert line.reply(wanted, soon()) == ready(wanted, 4)
    assert not line._replies
    assert not line._awaited


def test_replies_to_requests_that_are_given_up_do_not_fill_the_line(opened: Opened) -> None:
    """A server ends a line whose replies are not taken."""
    line, far = opened
    far.setblocking(False)
    for _ in range(1500):
        number = line.acquire(0, ids(1), 1.0)
        far.recv(1 << 18)
        far.send(encode(leased(number, [3], [0])))
        far.send(encode(came(number)))
        line.release(number, at_once=False)
    number = line.acquire(0, ids(1), 1.0)
    far.send(encode(ready(number, 4)))
    assert line.reply(number, soon()) == ready(number, 4)


def test_last_counts_of_the_session_are_kept_and_messages_counted(opened: Opened) -> None:
    line, far = opened
    joined = line.attachment.n_messages
    for n in range(3):
        number = line.acquire(0, ids(1), 1.0)
        far.send(encode(ready(number, 3, counts=[n] * 9)))
        line.reply(number, soon())
        assert line.attachment.counts == [n] * 9
    assert line.attachment.n_messages == joined + 6


def test_counts_come_with_the_first_part_of_a_reply_and_stay(opened: Opened) -> None:
    line, far = opened
    joined = line.attachment.n_messages
    number = line.acquire(0, ids(1), 1.0)
    far.send(encode(leased(number, [3], [0], counts=[5] * 9)))
    line.reply(number, soon())
    assert line.attachment.counts == [5] * 9
    far.send(encode(came(number)))
    line.reply(number, soon())
    assert line.attachment.counts == [5] * 9
    assert line.attachment.n_messages == joined + 3


def test_counts_of_a_reply_that_is_older_than_another_line_s_are_not_kept(
    server: ServerByHand, attachment: Attachment
) -> None:
    """A line may be read long after another one."""
    numbers = itertools.count(1)
    lines = [Line(attachment, numbers) for _ in range(2)]
    ends = [server.take_line() for _ in lines]
    asked = [line.acquire(0, ids(1), 1.0) for line in lines]
    for n, (number, end) in enumerate(zip(asked, ends, strict=True)):
        end.send(encode(ready(number, 3, counts=[n] * 9)))
    for line, number in reversed(list(zip(lines, asked, strict=True))):
        line.reply(number, soon())
        assert attachment.counts == [1] * 9
        line.close()


def test_lines_of_two_threads_share_a_session_and_each_gets_its_own_replies(
    server: ServerByHand, attachment: Attachment
) -> None:
    numbers = itertools.count(1)
    got: dict[str, list[Message]] = {"one": [], "other": []}
    errors: list[BaseException] = []
    ends: dict[str, socket.socket] = {}
    lines: dict[str, Line] = {}
    for name in got:
        lines[name] = Line(attachment, numbers)
        ends[name] = server.take_line()

    def work(name: str) -> None:
        try:
            for _ in range(50):
                number = lines[name].acquire(0, ids(1), 1.0)
                got[name].append(lines[name].reply(number, soon()))
                lines[name].release(number, at_once=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[name]) for name in got]
    for thread in threads:
        thread.start()
    seen: dict[str, list[int]] = {"one": [], "other": []}
    for _ in range(50):
        for name, sock in ends.items():
            request = read(sock)
            assert isinstance(request, AcquireNeurons)
            seen[name].append(request.request_id)
            sock.send(encode(ready(request.request_id, 5)))
    for thread in threads:
        thread.join(DEADLINE_S)
    assert errors == []
    for name, requests in seen.items():
        assert [reply.request_id for reply in got[name]] == requests  # type: ignore[union-attr]
        lines[name].close()
    assert sorted(seen["one"] + seen["other"]) == list(range(1, 101)), "numbers of a session do not repeat"


# --- ends


def test_silence_ends_at_the_deadline_and_a_later_reply_still_counts(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    begin = time.monotonic()
    with pytest.raises(NoAnswer, match="said nothing in time; is it stopped, or its disk"):
        line.reply(number, soon(0.2))
    assert 0.2 <= time.monotonic() - begin < 5
    far.send(encode(ready(number, 3)))
    assert line.reply(number, soon()) == ready(number, 3)


def test_deadline_that_has_passed_is_no_endless_wait_and_no_error_where_the_reply_is_there(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    begin = time.monotonic()
    with pytest.raises(NoAnswer):
        line.reply(number, soon(-5))
    assert time.monotonic() - begin < 2
    far.send(encode(ready(number, 3)))
    assert line.reply(number, soon(-5)) == ready(number, 3)


class Babbling:
    """In place of a line's socket: there is always something to read, and never what is waited for."""

    def __init__(self) -> None:
        self._tired_s = soon(3)

    def settimeout(self, _seconds: float) -> None:
        pass

    def recv(self, _nbytes: int) -> bytes:
        assert time.monotonic() < self._tired_s, "nobody looks at the deadline"
        return encode(ready(7, 3))


def test_server_that_says_other_things_all_the_time_does_not_hold_a_wait_beyond_its_deadline(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, _ = opened
    number = line.acquire(0, ids(1), 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(line, "_socket", Babbling())
        with pytest.raises(NoAnswer):
            line.reply(number, soon(0.2))


def test_end_of_the_server_is_told_at_once_and_known_to_the_session(server: ServerByHand, opened: Opened) -> None:
    line, _ = opened
    number = line.acquire(0, ids(1), 1.0)
    later = threading.Timer(0.1, server.stop)
    later.start()
    begin = time.monotonic()
    with pytest.raises(ServerNotRunning):
        line.reply(number, soon())
    assert time.monotonic() - begin < 5
    later.join(DEADLINE_S)
    assert line.attachment.is_over
    with pytest.raises(ServerNotRunning):
        line.acquire(0, ids(1), 1.0)


def test_line_that_is_hung_up_on_says_so(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    far.close()
    for _ in range(2):
        with pytest.raises(ServerNotRunning):
            line.reply(number, soon())


@pytest.mark.parametrize("use", ["acquire", "hint", "release"])
def test_sending_to_a_server_that_has_ended_says_so(opened: Opened, use: str) -> None:
    line, far = opened
    far.close()
    uses: dict[str, Callable[[], Any]] = {
        "acquire": lambda: line.acquire(0, ids(1), 1.0),
        "hint": lambda: line.hint(0, ids(1)),
        "release": lambda: line.release(5, at_once=True),
    }
    with pytest.raises(ServerNotRunning):
        uses[use]()
    assert line.attachment.is_over


def test_replies_that_came_before_the_end_are_still_there(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    read(far)
    far.send(encode(ready(number, 3)))
    far.close()
    assert line.reply(number, soon()) == ready(number, 3)


def test_line_to_a_server_that_has_ended_cannot_be_opened(
    server: ServerByHand, attachment: Attachment, nothing_left: None
) -> None:
    server.stop_listening()
    with pytest.raises(ServerNotRunning, match="has ended"):
        Line(attachment, itertools.count(1))
    assert attachment.is_over


def test_session_that_the_server_does_not_know_is_over(opened: Opened) -> None:
    """The answer to Join, whenever it comes."""
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    far.send(encode(ErrorReply(0, EPOCH, "resync", "no such session")))
    with pytest.raises(ServerNotRunning, match="no such session"):
        line.reply(number, soon())
    assert line.attachment.is_over


def test_message_that_is_no_reply_is_an_error_of_the_server(opened: Opened) -> None:
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    far.send(encode(Detached(EPOCH)))
    with pytest.raises(ServerError, match="Detached, which is no reply"):
        line.reply(number, soon())


JUNK = {
    "junk": b"\xc1junk",
    "unknown kind": msgpack.packb([PROTOCOL_VERSION, 99]),
    "other version": msgpack.packb([PROTOCOL_VERSION + 1, 19, 100, EPOCH, b"", []]),
    "field missing": msgpack.packb([PROTOCOL_VERSION, 19, 100, EPOCH, b""]),
    "wrong type": msgpack.packb([PROTOCOL_VERSION, 19, 100, EPOCH, "slots", []]),
}


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_junk_is_an_error_of_ours_and_the_next_reply_is_none_the_worse(opened: Opened, content: bytes) -> None:
    line, far = opened
    number = line.acquire(0, ids(1), 1.0)
    far.send(content)
    with pytest.raises(SparseFlowError):
        line.reply(number, soon())
    far.send(encode(ready(number, 3)))
    assert line.reply(number, soon()) == ready(number, 3)


def test_server_that_takes_nothing_is_told_of_in_time(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    line, _ = opened
    monkeypatch.setattr(line_module, "_SEND_TIMEOUT_S", 0.1)
    begin = time.monotonic()
    with pytest.raises(NoAnswer, match=r"took nothing within 0.1 s; is it stopped"):
        fill(line)
    assert time.monotonic() - begin < 8


def test_closing_may_be_done_twice_and_leaves_nothing(
    server: ServerByHand, attachment: Attachment, nothing_left: None
) -> None:
    line = Line(attachment, itertools.count(1))
    far = server.take_line()
    line.close()
    line.close()
    assert far.recv(10) == b"", "the server sees it"
    far.close()
