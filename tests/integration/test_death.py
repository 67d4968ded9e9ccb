"""Clients and servers that die, stop, or hang up: nobody else is disturbed, and who can go on does."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dense_reference import DenseIds
from processes import ClientProcess, Host, ServerProcess, until
from served_shards import ServedShards

RETURN_DEADLINE_S = 5.0
PROMPT = [5, 6, 7, 8]
N_TOKENS = 60

HOLD = """
import numpy as np
from telling import given, hear, tell
from sparseflow.client.weight_client import WeightClient

client = WeightClient(given["name"], reconnect_timeout_s=given.get("reconnect_timeout_s", 30.0))
fetches = [client.fetch(layer, np.arange(given["n_ids"], dtype=np.uint32)) for layer in (0, 2)]
for fetch in fetches:
    fetch.wait(30)
tell("leased")
hear()
"""

HANG_UP = (
    HOLD
    + """
client.attachment.sock.close()
tell("hung up")
hear()
"""
)

GENERATE = """
from sparseflow.errors import SparseFlowError
from telling import generate, given, hear, open_model, tell

model = open_model(reconnect_timeout_s=given.get("reconnect_timeout_s", 30.0))
tell("open")
hear()
try:
    tell(generate(model, given["prompt"], given["n_tokens"], tell_at=10, stop_at=given.get("stop_at")))
except SparseFlowError as error:
    tell([type(error).__name__, str(error)])
hear()
model.close()
"""

SOAK = (Path(__file__).parent / "fetching_client.py").read_text(encoding="utf-8")


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    return ServedShards(tmp_path / "store")


def serve_shares_of(host: Host, shards: ServedShards, n_ids: int, n_sessions: int = 3) -> ServerProcess:
    """A server of a small arena, whose sessions can lease so many bundles each."""
    ratio = shards.ratio(n_ids * (n_sessions + 1))
    return host.serve(shards.folder, cpu_cache_ratio=ratio, max_sessions=n_sessions)


def work_for(host: Host, seconds: float) -> None:
    """Another client fetches for a while, compares every byte, and ends well."""
    other = host.client(SOAK, name="s", n_threads=1, seconds=seconds, seed=1, most=8)
    assert other.hear() == "attached"
    assert other.hear()["fetches"] > 10
    other.finish()


# --- the end of a client


def test_leases_of_a_killed_client_come_back_and_others_write_on(
    host: Host, demo_store: Path, dense_ids: DenseIds
) -> None:
    server = host.serve(demo_store, cpu_cache_ratio=0.2)
    victim = host.client(HOLD, name="s", n_ids=30)
    other = host.client(GENERATE, name="s", prompt=PROMPT, n_tokens=N_TOKENS)
    assert victim.hear() == "leased"
    assert other.hear() == "open"
    session = server.session(victim.pid)
    assert session is not None
    assert (session["leases"], session["leased_slots"]) == (2, 60)
    other.say()
    assert other.hear() == "10 tokens"
    victim.kill()
    until(lambda: server.session(victim.pid) is None, RETURN_DEADLINE_S)
    assert other.hear() == dense_ids(PROMPT, N_TOKENS)
    other.say()
    other.finish()
    status = server.status()
    assert status["sessions"] == []
    assert status["arena"]["leased"] == 0


def test_leases_of_a_broken_connection_come_back_when_its_process_ends(host: Host, shards: ServedShards) -> None:
    server = serve_shares_of(host, shards, 20)
    client = host.client(HANG_UP, name="s", n_ids=10)
    assert client.hear() == "leased"
    client.say()
    assert client.hear() == "hung up"

    def is_quarantined() -> bool:
        session = server.session(client.pid)
        return session is not None and session["state"] == "quarantined"

    until(is_quarantined, RETURN_DEADLINE_S)
    work_for(host, 0.5)
    session = server.session(client.pid)
    assert session is not None
    assert session["leased_slots"] == 20
    client.say()
    client.finish()
    until(lambda: server.session(client.pid) is None, RETURN_DEADLINE_S)
    assert server.status()["arena"]["leased"] == 0


def test_a_client_that_breaks_its_connection_and_goes_on_is_attached_anew(host: Host, shards: ServedShards) -> None:
    server = serve_shares_of(host, shards, 20)
    client = host.client(
        HANG_UP
        + """
with client.fetch(1, np.arange(5, dtype=np.uint32)) as fetch:
    fetch.wait(30)
tell("fetched")
hear()
client.close()
""",
        name="s",
        n_ids=10,
    )
    for told in ("leased", "hung up", "fetched"):
        assert client.hear() == told
        client.say()
    client.finish()
    until(lambda: server.status()["sessions"] == [], RETURN_DEADLINE_S)


# --- the end of the server


def test_a_client_without_server_says_so_within_its_deadline(host: Host, shards: ServedShards) -> None:
    server = serve_shares_of(host, shards, 20)
    client = host.client(
        HOLD
        + """
