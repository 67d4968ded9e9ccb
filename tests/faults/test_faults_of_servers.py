"""Servers that are killed, told to end, begun twice, or in trouble: clients say so or go on, and nothing is left."""

import os
import random
import secrets
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from dense_reference import DenseIds
from processes import ClientProcess, Host, ServerProcess, until
from served_shards import ServedShards

from sparseflow.client.weight_client import WeightClient
from sparseflow.errors import DiskError, Draining, ServerNotRunning
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.run_directory import RunDirectory

PROMPT = [5, 6, 7, 8]
N_TOKENS = 60
N_KILLS = 20
IDS = np.arange(5, dtype=np.uint32)
EXIT_OK, EXIT_FAILED, EXIT_FORCED = 0, 1, 130

GENERATE = """
from sparseflow.errors import SparseFlowError
from telling import generate, given, hear, open_model, tell

model = open_model(reconnect_timeout_s=given.get("reconnect_timeout_s", 30.0))
tell("open")
while hear():
    try:
        tell(generate(model, given["prompt"], given["n_tokens"], tell_at=10, stop_at=given.get("stop_at")))
    except SparseFlowError as error:
        tell([type(error).__name__, str(error)])
model.close()
"""

HOLD = """
import numpy as np
from telling import given, hear, tell
from sparseflow.client.weight_client import WeightClient

client = WeightClient(given["name"], reconnect_timeout_s=1.0)
fetch = client.fetch(2, np.arange(5, dtype=np.uint32))
fetch.wait(30)
tell("leased")
how = hear()
if how == "close":
    client.close()
tell("closed")
"""


@pytest.fixture
def server(host: Host, shards: ServedShards) -> ServerProcess:
    """A small arena, and time for leases to come back when it is told to end."""
    return host.serve(shards.folder, cpu_cache_ratio=shards.ratio(80), max_sessions=3, drain_timeout=30)


def generating(host: Host, n_tokens: int = N_TOKENS, **values: object) -> ClientProcess:
    """A client that writes text each time that it is told to."""
    client = host.client(GENERATE, name="s", prompt=PROMPT, n_tokens=n_tokens, **values)
    assert client.hear() == "open"
    return client


def finish(client: ClientProcess) -> None:
    client.say(False)
    client.finish()


# --- killed


def test_05_killed_server_is_a_named_error_within_the_deadline(host: Host, demo_store: Path) -> None:
    server = host.serve(demo_store, cpu_cache_ratio=0.2)
    client = generating(host, n_tokens=400, reconnect_timeout_s=1.0)
    client.say(True)
    assert client.hear() == "10 tokens"
    server.kill()
    begin = time.monotonic()
    error, text = client.hear()
    assert time.monotonic() - begin < 10
    assert error == "ServerNotRunning"
    assert "none took its place within 1 s" in text
    finish(client)


