"""A server begins alone, ends as it is told, leaves nothing, and says what is the matter."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from processes import Host, ServerProcess, until
from served_shards import ServedShards
from still_serving import assert_degraded

from sparseflow.client.weight_client import WeightClient
from sparseflow.errors import DiskError, NoAnswer, ServerError, ServerNotRunning
from sparseflow.protocol.run_directory import server_names
from sparseflow.store.manifest import DENSE_NAME, MANIFEST_NAME, predictor_name

IDS = np.arange(5, dtype=np.uint32)
LAST_LAYER = 2
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_FORCED = 0, 1, 2, 130


@pytest.fixture
def host(host: Host) -> Host:
    """Its servers begin as people begin them."""
    host.program = ("-m", "sparseflow_daemon")
    return host


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    return ServedShards(tmp_path / "store")


@pytest.fixture
def serve(host: Host, shards: ServedShards) -> Callable[..., ServerProcess]:
    """Start a server of a small arena of those bundles; it is ready."""
    return lambda **options: host.serve(shards.folder, cpu_cache_ratio=shards.ratio(80), max_sessions=3, **options)


# --- the beginning


def test_servers_of_other_names_are_others(host: Host, shards: ServedShards) -> None:
    epochs = {host.serve(shards.folder, name=name).status()["epoch"] for name in ("a", "b")}
    assert len(epochs) == 2
    assert server_names() == ["a", "b"]


def test_status_is_answered_within_a_second_of_the_start(host: Host, demo_store: Path) -> None:
    seconds = []
    for name in ("a", "b", "c"):  # the best of three: others may hold the cores
        begin = time.monotonic()
        server = host.begin(demo_store, name=name)
        assert server.wait_for("loading", "ready")["models"][0]["name"] == "demo_model"
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 1


SLOW_DISK = """
import os
import sys
import time
from pathlib import Path
from sparseflow_daemon import served_model
from sparseflow_daemon.__main__ import main

go_on, read_into = Path(os.environ["GO_ON"]), served_model.read_into

def read_late(*arguments, **options):
    while not go_on.exists():
        time.sleep(0.01)
    read_into(*arguments, **options)

