"""Peers that talk nonsense, are somebody else, or ask for what is not theirs, does not fit or is not there."""

import gc
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed import NOT_NEURONS, WAYS, private_nbytes
from processes import Host, ServerProcess, until
from raw_peers import Connection, RawLine, RawSession, attach, packed
from served_shards import ServedShards
from still_serving import SHARE, assert_serves, content, neurons, refused

from sparseflow.client.attachment import Attachment
from sparseflow.client.weight_client import WeightClient
from sparseflow.errors import ArenaBusy, BadRequest, FingerprintMismatch, NoSuchModel, ProtocolMismatch
from sparseflow.protocol.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    ErrorReply,
    NeuronsLeased,
    NeuronsReady,
    ReleaseLeases,
)

N_SESSIONS = 3
MOST_WAITING = 256
JUNK_MAY_COST = 32 << 20


@pytest.fixture
def server(host: Host, shards: ServedShards) -> ServerProcess:
    """Three sessions with a share of SHARE slots each."""
    ratio = shards.ratio(SHARE * (N_SESSIONS + 1))
    return host.serve(shards.folder, cpu_cache_ratio=ratio, max_sessions=N_SESSIONS)


@pytest.fixture(autouse=True)
def no_garbage(nothing_is_left: None) -> Iterator[None]:
    """Of errors that were looked at: their tracebacks keep clients, and what those have mapped."""
    yield
    if "/memfd:sparseflow" in Path("/proc/self/maps").read_text(encoding="utf-8"):
        gc.collect()


# --- 15: what is no message, or not one for this place


@pytest.mark.parametrize("way", WAYS)
def test_15_malformed_frames_are_answered_or_dropped_and_others_are_served(
    server: ServerProcess, shards: ServedShards, way: str
) -> None:
    assert_serves(server, shards)
    before = private_nbytes(server)
    WAYS[way]()
    assert private_nbytes(server) - before < JUNK_MAY_COST
    assert_serves(server, shards)