import time
from sparseflow.errors import ServerNotRunning

begin = time.monotonic()
try:
    client.fetch(1, np.arange(5, dtype=np.uint32)).wait(30)
except ServerNotRunning as error:
    tell([time.monotonic() - begin, str(error)])
client.close()
""",
        name="s",
        n_ids=10,
        reconnect_timeout_s=1.0,
    )
    assert client.hear() == "leased"
    server.kill()
    client.say()
    seconds, text = client.hear()
    assert 0.8 < seconds < 10
    for part in (f"server 's' (pid {server.pid}) ended", "within 1 s", "start it again"):
        assert part in text
    client.finish()


def go_on(client: ClientProcess, ratio: float) -> None:
    """Where all weights are there, nothing waits for the next server: it is looked for once a second."""
    if ratio == 1:
        time.sleep(1.1)
    client.say()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0.6, 0.05),
        (1.0, 0.2),
        pytest.param(0.2, 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_next_server_may_have_another_arena(
    host: Host, demo_store: Path, dense_ids: DenseIds, before: float, after: float
) -> None:
    first = host.serve(demo_store, cpu_cache_ratio=before)
    client = host.client(GENERATE, name="s", prompt=PROMPT, n_tokens=N_TOKENS, stop_at=30)
    assert client.hear() == "open"
    client.say()
    assert client.hear() == "10 tokens"
    first.kill()
    second = host.serve(demo_store, cpu_cache_ratio=after)
    assert client.hear() == "30 tokens"
    go_on(client, before)
    until(lambda: second.session(client.pid))
    assert client.hear() == dense_ids(PROMPT, N_TOKENS)
    client.say()
    client.finish()


def test_a_next_server_of_other_weights_is_not_taken(host: Host, shards: ServedShards, tmp_path: Path) -> None:
    server = serve_shares_of(host, shards, 20)
    client = host.client(
        HOLD
        + """
from sparseflow.errors import FingerprintMismatch

try:
    client.fetch(1, np.arange(5, dtype=np.uint32)).wait(30)
except FingerprintMismatch as error:
    tell(str(error))
client.close()
""",
        name="s",
        n_ids=10,
    )
    assert client.hear() == "leased"
    server.kill()
    other = ServedShards(tmp_path / "other", dense=1)
    serve_shares_of(host, other, 20)
    client.say()
    text = client.hear()
    for manifest in (shards.manifest, other.manifest):
        assert repr(manifest.weights_fingerprint) in text
    assert "differ in weights: " in text
    client.finish()


def test_a_stopped_server_is_told_from_one_that_is_gone(host: Host, shards: ServedShards) -> None:
    server = serve_shares_of(host, shards, 20)
    client = host.client(
        """
import time
from sparseflow.client import served_fetch
from sparseflow.errors import NoAnswer

served_fetch.FETCH_TIMEOUT_S = 1.0
"""
        + HOLD
        + """
for fetch in fetches:
    fetch.release()
begin = time.monotonic()
try:
    with client.fetch(2, np.arange(5, dtype=np.uint32)) as fetch:
        fetch.early()
        fetch.wait(1.0)
except NoAnswer as error:
    tell([time.monotonic() - begin, str(error)])
hear()
with client.fetch(2, np.arange(5, dtype=np.uint32)) as fetch:
    fetch.wait(30)
tell("fetched")
hear()
client.close()
""",
        name="s",
        n_ids=10,
    )
    assert client.hear() == "leased"
    server.signal(signal.SIGSTOP)
    client.say()
    seconds, text = client.hear()
    assert 0.8 < seconds < 10
    assert "is it stopped" in text
    server.signal(signal.SIGCONT)
    client.say()
    assert client.hear() == "fetched"
    until(lambda: server.status()["arena"]["leased"] == 0, RETURN_DEADLINE_S)
    client.say()
    client.finish()


@pytest.fixture
def silent_server(host: Host) -> Iterator[str]:
    """A name under which somebody takes connections and says nothing."""
    folder = host.runtime_dir / "s"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "attach.sock"))
        listener.listen()
        yield "s"
    (folder / "attach.sock").unlink()
    folder.rmdir()


def test_opening_ends_by_its_deadline_where_nobody_answers(host: Host, silent_server: str) -> None:
    from sparseflow.client.weight_client import WeightClient
    from sparseflow.errors import NoAnswer

    begin = time.monotonic()
    with pytest.raises(NoAnswer, match=r"did not open a session: no answer within 0\.5 s"):
        WeightClient(silent_server, load_timeout_s=0.5)
    assert time.monotonic() - begin < 2
