"""Bundles that the server's GPU child pushes, over a stub of CUDA's driver: their bytes, refusals, and every death."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from processes import Host, until
from pushed_bundles import N_PLACES, N_SLOTS, TIMEOUT_S, child_of, pushed_to, serve, stub_driver
from served_shards import ServedShards

from sparseflow.cuda.driver import CudaDriver
from sparseflow.errors import BadRequest, ServerError, ShardCorrupt

PATIENCE_S = 1.0  # of a server whose child is to hang
RETURN_DEADLINE_S = 10.0


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    return ServedShards(tmp_path / "store")


@pytest.fixture
def driver(stub: Path) -> Iterator[CudaDriver]:
    with stub_driver(stub) as made:
        yield made


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return np.random.default_rng(seed)


# --- what comes over


@pytest.mark.parametrize("ratio", [None, 1.0], ids=["arena", "whole model"])
def test_places_hold_the_bundles_and_nothing_else_is_written(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator, ratio: float | None
) -> None:
    server = serve(host, shards, cpu_cache_ratio=ratio or shards.ratio(N_SLOTS))
    with pushed_to(shards, driver) as pushed:
        for _ in range(30):
            pushed.push_some(rng)
        session = server.session(os.getpid())
        assert session is not None
        assert (session["transport"], session["leases"], session["last_error"]) == ("push", 0, None)
        child = child_of(server)
        assert (child["state"], child["name"], child["slabs"], child["pushes"]) == ("ready", "Stub 0", 1, 30)
        assert child["bytes_pushed"] % shards.bundle_nbytes == 0
        assert child["errors"] == 0
        pushed.client.close_push()
        assert server.session(os.getpid())["transport"] == "arena"
        assert child_of(server)["slabs"] == 0
        pushed.fetch_some()


def test_several_pushes_of_one_session_are_under_way_at_once(
    host: Host, shards: ServedShards, driver: CudaDriver
) -> None:
    serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        ids = np.arange(10, dtype=np.uint32)
        asked = [pushed.client.push(layer, ids, ids + np.uint32(10 * layer)) for layer in range(3)]
        for push in reversed(asked):
            push.wait(TIMEOUT_S)
        found = pushed.memory[1024 : 1024 + 30 * shards.bundle_nbytes].reshape(3, 10, -1)
        assert all(np.array_equal(found[layer], shards.content(layer, ids)) for layer in range(3))


def test_what_waits_for_slots_of_its_session_comes_when_others_are_copied(
    host: Host, shards: ServedShards, driver: CudaDriver
) -> None:
    """Three times what a session may lease, at once."""
    server = serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        ids = np.arange(30, dtype=np.uint32)
        asked = [pushed.client.push(layer, ids, ids) for layer in range(3)]
        for push in asked:
            push.wait(TIMEOUT_S)
        found = pushed.memory[1024 : 1024 + 30 * shards.bundle_nbytes].reshape(30, -1)
        assert np.array_equal(found, shards.content(2, ids))
        until(lambda: server.session(os.getpid())["leased_slots"] == 0, RETURN_DEADLINE_S)


def test_a_hundred_slabs_leave_nothing_behind(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    server = serve(host, shards)
    counts = []
    for n in range(100):
        with pushed_to(shards, driver) as pushed:
            pushed.push_some(rng)
        if n in (5, 99):
            child = psutil.Process(child_of(server)["pid"])
            counts.append((server.settled_count(), child.num_fds(), child.num_threads(), len(child.memory_maps(False))))
    assert counts[0] == counts[1]
    assert child_of(server)["starts"] == 1


# --- what is refused, and goes on


def test_push_without_a_slab_and_a_second_slab_are_errors(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    from sparseflow.client.device_push import DevicePush

    serve(host, shards)
    none = np.zeros(0, np.uint32)
    with pushed_to(shards, driver) as pushed:
        with pytest.raises(BadRequest, match="registered a slab already"):
            DevicePush(pushed.client, pushed.address, pushed.nbytes, driver)
        line = pushed.client.line()
        pushed.push_some(rng)
        pushed.client.close_push()
        with pytest.raises(BadRequest, match="call open_push first"):
            pushed.client.push(0, none, none)
        reply = line.reply(line.push(0, none, none, 1.0), time.monotonic() + TIMEOUT_S)
        assert "register the device first" in reply.text


def test_corrupt_bundle_is_the_error_of_its_push_only(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    serve(host, shards)
    ids = np.array([3, 4, 5], np.uint32)
    with pushed_to(shards, driver) as pushed:
        with shards.flipped(1, 4), pytest.raises(ShardCorrupt, match="neuron 4"):
            pushed.client.push(1, ids, ids).wait(TIMEOUT_S)
        pushed.check()
        pushed.push(2, ids, ids)
        pushed.check()
        host.servers[0].kill()  # the error stays in its status, which is no good end


# --- drivers that fail, hang or crash

FAILING = [  # variable, value, where it shows, what is said
    ("STUB_CRASH", "cuInit", "open", "has ended: it ended.*exit code -6"),
    ("STUB_FAIL", "cuInit:100", "open", "CUDA_ERROR_NO_DEVICE"),
    ("STUB_DEVICES", "0", "open", "none of the 0 GPUs"),
    ("LD_LIBRARY_PATH", "/nowhere", "open", "library cannot be opened.*install NVIDIA's driver"),
    pytest.param("STUB_HANG", "cuDevicePrimaryCtxRetain", "open", "not ready within 3 s", marks=pytest.mark.slow),
    ("STUB_FAIL", "cuMemHostAlloc:2", "open", "CUDA_ERROR_OUT_OF_MEMORY"),
    pytest.param("STUB_HANG", "cuIpcOpenMemHandle_v2", "open", "did not finish OpenSlab", marks=pytest.mark.slow),
    ("STUB_CRASH", "cuIpcOpenMemHandle_v2", "open", "exit code -6"),
    ("STUB_FAIL", "cuMemcpyHtoDAsync_v2:719", "push", "refused: cuMemcpyHtoDAsync.*CUDA_ERROR_LAUNCH_FAILED"),
    ("STUB_HANG", "cuMemcpyHtoDAsync_v2", "push", "did not finish CopyBundles within 1 s"),
    ("STUB_CRASH", "cuMemcpyHtoDAsync_v2", "push", "exit code -6"),
]


CASES = [getattr(case, "values", case) for case in FAILING]


@pytest.mark.parametrize(("variable", "value", "where", "message"), FAILING, ids=[f"{v}={w}" for v, w, *_ in CASES])
def test_driver_that_fails_hangs_or_crashes_is_one_error_and_the_session_goes_on(
    host: Host, shards: ServedShards, driver: CudaDriver, variable: str, value: str, where: str, message: str
) -> None:
    server = serve(host, shards, gpu_timeout=PATIENCE_S, variables={variable: value})
    with pushed_to(shards, driver, is_open=False) as pushed:
        ids = np.arange(10, dtype=np.uint32)

        def push() -> None:
            pushed.client.push(0, ids, ids).wait(TIMEOUT_S)

        for n in (1, 2):  # the second meets a new child
            if where == "push":
                pushed.open()
            with pytest.raises(ServerError, match=message):
                (push if where == "push" else pushed.open)()
            session = server.session(os.getpid())
            assert (session["transport"], session["leases"]) == ("arena", 0)
            assert session["last_error"]
            pushed.fetch_some()
            child = until(lambda: child_of(server), RETURN_DEADLINE_S)
            assert child["slabs"] == 0
            assert child["errors"] >= n
        if where == "push":
            with pytest.raises(ServerError, match="register the device again"):
                push()


def test_slab_that_cannot_be_closed_costs_one_child(host: Host, shards: ServedShards, driver: CudaDriver) -> None:
    server = serve(host, shards, gpu_timeout=PATIENCE_S, variables={"STUB_HANG": "cuIpcCloseMemHandle"})
    with pushed_to(shards, driver) as pushed:
        before = child_of(server)["pid"]
        pushed.client.close_push()  # once that child is dead
        assert not psutil.pid_exists(before) or not psutil.Process(before).is_running()
        pushed.fetch_some()
        pushed.open()
        assert child_of(server)["starts"] == 2


# --- ends


def test_killed_child_is_an_error_and_the_next_slab_meets_a_new_one(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    server = serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        pushed.push_some(rng)
        os.kill(child_of(server)["pid"], signal.SIGKILL)
        until(lambda: child_of(server)["state"] == "gone", RETURN_DEADLINE_S)
        none = np.zeros(0, np.uint32)
        with pytest.raises(ServerError, match=r"has ended: it ended \(exit code -9\).*or fetch instead"):
            pushed.client.push(0, none, none).wait(TIMEOUT_S)
        pushed.fetch_some()
        pushed.open()
        pushed.push_some(rng)
        assert child_of(server)["starts"] == 2


def test_child_killed_in_the_middle_of_pushes_answers_each_with_an_error(
    host: Host, shards: ServedShards, driver: CudaDriver
) -> None:
    server = serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        pid = child_of(server)["pid"]
        os.kill(pid, signal.SIGSTOP)
        ids = np.arange(10, dtype=np.uint32)
        asked = [pushed.client.push(0, ids, ids) for _ in range(5)]
        until(lambda: server.session(os.getpid())["leases"] == 3, RETURN_DEADLINE_S)
        os.kill(pid, signal.SIGKILL)
        for push in asked:
            with pytest.raises(ServerError, match="exit code -9"):
                push.wait(TIMEOUT_S)
        assert server.session(os.getpid())["leases"] == 0
        pushed.check()
        pushed.fetch_some()


def test_stopped_child_is_ended_after_a_while_and_status_is_answered_meanwhile(
    host: Host, shards: ServedShards, driver: CudaDriver
) -> None:
    server = serve(host, shards, gpu_timeout=PATIENCE_S)
    with pushed_to(shards, driver) as pushed:
        os.kill(child_of(server)["pid"], signal.SIGSTOP)
        ids = np.arange(10, dtype=np.uint32)
        begin_s = time.monotonic()
        push = pushed.client.push(0, ids, ids)
        for _ in range(5):
            asked_s = time.monotonic()
            server.status()
            assert time.monotonic() - asked_s < PATIENCE_S / 2
        with pytest.raises(ServerError, match=r"did not finish CopyBundles within 1 s \(--gpu-timeout\).*exit code -9"):
            push.wait(TIMEOUT_S)
        assert time.monotonic() - begin_s < 5 * PATIENCE_S
        pushed.fetch_some()


CLIENT = """
import ctypes
import numpy as np
from telling import given, hear, tell
from sparseflow.client.weight_client import WeightClient
from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.library import Library

