"""Packets with descriptors: what arrives, who closes what, and what a broken peer can do."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest

from sparseflow.errors import BadRequest, NoAnswer, ProtocolMismatch, ServerNotRunning
from sparseflow.protocol.codec import encode
from sparseflow.protocol.messages import PROTOCOL_VERSION, Attach, Detach, Detached, ErrorReply, Message
from sparseflow.protocol.packets import PACKET_NBYTES, receive_packet, send_packet

TIMEOUT_S = 10.0
MOST_DESCRIPTORS = 16

Pair = tuple[socket.socket, socket.socket]

pytestmark = pytest.mark.usefixtures("no_descriptor_left")


@pytest.fixture
def pair(no_descriptor_left: None) -> Iterator[Pair]:
    """Two ends of a connection, which wait 10 s at most."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.settimeout(TIMEOUT_S)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def files(tmp_path: Path, no_descriptor_left: None) -> Iterator[list[int]]:
    """Descriptors of 20 files that hold their numbers."""
    opened = []
    for n in range(20):
        (tmp_path / str(n)).write_text(str(n))
        opened.append(os.open(tmp_path / str(n), os.O_RDONLY | os.O_CLOEXEC))
    yield opened
    for fd in opened:
        os.close(fd)


def n_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def contents(descriptors: list[int]) -> list[str]:
    """What files hold, which are closed."""
    found = [os.pread(fd, 10, 0).decode() for fd in descriptors]
    for fd in descriptors:
        os.close(fd)
    return found


def of_size(nbytes: int) -> Message:
    """A message of exactly that many bytes."""
    frame = len(encode(ErrorReply(1, 1, "", "x" * (1 << 16))))
    message = ErrorReply(1, 1, "", "x" * (nbytes - frame + (1 << 16)))
    assert len(encode(message)) == nbytes
    return message


def send_many(sock: socket.socket, message: Message) -> None:
    for _ in range(10_000):
        send_packet(sock, message)


# --- what arrives


def test_message_arrives_with_its_descriptors_in_their_order(pair: Pair, files: list[int]) -> None:
    attach = Attach(os.getpid(), "opt", {"dtype": "float16"})
    send_packet(pair[0], attach, [files[3], files[1], files[2]])
    message, descriptors = receive_packet(pair[1])
    assert message == attach
    assert contents(descriptors) == ["3", "1", "2"]
    assert contents([os.dup(files[3])]) == ["3"], "the sender's stay the sender's"


def test_message_arrives_without_descriptors(pair: Pair) -> None:
    send_packet(pair[1], Detach())
    assert receive_packet(pair[0]) == (Detach(), [])


def test_packets_stay_apart_each_with_its_own_descriptors(pair: Pair, files: list[int]) -> None:
    for n in range(5):
        send_packet(pair[0], Detached(n), files[:n])
    for n in range(5):
        message, descriptors = receive_packet(pair[1])
        assert message == Detached(n)
        assert contents(descriptors) == [str(i) for i in range(n)]


def test_as_many_descriptors_as_may_come_arrive(pair: Pair, files: list[int]) -> None:
    send_packet(pair[0], Detach(), files[:MOST_DESCRIPTORS])
    assert contents(receive_packet(pair[1])[1]) == [str(n) for n in range(MOST_DESCRIPTORS)]


def test_largest_packet_arrives(pair: Pair) -> None:
    message = of_size(PACKET_NBYTES)
    send_packet(pair[0], message)
    assert receive_packet(pair[1]) == (message, [])


def test_received_descriptors_are_not_inherited_by_programs_that_are_started(pair: Pair, files: list[int]) -> None:
    send_packet(pair[0], Detach(), files[:2])
    _, descriptors = receive_packet(pair[1])
    inheritable = [os.get_inheritable(fd) for fd in descriptors]
    for fd in descriptors:
        os.close(fd)
    assert inheritable == [False, False]


def test_message_that_comes_late_is_waited_for(pair: Pair) -> None:
    later = threading.Timer(0.1, lambda: send_packet(pair[0], Detached(3)))
    later.start()
    assert receive_packet(pair[1]) == (Detached(3), [])
    later.join(TIMEOUT_S)


# --- the other side is gone, or silent


def test_what_was_sent_before_the_end_still_arrives_and_then_the_end_is_told(pair: Pair, files: list[int]) -> None:
    send_packet(pair[0], Detach(), files[:2])
    pair[0].close()
    assert contents(receive_packet(pair[1])[1]) == ["0", "1"]
    for _ in range(2):
        with pytest.raises(ServerNotRunning, match="closed by the other side"):
            receive_packet(pair[1])


