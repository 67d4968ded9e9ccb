"""The seam between a model and its weights. Whoever computes sees this, never files, threads or sockets."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.config import OffloadStrategy
from sparseflow.engine.counts import FetchCounts, ReadTimes
from sparseflow.protocol.measured_recall import MeasuredRecall
from sparseflow.store.profile import ModelProfile

if TYPE_CHECKING:
    import torch
    from torch import Tensor


FETCH_TIMEOUT_S = 60.0  # far beyond any disk's answer; what takes longer has failed


@dataclass(frozen=True, slots=True)
class HostBundles:
    """Bundles in host memory.

    base: (n_slots, 2, hidden), the store's dtype. slots: (n,) uint32, in the order of the ids asked for. Valid until
    the fetch is released.
    """

    base: "Tensor"
    slots: NDArray[np.uint32]


class HostMemory(NamedTuple):
    """Memory of this process in which bundles lie: what a GPU can read by itself once it is page-locked.

    owner: what keeps it mapped. Another one, once a server's successor has put other memory in its place.
    """

    address: int
    nbytes: int
    is_read_only: bool
    owner: object


class Pushed(Protocol):
    """Bundles on their way to a device's memory."""

    def wait(self, timeout_s: float, stream: int = 0) -> None:
        """From then on what is put on this stream of the device finds them there.

        Raises:
            ServerError: who pushes has failed; `fetch` works as before. TimeoutError: not in time.
        """
        ...


class Pusher(Protocol):
    """Copies bundles from host memory to a device's, where the device cannot read host memory by itself."""

    @property
    def push_limit(self) -> int:
        """Bundles of one push."""
        ...

    def open_push(self, slab_address: int, slab_nbytes: int, device_index: int = 0) -> None:
        """Name the memory, whole bundles of one allocation of this process, one a place.

        Raises:
            DeviceError, ServerError: it cannot be pushed to.
        """
        ...

    def push(self, layer: int, ids: NDArray[np.uint32], places: NDArray[np.uint32]) -> Pushed:
        """Start copying bundles to places of it, with which the device must be done."""
        ...

    def close_push(self) -> None:
        """Before the memory is freed. May be called twice."""
        ...


class LentWeights(Protocol):
    """Dense weights and predictors as a server keeps them on a device. Not to be written to."""

    def require(self) -> None:
        """Before each step.

        Raises:
            ServerError: they are gone, and not to be touched.
        """
        ...

    def dense(self, device: "torch.device") -> "Mapping[str, Tensor]":
        """As `WeightSource.dense`, there."""
        ...

    def predictor_tensors(self, device: "torch.device") -> "Mapping[str, Tensor]":
        """As `WeightSource.predictor_tensors`, there."""
        ...

    def close(self) -> None:
        """Give them back; tensors made of them are used no more. May be called twice."""
        ...


class Early(NamedTuple):
    """What of a fetch is in host memory already, while the rest is read. positions: (n,) int64, among the ids."""

    bundles: HostBundles
    positions: NDArray[np.int64]


class Fetch(Protocol):
    """Bundles on their way. `with fetch:` releases it at the end."""

    def early(self) -> Early:
        """What can be computed before `wait`, which is all of it where nothing has to be read.

        Raises:
            TimeoutError: a server does not say.
        """
        ...

    def wait(self, timeout_s: float) -> HostBundles:
        """The bundles, once all have arrived.

        Raises:
            TimeoutError: they have not after `timeout_s` seconds.
            DiskError, ShardCorrupt: they could not be read, or are not those that were written.
            ServerError: a server that has them is gone, and none took its place.
        """
        ...

    def release(self) -> None:
        """Say that the work that reads the bundles is done. May be called twice."""
        ...

    def __enter__(self) -> "Fetch": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class SourceStatus:
    """What a source holds, in bytes. `shared` is memory that other processes of this host can use too."""

    state: str
    n_bundles: int
    n_resident: int
    memory: Mapping[str, int]
    io: str = "map"
    """How bundles come from disk: `direct`, `buffered` or `map`."""
    disk_bytes_per_s: float | None = None
    """Of reads of one bundle each from random places, as measured at opening; None where all are resident."""
    reasons: tuple[str, ...] = ()
    """Why something is not as asked for or as fast as it could be."""
    counts: FetchCounts | None = None
    """None where every bundle is resident and nothing is counted."""


class WeightSource(Protocol):
    """Weights of one model, dense ones at once and bundles on demand. Safe to use from several threads."""

    profile: ModelProfile
    model_files: Mapping[str, bytes]
    """config.json, and what there is of generation_config.json and tokenizer files, by name."""

    @property
    def fetch_limit(self) -> int:
        """Bundles that one fetch may ask for; twice as many can be in host memory at once."""
        ...

    @property
    def read_times(self) -> ReadTimes:
        """What bundles cost that are not in host memory."""
        ...

    def use_strategy(self, strategy: OffloadStrategy) -> None:
        """Keep bundles as the strategy says.

        Raises:
            BadRequest: the source was opened under another one.
        """
        ...

    def dense(self) -> "Mapping[str, Tensor]":
        """All weights but the bundles, under the names of `SparseOPTForCausalLM`'s parameters. Shared; read-only."""
        ...

    def predictor_tensors(self) -> "Mapping[str, Tensor]":
        """`LAYER.NAME` for each tensor of `store.codes`, and of what was calibrated. Shared; read-only."""
        ...

    def hint(self, layer: int, ids: NDArray[np.uint32]) -> None:
        """Start reading bundles that may be asked for. Promises nothing."""
        ...

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> Fetch:
        """Ask for bundles; returns at once.

        Args:
            ids: (n,) uint32, ascending, no repeats.
            keep: False: a look that leaves no trace. What had to be read for it is let go when it is released, what was
                there grows no younger, and neither hits nor misses count it.

        Raises:
            ArenaBusy: more than can be in host memory at once. BadRequest: not neurons of this model.
        """
        ...

    def resident_bundles(self, layer: int) -> "Tensor | None":
        """All bundles of a layer, (ffn_dim, 2, hidden) in the order of ids; None where they come and go.

        To be read at once, and asked for again for the next step: a server that ends takes them along.
        """
        ...

    def host_memory(self) -> HostMemory | None:
        """Where the bundles of all fetches lie; None where that cannot be page-locked, as with mapped files."""
        ...

    def borrow_dense(self, device_index: int = 0) -> LentWeights:
        """What a server lends on a GPU.

        Raises:
            BadRequest: it lends nothing there, or this is no server. DeviceError, ServerError: it cannot.
        """
        ...

    def pusher(self) -> Pusher | None:
        """Who copies bundles to a device; None where nobody else than this process does."""
        ...

    def counts(self) -> FetchCounts | None:
        """What all fetches through this source have cost so far; None where nothing is counted. Cheap."""
        ...

    def note_tokens(self, n: int) -> None:
        """Tokens were decoded: for whoever shows how fast that goes."""
        ...

    def note_recall(self, measured: MeasuredRecall) -> None:
        """How much is found of what is active, as measured so far: for whoever shows it."""
        ...

    def status(self) -> SourceStatus:
        """What is held now."""
        ...

    def close(self) -> None:
        """Let go of everything. May be called twice."""
        ...
