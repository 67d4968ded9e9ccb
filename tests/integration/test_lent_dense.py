"""Dense weights that a server's child lends on a GPU, over a stub of CUDA's driver: bytes, refusals, and every end."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from processes import Host, ServerProcess, until

from sparseflow.client.weight_client import WeightClient
from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.library import Library
from sparseflow.errors import BadRequest, ServerError

DEADLINE_S = 10.0
MakeFolder = Callable[[str, str], Path]


@pytest.fixture
def host(stub: Path, host: Host) -> Host:
    """Ended before it is looked whether the stub's memory was given back."""
    return host


@pytest.fixture
def killed_children_leave_memory(stub: Path) -> Iterator[None]:
    """The stub's, not CUDA's."""
    yield
    for left in Path(os.environ["STUB_FOLDER"]).iterdir():
        left.unlink()


@pytest.fixture
def store(family_store: MakeFolder) -> Path:
    return family_store("base", "float16")


@pytest.fixture
def driver(stub: Path) -> Iterator[CudaDriver]:
    """This process's; at the end nothing is left in it."""
    with CudaDriver(0, Library(str(stub))) as made:
        yield made
    assert ctypes.CDLL(str(stub)).stub_n_taken() == 0


def shared(server: ServerProcess) -> dict[str, Any]:
    told: dict[str, Any] = server.status()["shared_dense"]
    return told


def state(server: ServerProcess) -> str:
    (model,) = shared(server)["models"].values()
    return str(model["state"])


def n_borrowers(server: ServerProcess) -> int:
    return sum(model["borrowers"] for model in shared(server)["models"].values())


def test_what_is_lent_is_what_lies_in_host_memory(host: Host, store: Path, driver: CudaDriver) -> None:
    import torch

    cpu = torch.device("cpu")  # where the stub's memory is
    server = host.serve(store, share_dense_gpu=0)
    with WeightClient("s") as client, WeightClient("s") as other:
        for source in (client, other):
            lent = source.borrow_dense(driver=driver)
            for found, expected in (
                (lent.dense(cpu), source.dense()),
                (lent.predictor_tensors(cpu), source.predictor_tensors()),
            ):
                assert found.keys() == expected.keys()
                for name, tensor in expected.items():
                    assert found[name].dtype == tensor.dtype
                    assert torch.equal(found[name], tensor), name
                    assert found[name].data_ptr() != tensor.data_ptr()
            lent.require()
        assert n_borrowers(server) == 2
        assert shared(server)["uuid"] == "GPU-f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff"
        allocated = list(Path(os.environ["STUB_FOLDER"]).iterdir())
        assert len(allocated) == 1, "one copy for all"
        del found, tensor, expected
    assert n_borrowers(server) == 0


def test_borrowing_again_and_again_leaves_nothing_behind(host: Host, store: Path, driver: CudaDriver) -> None:
    server = host.serve(store, share_dense_gpu=0)
    counts = []
    with WeightClient("s") as client:
        for n in range(60):
            lent = client.borrow_dense(driver=driver)
            lent.close()
            lent.close()
            if n in (5, 59):
                counts.append((server.settled_count(), psutil.Process().num_fds()))
        with pytest.raises(BadRequest, match="closed"):
            lent.require()
    assert counts[0] == counts[1]


def test_server_that_lends_nothing_says_what_would_do(host: Host, store: Path, driver: CudaDriver) -> None:
    server = host.serve(store)
    assert shared(server) is None
    with WeightClient("s") as client, pytest.raises(BadRequest, match="--share-dense-gpu"):
        client.borrow_dense(driver=driver)


