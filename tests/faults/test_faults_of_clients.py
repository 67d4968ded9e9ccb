"""Clients that die, stop, fork, or are too many: others are not disturbed, and everything comes back."""

import os
import random
import resource
import secrets
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from forking_clients import CHILD_FIRST, OPEN_MODEL, OPEN_SESSION, PARENT_CLOSES
from processes import DEADLINE_S, ClientProcess, Host, ServerProcess, until
from raw_peers import Connection
from served_shards import ServedShards

from sparseflow.client.weight_client import WeightClient
from sparseflow.errors import ArenaBusy, ServerError

GONE_WITHIN_S = 2.0
KEPT_DESCRIPTORS = 64
N_KILLS = 50
SOAK = (Path(__file__).parents[1] / "integration" / "fetching_client.py").read_text(encoding="utf-8")

IDLE = """
from telling import given, hear, tell
from sparseflow.client.weight_client import WeightClient

client = WeightClient(given["name"])
tell("attached")
hear()
"""

HOLD = """
import numpy as np
from shards import content_of
from telling import given, hear, tell
from sparseflow.client.weight_client import WeightClient

def is_right(layer, bundles):
    raw = bundles.base.view(-1).numpy().view(np.uint8).reshape(-1, client.profile.bundle_nbytes)
    return bool((raw[bundles.slots] == content_of(layer, ids, client.profile.bundle_nbytes)).all())

client = WeightClient(given["name"])
ids = np.arange(given["n_ids"], dtype=np.uint32)
fetches = [client.fetch(layer, ids) for layer in (0, 2)]
held = [fetch.wait(30) for fetch in fetches]
tell("leased")
hear()
tell([is_right(layer, bundles) for layer, bundles in zip((0, 2), held)])
for fetch in fetches:
    fetch.release()
with client.fetch(1, ids) as fetch:
    tell(is_right(1, fetch.wait(30)))
hear()
client.close()
"""

AT_THE_DOOR = """
from raw_peers import Connection, attach
from telling import given, hear, tell

door = Connection(given["name"])
if given["stage"] != "connected":
    door.send(attach())
if given["stage"] == "welcomed":
    door.receive()
tell(given["stage"])
hear()
"""


@pytest.fixture
def server(host: Host, shards: ServedShards) -> ServerProcess:
    """Four sessions with a share of 20 slots each, in an arena that holds half of all bundles."""
    return host.serve(shards.folder, cpu_cache_ratio=shards.ratio(20 * 5), max_sessions=4)


def working(host: Host, seconds: float) -> ClientProcess:
    """A client that fetches for a while and compares every byte."""
    client = host.client(SOAK, name="s", n_threads=1, seconds=seconds, seed=secrets.randbits(31), most=8)
    assert client.hear() == "attached"
    return client


def assert_worked(client: ClientProcess) -> None:
    assert client.hear()["fetches"] >= 50
    client.finish()


def assert_gone(server: ServerProcess, client: ClientProcess) -> None:
    """Its session and its leases."""
    until(lambda: server.session(client.pid) is None, GONE_WITHIN_S)


def test_01_killed_idle_client_is_gone_and_others_are_not_disturbed(host: Host, server: ServerProcess) -> None:
    victim, other = host.client(IDLE, name="s"), working(host, 1)
    assert victim.hear() == "attached"
    before = server.settled_count()
    assert server.session(victim.pid) is not None
    victim.kill()
    assert_gone(server, victim)
    assert_worked(other)
    until(lambda: server.count()["shared maps"] == before["shared maps"] - 2)  # a page of counters each