def test_end_with_messages_unread_is_told(pair: Pair) -> None:
    """The kernel then resets the connection."""
    send_packet(pair[1], Detach())
    pair[0].close()
    with pytest.raises(ServerNotRunning):
        receive_packet(pair[1])


def test_sending_to_a_closed_peer_is_an_error(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(OSError, match="pipe"):
        send_packet(pair[1], Detach())


def test_silence_ends_at_the_socket_s_timeout(pair: Pair) -> None:
    pair[1].settimeout(0.2)
    begin = time.monotonic()
    with pytest.raises(NoAnswer, match=r"no answer within 0.2 s; is the other side stopped"):
        receive_packet(pair[1])
    assert 0.2 <= time.monotonic() - begin < 5


def test_peer_that_reads_nothing_does_not_hold_a_sender_for_ever(pair: Pair) -> None:
    pair[0].settimeout(0.05)
    with pytest.raises(OSError, match="timed out"):
        send_many(pair[0], of_size(PACKET_NBYTES))
    assert receive_packet(pair[1])[0] == of_size(PACKET_NBYTES), "what was taken is whole"


# --- too much, and junk


def test_message_that_fits_no_packet_is_refused_and_nothing_is_sent(pair: Pair, files: list[int]) -> None:
    with pytest.raises(BadRequest, match=rf"ErrorReply of {PACKET_NBYTES + 1} bytes: a packet holds {PACKET_NBYTES}"):
        send_packet(pair[0], of_size(PACKET_NBYTES + 1), files[:1])
    send_packet(pair[0], Detach())
    assert receive_packet(pair[1]) == (Detach(), [])


JUNK = {
    "junk": b"\xc1junk",
    "not an array": msgpack.packb({"a": 1}),
    "unknown kind": msgpack.packb([PROTOCOL_VERSION, 99]),
    "a field too few": msgpack.packb([PROTOCOL_VERSION, 1]),
    "a field too many": msgpack.packb([PROTOCOL_VERSION, 18, 1, 1]),
    "a field too many for a message of none": msgpack.packb([PROTOCOL_VERSION, 2, 1]),
    "lists in lists": b"\x92" + bytes([PROTOCOL_VERSION]) + b"\x91" * 1020 + b"\x90",
}


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_junk_is_refused_and_its_descriptors_closed(pair: Pair, files: list[int], content: bytes) -> None:
    socket.send_fds(pair[0], [content], files[:3])
    before = n_open()
    with pytest.raises(BadRequest):
        receive_packet(pair[1])
    assert n_open() == before
    send_packet(pair[0], Detach())
    assert receive_packet(pair[1]) == (Detach(), []), "the next packet is none the worse"


def test_other_version_is_a_mismatch_and_its_descriptors_closed(pair: Pair, files: list[int]) -> None:
    socket.send_fds(pair[0], [msgpack.packb([PROTOCOL_VERSION + 1, 1, "anything"])], files[:3])
    before = n_open()
    with pytest.raises(ProtocolMismatch):
        receive_packet(pair[1])
    assert n_open() == before


def test_packet_of_nothing_with_descriptors_closes_them(pair: Pair, files: list[int]) -> None:
    socket.send_fds(pair[0], [b""], files[:3])
    before = n_open()
    with pytest.raises((BadRequest, ServerNotRunning)):
        receive_packet(pair[1])
    assert n_open() == before


def test_packet_that_is_too_large_is_refused_and_its_descriptors_closed(pair: Pair, files: list[int]) -> None:
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    socket.send_fds(pair[0], [encode(of_size(PACKET_NBYTES + 1))], files[:3])
    before = n_open()
    with pytest.raises(BadRequest, match=f"more than {PACKET_NBYTES} bytes or {MOST_DESCRIPTORS} descriptors"):
        receive_packet(pair[1])
    assert n_open() == before
    send_packet(pair[0], Detach())
    assert receive_packet(pair[1]) == (Detach(), [])


@pytest.mark.parametrize("n", [MOST_DESCRIPTORS + 1, 20])
def test_packet_with_too_many_descriptors_is_refused_and_all_are_closed(pair: Pair, files: list[int], n: int) -> None:
    socket.send_fds(pair[0], [encode(Detach())], files[:n])
    before = n_open()
    with pytest.raises(BadRequest, match="descriptors"):
        receive_packet(pair[1])
    assert n_open() == before


def test_many_bad_packets_leave_no_descriptor(pair: Pair, files: list[int], rng: np.random.Generator) -> None:
    before = n_open()
    for _ in range(300):
        n = int(rng.integers(0, 20))
        content = rng.bytes(int(rng.integers(1, 40)))
        socket.send_fds(pair[0], [content], files[:n])
        try:
            _, descriptors = receive_packet(pair[1])
        except (BadRequest, ProtocolMismatch):
            continue
        contents(descriptors)
    assert n_open() == before
