"""What a server refuses: who is told why, with both values; and whoever talks nonsense disturbs nobody."""

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from processes import Host, ServerProcess, until
from raw_peers import Connection, RawLine, RawSession, attach
from served_shards import ServedShards
from still_serving import SHARE, assert_serves, content, neurons, refused

from sparseflow.client.weight_client import WeightClient
from sparseflow.errors import BadRequest
from sparseflow.protocol.messages import (
    Detach,
    Detached,
    ErrorReply,
    HintNeurons,
    NeuronsReady,
    ReleaseLeases,
)

N_SESSIONS = 2


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    return ServedShards(tmp_path / "store")


@pytest.fixture
def server(host: Host, shards: ServedShards) -> ServerProcess:
    """Two sessions with a share of SHARE slots each."""
    ratio = shards.ratio(SHARE * (N_SESSIONS + 1))
    return host.serve(shards.folder, cpu_cache_ratio=ratio, max_sessions=N_SESSIONS)


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
        refused(line, "draining", request_id=5)
        assert isinstance(replies[2], NeuronsReady)
        assert len(replies[2].slots) == 4
        assert isinstance(replies[3], NeuronsReady)
        assert replies[3].slots == b"", "told before"
        assert isinstance(replies[4], ErrorReply)
        session.send(Detach())
        assert session.receive() == Detached(session.welcome.epoch)
    assert server.wait(5) == 0


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
    refused(line, "resync", request_id=5)
    with RawLine(session, epoch=session.welcome.epoch + 2) as late:
        refused(late, "resync")
    with RawLine(session, session=bytes(16)) as stray:
        refused(stray, "resync")


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
