"""What a server refuses: who is told why, with both values; and whoever talks nonsense disturbs nobody."""

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from processes import Host, ServerProcess, until
from raw_peers import Connection, RawLine, RawSession, ask_ctl, attach, nested, packed
from served_shards import ServedShards

from sparseflow.client.attachment import Attachment
from sparseflow.client.weight_client import WeightClient
from sparseflow.core.weight_source import HostBundles
from sparseflow.errors import ArenaBusy, BadRequest, FingerprintMismatch, NoSuchModel, ProtocolMismatch
from sparseflow.protocol.codec import encode
from sparseflow.protocol.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    AcquireNeurons,
    Detach,
    Detached,
    ErrorReply,
    HintNeurons,
    Join,
    NeuronsReady,
    ReleaseLeases,
    StatusReply,
    StatusRequest,
)

SHARE = 12
N_SESSIONS = 2


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    return ServedShards(tmp_path / "store")


@pytest.fixture
def server(host: Host, shards: ServedShards) -> ServerProcess:
    """Two sessions with a share of SHARE slots each."""
    ratio = shards.ratio(SHARE * (N_SESSIONS + 1))
    return host.serve(shards.folder, cpu_cache_ratio=ratio, max_sessions=N_SESSIONS)


@pytest.fixture
def session(server: ServerProcess) -> Iterator[RawSession]:
    with RawSession() as session:
        yield session
        session.send(Detach())
        assert session.receive() == Detached(session.welcome.epoch)


@pytest.fixture
def line(session: RawSession) -> Iterator[RawLine]:
    with RawLine(session) as line:
        yield line


def neurons(*ids: int) -> bytes:
    return np.array(ids, "<u4").tobytes()


def assert_serves(server: ServerProcess, shards: ServedShards) -> None:
    """Somebody else attaches, fetches, and gets what is asked for; and nothing is amiss."""
    ids = np.arange(3, 3 + SHARE, dtype=np.uint32)
    with WeightClient("s") as client, client.fetch(1, ids) as fetch:
        assert np.array_equal(content(fetch.wait(10)), shards.content(1, ids))
    status = server.status()
    assert (status["state"], status["reasons"]) == ("ready", [])


def content(bundles: HostBundles) -> np.ndarray:
    """(n, bundle_nbytes) uint8."""
    base = bundles.base.view(len(bundles.base), -1).numpy().view(np.uint8)
    return base[bundles.slots]


# --- what does not fit together


@pytest.mark.parametrize("field", ["weights", "predictors", "dtype", "bundle_nbytes"])
def test_other_weights_than_expected_are_refused_with_both_values(
    server: ServerProcess, shards: ServedShards, field: str
) -> None:
    held = {
        "weights": shards.manifest.weights_fingerprint,
        "predictors": shards.manifest.predictors_fingerprint,
        "dtype": "float16",
        "bundle_nbytes": shards.bundle_nbytes,
    }
    with pytest.raises(FingerprintMismatch) as refused:
        WeightClient("s", expected={field: "another"})
    assert f"{field}: 'another' there, {held[field]!r} here" in str(refused.value)
    with WeightClient("s", expected=held) as client:
        assert client.model == "self-describing"


@pytest.mark.parametrize(("field", "here"), [("protocol", PROTOCOL_VERSION), ("layout", LAYOUT_VERSION)])
def test_another_version_is_refused_with_both_values(server: ServerProcess, field: str, here: int) -> None:
    with pytest.raises(ProtocolMismatch, match=rf"{field}: 99 there, {here} here.*install the same SparseFlow"):
        Attachment("s", "", {field: 99}, 10)


def test_every_field_that_differs_is_named(server: ServerProcess) -> None:
    other = {"protocol": 98, "layout": 99, "weights": "w", "predictors": "p", "dtype": "int4", "bundle_nbytes": 3}
    with pytest.raises(ProtocolMismatch) as refused:
        Attachment("s", "", other, 10)
    for field, value in other.items():
        assert f"{field}: {value!r} there, " in str(refused.value)