@pytest.mark.parametrize("what", ["more than a packet", "more descriptors than are taken", "descriptors"])
def test_15_of_a_greeting_with_too_much_beside_it_nothing_is_kept(
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


def test_15_neurons_that_are_none_are_refused(
    session: RawSession, line: RawLine, server: ServerProcess, shards: ServedShards
) -> None:
    for n, changed in enumerate(NOT_NEURONS.values(), 1):
        line.send(session.acquire(n, **{"ids": neurons(1)} | changed))
        refused(line, "bad_request", request_id=n)
    assert_serves(server, shards)


def test_15_a_request_id_that_is_in_use_is_refused_and_leaves_no_lease(
    session: RawSession, line: RawLine, server: ServerProcess, shards: ServedShards
) -> None:
    line.send(session.acquire(1, neurons(*range(SHARE))))
    assert isinstance(line.reply(), NeuronsReady)
    line.send(session.acquire(1, neurons(1)))
    refused(line, "bad_request", request_id=1)
    line.send(session.acquire(2, neurons(1)))  # it waits
    line.send(session.acquire(2, neurons(2)))
    refused(line, "bad_request", request_id=2)
    line.send(ReleaseLeases(session.welcome.epoch, [1]))
    assert isinstance(line.reply(), NeuronsReady)
    line.send(ReleaseLeases(session.welcome.epoch, [2]))
    until(lambda: server.status()["arena"]["leased"] == 0)
    assert_serves(server, shards)


# --- 18: another user

NOBODY = 65534
SOMEBODY_ELSE = """
import os
from raw_peers import Connection, ask_ctl
from sparseflow.protocol.codec import encode
from sparseflow.protocol.messages import StatusRequest
from telling import given, hear, tell

def attached():
    try:
        with Connection() as peer:
            return [getattr(reply := peer.receive(), "code", ""), getattr(reply, "text", "")]
    except OSError as error:
        return [type(error).__name__, str(error)]

def asked():
    reply = ask_ctl([encode(StatusRequest(1))], timeout_s=given["patience_s"])
    return [getattr(reply, "code", type(reply).__name__), getattr(reply, "text", "")]

os.setgroups([])
os.setresgid(given["uid"], given["uid"], given["uid"])
os.setresuid(given["uid"], given["uid"], given["uid"])
for _ in range(2):
    tell([attached(), asked()])
    hear()
"""


def test_18_another_user_cannot_connect_and_is_refused_where_modes_let_it(
    host: Host, server: ServerProcess, shards: ServedShards
) -> None:
    """Who runs this as root is another user in a process of its own; all others see the modes only."""
    sockets = [server.directory / name for name in ("attach.sock", "ctl.sock")]
    assert [path.stat().st_mode & 0o777 for path in sockets] == [0o600, 0o600]
    assert server.directory.stat().st_mode & 0o777 == 0o700
    if os.getuid() != 0:
        return
    stranger = host.client(SOMEBODY_ELSE, uid=NOBODY, patience_s=1.0)
    attached, asked = stranger.hear()
    assert attached[0] == "PermissionError"
    assert asked[0] == "NoneType"  # nobody was reached
    for path in (host.runtime_dir, server.directory, *sockets):
        path.chmod(0o777)
    stranger.say()
    for code, text in stranger.hear():
        assert code == "not_permitted"
        assert f"user {NOBODY} may not talk to a server of user 0; start one of your own" in text
    stranger.say()
    stranger.finish()
    assert_serves(server, shards)


# --- 19: names that lead elsewhere

NO_SERVERS = [
    "../{}",
    "a/../../{}",
    "/tmp/{}",
    "{}/",
    ".",
    "..",
    "",
    "-x",
    "x\0y",
    "x\n",
    "x" * 65,
    "x" * 5000,
    "ü",
    "a b",
]


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder beside that of the servers, as one of them would have it: whoever comes there is heard."""
    folder = Path(tempfile.mkdtemp(prefix="sf-"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "attach.sock"))
        listener.listen()
        listener.setblocking(False)
        yield folder
        with suppress(BlockingIOError):
            listener.accept()
            raise AssertionError("somebody was led there")
    assert [path.name for path in folder.iterdir()] == ["attach.sock"]
    shutil.rmtree(folder)


def test_19_a_server_name_that_leads_elsewhere_is_one_error(host: Host, elsewhere: Path) -> None:
    for name in [name.format(elsewhere.name) for name in NO_SERVERS]:
        with pytest.raises(BadRequest, match="server name ") as told:
            WeightClient(name, load_timeout_s=2)
        assert "\n" not in str(told.value)
    for name in (f"../{elsewhere.name}", str(elsewhere), "\udcff"):
        with pytest.raises(BadRequest, match="server name "):
            host.begin(Path("/nowhere"), name=name).status()
    for server, name in zip(host.servers, ("'../", "'/", "'\\udcff'"), strict=True):
        assert server.wait() == 2
        (line,) = server.log().splitlines()
        assert f"error: server name {name}" in line
    assert list(host.runtime_dir.iterdir()) == []


NO_MODELS = ["../{}", "/etc/passwd", "{}/config.json", "x\0y", "x\n", "m" * 5000, "ü", "..", "'", "\udcff"]


def test_19_a_model_that_is_not_served_is_one_error_whatever_its_name_is(
    host: Host, shards: ServedShards, family_store: Callable[[str], Path]
) -> None:
    other = family_store("base")
    server = host.serve(shards.folder)
    before = server.settled_count()
    for name in [name.format(other) for name in [*NO_MODELS, "{}"]]:
        with pytest.raises((NoSuchModel, BadRequest)) as told:
            WeightClient("s", name)
        assert "name one of: self-describing" in str(told.value)
        assert len(str(told.value)) < 200
        assert str(told.value).isprintable()
    assert server.settled_count() == before
    assert_serves(server, shards)


# --- 20: what does not fit together


@pytest.mark.parametrize("field", ["protocol", "layout", "weights", "predictors", "dtype", "bundle_nbytes", "all"])
def test_20_what_does_not_fit_is_refused_and_each_field_named_with_both_values(
    server: ServerProcess, shards: ServedShards, field: str
) -> None:
    here = {
        "protocol": PROTOCOL_VERSION,
        "layout": LAYOUT_VERSION,
        "weights": shards.manifest.weights_fingerprint,
        "predictors": shards.manifest.predictors_fingerprint,
        "dtype": "float16",
        "bundle_nbytes": shards.bundle_nbytes,
    }
    there = {name: f"another {name}" for name in here if field in (name, "all")}
    is_ours = field not in ("protocol", "layout", "all")
    with pytest.raises(FingerprintMismatch if is_ours else ProtocolMismatch) as refusal:
        Attachment("s", "", there, 10)
    for name in here:
        assert (f"{name}: 'another {name}' there, {here[name]!r} here" in str(refusal.value)) == (name in there)
    assert ("attach to a server of the same store" if is_ours else "install the same SparseFlow") in str(refusal.value)
    with WeightClient("s", expected=here) as client:
        assert client.model == "self-describing"


def test_20_a_packet_of_another_protocol_is_refused_by_its_version(server: ServerProcess) -> None:
    with Connection() as peer:
        peer.send(packed(99, 1, os.getpid(), "", {}))
        assert f"99 there, {PROTOCOL_VERSION} here" in refused(peer, "protocol_mismatch").text


def test_20_a_model_that_is_not_served_is_refused_with_those_that_are(
    host: Host, shards: ServedShards, family_store: Callable[[str], Path]
) -> None:
    host.serve(shards.folder, family_store("base"))
    with pytest.raises(NoSuchModel, match="model 'opt-175b' is not served here; name one of: base, self-describing"):
        WeightClient("s", "opt-175b")
    with pytest.raises(NoSuchModel, match="several models are served here; name one of: base, self-describing"):
        WeightClient("s")
    with WeightClient("s", "base") as client:
        assert client.model == "base"


# --- 23: what there is not enough of


class Holder:
    """A session that leases all of its share."""

    def __init__(self, stack: ExitStack, shards: ServedShards, layer: int) -> None:
        self.client = stack.enter_context(WeightClient("s"))
        self.line = self.client.line()
        ids = np.arange(SHARE, dtype=np.uint32) + np.uint32(20 * layer)
        self.expected = shards.content(layer, ids)
        self.fetch = stack.enter_context(self.client.fetch(layer, ids))
        self.held = self.fetch.wait(10)

    def ask(self, n: int, timeout_s: float) -> int:
        return self.line.acquire(2, np.arange(40, 40 + n, dtype=np.uint32), timeout_s)

    def reply(self, request_id: int) -> Any:
        while isinstance(reply := self.line.reply(request_id, time.monotonic() + 10), NeuronsLeased):
            pass
        return reply

    def check(self) -> None:
        assert np.array_equal(content(self.held), self.expected)


def test_23_where_all_is_leased_requests_wait_their_time_and_nothing_leased_goes(
    server: ServerProcess, shards: ServedShards
) -> None:
    with ExitStack() as stack:
        holders = [Holder(stack, shards, layer) for layer in (0, 1)]
        late = [holder.ask(3, 0.3) for holder in holders]
        for _ in range(5):
            assert_serves(server, shards)  # the third share, at once
        for holder, request_id in zip(holders, late, strict=True):
            refusal = holder.reply(request_id)
            assert refusal.code == "arena_busy"
            text = f"layer 2: no slots within 0.3 s, this session leases {SHARE} of its {SHARE}; release leases before"
            assert text in refusal.text
        waiting = holders[0].ask(5, 20.0)
        until(lambda: [session["waiting"] for session in server.status()["sessions"]] == [1, 0], 5)
        for holder in holders:
            holder.check()
        begin_s = time.monotonic()
        holders[0].fetch.release()
        retried = holders[0].ask(4, 20.0)  # tells of the release
        for request_id in (waiting, retried):
            assert isinstance(holders[0].reply(request_id), NeuronsReady)
        assert time.monotonic() - begin_s < 5
        holders[1].check()


def test_23_requests_that_wait_are_so_many_at_most(session: RawSession, line: RawLine) -> None:
    line.send(session.acquire(1, neurons(*range(SHARE))))
    assert isinstance(line.reply(), NeuronsReady)
    for n in range(MOST_WAITING):
        line.send(session.acquire(2 + n, neurons(1)))
    begin_s = time.monotonic()
    line.send(session.acquire(1000, neurons(1)))
    refusal = refused(line, "arena_busy", request_id=1000)
    assert time.monotonic() - begin_s < 5
    assert f"{MOST_WAITING} requests of this session wait for slots already; release leases first" in refusal.text
    line.send(ReleaseLeases(session.welcome.epoch, [1]))
    for n in range(SHARE):
        reply = line.reply()
        assert isinstance(reply, NeuronsReady)
        assert reply.request_id == 2 + n


def test_23_more_sessions_than_shares_are_refused(server: ServerProcess, shards: ServedShards) -> None:
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(WeightClient("s")) for _ in range(N_SESSIONS)]
        with pytest.raises(ArenaBusy, match=r"3 sessions are open, 3 have a share.*larger --max-sessions"):
            WeightClient("s")
        first.close()
        assert_serves(server, shards)


def test_23_more_than_the_share_at_once_is_refused(server: ServerProcess, shards: ServedShards) -> None:
    with WeightClient("s") as client:
        assert client.fetch_limit == SHARE
        text = rf"layer 1: {SHARE + 1} bundles asked for at once, this session's share of the arena is {SHARE} slots"
        with pytest.raises(ArenaBusy, match=text), client.fetch(1, np.arange(SHARE + 1, dtype=np.uint32)) as fetch:
            fetch.wait(10)
        with client.fetch(1, np.arange(SHARE, dtype=np.uint32)) as fetch:
            assert np.array_equal(content(fetch.wait(10)), shards.content(1, np.arange(SHARE)))
