"""What goes wrong with GPUs: handles that are forged, memory that cannot be page-locked, and no CUDA at all.

The driver is a stub, or none.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from child_process import start_forked
from dense_reference import DenseIds
from processes import Host
from pushed_bundles import N_PLACES, TIMEOUT_S, child_of, pushed_to, serve, stub_driver
from served_shards import ServedShards

from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.tickets import SlabTicket
from sparseflow.errors import ArenaBusy, BadRequest, ServerError


@pytest.fixture
def driver(stub: Path) -> Iterator[CudaDriver]:
    with stub_driver(stub) as made:
        yield made


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return np.random.default_rng(seed)


# --- 16: hostile handles

FORGED = [
    ({"handle": bytes(64)}, "slab: its handle cannot be opened"),
    ({"handle": bytes(range(64))}, "slab: its handle cannot be opened"),
    ({"handle": b"x" * 63}, "handle is 63 bytes"),
    ({"handle": b"x" * 65}, "handle is 65 bytes"),
    ({"handle": None}, "handle is "),
    ({"device_uuid": b"GPU"}, "device_uuid is 3 bytes"),
    ({"offset": 1 << 40}, "its allocation ends at"),
    ({"offset": -1}, "offset=-1"),
    ({"offset": (1 << 62), "nbytes": 1 << 62}, "its allocation ends at"),
    ({"offset": (1 << 64) - 512}, "offset=18446744073709551104"),
    ({"nbytes": 1 << 40}, "its allocation ends at"),
    ({"nbytes": 511}, "export whole ones"),
    ({"nbytes": -1}, "nbytes=-1"),
    ({"nbytes": True}, "nbytes=True"),
    ({"more": 1}, "nothing else"),
]


def test_16_forged_slab_is_an_error_and_a_right_one_opens_after_it(
    host: Host, shards: ServedShards, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    server = serve(host, shards)
    right = SlabTicket.to_dict
    with pushed_to(shards, driver) as pushed:
        for change, message in FORGED:
            with monkeypatch.context() as patch:
                patch.setattr(SlabTicket, "to_dict", lambda ticket, change=change: right(ticket) | change)
                with pytest.raises(BadRequest, match=message):
                    pushed.open()
            assert server.session(os.getpid())["transport"] == "arena"
            pushed.fetch_some()
            pushed.open()
            pushed.push_some(rng)
        assert child_of(server)["starts"] == 1


def test_16_gpu_that_the_server_does_not_see_is_an_error(
    host: Host, shards: ServedShards, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(host, shards)
    monkeypatch.setattr(driver, "device_uuid", lambda: bytes(16))
    with pushed_to(shards, driver, is_open=False) as pushed:
        with pytest.raises(ServerError, match=r"GPU-00000000-.*none of the 1 GPUs.*CUDA_VISIBLE_DEVICES"):
            pushed.open()
        pushed.fetch_some()
        assert child_of(server)["state"] == "gone"


WRONG_PUSHES = [
    (0, [1, 2], [0, N_PLACES], f"place {N_PLACES}: the slab has {N_PLACES}"),
    (0, [1, 2], [0, 2**32 - 1], "place 4294967295"),
    (0, [2, 1], [0, 1], "ascending"),
    (0, [61], [0], "61 neurons"),
    (3, [1], [0], "3 layers"),
    (2**40, [1], [0], "3 layers"),
    (0, list(range(31)), list(range(31)), "share of the arena"),
]


def test_16_push_to_a_wrong_place_or_of_wrong_neurons_is_an_error_and_the_slab_stays(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    serve(host, shards)
    with pushed_to(shards, driver) as pushed:
        for layer, ids, places, message in WRONG_PUSHES:
            push = pushed.client.push(layer, np.array(ids, np.uint32), np.array(places, np.uint32))
            with pytest.raises((BadRequest, ArenaBusy), match=message):
                push.wait(TIMEOUT_S)
            pushed.check()
            pushed.push_some(rng)


def test_16_push_of_wrong_neurons_of_a_whole_model_is_an_error_too(
    host: Host, shards: ServedShards, driver: CudaDriver, rng: np.random.Generator
) -> None:
    serve(host, shards, cpu_cache_ratio=1.0)
    with pushed_to(shards, driver) as pushed:
        for layer, neuron in ((0, 61), (3, 0), (2**50, 2**32 - 1)):
            push = pushed.client.push(layer, np.array([neuron], np.uint32), np.zeros(1, np.uint32))
            with pytest.raises(BadRequest, match="3 layers of 61 neurons"):
                push.wait(TIMEOUT_S)
        pushed.push_some(rng)


# --- 26: memory that cannot be page-locked

STAGED = """
import ctypes
from functools import partial
import torch
import sparseflow.cuda.driver as cuda
from sparseflow.client import weight_client
from sparseflow.core.config import OffloadStrategy, SparseFlowConfig
from sparseflow.cuda.library import Library
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.device import transport
from telling import generate, given, tell