def test_a_packet_of_another_protocol_is_refused_by_its_version(server: ServerProcess) -> None:
    with Connection() as peer:
        peer.send(packed(99, 1, os.getpid(), "", {}))
        reply = peer.receive()
    assert isinstance(reply, ErrorReply)
    assert reply.code == "protocol_mismatch"
    assert f"99 there, {PROTOCOL_VERSION} here" in reply.text


def test_a_model_that_is_not_served_is_refused_with_those_that_are(
    host: Host, shards: ServedShards, family_store: Callable[[str], Path]
) -> None:
    host.serve(shards.folder, family_store("base"))
    with pytest.raises(NoSuchModel, match="model 'opt-175b' is not served here; name one of: base, self-describing"):
        WeightClient("s", "opt-175b")
    with pytest.raises(NoSuchModel, match="several models are served here; name one of: base, self-describing"):
        WeightClient("s")
    with WeightClient("s", "base") as client:
        assert client.model == "base"


# --- what there is not enough of


def test_more_sessions_than_shares_are_refused(server: ServerProcess, shards: ServedShards) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(WeightClient("s"))
        stack.enter_context(WeightClient("s"))
        with pytest.raises(ArenaBusy, match=r"2 sessions are open, 2 have a share.*larger --max-sessions"):
            WeightClient("s")
        first.close()
        assert_serves(server, shards)


def test_more_than_the_share_at_once_is_refused(server: ServerProcess, shards: ServedShards) -> None:
    with WeightClient("s") as client:
        assert client.fetch_limit == SHARE
        text = rf"layer 1: {SHARE + 1} bundles asked for at once, this session's share of the arena is {SHARE} slots"
        with (
            pytest.raises(ArenaBusy, match=text),
            client.fetch(1, np.arange(SHARE + 1, dtype=np.uint32)) as fetch,
        ):
            fetch.wait(10)
        with client.fetch(1, np.arange(SHARE, dtype=np.uint32)) as fetch:
            assert np.array_equal(content(fetch.wait(10)), shards.content(1, np.arange(SHARE)))


def test_more_than_the_share_together_waits_for_leases_and_is_refused_after_its_time(
    session: RawSession, line: RawLine
) -> None:
    line.send(session.acquire(1, neurons(*range(SHARE))))
    assert line.reply().request_id == 1
    line.send(session.acquire(2, neurons(1), layer=1, timeout_s=0.2))
    refusal = line.receive()
    assert isinstance(refusal, ErrorReply)
    assert (refusal.request_id, refusal.code) == (2, "arena_busy")
    assert f"no slots within 0.2 s, this session leases {SHARE} of its {SHARE}" in refusal.text
    line.send(session.acquire(3, neurons(1), layer=1))
    line.send(ReleaseLeases(session.welcome.epoch, [1]))
    assert isinstance(reply := line.reply(), NeuronsReady)
    assert reply.request_id == 3


def test_requests_that_wait_are_answered_while_the_server_ends(server: ServerProcess) -> None:
    """One whose bundles are there, one whose bundles must be read, and one that is given up."""
    with RawSession() as session, RawLine(session) as line, RawLine(session) as other:
        line.send(session.acquire(1, neurons(*range(SHARE))))
        assert line.reply().request_id == 1
        for request_id, ids in ((2, neurons(1)), (3, neurons(60)), (4, neurons(5))):
            other.send(session.acquire(request_id, ids, timeout_s=20.0))
        until(lambda: server.status()["sessions"][0]["waiting"] == 3, 5)
        server.signal(signal.SIGTERM)
        server.wait_for("draining")
        line.send(session.acquire(5, neurons(1), released=[1, 4]))
        replies = {reply.request_id: reply for reply in (other.receive() for _ in range(4))}
        assert_refused(line, "draining", request_id=5)
        assert isinstance(replies[2], NeuronsReady)
        assert len(replies[2].slots) == 4
        assert isinstance(replies[3], NeuronsReady)
        assert replies[3].slots == b"", "told before"
        assert isinstance(replies[4], ErrorReply)
        session.send(Detach())
        assert session.receive() == Detached(session.welcome.epoch)
    assert server.wait(5) == 0


# --- what is no message, or not one for this place

