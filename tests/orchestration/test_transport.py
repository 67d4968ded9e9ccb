"""Bundles reach a device by whatever way works, and the text is the same."""

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import opt_family
import pytest
import torch
from fake_driver import FakeDriver

from sparseflow import DiskWeightStore, OffloadStrategy, SparseOPTForCausalLM
from sparseflow.core.weight_source import FETCH_TIMEOUT_S, HostBundles
from sparseflow.errors import ServerError
from sparseflow.kernels.device.ops import ReachableBundles
from sparseflow.orchestration.device import transport
from sparseflow.orchestration.device.coordinator import DeviceCoordinator
from sparseflow.orchestration.device.transport import Pull, Push, Staging, lock_memory, open_transport

MakeFolder = Callable[[str, str], Path]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def store(family_checkpoint: MakeFolder) -> DiskWeightStore:
    """Copied to memory of its own, as for a GPU."""
    return DiskWeightStore(family_checkpoint("base", "float32")).initialize_from_pretrained(for_device=True)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Stands for the GPU's."""
    fake = FakeDriver()
    monkeypatch.setattr("sparseflow.cuda.driver.CudaDriver", lambda number: fake)
    return fake


def bundle_like(store: DiskWeightStore) -> torch.Tensor:
    return torch.empty(2, store.profile.hidden_dimension)


def test_staging_brings_what_was_fetched(store: DiskWeightStore) -> None:
    ids = np.array([3, 70, 255], np.uint32)
    staging = Staging("no lock", 10, bundle_like(store), CPU)
    reach, rows, lease = staging.bring(store, 1, ids)
    assert lease is not None
    resident = store.resident_bundles(1)
    assert resident is not None
    assert torch.equal(reach.bundles[rows.long()], resident[ids.astype(np.int64)])
    assert staging.resident(resident) is None


def test_a_model_that_stages_says_the_same(family_checkpoint: MakeFolder) -> None:
    checkpoint = family_checkpoint("base", "float32")
    plain = SparseOPTForCausalLM.from_pretrained(checkpoint)
    staged = SparseOPTForCausalLM.from_pretrained(checkpoint, strategy=OffloadStrategy(device_cache="copy"))
    coordinator, profile = staged.coordinator, staged.source.profile
    assert isinstance(coordinator, DeviceCoordinator)
    coordinator.bringer.transport = Staging(
        "a test", profile.ffn_dimension, torch.empty(2, profile.hidden_dimension), CPU
    )
    ids = opt_family.random_ids(plain.config, 1, 9)
    texts = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (plain, staged)]
    assert torch.equal(*texts)
    assert staged.device_report()["transport"] == "staging"
    assert staged.device_report()["transport_reason"] == "a test"


class PushingStore:
    """A server's process on the GPU, in this one; it copies when somebody waits. fails_at: the number of a push."""

    push_limit = 50

    def __init__(self, store: DiskWeightStore, fails_at: int | None = None) -> None:
        self._store, self.fails_at, self.n_pushed, self.is_open = store, fails_at, 0, False

    def open_push(self, slab_address: int, slab_nbytes: int, device_index: int = 0) -> None:
        self._address, self.is_open = slab_address, True

    def push(self, layer: int, ids: np.ndarray, places: np.ndarray) -> "PushingStore":
        assert self.is_open
        assert len(ids) <= self.push_limit
        self._asked, self.n_pushed = (layer, ids, places), self.n_pushed + 1
        return self

    def wait(self, timeout_s: float, stream: int = 0) -> None:
        if self.n_pushed == self.fails_at:
            raise ServerError("the process on the GPU has ended")
        layer, ids, places = self._asked
        nbytes = self._store.profile.bundle_nbytes
        resident = self._store.resident_bundles(layer)
        assert resident is not None
        for neuron, place in zip(ids.tolist(), places.tolist(), strict=True):
            ctypes.memmove(self._address + place * nbytes, resident[neuron].data_ptr(), nbytes)

    def close_push(self) -> None:
        self.is_open = False


@pytest.mark.filterwarnings("ignore:bundles are staged")
@pytest.mark.parametrize("fails_at", [None, 3])
def test_a_model_that_is_pushed_to_says_the_same(family_checkpoint: MakeFolder, fails_at: int | None) -> None:
    checkpoint = family_checkpoint("base", "float32")
    plain = SparseOPTForCausalLM.from_pretrained(checkpoint)
    model = SparseOPTForCausalLM.from_pretrained(checkpoint, strategy=OffloadStrategy(device_cache="copy"))
    coordinator = model.coordinator
    assert isinstance(coordinator, DeviceCoordinator)
    assert isinstance(model.source, DiskWeightStore)
    pushing = PushingStore(model.source, fails_at)
    coordinator.bringer.transport = Push("no lock", pushing, bundle_like(model.source), CPU)
    ids = opt_family.random_ids(plain.config, 1, 9)
    assert torch.equal(*(each.generate(ids, max_new_tokens=12, do_sample=False) for each in (plain, model)))
    report = model.device_report()
    assert report["transport"] == ("push" if fails_at is None else "staging")
    assert "no lock" in report["transport_reason"]
    assert (fails_at is None) or ("the process on the GPU has ended" in report["transport_reason"])
    model.close()
    assert not pushing.is_open