def test_05_twenty_servers_killed_at_random_moments_change_no_word(
    host: Host, demo_store: Path, dense_ids: DenseIds
) -> None:
    """Whatever of a token's messages the kill comes between."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    server = host.serve(demo_store, cpu_cache_ratio=0.1)
    client = generating(host, n_tokens=40)
    for _ in range(N_KILLS):
        client.say(True)
        assert client.hear() == "10 tokens"
        time.sleep(rng.uniform(0, 0.1))
        server.kill()
        server = host.begin(demo_store, cpu_cache_ratio=0.1)
        assert client.hear() == dense_ids(PROMPT, 40)
    server.wait_for("ready")
    finish(client)


def go_on(client: ClientProcess, ratio: float) -> None:
    """Where all weights are there, nothing waits for the next server: it is looked for once a second."""
    if ratio == 1:
        time.sleep(1.1)
    client.say()


@pytest.mark.parametrize("ratio", [0.2, 1.0], ids=["arena", "whole model"])
def test_06_next_server_is_noticed_by_its_epoch_and_text_goes_on(
    host: Host, demo_store: Path, dense_ids: DenseIds, ratio: float
) -> None:
    first = host.serve(demo_store, cpu_cache_ratio=ratio)
    client = generating(host, stop_at=30)
    client.say(True)
    assert client.hear() == "10 tokens"
    first.kill()
    second = host.serve(demo_store, cpu_cache_ratio=ratio)
    assert client.hear() == "30 tokens"  # of the second server, or of weights that are all there
    go_on(client, ratio)
    session = until(lambda: second.session(client.pid))
    assert session["state"] == "open"
    assert client.hear() == dense_ids(PROMPT, N_TOKENS)
    session = second.session(client.pid)
    assert session is not None
    assert session["tokens"] == N_TOKENS - 1  # the first comes from the prompt
    assert session["leases"] == 0
    finish(client)


@pytest.mark.parametrize("how", ["close", "end"])
def test_31_client_of_a_killed_server_ends_at_once(host: Host, server: ServerProcess, how: str) -> None:
    client = host.client(HOLD, name="s")
    assert client.hear() == "leased"
    server.kill()
    begin = time.monotonic()
    client.say(how)
    assert client.hear() == "closed"
    client.finish()
    assert time.monotonic() - begin < 5


# --- told to end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_07_server_that_is_told_to_end_waits_for_leases_and_lets_nobody_in(
    server: ServerProcess, number: signal.Signals
) -> None:
    with WeightClient("s") as client:
        fetch = client.fetch(2, IDS)
        held = fetch.wait(10)
        server.signal(number)
        status = server.wait_for("draining")
        assert status["sessions"][0]["leases"] == 1
        with pytest.raises(Draining, match="attach to its successor"):
            WeightClient("s")
        time.sleep(0.3)
        assert server.exit_code is None
        fetch.release()
        assert server.wait(5) == EXIT_OK
        assert not server.directory.exists()
        assert held.base[0].shape == (2, 128)  # memory that is mapped stays


def test_07_second_signal_ends_it_at_once(server: ServerProcess) -> None:
    with WeightClient("s") as client, client.fetch(0, IDS) as fetch:
        fetch.wait(10)
        server.signal(signal.SIGTERM)
        server.wait_for("draining")
        server.signal(signal.SIGTERM)
        assert server.wait(10) == EXIT_FORCED
        assert not server.directory.exists()


# --- begun


@pytest.mark.parametrize("left_pid", ["its own", "of a living process"])
def test_13_what_a_killed_server_left_is_told_from_a_living_one_and_cleared(
    host: Host, shards: ServedShards, left_pid: str
) -> None:
    first = host.serve(shards.folder)
    first.kill()
    directory = RunDirectory.of("s")
    if left_pid == "of a living process":  # the number was given to another one meanwhile
        directory.lock.write_text(str(os.getpid()), encoding="ascii")
    assert not directory.is_alive()
    for ask in (ask_status, WeightClient):
        with pytest.raises(ServerNotRunning, match="no server 's' runs here"):
            ask("s")
    second = host.serve(shards.folder)
    assert directory.owner() == second.pid
    with WeightClient("s") as client, client.fetch(0, IDS) as fetch:
        fetch.wait(10)


def test_14_of_eight_servers_begun_at_once_one_wins_and_no_other_disturbs_it(host: Host, shards: ServedShards) -> None:
    servers = [host.begin(shards.folder) for _ in range(8)]
    losers = until(lambda: ended if len(ended := ended_of(servers)) == 7 else None)
    (winner,) = set(servers) - set(losers)
    before = winner.wait_for("ready")
    for loser in losers:
        assert loser.exit_code == EXIT_FAILED
        (line,) = loser.log().splitlines()
        assert line.endswith(
            f"error: server 's' is already running (pid {winner.pid}); choose another --name, or end it first"
        )
    with WeightClient("s") as client:
        assert client.attachment.welcome.epoch == before["epoch"]
    late = host.begin(shards.folder)
    assert late.wait() == EXIT_FAILED
    assert winner.status()["epoch"] == before["epoch"]


def ended_of(servers: list[ServerProcess]) -> list[ServerProcess]:
    return [server for server in servers if server.exit_code is not None]


def test_28_path_too_long_for_a_socket_is_said_with_length_and_limit(
    host: Host, shards: ServedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 120)
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(long))
    server = host.begin(shards.folder)
    assert server.wait() != EXIT_OK
    n_bytes = len(str(long / "s" / "attach.sock"))
    assert (
        f"{n_bytes} bytes, a socket's path has at most 107; set SPARSEFLOW_RUNTIME_DIR to a shorter one"
        in (server.log().splitlines()[-1])
    )
    assert not long.exists()


# --- in trouble

TROUBLED = """
import sys
from sparseflow_daemon import server
from sparseflow_daemon.__main__ import main

class Trouble:
    n = 0

def troubled(method):
    def fails_at_first(*arguments):
        Trouble.n += 1
        if Trouble.n == 3:
            raise RuntimeError("a test's own")
        return method(*arguments)
    return fails_at_first

server.Server.{method} = troubled(server.Server.{method})
sys.exit(main())
"""


@pytest.mark.parametrize("method", ["_tick", "_turn"])
def test_24_unforeseen_error_is_logged_counted_and_survived(host: Host, shards: ServedShards, method: str) -> None:
    program = ["-c", TROUBLED.replace("{method}", method)]
    server = host.begin(shards.folder, program=program, cpu_cache_ratio=shards.ratio(80), max_sessions=3)
    status = server.wait_for("degraded")
    assert status["reasons"] == ["1 unforeseen errors, see the log"]
    assert next(thread for thread in status["threads"] if thread["name"] == "loop")["errors"] == 1
    assert "RuntimeError: a test's own" in server.log()
    with WeightClient("s") as client, client.fetch(0, IDS) as fetch:
        fetch.wait(10)
    assert server.end() == EXIT_OK


READERS_FAIL = """
import os
import sys
from sparseflow.engine import reading
from sparseflow_daemon.__main__ import main

read_vector = reading.read_vector

def fails_when_told(read):
    if os.path.exists(os.environ["FAIL"]):
        raise RuntimeError("a test's own")
    return read_vector(read)

reading.read_vector = fails_when_told
sys.exit(main())
"""


def test_24_thread_that_reads_survives_an_unforeseen_error(host: Host, shards: ServedShards, tmp_path: Path) -> None:
    fail = tmp_path / "fail"
    options = {"cpu_cache_ratio": shards.ratio(80), "max_sessions": 3, "io": "buffered"}
    server = host.begin(shards.folder, program=["-c", READERS_FAIL], variables={"FAIL": str(fail)}, **options)
    n_threads = len(server.wait_for("ready")["threads"])
    with WeightClient("s") as client:
        fail.touch()
        with pytest.raises(DiskError, match=r"layer 1, neuron 0 cannot be read"), client.fetch(1, IDS) as fetch:
            fetch.wait(10)
        fail.unlink()
        with client.fetch(1, IDS) as fetch:
            fetch.wait(10)
    status = server.status()
    assert all(thread["alive"] for thread in status["threads"])
    assert len(status["threads"]) == n_threads
    assert status["state"] == "degraded"
    assert "1 requests failed at the disk, the last: " in status["reasons"][0]
    assert "RuntimeError: a test's own" in server.log()
    assert server.end() == EXIT_OK