JUNK = {
    "one byte": b"\x00",
    "random bytes": secrets.token_bytes(100),
    "no array": packed(1)[1:],
    "an empty array": packed(),
    "a version alone": packed(PROTOCOL_VERSION),
    "a kind that is none": packed(PROTOCOL_VERSION, 99),
    "a kind that is no number": packed(PROTOCOL_VERSION, "Attach"),
    "too few fields": packed(PROTOCOL_VERSION, 1, 5),
    "fields of other types": packed(PROTOCOL_VERSION, 3, 5, "0", -1, None, {}, 1),
    "an extension type": b"\x93\x02\x01\xd4\x05x",
    "much of nothing": b"x" * (150 << 10),
    "a long string as version": packed("v" * 150_000),
    "a long string as kind": packed(PROTOCOL_VERSION, "k" * 150_000),
}
DEEP = {  # what Python cannot say in so many words
    "version": b"\x92" + nested(1000) + b"\x01",
    "kind": b"\x92\x02" + nested(1000),
    "field": b"\x93\x02\x06" + nested(1000),
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
}


def test_junk_as_greeting_is_refused_or_dropped(server: ServerProcess, shards: ServedShards) -> None:
    for what, packet in (JUNK | NOT_GREETINGS).items():
        assert_turned_away(packet, what)
        assert_serves(server, shards)


def test_deep_nesting_as_greeting_is_refused_or_dropped(server: ServerProcess, shards: ServedShards) -> None:
    for what, packet in DEEP.items():
        assert_turned_away(packet, what)
        assert_serves(server, shards)


def test_a_fingerprint_too_long_to_be_repeated_is_refused_or_dropped(
    server: ServerProcess, shards: ServedShards
) -> None:
    assert_turned_away(encode(attach(weights="\x01" * 60_000)), "fingerprint")
    assert_serves(server, shards)


def assert_turned_away(packet: bytes, what: str) -> None:
    with Connection() as peer:
        peer.send(packet)
        reply = peer.reply_or_end()
        assert reply is None or isinstance(reply, ErrorReply), what
        assert reply is None or peer.reply_or_end() is None, what


@pytest.mark.parametrize("what", ["more than a packet", "more descriptors than are taken", "descriptors"])
def test_a_greeting_with_too_much_beside_it_is_refused_and_nothing_of_it_kept(
    server: ServerProcess, shards: ServedShards, what: str
) -> None:
    assert_serves(server, shards)
    until(lambda: server.status()["sessions"] == [])
    before = server.settled_count()["fds"]
    with Connection() as peer, open("/dev/null", "rb") as file:
        if what == "more than a packet":
            peer.send(b"x" * (170 << 10))
        else:
            n = 100 if what == "more descriptors than are taken" else 5
            peer.send(attach(weights="another"), [file.fileno()] * n)
        assert isinstance(peer.receive(), ErrorReply)
    assert_serves(server, shards)
    until(lambda: server.count()["fds"] <= before)


def test_junk_on_a_line_is_answered_once(
    session: RawSession, line: RawLine, server: ServerProcess, shards: ServedShards
) -> None:
    for n, (what, packet) in enumerate(JUNK.items(), 1):
        line.send(packet)
        assert_refused(line, "bad_request", "protocol_mismatch", request_id=5 if what == "fields of other types" else 0)
        line.send(session.acquire(n, neurons(n), released=[n - 1]))
        assert isinstance(reply := line.reply(), NeuronsReady), what
        assert reply.request_id == n
    assert_serves(server, shards)


def test_deep_nesting_on_a_line_is_answered_once(
    session: RawSession, line: RawLine, server: ServerProcess, shards: ServedShards
) -> None:
    for n, packet in enumerate(DEEP.values(), 1):
        line.send(packet)
        assert_refused(line, "bad_request", "protocol_mismatch")
        line.send(session.acquire(n, neurons(n), released=[n - 1]))
        assert isinstance(line.reply(), NeuronsReady)
    assert_serves(server, shards)


BAD_REQUESTS = {
    "a layer that is none": {"layer": 3},
    "a layer far away": {"layer": 2**64 - 1},
    "a neuron that is none": {"ids": neurons(1, 61)},
    "neurons out of order": {"ids": neurons(5, 3)},
    "a neuron twice": {"ids": neurons(3, 3)},
    "half a neuron": {"ids": b"\x01\x00"},
}