served_model.read_into = read_late
sys.exit(main())
"""


class SlowServer(NamedTuple):
    """A server whose disk gives nothing until the path exists."""

    process: ServerProcess
    go_on: Path


@pytest.fixture
def slow_server(host: Host, shards: ServedShards, tmp_path: Path) -> SlowServer:
    go_on = tmp_path / "go-on"
    process = host.begin(shards.folder, program=["-c", SLOW_DISK], variables={"GO_ON": str(go_on)})
    process.wait_for("loading")
    return SlowServer(process, go_on)


def test_a_server_that_loads_answers_and_lets_clients_wait(slow_server: SlowServer) -> None:
    status = slow_server.process.status()
    assert status["models"][0]["state"] == "loading"
    assert status["models"][0]["n_resident"] is None
    with pytest.raises(NoAnswer, match=r"did not open a session: no answer within 0\.3 s"):
        WeightClient("s", load_timeout_s=0.3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(WeightClient, "s")
        time.sleep(0.2)
        assert slow_server.process.status()["state"] == "loading"
        assert not waiting.done()
        slow_server.go_on.touch()
        with waiting.result(10) as client, client.fetch(0, IDS) as fetch:
            fetch.wait(10)
    assert slow_server.process.status()["state"] == "ready"


def test_who_waits_for_a_model_that_cannot_be_loaded_is_told_why(slow_server: SlowServer, shards: ServedShards) -> None:
    (shards.folder / DENSE_NAME).unlink()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(WeightClient, "s")
        time.sleep(0.2)
        slow_server.go_on.touch()
        with pytest.raises(DiskError, match=DENSE_NAME):
            waiting.result(10)
    assert slow_server.process.end() == EXIT_OK


def test_a_server_that_loads_ends_as_soon_as_it_is_told(slow_server: SlowServer) -> None:
    assert slow_server.process.end(timeout_s=10) == EXIT_OK


def test_the_server_never_loads_torch(host: Host, shards: ServedShards, serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    with WeightClient("s") as client, client.fetch(0, IDS) as fetch:
        fetch.wait(10)
        assert server.status()["sessions"][0]["leases"] == 1
        mapped = Path(f"/proc/{server.pid}/maps").read_text(encoding="utf-8")
    assert "libzmq" in mapped or "zmq" in mapped
    assert "libtorch" not in mapped
    assert "numba" not in mapped


# --- the end


def test_ending_waits_for_leases_no_longer_than_it_was_told(serve: Callable[..., ServerProcess]) -> None:
    server = serve(drain_timeout=0.5)
    with WeightClient("s") as client, client.fetch(0, IDS) as fetch:
        fetch.wait(10)
        begin = time.monotonic()
        assert server.end(5) == EXIT_OK
        assert 0.4 < time.monotonic() - begin < 4  # by itself it would wait for 5


def test_ending_does_not_wait_for_a_client_that_only_asks_on(serve: Callable[..., ServerProcess]) -> None:
    """Leases of the step before come back with the next request, which is refused."""
    server = serve(drain_timeout=30)
    with WeightClient("s", reconnect_timeout_s=1.0) as client:
        with client.fetch(0, IDS) as fetch:
            fetch.wait(10)
        server.signal(signal.SIGTERM)
        with pytest.raises(ServerNotRunning), client.fetch(1, IDS) as fetch:
            fetch.wait(10)
        assert server.wait(10) == EXIT_OK


def test_a_client_goes_from_a_server_that_ends_to_the_next(host: Host, serve: Callable[..., ServerProcess]) -> None:
    first = serve(drain_timeout=0.5)
    client = host.client(SOAK, name="s", n_threads=2, seconds=4, seed=1, most=8)
    assert client.hear() == "attached"
    assert first.end(10) == EXIT_OK
    second = serve()
    until(lambda: f"session of pid {client.pid} on" in second.log())
    assert client.hear()["fetches"] > 10
    client.finish()
    assert second.status()["evictions"] > 0


SOAK = (Path(__file__).parent / "fetching_client.py").read_text(encoding="utf-8")


# --- what it says


def test_usr1_writes_status_and_stacks_to_the_log_and_the_server_goes_on(serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    with WeightClient("s") as client, client.fetch(0, IDS) as fetch:
        fetch.wait(10)
        server.signal(signal.SIGUSR1)
        until(lambda: "(most recent call first)" in server.log(), 5)
    (line,) = [line for line in server.log().splitlines() if "status: {" in line]
    status = json.loads(line[line.index("{") :])
    assert (status["name"], status["pid"], status["state"]) == ("s", server.pid, "ready")
    assert status["sessions"][0]["leases"] == 1
    until(lambda: "in run\n" in server.log(), 5)
    assert server.status()["state"] == "ready"


@pytest.fixture
def service_manager(host: Host) -> Iterator[socket.socket]:
    """Where a service manager listens; the server is told by NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        yield sock


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_service_manager_is_told(
    host: Host, shards: ServedShards, service_manager: socket.socket, kind: str
) -> None:
    path = host.runtime_dir / "notify"
    service_manager.bind(str(path) if kind == "path" else f"\0{path}")
    address = str(path) if kind == "path" else f"@{path}"
    server = host.begin(shards.folder, variables={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000000"})
    told = [service_manager.recv(4096)]
    while b"WATCHDOG=1" not in told:
        told.append(service_manager.recv(4096))
    assert b"READY=1\nSTATUS=ready: self-describing" in told
    assert server.end() == EXIT_OK
    while (message := service_manager.recv(4096)) == b"WATCHDOG=1":
        pass
    assert message == b"STOPPING=1"
    path.unlink(missing_ok=True)


# --- what cannot be served


def ended(host: Host, *stores: Path, **options: object) -> tuple[int, list[str]]:
    """How a server ends that cannot begin: exit code, and what it has logged."""
    server = host.begin(*stores, **options)
    code = server.wait()
    assert server_names() == []
    return code, server.log().splitlines()


def test_a_store_that_does_not_exist_is_named(host: Host, tmp_path: Path) -> None:
    code, lines = ended(host, tmp_path / "nowhere")
    assert code == EXIT_FAILED
    assert str(tmp_path / "nowhere") in lines[-1]
    errors = [line for line in lines if "error" in line.lower()]
    assert len(errors) == 1, lines
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("memory", "lots", "6GiB"),
        ("cpu_cache_ratio", 0, "above 0"),
        ("io", "osmosis", "direct"),
        ("eviction", "random", "lru"),
        ("max_sessions", 0, "at least 1"),
        ("drain_timeout", -1, "at least 0"),
        ("name", "a/b", "letters"),
    ],
)
def test_wrong_usage_is_refused_with_a_remedy(
    host: Host, shards: ServedShards, option: str, value: object, remedy: str
) -> None:
    code, lines = ended(host, shards.folder, **{option: value})
    assert code == EXIT_USAGE
    assert remedy in lines[-1]


def test_two_stores_of_one_name_are_refused(host: Host, shards: ServedShards) -> None:
    code, (line,) = ended(host, shards.folder, shards.folder)
    assert code == EXIT_USAGE
    assert "both hold a model named 'self-describing'" in line


@pytest.mark.parametrize("name", [DENSE_NAME, predictor_name(1), "config.json"])
def test_a_corrupt_file_is_named_and_the_server_says_so(host: Host, shards: ServedShards, name: str) -> None:
    content = (shards.folder / name).read_bytes()
    (shards.folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_degraded(host.begin(shards.folder), name, "remove the store and convert the model again")


def test_a_missing_file_is_named_and_the_server_says_so(host: Host, shards: ServedShards) -> None:
    (shards.folder / predictor_name(1)).unlink()
    assert_degraded(host.begin(shards.folder), predictor_name(1))


def test_a_manifest_that_is_none_is_refused(host: Host, shards: ServedShards) -> None:
    (shards.folder / MANIFEST_NAME).write_text("{}", encoding="utf-8")
    code, (line,) = ended(host, shards.folder)
    assert code == EXIT_FAILED
    assert MANIFEST_NAME in line


def test_status_may_be_asked_all_the_time_while_models_load(host: Host, demo_store: Path) -> None:
    server = host.begin(demo_store)
    is_over = threading.Event()

    def ask() -> int:
        n = 0
        while not is_over.is_set():
            try:
                n += bool(server.status())
            except ServerError:  # not there yet
                time.sleep(0.001)
        return n

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask) for _ in range(3)]
        try:
            server.wait_for("ready")
        finally:
            is_over.set()
        assert min(asker.result(10) for asker in askers) > 0
