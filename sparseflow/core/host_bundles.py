"""Where an open store keeps its bundles in this process: all mapped or copied, or some in the engine's arena."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.config import OffloadStrategy
from sparseflow.core.tensor_views import view_bundles
from sparseflow.core.weight_source import Early, Fetch, HostBundles, HostMemory
from sparseflow.engine.arena import Arena
from sparseflow.engine.counts import FetchCounts, ReadTimes
from sparseflow.engine.engine import Engine
from sparseflow.engine.resident import ResidentShards
from sparseflow.store.manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor

_HINT_TIMEOUT_S = 60.0


class BundleHolder(Protocol):
    """What `DiskWeightStore` needs of either."""

    io: str
    disk_bytes_per_s: float | None
    reasons: tuple[str, ...]
    fetch_limit: int
    read_times: ReadTimes
    private_nbytes: int
    """Bytes of this process's own memory."""
    mapped_nbytes: int
    """Bytes of files that are mapped."""

    @property
    def n_resident(self) -> int:
        """Bundles in host memory."""
        ...

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """As `WeightSource.hint`."""
        ...

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> Fetch:
        """As `WeightSource.fetch`."""
        ...

    def resident_bundles(self, layer: int) -> "Tensor | None":
        """As `WeightSource.resident_bundles`."""
        ...

    def host_memory(self) -> HostMemory | None:
        """As `WeightSource.host_memory`."""
        ...

    def counts(self) -> FetchCounts | None:
        """What was fetched so far; None where nothing is counted."""
        ...

    def close(self) -> None:
        """Let go of the memory. May be called twice."""
        ...


class MappedBundles:
    """Every bundle mapped, in the slot of its own id."""

    io = "map"
    disk_bytes_per_s: float | None = None
    reasons: tuple[str, ...] = ()
    read_times = ReadTimes(0.0, 0.0)
    private_nbytes = 0

    def __init__(self, store: Path, manifest: Manifest) -> None:
        profile = manifest.profile
        self._shards = ResidentShards(store, manifest)
        self.fetch_limit = profile.ffn_dimension
        self.mapped_nbytes = manifest.nbytes_under("neurons/")
        layers = range(profile.num_layers)
        self.n_resident = len(layers) * profile.ffn_dimension
        self._bundles = [view_bundles(self._shards.layer(n), profile) for n in layers]

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """Nothing to start."""

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> "MappedFetch":
        """As `WeightSource.fetch`."""
        return MappedFetch(HostBundles(self._bundles[layer], ids))

    def resident_bundles(self, layer: int) -> "Tensor | None":
        """As `WeightSource.resident_bundles`."""
        return self._bundles[layer]

    def host_memory(self) -> HostMemory | None:
        """None: a driver may not page-lock a mapped file."""
        return None

    def counts(self) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """As `BundleHolder.close`."""
        self._bundles = []
        self._shards.close()


class CopiedBundles(MappedBundles):
    """Every bundle in memory of this process's own, which can be page-locked, in the slot of its own id."""

    io = "copy"

    def __init__(self, store: Path, manifest: Manifest) -> None:
        """
        Raises:
            NotEnoughMemory: the system refuses.
        """
        super().__init__(store, manifest)
        profile, mapped = manifest.profile, self._bundles
        n_bundles = profile.num_layers * profile.ffn_dimension
        self._arena = Arena(n_bundles, profile.bundle_nbytes)
        self.mapped_nbytes, self.private_nbytes = 0, self._arena.slots.nbytes
        copies = view_bundles(self._arena.slots, profile).chunk(profile.num_layers)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda layer: copies[layer].copy_(mapped[layer]), range(profile.num_layers)))
        self._bundles = list(copies)
        self._shards.close()

    def host_memory(self) -> HostMemory | None:
        """As `WeightSource.host_memory`."""
        return memory_of(self._arena.slots)


class MappedFetch:
    """A fetch that has nothing to wait for."""

    __slots__ = ("_bundles",)

    def __init__(self, bundles: HostBundles) -> None:
        self._bundles = bundles

    def early(self) -> Early:
        """All."""
        return Early(self._bundles, np.arange(len(self._bundles.slots)))

    def wait(self, timeout_s: float) -> HostBundles:
        """As `Fetch.wait`."""
        return self._bundles

    def release(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> "MappedFetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class ArenaBundles:
    """Some bundles in the arena of an engine, the others on disk until they are asked for."""

    mapped_nbytes = 0

    def __init__(
        self, store: Path, manifest: Manifest, n_slots: int, strategy: OffloadStrategy, io: str, buffers_nbytes: int
    ) -> None:
        self._engine = Engine(store, manifest, n_slots, eviction=strategy.arena_eviction, io=io)
        profile = manifest.profile
        self._waits_for_hints = not strategy.async_transfer
        self._base = view_bundles(self._engine.slots, profile)
        self.io, self.reasons = self._engine.io, self._engine.reasons
        self.disk_bytes_per_s: float | None = self._engine.speed.bytes_per_s(profile.bundle_nbytes)
        self.fetch_limit = max(1, min(profile.ffn_dimension, n_slots // 2))
        self.read_times = self._engine.read_times
        self.private_nbytes = buffers_nbytes + self._engine.slots.nbytes

    @property
    def n_resident(self) -> int:
        """As `BundleHolder.n_resident`."""
        return self._engine.n_resident

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """As `WeightSource.hint`; without `async_transfer`, returns when the reads are done."""
        self._engine.hint(layer, ids)
        if self._waits_for_hints:
            with suppress(TimeoutError):  # then the fetch will say so
                self._engine.settle(_HINT_TIMEOUT_S)

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> "ArenaFetch":
        """As `WeightSource.fetch`."""
        return ArenaFetch(self._engine, self._base, self._engine.fetch(layer, ids, keep))

    def resident_bundles(self, layer: int) -> "Tensor | None":
        """None: a bundle is here between two evictions."""
        return None

    def host_memory(self) -> HostMemory | None:
        """As `WeightSource.host_memory`."""
        return memory_of(self._engine.slots)

    def counts(self) -> FetchCounts:
        """As `BundleHolder.counts`."""
        return self._engine.counts()

    def close(self) -> None:
        """As `BundleHolder.close`."""
        self._engine.close()


def memory_of(slots: NDArray[np.uint8]) -> HostMemory:
    """An arena of this process's own: whole pages from its first slot on."""
    return HostMemory(slots.ctypes.data, slots.nbytes, is_read_only=False, owner=slots)


_NOTHING = np.empty(0, np.int64), np.empty(0, bool)


class ArenaFetch:
    """A fetch of the engine."""

    __slots__ = ("_base", "_engine", "_number")

    def __init__(self, engine: Engine, base: "Tensor", number: int) -> None:
        self._engine, self._base, self._number = engine, base, number

    def early(self) -> Early:
        """As `Fetch.early`."""
        slots, are_filled = self._engine.leased(self._number) or _NOTHING
        positions = np.flatnonzero(are_filled)
        return Early(HostBundles(self._base, slots[positions].astype(np.uint32)), positions)

    def wait(self, timeout_s: float) -> HostBundles:
        """As `Fetch.wait`."""
        return HostBundles(self._base, self._engine.wait(self._number, timeout_s).astype(np.uint32))

    def release(self) -> None:
        """As `Fetch.release`."""
        self._engine.release(self._number)

    def __enter__(self) -> "ArenaFetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