class OnHost:
    "The way asked for, but for a torch without CUDA, which has its tensors in host memory."

    def __init__(self, way):
        self.way = way

    def __call__(self, *arguments):
        return self.way(*arguments[:-1], torch.device("cpu"))

torch.set_num_threads(1)
cuda.CudaDriver = weight_client.CudaDriver = partial(cuda.CudaDriver, library=Library(given["library"]))
source = weight_client.WeightClient("s")
strategy = OffloadStrategy(cpu_cache_ratio=source.strategy.cpu_cache_ratio, device_cache="copy")
model = SparseOPTForCausalLM(SparseFlowConfig(source.profile, strategy), source)
transport.Push, transport.Staging = OnHost(transport.Push), OnHost(transport.Staging)
way = transport.open_transport(source, torch.device("cuda:0"), source.fetch_limit)
model.coordinator.bringer.transport = way
ids = generate(model, given["prompt"], given["n_tokens"])
report = model.device_report()
with cuda.CudaDriver(0) as driver:  # an error that is left would be the next call's
    driver.mem_free(driver.mem_alloc(1 << 16))
model.close()
tell([ids, report["transport"], report["transport_reason"], ctypes.CDLL(given["library"]).stub_n_taken()])
"""


def test_26_memory_that_cannot_be_page_locked_is_staged_and_the_report_says_why(
    host: Host, stub: Path, demo_store: Path, dense_ids: DenseIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.serve(demo_store, cpu_cache_ratio=0.5)
    monkeypatch.setenv("STUB_FAIL", "cuMemHostRegister_v2:2")
    prompt = [2, 5, 100, 31]
    client = host.client(STAGED, library=str(stub), prompt=prompt, n_tokens=12)
    ids, way, reason, n_taken = client.hear()
    client.finish()
    assert ids == dense_ids(prompt, 12)
    assert way == "staging"
    assert "0 of " in reason
    assert "cuMemHostRegister" in reason
    assert "CUDA_ERROR_OUT_OF_MEMORY" in reason
    assert n_taken == 0


# --- 27: no CUDA

COMMAND = "import sys; from sparseflow.cli.main import main; sys.exit(main(sys.argv[1:]))"
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": "/nowhere"}


def run(log: Path, *words: object) -> tuple[int, str, list[str]]:
    """Exit code, output and lines of complaint of a command where there is no GPU to be seen."""
    with start_forked(COMMAND, *words, log=log, **NO_GPU) as process:
        printed = process.read(60)
        return process.wait(10), printed, log.read_text(encoding="utf-8").splitlines()


def test_27_without_cuda_a_gpu_asked_for_is_one_error_and_all_else_runs(
    fork_server: None, demo_store: Path, tmp_path: Path
) -> None:
    words = ("generate", demo_store, "--prompt", "In the beginning", "--max-new-tokens", 5, "--quiet")
    begin_s = time.monotonic()
    code, printed, (text,) = run(tmp_path / "log", *words, "--device", "cuda")
    assert time.monotonic() - begin_s < 10
    assert (code, printed) == (2, "")
    assert text.startswith("sparseflow: error: device 'cuda': ")
    assert "sees 0 GPUs here; use device='cpu'" in text
    code, printed, complaints = run(tmp_path / "log", *words)
    assert (code, complaints) == (0, [])
    assert printed.strip()


def test_27_without_cuda_doctor_says_so(host: Host) -> None:
    """Not a fork: its driver's library is looked for where variables said at the start."""
    command = [sys.executable, "-m", "sparseflow", "doctor"]
    doctor = subprocess.run(command, env=os.environ | NO_GPU, capture_output=True, text=True, timeout=60, check=False)
    assert (doctor.returncode, doctor.stderr) == (0, "")
    assert re.search(r"^ +(note|warning) +device +none \(", doctor.stdout, re.MULTILINE)