def test_02_fifty_clients_killed_at_random_moments_leave_no_lease(host: Host, server: ServerProcess) -> None:
    """Each is fetching, hinting, waiting or holding leases when it dies, or has hardly begun."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    unused = server.settled_count()
    other = host.client(SOAK, name="s", n_threads=1, seconds=6, seed=rng.getrandbits(31), most=8)
    for n in range(N_KILLS):
        values = {"n_threads": 2, "seconds": 60, "seed": rng.getrandbits(31), "most": 12}
        victim = host.client(SOAK, name="s", **values)
        if n % 5:
            assert victim.hear() == "attached"
        time.sleep(rng.uniform(0, 0.06))
        victim.kill()
        assert_gone(server, victim)
    assert other.hear() == "attached"
    assert_worked(other)
    until(lambda: server.status()["sessions"] == [])
    assert server.status()["arena"]["leased"] == 0
    until(lambda: server.count() == unused)


@pytest.mark.parametrize("stage", ["connected", "asked", "welcomed"])
def test_03_client_that_dies_before_it_says_more_is_forgotten(host: Host, server: ServerProcess, stage: str) -> None:
    unused = server.settled_count()
    for _ in range(5):
        victim = host.client(AT_THE_DOOR, name="s", stage=stage)
        assert victim.hear() == stage
        victim.kill()
    until(lambda: server.status()["sessions"] == [], GONE_WITHIN_S)
    until(lambda: server.count() == unused, GONE_WITHIN_S)
    assert_worked(working(host, 0.3))


def test_04_stopped_client_keeps_its_leases_costs_nobody_and_goes_on(host: Host, server: ServerProcess) -> None:
    """It wakes up to the right bytes, however long it slept."""
    stopped = host.client(HOLD, name="s", n_ids=10)
    assert stopped.hear() == "leased"
    memory_before = psutil.Process(server.pid).memory_info().rss
    stopped.signal(signal.SIGSTOP)
    others = [working(host, 1.5) for _ in range(3)]  # they evict, and want all slots that they may have
    for other in others:
        assert_worked(other)
    session = server.session(stopped.pid)
    assert session is not None
    assert (session["state"], session["leased_slots"], session["waiting"]) == ("open", 20, 0)
    assert server.status()["evictions"] > 0
    assert psutil.Process(server.pid).memory_info().rss < memory_before + (8 << 20)
    stopped.signal(signal.SIGCONT)
    stopped.say()
    assert stopped.hear() == [True, True]
    assert stopped.hear() is True
    stopped.say()
    stopped.finish()


def test_21_thirty_two_clients_are_served_and_one_more_is_refused(host: Host, shards: ServedShards) -> None:
    server = host.serve(shards.folder, cpu_cache_ratio=shards.ratio(33 * 4), max_sessions=32)
    unused = server.settled_count()
    clients = [host.client(HOLD, name="s", n_ids=2) for _ in range(32)]
    for client in clients:
        assert client.hear() == "leased"
    with pytest.raises(ArenaBusy, match=r"32 sessions are open, 32 have a share.*larger --max-sessions"):
        WeightClient("s")
    assert server.count()["threads"] == unused["threads"]
    for client in clients:
        client.say()
    for client in clients:
        assert client.hear() == [True, True]
        assert client.hear() is True
        client.say()
        client.finish()
    until(lambda: server.count() == unused)


def test_21_server_with_few_descriptors_left_says_so_and_goes_on(host: Host, shards: ServedShards) -> None:
    """It turns newcomers away, and does not spin; whoever has a session keeps it; the rest comes back with room."""
    server = host.serve(shards.folder, cpu_cache_ratio=shards.ratio(100), max_sessions=16)
    n_open, ids = server.settled_count()["fds"], np.arange(3, dtype=np.uint32)
    most = n_open + KEPT_DESCRIPTORS + 12
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        client = stack.enter_context(WeightClient("s"))
        client.fetch(1, ids).release()  # its line is open
        for _ in range(20):
            stack.enter_context(Connection())
        text = rf"may have {most} files open, and keeps the last {KEPT_DESCRIPTORS} for .*; close sessions, or start it"
        with pytest.raises(ServerError, match=text):
            WeightClient("s", load_timeout_s=5)
        assert server.status()["state"] == "ready"
        before_s = sum(psutil.Process(server.pid).cpu_times()[:2])
        time.sleep(0.5)
        assert sum(psutil.Process(server.pid).cpu_times()[:2]) - before_s < 0.25
        with client.fetch(1, ids) as fetch:
            fetch.wait(10)
    assert_worked(working(host, 0.3))


def test_22_five_hundred_sessions_leave_nothing_in_either_process(server: ServerProcess) -> None:
    ids = np.arange(5, dtype=np.uint32)

    def attach_and_detach(n: int) -> None:
        for _ in range(n):
            with WeightClient("s") as client, client.fetch(2, ids) as fetch:
                fetch.wait(10)

    attach_and_detach(100)
    ours, theirs = psutil.Process(), psutil.Process(server.pid)
    until(lambda: server.status()["sessions"] == [])
    counts = server.settled_count(), n_open(), n_maps(server.pid), theirs.memory_info().rss, ours.memory_info().rss
    attach_and_detach(400)
    until(lambda: server.status()["sessions"] == [])
    until(lambda: server.count() == counts[0])
    assert n_open() == counts[1]
    assert n_maps(server.pid) <= counts[2] + 4  # the allocator's own
    assert theirs.memory_info().rss < counts[3] + (8 << 20)
    assert ours.memory_info().rss < counts[4] + (16 << 20)


def n_open() -> tuple[int, int]:
    """Descriptors and threads of the test."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def n_maps(pid: int) -> int:
    return len(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("opened", "child_ends"), [(OPEN_MODEL, "as a program"), (OPEN_SESSION, "at once")], ids=["model", "session"]
)
def test_30_forked_child_is_refused_and_its_parent_goes_on(
    host: Host, family_store: Callable[[str], Path], opened: str, child_ends: str
) -> None:
    server = host.serve(family_store("base"), cpu_cache_ratio=0.3)
    client = host.client(opened + CHILD_FIRST, name="s", prompt=[5, 6, 7, 8], child_ends=child_ends)
    told = [client.hear(), client.hear()]  # parent and child, in any order
    texts = next(each for each in told if isinstance(each, list))
    assert len(texts) == 3
    assert all("a forked process cannot use its parent's session" in text for text in texts)
    assert [session["pid"] for session in server.status()["sessions"]] == [client.pid]
    client.say()
    assert client.hear() is True
    session = server.session(client.pid)
    assert session is not None
    assert session["state"] == "open"
    client.say()
    client.finish()


@pytest.mark.parametrize("end", ["closes", "dies"])
def test_30_forked_child_does_not_keep_the_session(host: Host, server: ServerProcess, end: str) -> None:
    client = host.client(OPEN_SESSION + PARENT_CLOSES, name="s", child_ends="at once")
    child = next(each for each in (client.hear(), client.hear()) if isinstance(each, int))
    if end == "dies":
        client.kill()
    else:
        client.say()
        assert client.hear() == "closed"
        assert Path(f"/proc/{child}").exists()
    until(lambda: server.status()["sessions"] == [])
    if end == "closes":
        client.say()
        client.finish()
    until(lambda: not Path(f"/proc/{child}").exists(), DEADLINE_S)
