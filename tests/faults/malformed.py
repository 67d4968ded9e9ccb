"""What is no message, or not one for its place: packets that peers of a server send in place of what they should."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import zmq
from processes import ServerProcess
from raw_peers import Connection, RawLine, RawSession, ask_ctl, attach, nested, packed
from still_serving import neurons, refused

from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import (
    PROTOCOL_VERSION,
    AcquireNeurons,
    Detach,
    Detached,
    ErrorReply,
    Join,
    NeuronsReady,
    StatusReply,
    StatusRequest,
)
from sparseflow.protocol.run_directory import RunDirectory

_CHOICE = random.Random(8)  # fuzzers take other bytes each time; these fail again if they do once
MALFORMED = ("bad_request", "protocol_mismatch")

JUNK = {
    "one byte": b"\x00",
    "random bytes": _CHOICE.randbytes(100),
    "no array": packed(1)[1:],
    "an empty array": packed(),
    "a version alone": packed(PROTOCOL_VERSION),
    "a version that is true": packed(True, 3),
    "a kind that is none": packed(PROTOCOL_VERSION, 99),
    "a kind that is no number": packed(PROTOCOL_VERSION, "Attach"),
    "a kind that is true": packed(PROTOCOL_VERSION, True),
    "too few fields": packed(PROTOCOL_VERSION, 1, 5),
    "an extension type": b"\x93\x02\x01\xd4\x05x",
    "a time": b"\x93\x02\x01\xd6\xff\x00\x00\x00\x01",
    "an extension of 4 GB": b"\x93\x02\x01\xc9\xff\xff\xff\xff\x05x",
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff\x02\x03",
    "a field of 4 billion": b"\x93\x02\x03\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\x93\x02\x03\xdf\xff\xff\xff\xff",
    "a string of 4 GB": b"\x93\x02\x03\xdb\xff\xff\xff\xffx",
    "bytes of 4 GB": b"\x93\x02\x03\xc6\xff\xff\xff\xffx",
    "a string that is not UTF-8": b"\x93\x02\x01\xa2\xff\xfe",
    "a map whose key is an array": b"\x93\x02\x01\x81\x91\x01\x01",
    "a message and a byte": encode(StatusRequest(7)) + b"\x00",
    "half a message": encode(attach("model"))[:-3],
    "much of nothing": b"x" * (150 << 10),
    "a long string as version": packed("v" * 150_000),
    "a long string as kind": packed(PROTOCOL_VERSION, "k" * 150_000),
    # what Python cannot say in so many words
    "deep nesting as version": b"\x92" + nested(1000) + b"\x01",
    "deep nesting as kind": b"\x92\x02" + nested(1000),
    "deep nesting as field": b"\x93\x02\x06" + nested(1000),
}


def _request(**changed: Any) -> bytes:
    """A request of number 5, some fields of which are of no type of theirs."""
    fields = {"epoch": 1, "layer": 0, "ids": b"\x00" * 4, "released": [], "timeout_s": 1.0, "keep": True} | changed
    return packed(PROTOCOL_VERSION, AcquireNeurons.KIND, 5, *fields.values())


WRONG_FIELDS = {  # of a request whose number can be read
    "fields of other types": packed(PROTOCOL_VERSION, 3, 5, "0", -1, None, {}, 1),
    "a negative layer": _request(layer=-1),
    "a layer that is not a number": _request(layer=float("nan")),
    "a layer that is true": _request(layer=True),
    "neurons as numbers": _request(ids=[-1, 2]),
    "a negative request": _request(released=[-1]),
    "a request that is true": _request(released=[True]),
    "a time that is not a number": _request(timeout_s=float("nan")),
    "a time without end": _request(timeout_s=float("inf")),
    "a whole number of seconds": _request(timeout_s=1),
    "a flag that is a number": _request(keep=1),
}

NOT_GREETINGS = {
    "an empty packet": b"",
    "a question for the other socket": encode(StatusRequest(7)),
    "a request before the session": encode(AcquireNeurons(7, 1, 0, b"", [], 1.0, True)),
    "goodbye before hello": encode(Detach()),
    "what only a server says": encode(Detached(1)),
    "a session that is not open": encode(Join(1, bytes(16))),
    "a token that is none": encode(Join(1, b"x")),
    "a long name of a model": encode(attach("m" * 150_000)),
    "deep nesting as fingerprint": b"\x95\x02\x01\x05\xa0\x81\xa7weights" + nested(900),
    "a fingerprint too long to be repeated": encode(attach(weights="\x01" * 60_000)),
}

NOT_QUESTIONS: Mapping[str, Sequence[bytes]] = {
    "an empty frame": [b""],
    "two frames": [encode(StatusRequest(7)), b""],
    "the delimiter of a REQ socket": [b"", encode(StatusRequest(7))],
    "many frames": [b"x"] * 200,
    "as much as is taken": [_CHOICE.randbytes(1 << 20)],
    "what belongs on the other socket": [encode(attach())],
    "a request": [encode(AcquireNeurons(7, 1, 0, b"", [], 1.0, True))],
    "what only a server says": [encode(Detached(1))],
}


NOT_NEURONS: Mapping[str, Mapping[str, Any]] = {
    "a layer that is none": {"layer": 3},
    "a layer far away": {"layer": 2**64 - 1},
    "a neuron that is none": {"ids": neurons(1, 61)},
    "a neuron far away": {"ids": neurons(1, 2**32 - 1)},
    "neurons out of order": {"ids": neurons(5, 3)},
    "a neuron twice": {"ids": neurons(3, 3)},
    "half a neuron": {"ids": b"\x01\x00"},
}


# --- the three ways in: each takes all of its junk, then much of it, and says what else it was asked for


def greet_with_junk() -> None:
    """Connections that say anything but hello: told why and closed, or closed."""
    for what, packet in (JUNK | WRONG_FIELDS | NOT_GREETINGS).items():
        _turned_away(packet, what)
    for _ in range(60):
        for what in ("random bytes", "much of nothing", "an array of 4 billion", "deep nesting as field"):
            _turned_away(JUNK[what], what)


def _turned_away(packet: bytes, what: str) -> None:
    with Connection() as peer:
        peer.send(packet)
        reply = peer.reply_or_end()
        assert reply is None or isinstance(reply, ErrorReply), what
        assert reply is None or peer.reply_or_end() is None, what


def ask_for_junk() -> None:
    """A line on which every other packet is junk: each is answered once, and the line goes on."""
    with RawSession() as session, RawLine(session) as line:
        for n, (what, packet) in enumerate((JUNK | WRONG_FIELDS).items(), 1):
            line.send(packet)
            refused(line, *MALFORMED, request_id=5 if what in WRONG_FIELDS else 0)
            line.send(session.acquire(n, neurons(n), released=[n - 1]))
            assert isinstance(reply := line.reply(), NeuronsReady), what
            assert reply.request_id == n
        for _ in range(300):
            for what in ("random bytes", "much of nothing", "an array of 4 billion", "deep nesting as field"):
                line.send(JUNK[what])
                refused(line, *MALFORMED)
        session.send(Detach())
        assert session.receive() == Detached(session.welcome.epoch)


def question_with_junk() -> None:
    """Messages to `ctl.sock`: each is answered, but for one that is larger than is taken."""
    for what, frames in (NOT_QUESTIONS | {what: [packet] for what, packet in (JUNK | WRONG_FIELDS).items()}).items():
        reply = ask_ctl(frames, timeout_s=10)
        assert isinstance(reply, ErrorReply), what
        assert reply.code in MALFORMED, what
    assert isinstance(ask_ctl([encode(StatusRequest(8))]), StatusReply)
    assert ask_ctl([b"x" * (2 << 20)], timeout_s=0.2) is None
    packets = [JUNK["random bytes"], JUNK["much of nothing"], JUNK["an array of 4 billion"]]
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(RunDirectory.of("s").ctl_endpoint)
        for _ in range(300):
            for packet in packets:
                sock.send(packet)
            for _ in packets:
                assert sock.poll(10_000)
                assert isinstance(decode(sock.recv()), ErrorReply)


WAYS: Mapping[str, Callable[[], None]] = {
    "attach.sock": greet_with_junk,
    "line": ask_for_junk,
    "ctl.sock": question_with_junk,
}


def private_nbytes(server: ServerProcess) -> int:
    """Memory that is the server's alone."""
    return int(psutil.Process(server.pid).memory_full_info().uss)
