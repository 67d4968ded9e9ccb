"""The weight source inside the process: `DiskWeightStore` runs the engine here. And `WeightCache`, device slots."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.checkpoint import Checkpoint, locate, model_name
from sparseflow.core.config import OffloadStrategy, dtype_name, require_same_network
from sparseflow.core.converter import convert
from sparseflow.core.device_cache import WeightCache
from sparseflow.core.host_bundles import ArenaBundles, BundleHolder, MappedBundles
from sparseflow.core.memory_plan import plan_memory, require_memory
from sparseflow.core.weight_source import Fetch, SourceStatus
from sparseflow.engine.counts import FetchCounts, ReadTimes
from sparseflow.engine.reading import require_io
from sparseflow.errors import BadRequest, DiskError, ShardCorrupt
from sparseflow.store.codes import code_specs
from sparseflow.store.manifest import (
    DENSE_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    check_content,
    predictor_name,
)
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import TensorSpec, map_file, read_places

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import OPTConfig

__all__ = ["DiskWeightStore", "WeightCache", "sparseflow_home"]


def sparseflow_home() -> Path:
    """Where converted stores are kept: `$SPARSEFLOW_HOME`, else `sparseflow` in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SPARSEFLOW_HOME") or f"{cache}/sparseflow").expanduser()


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
            dtype: store the weights as `float16`, `bfloat16` or `float32`; None: as they are.
            quiet: no progress bar while converting.
        """
        self._name = str(model_name)
        self._cache_dir = Path(cache_dir).expanduser() if cache_dir else sparseflow_home() / "stores"
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
    ) -> Self:
        """Find or make the store, and open it.

        Args:
            hf_config: transformers' configuration of the model; checked against the store's if given.
            strategy: how much is kept in host memory; None: what the first model built on it says.
            memory: the most that weights, arena and buffers may take, a size or `auto` (nine tenths of what is free).
                Where all weights fit they are mapped; else what must be is resident, and the rest is the arena's.
            io: how bundles are read where not all are resident: `direct`, `buffered`, `map`, or `auto` (direct where
                the file system allows it; `status` says which, and why).

        Raises:
            FingerprintMismatch: `hf_config` describes another model.
            NotEnoughMemory: the weights do not fit.
            DiskError, UnsupportedModel, BadRequest: as their texts say.
        """
        require_memory(memory)
        require_io(io)
        self.path = self._find_or_convert()
        self.manifest = Manifest.load(self.path)
        self.manifest.require_all_parts(self.path)
        self.profile: ModelProfile = self.manifest.profile
        if self._dtype not in (None, self.profile.dtype):
            raise BadRequest(
                f"{self.path}: holds {self.profile.dtype}, {self._dtype} is asked for; "
                f"convert the checkpoint again with --dtype {self._dtype}"
            )
        if hf_config is not None:
            stored = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            require_same_network(hf_config.to_dict(), stored, str(self.path))
        self._memory, self._io, self._strategy = memory, io, strategy
        plan_memory(self.path, self.manifest, strategy or OffloadStrategy(), memory)  # refused before much is read
        for name, entry in self.manifest.files.items():
            if not name.startswith("neurons/"):
                check_content(self.path, name, entry)
        self.model_files: Mapping[str, bytes] = {
            name: (self.path / name).read_bytes() for name in self.manifest.files if not name.endswith(".safetensors")
        }
        self.close()
        self._holder = self._hold(strategy or OffloadStrategy())
        return self

    def _find_or_convert(self) -> Path:
        folder = locate(self._name)
        if (folder / MANIFEST_NAME).is_file():
            return folder
        checkpoint = Checkpoint(folder, model_name(self._name))
        identity = json.dumps([str(folder), checkpoint.identity(), self._dtype or checkpoint.dtype(), FORMAT_VERSION])
        digest = hashlib.blake2s(identity.encode(), digest_size=6).hexdigest()
        path = self._cache_dir / f"{checkpoint.name}-{digest}"
        if not path.exists():
            try:
                convert(checkpoint, path, dtype=self._dtype, quiet=self._quiet)
            except BadRequest:
                if not path.exists():  # else another process was faster
                    raise
        return path

    def _hold(self, strategy: OffloadStrategy) -> BundleHolder:
        plan = plan_memory(self.path, self.manifest, strategy, self._memory)
        if plan.n_slots is None:
            return MappedBundles(self.path, self.manifest)
        return ArenaBundles(self.path, self.manifest, plan.n_slots, strategy, self._io, plan.buffers_nbytes)

    @property
    def _bundles(self) -> BundleHolder:
        if self._holder is None:
            raise BadRequest(f"{self._name}: the store is not open; call initialize_from_pretrained() first")
        return self._holder

    @property
    def fetch_limit(self) -> int:
        """As `WeightSource.fetch_limit`."""
        return self._bundles.fetch_limit

    @property
    def read_times(self) -> ReadTimes:
        """As `WeightSource.read_times`."""
        return self._bundles.read_times

    def use_strategy(self, strategy: OffloadStrategy) -> None:
        """As `WeightSource.use_strategy`: settled by whoever says it first."""
        held = self._strategy or OffloadStrategy()
        differing = [name for name in _HOST_FIELDS if getattr(strategy, name) != getattr(held, name)]
        if differing and self._strategy is not None:
            raise BadRequest(
                f"{self.path}: was opened with {held}, the model asks for other {', '.join(differing)}; "
                "give both the same strategy, or open the store a second time"
            )
        if differing:
            plan_memory(self.path, self.manifest, strategy, self._memory)  # before anything is closed
            self._bundles.close()
            self._holder = None
            self._holder = self._hold(strategy)
        self._strategy = strategy

    def dense(self) -> "Mapping[str, Tensor]":
        """All weights but the bundles, as `WeightSource.dense`."""
        self._bundles  # noqa: B018  raises where the store is not open
        return map_tensors(self.path / DENSE_NAME)

    def predictor_tensors(self) -> "Mapping[str, Tensor]":
        """Codes of fc1, as `WeightSource.predictor_tensors`."""
        self._bundles  # noqa: B018  raises where the store is not open
        expected = code_specs(self.profile.ffn_dimension, self.profile.hidden_dimension)
        return {
            f"{layer}.{name}": tensor
            for layer in range(self.profile.num_layers)
            for name, tensor in map_tensors(self.path / predictor_name(layer), expected).items()
        }

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """As `WeightSource.hint`."""
        self._bundles.hint(layer, ids)

    def fetch(self, layer: int, ids: NDArray[np.uint32]) -> Fetch:
        """As `WeightSource.fetch`."""
        return self._bundles.fetch(layer, ids)

    def counts(self) -> FetchCounts | None:
        """As `WeightSource.counts`."""
        return self._bundles.counts()

    def status(self) -> SourceStatus:
        """What is held now."""
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
_HOST_FIELDS = ("cpu_cache_ratio", "aggressive_offload", "use_lru_eviction", "async_transfer")


def map_tensors(path: Path, expected: Sequence[TensorSpec] | None = None) -> "dict[str, Tensor]":
    """All tensors of one of our files, as views of its pages: copy-on-write, so treat them as read-only.

    Raises:
        ShardCorrupt: the file does not hold the `expected` tensors, whose sizes kernels take for granted.
    """
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8, "U64": torch.uint64}
    places = read_places(path)
    if expected is not None and [place.spec for place in places.values()] != list(expected):
        raise ShardCorrupt(
            f"{path}: not laid out as this version of SparseFlow reads it; remove the store and convert the model again"
        )
    content = torch.frombuffer(map_file(path), dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for name, place in places.items():
        raw = content[place.offset : place.offset + place.spec.nbytes]
        if raw.storage_offset() % raw.new_empty(0, dtype=dtypes[place.spec.dtype]).element_size():
            raise DiskError(f"{path}: tensor {name!r} is not aligned; remove the store and convert the model again")
        tensors[name] = raw.view(dtypes[place.spec.dtype]).view(place.spec.shape)
    return tensors