driver = CudaDriver(0, Library(given["library"]))
address = driver.mem_alloc(given["nbytes"])
client = WeightClient("s")
client.open_push(address, given["nbytes"], driver=driver)
ids = np.arange(10, dtype=np.uint32)
client.push(0, ids, ids).wait(30)
tell("pushed")
hear()
while True:
    client.push(1, ids, ids).wait(30)
"""


def begin_client(host: Host, shards: ServedShards, stub: Path) -> Any:
    client = host.client(CLIENT, library=str(stub), nbytes=N_PLACES * shards.bundle_nbytes)
    assert client.hear() == "pushed"
    return client


@pytest.fixture
def killed_clients_leave_memory(stub: Path) -> Iterator[None]:
    """The stub's, not CUDA's."""
    yield
    for left in Path(os.environ["STUB_FOLDER"]).iterdir():
        left.unlink()


@pytest.mark.parametrize("is_pushing", [False, True], ids=["between pushes", "while it pushes"])
def test_slab_of_a_killed_client_is_closed_and_another_client_is_not_disturbed(
    host: Host,
    shards: ServedShards,
    stub: Path,
    killed_clients_leave_memory: None,
    driver: CudaDriver,
    rng: np.random.Generator,
    is_pushing: bool,
) -> None:
    server = serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        client = begin_client(host, shards, stub)
        assert child_of(server)["slabs"] == 2
        if is_pushing:
            client.say()
            until(lambda: child_of(server)["pushes"] > 20)
        client.kill()
        until(lambda: child_of(server)["slabs"] == 1, RETURN_DEADLINE_S)
        pushed.push_some(rng)
        child = child_of(server)
        assert (child["starts"], child["errors"]) == (1, 0)


def test_killed_client_whose_slab_does_not_close_costs_the_child_and_no_more(
    host: Host,
    shards: ServedShards,
    stub: Path,
    killed_clients_leave_memory: None,
    driver: CudaDriver,
) -> None:
    server = serve(host, shards, gpu_timeout=PATIENCE_S, variables={"STUB_HANG": "cuIpcCloseMemHandle"})
    client = begin_client(host, shards, stub)
    client.kill()
    until(lambda: child_of(server)["state"] == "gone", RETURN_DEADLINE_S)
    assert "CloseSlab" in child_of(server)["last_error"]
    with pushed_to(shards, driver) as pushed:
        pushed.push(0, np.arange(5, dtype=np.uint32), np.arange(5, dtype=np.uint32))
        pushed.check()
        assert child_of(server)["starts"] == 2


def test_child_dies_with_a_killed_server_and_pushing_goes_on_with_its_successor(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    server = serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        pushed.push_some(rng)
        child = psutil.Process(child_of(server)["pid"])
        server.kill()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, RETURN_DEADLINE_S)
        successor = serve(host, shards)
        pushed.push_some(rng)
        assert successor.session(os.getpid())["transport"] == "push"
        pushed.push_some(rng)


def test_child_ends_with_a_server_that_is_told_to(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    server = serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        pushed.push_some(rng)
        child = psutil.Process(child_of(server)["pid"])
        child.send_signal(signal.SIGTERM)  # not its to act upon
        child.send_signal(signal.SIGINT)
        pushed.push_some(rng)
        assert server.end() == 0
        assert not child.is_running()
        assert "ERROR" not in server.log()
        assert list(Path(os.environ["STUB_FOLDER"]).iterdir())  # the slab is its owner's still
        pushed.check()