def test_another_gpu_is_refused_with_both_named(
    host: Host, store: Path, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.serve(store, share_dense_gpu=0)
    monkeypatch.setattr(driver, "device_uuid", lambda: bytes(16))
    with WeightClient("s") as client, pytest.raises(BadRequest, match=r"lends on GPU-f0f1.*not on GPU-00000000"):
        client.borrow_dense(driver=driver)


@pytest.mark.parametrize(
    ("device", "variables", "message"),
    [
        (3, {}, "device 3: 1 are visible"),
        (0, {"STUB_FAIL": "cuMemAlloc_v2:2"}, "CUDA_ERROR_OUT_OF_MEMORY"),
        (0, {"STUB_CRASH": "cuMemAlloc_v2"}, "exit code -6"),
        (0, {"STUB_HANG": "cuMemcpyHtoDAsync_v2"}, "did not finish LoadRegions"),
        (0, {"LD_LIBRARY_PATH": "/nowhere"}, "library cannot be opened"),
    ],
    ids=str,
)
def test_gpu_that_cannot_be_used_degrades_the_server_says_why_and_everything_else_goes_on(
    host: Host,
    store: Path,
    driver: CudaDriver,
    killed_children_leave_memory: None,
    device: int,
    variables: dict[str, str],
    message: str,
) -> None:
    server = host.begin(store, share_dense_gpu=device, gpu_timeout=1.0, variables=variables)
    status = server.wait_for("degraded")
    assert message in status["reasons"][0]
    with WeightClient("s") as client:
        with pytest.raises(ServerError, match=message):
            client.borrow_dense(driver=driver)
        ids = np.arange(3, dtype=np.uint32)
        with client.fetch(0, ids) as fetch:
            assert len(fetch.wait(30).slots) == 3
    server.kill()  # degraded is no good end


# --- ends


def test_killed_lender_is_an_error_before_the_next_step_and_a_new_one_lends_again(
    host: Host, store: Path, driver: CudaDriver, stub: Path
) -> None:
    server = host.serve(store, share_dense_gpu=0)
    with WeightClient("s") as client:
        lent = client.borrow_dense(driver=driver)
        lent.require()
        left = list(Path(os.environ["STUB_FOLDER"]).iterdir())
        os.kill(shared(server)["pid"], signal.SIGKILL)
        until(lambda: state(server) == "failed", DEADLINE_S)
        for _ in range(2):
            with pytest.raises(ServerError, match=r"gone: the server's process.*open it again"):
                lent.require()
        assert "1 sessions have lost" in server.status()["reasons"][0]
        lent.close()
        for path in left:  # the stub's, not CUDA's
            path.unlink()
        lent = client.borrow_dense(driver=driver)
        lent.require()
        lent.close()
        assert server.status()["reasons"] == []


def test_killed_server_is_an_error_before_the_next_step(host: Host, store: Path, driver: CudaDriver) -> None:
    server = host.serve(store, share_dense_gpu=0)
    with WeightClient("s") as client:
        lent = client.borrow_dense(driver=driver)
        left = list(Path(os.environ["STUB_FOLDER"]).iterdir())
        child = psutil.Process(shared(server)["pid"])
        server.kill()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, DEADLINE_S)
        with pytest.raises(ServerError, match="gone"):
            lent.require()
        for path in left:  # if the child was killed before it saw its parent's end
            path.unlink(missing_ok=True)


def test_server_that_ends_tells_borrowers_and_waits_until_they_have_returned_it(
    host: Host, store: Path, driver: CudaDriver
) -> None:
    server = host.serve(store, share_dense_gpu=0, drain_timeout=30)
    with WeightClient("s") as client:
        lent = client.borrow_dense(driver=driver)
        server.signal(signal.SIGTERM)
        until(lambda: "waiting for 1 sessions to return" in server.log(), DEADLINE_S)
        until(lent._attachment.has_news, DEADLINE_S)
        with pytest.raises(ServerError, match="about to end"):
            lent.require()
        assert server.exit_code is None
        assert list(Path(os.environ["STUB_FOLDER"]).iterdir()), "it is not freed yet"
    assert server.wait(DEADLINE_S) == 0


def test_server_that_is_waited_for_in_vain_ends_in_time_and_says_so(
    host: Host, store: Path, driver: CudaDriver
) -> None:
    server = host.serve(store, share_dense_gpu=0, drain_timeout=0.5)
    with WeightClient("s") as client:
        lent = client.borrow_dense(driver=driver)
        begin_s = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begin_s < 5
        assert "1 sessions have not returned the weights on the GPU in time" in server.log()
        with pytest.raises(ServerError, match="gone"):
            lent.require()


CLIENT = """
from telling import given, hear, tell
from sparseflow.client.weight_client import WeightClient
from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.library import Library

client = WeightClient("s")
lent = client.borrow_dense(driver=CudaDriver(0, Library(given["library"])))
tell("borrowed")
hear()
"""


def test_killed_borrower_has_returned_what_it_had(host: Host, store: Path, stub: Path) -> None:
    server = host.serve(store, share_dense_gpu=0)
    client = host.client(CLIENT, library=str(stub))
    assert client.hear() == "borrowed"
    assert n_borrowers(server) == 1
    client.kill()
    until(lambda: n_borrowers(server) == 0, DEADLINE_S)
