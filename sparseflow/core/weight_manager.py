"""The weight source inside the process: `DiskWeightStore` runs the engine here. And `WeightCache`, device slots."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.config import OffloadStrategy, dtype_name, require_same_network, stored_config
from sparseflow.core.device_cache import WeightCache
from sparseflow.core.host_bundles import ArenaBundles, BundleHolder, CopiedBundles, MappedBundles
from sparseflow.core.store_home import find_or_convert
from sparseflow.core.tensor_views import map_tensors, predictors_by_layer
from sparseflow.core.weight_source import Fetch, HostMemory, SourceStatus
from sparseflow.engine.counts import FetchCounts, ReadTimes
from sparseflow.engine.memory_plan import MemoryPlan, plan_memory, require_memory
from sparseflow.engine.reading import require_io
from sparseflow.errors import BadRequest
from sparseflow.protocol.measured_recall import MeasuredRecall
from sparseflow.store.manifest import DENSE_NAME, Manifest, check_content
from sparseflow.store.profile import ModelProfile
from sparseflow.utils.process_memory import process_memory
from sparseflow.utils.progress import OF_BYTES, progress, waiting

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import OPTConfig

__all__ = ["DiskWeightStore", "WeightCache"]


class DiskWeightStore:
    """A store, opened in this process: a `WeightSource`.

    `model_name` is a store, a transformers checkpoint folder, or a hub id; a checkpoint is converted once into
    `cache_dir` (default: `sparseflow_home()`), and found there from then on, as long as it is not changed.
    """

    def __init__(
        self,
        model_name: str | Path,
        cache_dir: str | Path | None = None,
        *,
        dtype: str | None = None,
        quiet: bool = True,
    ) -> None:
        """
        Args:
            model_name, cache_dir: as above.
            dtype: store the weights as `float16`, `bfloat16` or `float32`; None: as they are.
            quiet: no progress bars.

        Raises:
            BadRequest: no such dtype. Nothing is looked for or opened before `initialize_from_pretrained`.
        """
        self._name = str(model_name)
        self._cache_dir = cache_dir
        self._dtype = dtype_name(dtype) if dtype else None
        self._quiet = quiet
        self._holder: BundleHolder | None = None

    def initialize_from_pretrained(
        self,
        hf_config: "OPTConfig | None" = None,
        *,
        strategy: OffloadStrategy | None = None,
        memory: str | int = "auto",
        io: str = "auto",
        for_device: bool = False,
    ) -> Self:
        """Find or make the store, and open it.

        Args:
            hf_config: transformers' configuration of the model; checked against the store's if given.
            strategy: how much is kept in host memory; None: what the first model built on it says.
            memory: the most that weights, arena and buffers may take, a size or `auto` (nine tenths of what is free).
                Where all weights fit they are mapped; else what must be is resident, and the rest is the arena's.
            io: how bundles are read where not all are resident: `direct`, `buffered`, `map`, or `auto` (direct where
                the file system allows it; `status` says which, and why).
            for_device: a GPU will read bundles from host memory: where all weights fit they are copied to memory that
                can be page-locked, not mapped.

        Raises:
            FingerprintMismatch: `hf_config` describes another model.
            NotEnoughMemory: the weights do not fit.
            DiskError, UnsupportedModel, BadRequest: as their texts say.
        """
        require_memory(memory)
        require_io(io)
        self.path = find_or_convert(self._name, self._cache_dir, dtype=self._dtype, quiet=self._quiet)
        self.manifest = Manifest.load(self.path)
        self.manifest.require_all_parts(self.path)
        self.manifest.require_files(self.path)
        self.profile: ModelProfile = self.manifest.profile
        if hf_config is not None:
            stored = stored_config((self.path / "config.json").read_bytes(), self.profile)
            require_same_network(hf_config.to_dict(), stored.to_dict(), str(self.path))
        self._memory, self._io, self._strategy, self._for_device = memory, io, strategy, for_device
        self._plan(strategy or OffloadStrategy())  # refused before much is read
        self._check_all_but_neurons()
        self.model_files: Mapping[str, bytes] = {
            name: (self.path / name).read_bytes() for name in self.manifest.companions
        }
        self.close()
        self._holder = self._hold(strategy or OffloadStrategy())
        return self

    def _check_all_but_neurons(self) -> None:
        files = {name: entry for name, entry in self.manifest.files.items() if not name.startswith("neurons/")}
        total = sum(entry.nbytes for entry in files.values())
        with progress(desc="checking weights", quiet=self._quiet, total=total, leave=False, **OF_BYTES) as bar:
            for name, entry in files.items():
                check_content(self.path, name, entry)
                bar.update(entry.nbytes)

    def _plan(self, strategy: OffloadStrategy) -> MemoryPlan:
        return plan_memory(
            self.path,
            self.manifest,
            self._memory,
            cpu_cache_ratio=strategy.cpu_cache_ratio,
            aggressive_offload=strategy.aggressive_offload,
        )

    def _hold(self, strategy: OffloadStrategy) -> BundleHolder:
        plan = self._plan(strategy)
        if plan.n_slots is None:
            return self._read_all()
        return ArenaBundles(self.path, self.manifest, plan.n_slots, strategy, self._io, plan.buffers_nbytes)

    def _read_all(self) -> BundleHolder:
        nbytes, before = self.manifest.nbytes_under("neurons/"), sum(process_memory())
        kind, n_times = (CopiedBundles, 2) if self._for_device else (MappedBundles, 1)

        def n_read() -> int:
            return sum(process_memory()) - before

        with waiting("reading neurons", quiet=self._quiet, total=n_times * nbytes, n_done=n_read):
            return kind(self.path, self.manifest)

    @property
    def _bundles(self) -> BundleHolder:
        if self._holder is None:
            raise BadRequest(f"{self._name}: the store is not open; call initialize_from_pretrained() first")
        return self._holder

    @property
    def fetch_limit(self) -> int:
        """Bundles that one `fetch` may ask for: a layer's, or half of the arena's slots where these are fewer."""
        return self._bundles.fetch_limit

    @property
    def read_times(self) -> ReadTimes:
        """Seconds that reading a layer takes: in order (`layer_s`), from random places (`scattered_s`); 0 if mapped."""
        return self._bundles.read_times

    def use_strategy(self, strategy: OffloadStrategy) -> None:
        """Keep bundles as a strategy says: that of `initialize_from_pretrained`, else of the first model built on it.

        Raises:
            BadRequest: the store was opened under another one. NotEnoughMemory: it does not fit.
        """
        held = self._strategy or OffloadStrategy()
        differing = [name for name in _HOST_FIELDS if getattr(strategy, name) != getattr(held, name)]
        if differing and self._strategy is not None:
            raise BadRequest(
                f"{self.path}: was opened with {held}, the model asks for other {', '.join(differing)}; "
                "give both the same strategy, or open the store a second time"
            )
        if differing:
            self._plan(strategy)  # before anything is closed
            self._bundles.close()
            self._holder = None
            self._holder = self._hold(strategy)
        self._strategy = strategy

    def dense(self) -> "Mapping[str, Tensor]":
        """All weights but the bundles, under the names of `SparseOPTForCausalLM`'s parameters; the store's dtype.

        Mapped, to be read only.
        """
        self._bundles  # noqa: B018  raises where the store is not open
        return map_tensors(self.path / DENSE_NAME)

    def predictor_tensors(self) -> "Mapping[str, Tensor]":
        """`LAYER.NAME` for each tensor of `store.codes`, and of what was calibrated. Mapped, to be read only.

        Raises:
            ShardCorrupt: codes that no weights have.
        """
        self._bundles  # noqa: B018  raises where the store is not open
        return predictors_by_layer(
            self.profile, self.manifest.files, lambda name, *how: map_tensors(self.path / name, *how)
        )

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """Start reading bundles that may be asked for; promises nothing. ids: as in `fetch`."""
        self._bundles.hint(layer, ids)

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> Fetch:
        """Ask for bundles of a layer; returns at once.

        Args:
            ids: (n,) uint32, ascending, no repeats; at most `fetch_limit`.
            keep: False: a look that leaves no trace, in what is kept and in what is counted.

        Returns:
            A fetch: `wait(timeout_s)` gives `HostBundles`, `release()` says that they were read.

        Raises:
            ArenaBusy: more than the arena has slots. BadRequest: not neurons of this model.
        """
        return self._bundles.fetch(layer, ids, keep)

    def resident_bundles(self, layer: int) -> "Tensor | None":
        """All bundles of a layer, (ffn_dim, 2, hidden), the store's dtype; None where they come and go."""
        return self._bundles.resident_bundles(layer)

    def host_memory(self) -> HostMemory | None:
        """Memory of this process in which all bundles lie, for a GPU to read; None where that is mapped files."""
        return self._bundles.host_memory()

    def borrow_dense(self, device_index: int = 0) -> NoReturn:
        """Raises BadRequest: only a server lends weights on a GPU."""
        raise BadRequest(f"{self.path}: this process has the weights itself; only a server lends them")

    def pusher(self) -> None:
        """None: nobody else than this process copies bundles to a GPU."""

    def counts(self) -> FetchCounts | None:
        """What all fetches have cost so far; None where all bundles are mapped, and nothing is counted."""
        return self._bundles.counts()

    def note_tokens(self, n: int) -> None:
        """Does nothing: a server shows tokens of its sessions, a store has nobody to show them to."""

    def note_recall(self, measured: MeasuredRecall) -> None:
        """Does nothing, likewise."""

    def status(self) -> SourceStatus:
        """What is held now, in bytes and bundles, how the rest is read, and why not in a better way."""
        if self._holder is None:
            return SourceStatus("closed", 0, 0, {"shared": 0, "private": 0})
        holder, manifest = self._holder, self.manifest
        shared = manifest.nbytes_under("") - manifest.nbytes_under("neurons/") + holder.mapped_nbytes
        return SourceStatus(
            "ready",
            self.profile.num_layers * self.profile.ffn_dimension,
            holder.n_resident,
            {"shared": shared, "private": holder.private_nbytes},
            holder.io,
            holder.disk_bytes_per_s,
            holder.reasons,
            holder.counts(),
        )

    def __reduce__(self) -> NoReturn:
        raise BadRequest("a store that is open in one process cannot be copied or sent to another; open it there again")

    def close(self) -> None:
        """Let go of the weights; models built on this store must not be used afterwards."""
        if self._holder is not None:
            self._holder.close()
            self._holder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# What of a strategy says how bundles are kept in host memory.
_HOST_FIELDS = ("cpu_cache_ratio", "aggressive_offload", "arena_eviction", "async_transfer")
