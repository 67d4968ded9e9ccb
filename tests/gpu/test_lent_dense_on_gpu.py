"""Dense weights that a server lends on a real GPU, as torch's tensors."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("engine", "integration")]  # processes

from processes import RUNTIME_DIR, ServerProcess, until

from sparseflow.client.weight_client import WeightClient
from sparseflow.errors import ServerError

pytestmark = pytest.mark.gpu


@pytest.fixture
def server(
    family_store: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv(RUNTIME_DIR, folder)
        options: dict[str, Any] = {"share_dense_gpu": 0, "io": "buffered"}
        store = family_store("base", "float16")
        made = ServerProcess(tmp_path / "log", ("-m", "sparseflow_daemon"), [store], "s", options)
        made.wait_for("ready", "degraded")
        yield made
        made.signal(signal.SIGTERM)
        made.wait()
        print(made.log())


def test_tensors_on_the_gpu_are_those_in_host_memory_in_every_session(server: ServerProcess) -> None:
    import torch

    gpu = torch.device("cuda", 0)
    for _ in range(3):
        with WeightClient("s") as client:
            lent = client.borrow_dense()
            for found, expected in (
                (lent.dense(gpu), client.dense()),
                (lent.predictor_tensors(gpu), client.predictor_tensors()),
            ):
                assert found.keys() == expected.keys()
                for name, tensor in expected.items():
                    assert found[name].device == gpu
                    assert found[name].dtype == tensor.dtype
                    assert torch.equal(found[name].cpu(), tensor), name
            weight = next(tensor for tensor in lent.dense(gpu).values() if tensor.ndim == 2)
            product = weight.float() @ torch.ones(weight.shape[1], device=gpu)
            assert torch.isfinite(product).all()
            del found, tensor, weight, product
            torch.cuda.synchronize()
    assert server.status()["shared_dense"]["models"][client.model]["borrowers"] == 0


def test_look_takes_microseconds(server: ServerProcess) -> None:
    with WeightClient("s") as client:
        lent = client.borrow_dense()
        begin = time.perf_counter()
        for _ in range(1000):
            lent.require()
        print(f"{1e3 * (time.perf_counter() - begin):.1f} us a look")


def test_killed_lender_is_an_error_and_the_gpu_can_be_used_on(server: ServerProcess) -> None:
    """What becomes of memory whose process has died is the driver's: this looks only that unmapping it does no harm."""
    import torch

    with WeightClient("s") as client:
        lent = client.borrow_dense()
        os.kill(server.status()["shared_dense"]["pid"], signal.SIGKILL)
        until(lambda: server.status()["state"] == "degraded")
        with pytest.raises(ServerError, match="gone"):
            lent.require()
        lent.close()
        assert int(torch.ones(1000, device="cuda").sum()) == 1000
        again = client.borrow_dense()
        again.require()
        assert server.status()["state"] == "ready"