def test_neurons_that_are_none_are_refused(
    session: RawSession, line: RawLine, server: ServerProcess, shards: ServedShards
) -> None:
    for n, changed in enumerate(BAD_REQUESTS.values(), 1):
        line.send(session.acquire(n, **{"ids": neurons(1)} | changed))
        assert_refused(line, "bad_request", request_id=n)
    assert_serves(server, shards)


def test_a_request_id_that_is_in_use_is_refused_and_leaves_no_lease(
    session: RawSession, line: RawLine, server: ServerProcess, shards: ServedShards
) -> None:
    line.send(session.acquire(1, neurons(*range(SHARE))))
    assert isinstance(line.reply(), NeuronsReady)
    line.send(session.acquire(1, neurons(1)))
    assert_refused(line, "bad_request", request_id=1)
    line.send(session.acquire(2, neurons(1)))  # it waits
    line.send(session.acquire(2, neurons(2)))
    assert_refused(line, "bad_request", request_id=2)
    line.send(ReleaseLeases(session.welcome.epoch, [1]))
    assert isinstance(line.reply(), NeuronsReady)
    line.send(ReleaseLeases(session.welcome.epoch, [2]))
    until(lambda: server.status()["arena"]["leased"] == 0)
    assert_serves(server, shards)


def test_a_notice_is_never_answered(session: RawSession, line: RawLine) -> None:
    epoch = session.welcome.epoch
    for notice in (
        HintNeurons(epoch, 0, neurons(1, 2)),
        HintNeurons(epoch, 3, neurons(1, 2)),
        HintNeurons(epoch, 0, b"\x01"),
        HintNeurons(epoch - 1, 0, neurons(1)),
        ReleaseLeases(epoch, [1, 2, 3]),
        ReleaseLeases(epoch - 1, [1]),
    ):
        line.send(notice)
    line.send(session.acquire(1, neurons(1)))
    assert isinstance(line.reply(), NeuronsReady)


def test_a_wrong_hint_does_not_cost_the_session(server: ServerProcess) -> None:
    ids = np.arange(3, dtype=np.uint32)
    with WeightClient("s") as client:
        client.hint(7, ids)
        with client.fetch(1, ids) as fetch:
            fetch.wait(10)
        assert len(server.status()["sessions"]) == 1


def test_wrong_neurons_are_refused_by_name_and_do_not_cost_the_session(server: ServerProcess) -> None:
    with WeightClient("s") as client:
        with (
            pytest.raises(BadRequest, match="the model has 3 layers of 61 neurons"),
            client.fetch(7, np.arange(3, dtype=np.uint32)) as fetch,
        ):
            fetch.wait(10)
        with client.fetch(1, np.arange(3, dtype=np.uint32)) as fetch:
            fetch.wait(10)
        assert len(server.status()["sessions"]) == 1


def test_fetches_that_nobody_waits_for_do_not_cost_the_session(server: ServerProcess, shards: ServedShards) -> None:
    ids = np.arange(3, dtype=np.uint32)
    with WeightClient("s") as client:
        for _ in range(1000):
            client.fetch(1, ids).release()
        with client.fetch(2, ids) as fetch:
            assert np.array_equal(content(fetch.wait(10)), shards.content(2, ids))
        assert [session["state"] for session in server.status()["sessions"]] == ["open"]
        assert server.status()["arena"]["leased"] == 0


def test_an_old_epoch_is_answered_with_resync(session: RawSession, line: RawLine) -> None:
    line.send(session.acquire(5, neurons(1), epoch=session.welcome.epoch + 2))
    assert_refused(line, "resync", request_id=5)
    with RawLine(session, epoch=session.welcome.epoch + 2) as late:
        assert_refused(late, "resync")
    with RawLine(session, session=bytes(16)) as stray:
        assert_refused(stray, "resync")


def assert_refused(peer: Connection, *codes: str, request_id: int = 0) -> None:
    refusal = peer.receive()
    assert isinstance(refusal, ErrorReply), refusal
    assert refusal.code in codes
    assert refusal.request_id == request_id
    assert refusal.text