def test_a_server_pushes_where_the_gpu_cannot_read(
    store: DiskWeightStore, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.host_limit = 0
    monkeypatch.setattr(store, "pusher", lambda: "the server", raising=False)
    monkeypatch.setattr(transport, "Push", lambda reason, pusher, *_: (pusher, reason))
    pusher, reason = open_transport(store, GPU, 10)  # type: ignore[misc]
    assert pusher == "the server"
    assert "page-locked, then" in reason

    def refuse(*_: object) -> None:
        raise ServerError("no GPU there")

    monkeypatch.setattr(transport, "Push", refuse)
    monkeypatch.setattr(transport, "Staging", lambda reason, *_: reason)
    assert "cannot push: no GPU there" in open_transport(store, GPU, 10)  # type: ignore[operator]


def test_memory_of_its_own_is_page_locked_and_let_go(store: DiskWeightStore, driver: FakeDriver) -> None:
    pull = open_transport(store, GPU, 10)
    assert isinstance(pull, Pull)
    bundles = store.resident_bundles(1)
    assert bundles is not None
    memory = store.host_memory()
    assert memory is not None
    assert pull.resident(bundles).address == driver.host_device_pointer(memory.address) + bundles.nbytes
    assert pull.is_of(store)
    pull._lock.close()
    assert driver.leaks() == {}


def test_no_copy_reaches_over_an_edge_of_what_was_locked_together() -> None:
    bundles = torch.empty(100, 2, 4)
    assert ReachableBundles(bundles, 0).pieces(3, 50) == [(3, 53)]
    for first_edge, n_between in ((0, 7), (3, 7), (6, 7), (50, 64)):
        reach = ReachableBundles(bundles, 0, first_edge, n_between)
        for first in range(60):
            for n in (1, 6, 7, 8, 40):
                pieces = reach.pieces(first, n)
                covered = [k for begin, end in pieces for k in range(begin, end)]
                assert covered == list(range(first, first + n))
                for begin, end in pieces:
                    assert not any(k % n_between == first_edge % n_between for k in range(begin + 1, end))


def test_chunks_of_a_lock_hold_whole_bundles(store: DiskWeightStore, driver: FakeDriver, monkeypatch: Any) -> None:
    monkeypatch.setattr(transport, "CHUNK_NBYTES", 3 * mmap.PAGESIZE)
    pull = open_transport(store, GPU, 10)
    assert isinstance(pull, Pull)
    profile, n_before = store.profile, store.profile.ffn_dimension
    n_between = pull._lock.chunk_nbytes // profile.bundle_nbytes
    assert pull._lock.chunk_nbytes == n_between * profile.bundle_nbytes
    bundles = store.resident_bundles(1)
    assert bundles is not None
    reach = pull.resident(bundles)
    assert (n_before + reach.first_edge) % n_between == 0
    pull._lock.close()


def test_where_page_locking_fails_staging_says_why(
    store: DiskWeightStore, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = store.host_memory()
    assert memory is not None
    driver.host_limit = 0
    reason = lock_memory(memory, GPU, store.profile.bundle_nbytes)
    assert isinstance(reason, str)
    assert "page-locked, then" in reason
    monkeypatch.setattr(transport, "Staging", lambda reason, *_: reason)
    assert "page-locked, then" in open_transport(store, GPU, 10)


def test_mapped_files_are_not_page_locked(family_checkpoint: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = DiskWeightStore(family_checkpoint("base", "float32")).initialize_from_pretrained()
    assert mapped.host_memory() is None
    monkeypatch.setattr(transport, "Staging", lambda reason, *_: reason)
    assert "mapped files" in open_transport(mapped, GPU, 10)


def test_copied_bundles_are_those_of_the_files(store: DiskWeightStore, family_checkpoint: MakeFolder) -> None:
    mapped = DiskWeightStore(family_checkpoint("base", "float32")).initialize_from_pretrained()
    for layer in range(store.profile.num_layers):
        one, other = store.resident_bundles(layer), mapped.resident_bundles(layer)
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert store.status().io == "copy"
    assert store.status().memory["private"] == store.profile.neurons_nbytes
    fetched = store.fetch(0, np.array([7], np.uint32)).wait(FETCH_TIMEOUT_S)
    assert isinstance(fetched, HostBundles)


def test_page_locks_take_turns_in_a_file_of_ones_own(
    store: DiskWeightStore, driver: FakeDriver, tmp_path: Path
) -> None:
    memory = store.host_memory()
    assert memory is not None
    lock = lock_memory(memory, GPU, store.profile.bundle_nbytes)
    assert not isinstance(lock, str)
    lock.close()
    assert (Path(transport.tempfile.gettempdir()) / f"sparseflow-page-lock-{os.getuid()}").exists()
