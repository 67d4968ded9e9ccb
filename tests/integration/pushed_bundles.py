"""A client with a slab on a device that is a stub, to which a server pushes; and what the slab must hold."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from processes import Host, ServerProcess
from served_shards import ServedShards
from shards import some_ids

from sparseflow.client.weight_client import WeightClient
from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.library import Library

N_PLACES = 40
N_SLOTS = 120  # thirty for a session
TIMEOUT_S = 30.0


@contextmanager
def stub_driver(stub: Path) -> Iterator[CudaDriver]:
    """This process's; at the end nothing is left in it."""
    with CudaDriver(0, Library(str(stub))) as made:
        yield made
    assert ctypes.CDLL(str(stub)).stub_n_taken() == 0


class Pushed:
    """A client with a slab, and what its places must hold."""

    def __init__(self, shards: ServedShards, driver: CudaDriver, name: str = "s") -> None:
        self.shards, self.driver = shards, driver
        self.client = WeightClient(name, reconnect_timeout_s=TIMEOUT_S)
        self._before, nbytes = 1024, N_PLACES * shards.bundle_nbytes  # it lies inside of its allocation
        self.allocation = driver.mem_alloc(self._before + nbytes + 512)
        whole = (ctypes.c_ubyte * (self._before + nbytes + 512)).from_address(self.allocation)
        self.memory = np.frombuffer(whole, np.uint8)
        self.memory[:] = 0xEE
        self.expected = self.memory.copy()
        self.address, self.nbytes = self.allocation + self._before, nbytes

    def open(self) -> None:
        self.client.open_push(self.address, self.nbytes, driver=self.driver)

    def push(self, layer: int, ids: NDArray[np.uint32], places: NDArray[np.uint32]) -> None:
        self.client.push(layer, ids, places).wait(TIMEOUT_S)
        content = self.shards.content(layer, ids)
        for place, bundle in zip(places.tolist(), content, strict=True):
            first = self._before + place * self.shards.bundle_nbytes
            self.expected[first : first + self.shards.bundle_nbytes] = bundle

    def push_some(self, rng: np.random.Generator, n: int = 25) -> None:
        layer = int(rng.integers(self.shards.n_layers))
        n = int(rng.integers(1, n + 1))
        places = rng.permutation(N_PLACES)[:n].astype(np.uint32)
        self.push(layer, some_ids(rng, self.shards.ffn_dim, n), places)
        self.check()

    def check(self) -> None:
        assert np.array_equal(self.memory, self.expected)

    def fetch_some(self) -> None:
        """That everything else goes on."""
        ids = np.arange(5, dtype=np.uint32)
        with self.client.fetch(2, ids) as fetch:
            found = fetch.wait(TIMEOUT_S)
            bundles = found.base.view(len(found.base), -1).numpy().view(np.uint8)[found.slots]
            assert np.array_equal(bundles, self.shards.content(2, ids))

    def close(self) -> None:
        self.client.close()
        self.driver.mem_free(self.allocation)


@contextmanager
def pushed_to(shards: ServedShards, driver: CudaDriver, *, is_open: bool = True) -> Iterator[Pushed]:
    made = Pushed(shards, driver)
    try:
        if is_open:
            made.open()
        yield made
    finally:
        made.close()


def serve(host: Host, shards: ServedShards, **options: Any) -> ServerProcess:
    return host.serve(shards.folder, **{"cpu_cache_ratio": shards.ratio(N_SLOTS), "max_sessions": 3} | options)


def child_of(server: ServerProcess) -> dict[str, Any]:
    (child,) = server.status()["gpu_children"]
    return child
