"""Bundles that a server's child pushes to torch's memory on a real GPU."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("engine", "integration")]  # shards, processes

from processes import RUNTIME_DIR, ServerProcess, until
from served_shards import ServedShards
from shards import some_ids

import sparseflow
from sparseflow.client.weight_client import WeightClient
from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.tickets import SlabTicket
from sparseflow.errors import BadRequest, ServerError

pytestmark = pytest.mark.gpu

N_PLACES, BUNDLE_NBYTES, FFN_DIM = 900, 16384, 1200
TIMEOUT_S = 60.0
SPARE = 64 << 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ServedShards:
    folder = tmp_path_factory.mktemp("push") / "store"
    return ServedShards(folder, n_layers=2, ffn_dim=FFN_DIM, bundle_nbytes=BUNDLE_NBYTES)


@pytest.fixture
def serve(
    shards: ServedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ServerProcess]]:
    servers: list[ServerProcess] = []

    def start(**options: Any) -> ServerProcess:
        options = {"cpu_cache_ratio": 1.0, "io": "buffered", "max_sessions": 3} | options
        server = ServerProcess(tmp_path / "log", ("-m", "sparseflow_daemon"), [shards.folder], "s", options)
        servers.append(server)
        server.wait_for("ready")
        return server

    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv(RUNTIME_DIR, folder)
        yield start
        for server in servers:
            log = server.log()
            server.signal(signal.SIGTERM)
            server.wait()
            print(log)


class Slab:
    """Places in torch's memory, and the client that has it filled."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.zeros(3 << 20, dtype=torch.uint8, device="cuda")  # so that it does not begin its allocation
        self.places = torch.full((N_PLACES, BUNDLE_NBYTES), 0xEE, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self.client = WeightClient("s")

    def open(self) -> None:
        self.client.open_push(self.places.data_ptr(), self.places.nbytes, self.places.device.index or 0)

    def push(self, layer: int, ids: Any, places: Any) -> Any:
        """What a kernel sees that comes after the push on the current stream: a copy of the places."""
        stream = self.torch.cuda.current_stream().cuda_stream
        self.client.push(layer, ids, places).wait(TIMEOUT_S, stream)
        return self.places.clone()

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def slab(serve: Callable[..., ServerProcess]) -> Iterator[Slab]:
    serve()
    made = Slab()
    made.open()
    yield made
    made.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("on_stream", [False, True], ids=["default stream", "another stream"])
def test_places_hold_the_bundles_for_whatever_comes_later_on_the_stream(
    slab: Slab, shards: ServedShards, rng: np.random.Generator, on_stream: bool
) -> None:
    torch = slab.torch
    expected = slab.places.cpu().numpy()
    with torch.cuda.stream(torch.cuda.Stream() if on_stream else torch.cuda.default_stream()):
        for n in (1, 3, 250, 256, 257, 513, N_PLACES, *rng.integers(1, N_PLACES, 40).tolist()):
            layer, ids = int(rng.integers(2)), some_ids(rng, FFN_DIM, n)
            places = rng.permutation(N_PLACES)[:n].astype(np.uint32)
            if rng.random() < 0.3:
                places.sort()
            seen = slab.push(layer, ids, places)
            expected[places] = shards.content(layer, ids)
            assert np.array_equal(seen.cpu().numpy(), expected), n


def test_neighbouring_places_are_filled_as_others_are(slab: Slab, shards: ServedShards) -> None:
    ids = np.arange(N_PLACES, dtype=np.uint32)
    seen = slab.push(1, ids, ids).cpu().numpy()
    assert np.array_equal(seen, shards.content(1, ids))


def test_time_of_a_push(slab: Slab, rng: np.random.Generator) -> None:
    """Printed, not judged: until a kernel could run, in us."""
    for n in (1, 20, 100, 400, N_PLACES):
        for kind in ("neighbours", "scattered"):
            took = []
            for _ in range(30):
                ids, places = some_ids(rng, FFN_DIM, n), rng.permutation(N_PLACES)[:n].astype(np.uint32)
                if kind == "neighbours":
                    places = np.arange(n, dtype=np.uint32)
                slab.torch.cuda.synchronize()
                begin = time.perf_counter()
                slab.client.push(0, ids, places).wait(TIMEOUT_S, slab.torch.cuda.current_stream().cuda_stream)
                said = time.perf_counter()
                slab.torch.cuda.synchronize()
                took.append((1e6 * (said - begin), 1e6 * (time.perf_counter() - begin)))
            said_us, done_us = np.median(took, axis=0)
            rate = n * BUNDLE_NBYTES / done_us / 1e3
            print(f"{n:4} {kind:10} said {said_us:8.0f} us, done {done_us:8.0f} us, {rate:6.2f} GB/s")


def test_killed_child_is_an_error_and_a_new_one_pushes_again(
    serve: Callable[..., ServerProcess], shards: ServedShards
) -> None:
    server = serve()
    slab = Slab()
    ids = np.arange(100, dtype=np.uint32)
    for _ in range(3):
        slab.open()
        assert np.array_equal(slab.push(0, ids, ids)[:100].cpu().numpy(), shards.content(0, ids))
        os.kill(server.status()["gpu_children"][0]["pid"], signal.SIGKILL)
        until(lambda: server.status()["gpu_children"][0]["state"] == "gone")
        with pytest.raises(ServerError, match="exit code -9"):
            slab.push(0, ids, ids)
        assert int(slab.places.sum()) >= 0, "the memory is still this process's to use"
    slab.close()


def test_child_killed_while_it_copies_leaves_the_client_usable(
    serve: Callable[..., ServerProcess], shards: ServedShards
) -> None:
    """What an event does whose process dies before it has come to pass: printed."""
    server = serve()
    slab = Slab()
    slab.open()
    ids = np.arange(N_PLACES, dtype=np.uint32)
    stream = slab.torch.cuda.current_stream()
    outcomes = []
    for _ in range(10):
        pushes = [slab.client.push(0, ids, ids) for _ in range(3)]
        try:
            pushes[0].wait(TIMEOUT_S, stream.cuda_stream)
            os.kill(server.status()["gpu_children"][0]["pid"], signal.SIGKILL)
            for push in pushes[1:]:
                push.wait(TIMEOUT_S, stream.cuda_stream)
            outcomes.append("copied before it died")
        except ServerError:
            outcomes.append("told of its death")
        deadline = time.monotonic() + 10
        while not stream.query() and time.monotonic() < deadline:
            time.sleep(0.001)
        outcomes[-1] += "" if stream.query() else ", and the stream waits for ever"
        if not stream.query():
            break
        until(lambda: server.status()["gpu_children"][0]["state"] == "gone")
        slab.open()
    print(outcomes)
    assert not any("for ever" in outcome for outcome in outcomes)
    slab.close()


def test_handle_of_nothing_is_an_error_and_a_right_one_opens_after_it(
    serve: Callable[..., ServerProcess], shards: ServedShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    slab = Slab()
    right = SlabTicket.to_dict
    for change in ({"handle": bytes(64)}, {"handle": os.urandom(64)}, {"offset": 1 << 40}):
        with monkeypatch.context() as patch:
            patch.setattr(SlabTicket, "to_dict", lambda ticket, change=change: right(ticket) | change)
            with pytest.raises((BadRequest, ServerError)) as caught:
                slab.open()
        print(caught.value)
    slab.open()
    ids = np.arange(10, dtype=np.uint32)
    assert np.array_equal(slab.push(0, ids, ids)[:10].cpu().numpy(), shards.content(0, ids))
    slab.close()


CLIENT = """
import sys
import numpy as np
import torch
from sparseflow.client.weight_client import WeightClient
n, nbytes = int(sys.argv[1]), int(sys.argv[2])
places = torch.zeros(n + 50_000, nbytes, dtype=torch.uint8, device="cuda")
client = WeightClient("s")
client.open_push(places.data_ptr(), places.nbytes)
ids = np.arange(100, dtype=np.uint32)
print("pushing", flush=True)
while True:
    client.push(0, ids, ids).wait(60, torch.cuda.current_stream().cuda_stream)
"""


def test_memory_of_a_killed_client_is_given_back(serve: Callable[..., ServerProcess]) -> None:
    """The child has it mapped: it must let go."""
    server = serve()
    slab = Slab()
    slab.open()
    with CudaDriver() as driver:
        before = driver.mem_info().free
        for _ in range(3):
            command = [sys.executable, "-c", CLIENT, str(N_PLACES), str(BUNDLE_NBYTES)]
            path = os.pathsep.join([str(Path(sparseflow.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
            client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
            assert client.stdout is not None
            assert client.stdout.readline() == "pushing\n"
            time.sleep(0.5)
            client.kill()
            client.wait()
            client.stdout.close()
            until(lambda: server.status()["gpu_children"][0]["slabs"] == 1)
            until(lambda: driver.mem_info().free >= before - SPARE, 10)
        assert server.status()["gpu_children"][0]["starts"] == 1
    ids = np.arange(10, dtype=np.uint32)
    slab.push(0, ids, ids)
    slab.close()