FRAMES = {
    "an empty frame": [b""],
    "two frames": [encode(StatusRequest(7)), b""],
    "the delimiter of a REQ socket": [b"", encode(StatusRequest(7))],
    "many frames": [b"x"] * 200,
    "what belongs on the other socket": [encode(attach())],
    "a request": [encode(AcquireNeurons(7, 1, 0, b"", [], 1.0, True))],
    "what only a server says": [encode(Detached(1))],
} | {what: [content] for what, content in JUNK.items()}


def test_junk_on_the_control_socket_is_answered(server: ServerProcess, shards: ServedShards) -> None:
    for what, frames in FRAMES.items():
        assert_refused_by_ctl(frames, what)
    assert_serves(server, shards)


def test_deep_nesting_on_the_control_socket_is_answered(server: ServerProcess, shards: ServedShards) -> None:
    for what, packet in DEEP.items():
        assert_refused_by_ctl([packet], what)
    assert_serves(server, shards)


def assert_refused_by_ctl(frames: list[bytes], what: str) -> None:
    reply = ask_ctl(frames, timeout_s=10)
    assert isinstance(reply, ErrorReply), what
    assert reply.code in ("bad_request", "protocol_mismatch"), what
    assert isinstance(ask_ctl([encode(StatusRequest(8))]), StatusReply), what


def test_a_huge_message_on_the_control_socket_is_dropped(server: ServerProcess, shards: ServedShards) -> None:
    assert ask_ctl([b"x" * (2 << 20)], timeout_s=0.3) is None
    assert_serves(server, shards)


@pytest.mark.slow
def test_many_connections_that_say_nothing_keep_nobody_out(server: ServerProcess, shards: ServedShards) -> None:
    before = server.settled_count()["fds"]
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(Connection())
        assert_serves(server, shards)
        until(lambda: server.count()["fds"] <= before, 10)  # they are not waited for without end


def test_whoever_goes_away_before_it_is_welcomed_costs_the_next_nothing(
    server: ServerProcess, shards: ServedShards
) -> None:
    """The number of its descriptor is the next one's."""
    for _ in range(3):
        server.signal(signal.SIGSTOP)
        with Connection() as gone:
            gone.send(attach())
        server.signal(signal.SIGCONT)
        assert server.status()["sessions"] == []
        with WeightClient("s", load_timeout_s=5):
            assert len(server.status()["sessions"]) == 1
    assert_serves(server, shards)


BREAK_OFF = """
from raw_peers import Connection, RawLine, RawSession, attach
from sparseflow.protocol.messages import Detach, NeuronsReady
from telling import given, hear, tell

for _ in range(given["n_times"]):
    first = Connection()
    session = RawSession()
    first.close()
    tell("the server closes the first connection")
    hear()
    with RawLine(session) as line:  # it has the first one's number in the server now
        line.send(session.acquire(1, bytes(4)))
        assert isinstance(line.reply(), NeuronsReady)
        tell("stop the server")
        hear()
        session.close()
        newcomer = Connection()
    tell("let it go on")
    hear()
    newcomer.send(attach())
    told = newcomer.receive()
    tell(getattr(told, "text", type(told).__name__))
    newcomer.send(Detach())
    newcomer.receive()
    newcomer.close()
"""


def test_an_event_of_a_line_that_was_closed_is_not_taken_for_the_next_connections(
    host: Host, shards: ServedShards
) -> None:
    """The end of a session closes its lines, whose own end may be told in the same breath."""
    server = host.serve(shards.folder, max_sessions=16)
    peer = host.client(BREAK_OFF, n_times=8)
    for _ in range(8):
        peer.hear()
        time.sleep(0.1)
        peer.say()
        peer.hear()
        time.sleep(0.1)  # the server has nothing left to do
        server.signal(signal.SIGSTOP)
        peer.say()
        peer.hear()
        server.signal(signal.SIGCONT)
        peer.say()
        assert peer.hear() == "Welcome"
    peer.finish()
    status = server.status()
    assert (status["state"], status["reasons"]) == ("ready", [])
