"""One model of a server: its weights in shared memory, and the engine that fills its arena."""

import logging
import math
import os
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparseflow.engine.engine import Engine
from sparseflow.engine.memory_plan import AUTO_SHARE, fixed_nbytes, free_memory, plan_memory, total_memory
from sparseflow.engine.shared_memory import SharedMemory, read_into
from sparseflow.errors import BadRequest, Draining, NotEnoughMemory, SparseFlowError
from sparseflow.protocol.messages import LAYOUT_VERSION, PROTOCOL_VERSION
from sparseflow.store.manifest import DENSE_NAME, Manifest
from sparseflow.utils.sizes import format_size, parse_size
from sparseflow_daemon.config import ServerConfig

_log = logging.getLogger(__name__)
_LOAD_TIMEOUT_S = 600.0  # of one layer
_PAGE = 4096
_MOST_IDS = 32768  # of one request: what a packet holds


class ServedModel:
    """Loaded by a thread of its own (`load`); from then on used by the server's loop alone."""

    engine: Engine
    """There once it is `ready`."""

    def __init__(self, store: Path, manifest: Manifest, memory: int, config: ServerConfig) -> None:
        """
        Args:
            memory: what of the server's memory is this model's.

        Raises:
            NotEnoughMemory: it does not hold what must be resident.
        """
        self.store, self.manifest, self.profile = store, manifest, manifest.profile
        self.name = manifest.profile.model_identifier.rsplit("/", 1)[-1]
        self._config = config
        plan = plan_memory(store, manifest, memory, cpu_cache_ratio=config.cpu_cache_ratio)
        self.n_bundles = self.profile.num_layers * self.profile.ffn_dimension
        self.n_slots = plan.n_slots or self.n_bundles
        self.is_resident = plan.n_slots is None
        self.fetch_limit = max(1, min(self.profile.ffn_dimension, self.n_slots // (config.max_sessions + 1), _MOST_IDS))
        self.state = "loading"
        self.error: SparseFlowError | None = None
        self.regions: dict[str, SharedMemory] = {}
        self.parts: dict[str, dict[str, list[int]]] = {}
        self._is_stopped = threading.Event()
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a client's expectations are compared with. Made once: fingerprints of a large store take a while."""
        return {
            "protocol": PROTOCOL_VERSION,
            "layout": LAYOUT_VERSION,
            "weights": self.manifest.weights_fingerprint,
            "predictors": self.manifest.predictors_fingerprint,
            "dtype": self.profile.dtype,
            "bundle_nbytes": self.profile.bundle_nbytes,
        }

    @property
    def strategy(self) -> dict[str, Any]:
        """Fields of the clients' `OffloadStrategy` that the server decides."""
        return {
            "cpu_cache_ratio": self.n_slots / self.n_bundles,
            "eviction": self._config.eviction,
        }

    @property
    def planned_nbytes(self) -> int:
        """Of all shared memory, once it is loaded; none of it can be given back while it is served."""
        beside = self.manifest.nbytes_under("") - self.manifest.nbytes_under("neurons/")
        return beside + self.n_slots * self.profile.bundle_nbytes

    @property
    def nbytes(self) -> int:
        """Of all shared memory."""
        return sum(region.nbytes for region in self.regions.values())

    def load(self) -> None:
        """Bring everything into memory that must be there. Ends in state `ready`, or `failed` with the error kept."""
        try:
            self.manifest.require_files(self.store)
            predictors = sorted(name for name in self.manifest.files if name.startswith("predictors/"))
            self._load_files("dense", [DENSE_NAME])
            self._load_files("predictors", predictors)
            self._load_files("files", self.manifest.companions)
            self.engine = Engine(
                *(self.store, self.manifest, self.n_slots),
                eviction=self._config.eviction,
                io=self._config.io,
                shared=True,
                event_fd=self.event_fd,
            )
            assert self.engine.arena.memory is not None
            self.regions["arena"] = self.engine.arena.memory
            self.parts["arena"] = {}
            if self.is_resident:
                self._fill()
            self.state = "ready"
        except Draining as error:
            self.error, self.state = error, "failed"
        except SparseFlowError as error:
            self.error, self.state = error, "failed"
            _log.error("model %s: %s", self.name, error, extra={"model": self.name})
        except Exception as error:  # whatever it is, the server goes on and says so
            self.error, self.state = SparseFlowError(f"loading failed: {error!r}; see the log"), "failed"
            _log.exception("model %s", self.name, extra={"model": self.name})

    def _load_files(self, region: str, names: list[str]) -> None:
        """Copy files into one piece of shared memory, each from the start of a page."""
        entries = [self.manifest.files[name] for name in names]
        starts = np.cumsum([0, *(math.ceil(entry.nbytes / _PAGE) * _PAGE for entry in entries)]).tolist()
        memory = self.regions[region] = SharedMemory(region, starts[-1])
        memory.begin(memory.nbytes)
        for name, entry, start in zip(names, entries, starts[:-1], strict=True):
            place = memory.bytes[start : start + entry.nbytes]
            read_into(place, self.store / name, entry, require=self._require_going_on)
        self.parts[region] = {
            name: [start, entry.nbytes] for name, entry, start in zip(names, entries, starts[:-1], strict=True)
        }

    def _fill(self) -> None:
        """Read every bundle. Slots are given in the order of asking, so a bundle's is `layer * ffn_dim + id`."""
        everything = np.arange(self.profile.ffn_dimension, dtype=np.uint32)
        for layer in range(self.profile.num_layers):
            self._require_going_on()
            fetch = self.engine.fetch(layer, everything)
            slots = self.engine.wait(fetch, _LOAD_TIMEOUT_S)
            assert np.array_equal(slots, layer * len(everything) + everything), "slots are not in order"
            self.engine.release(fetch)

    def stop_loading(self) -> None:
        """Let `load` end soon, as failed. From another thread."""
        self._is_stopped.set()

    def _require_going_on(self) -> None:
        if self._is_stopped.is_set():
            raise Draining("the server is ending; attach to its successor")

    def clear_event(self) -> None:
        """Make the event descriptor unreadable until more reads end."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.event_fd)

    def describe_profile(self) -> dict[str, Any]:
        """Fields of the profile, as they travel."""
        return asdict(replace(self.profile, layer_sparsity_map=None))

    def close(self) -> None:
        """Give everything back. May be called twice."""
        if hasattr(self, "engine"):
            self.engine.close()
        for region in self.regions.values():
            region.close()
        if self.event_fd >= 0:
            os.close(self.event_fd)
            self.event_fd = -1


def open_models(config: ServerConfig) -> dict[str, ServedModel]:
    """The models of a server's stores by name, not loaded yet, with the memory divided among them.

    Each gets what must be resident of it, and of the rest as much as its neurons are of all.

    Raises:
        DiskError, ShardCorrupt: not a store. BadRequest: two models of one name.
        NotEnoughMemory: the memory does not hold them.
    """
    manifests = [Manifest.load(store) for store in config.stores]
    for store, manifest in zip(config.stores, manifests, strict=True):
        manifest.require_all_parts(store)
    fixed = [fixed_nbytes(manifest) for manifest in manifests]
    neurons = [manifest.nbytes_under("neurons/") for manifest in manifests]
    allowed = int(free_memory() * AUTO_SHARE) if config.memory == "auto" else parse_size(config.memory)
    rest = allowed - sum(fixed)
    if rest < 0:
        what, remedy = (
            ("free are", "free some") if config.memory == "auto" else ("allowed are", "allow more (--memory)")
        )
        raise NotEnoughMemory(
            f"{format_size(sum(fixed))} must be resident beside the neurons, {what} {format_size(allowed)}; {remedy}, "
            "or serve smaller models or fewer"
        )
    models: dict[str, ServedModel] = {}
    for n, (store, manifest) in enumerate(zip(config.stores, manifests, strict=True)):
        model = ServedModel(store, manifest, max(1, fixed[n] + rest * neurons[n] // sum(neurons)), config)
        if model.name in models:
            raise BadRequest(
                f"{store} and {models[model.name].store}: both hold a model named {model.name!r}; serve one of them "
                "by another server"
            )
        models[model.name] = model
    _require_room(sum(model.planned_nbytes for model in models.values()))
    return models


def _require_room(nbytes: int) -> None:
    """Before any is taken: shared memory cannot be given back under pressure, so that processes would be killed.

    More than is free now is only warned of: clients of a server that died hold its memory until they come to this one.

    Raises:
        NotEnoughMemory: it can never be had here.
    """
    free, total = free_memory(), total_memory()
    if nbytes > total:
        raise NotEnoughMemory(
            f"{format_size(nbytes)} of shared memory are asked for, there are {format_size(total)} here; "
            "give less (--memory)"
        )
    if nbytes > free:
        _log.warning(
            "%s of shared memory are asked for, %s are free now; if no more gets free, processes will be killed: "
            "give less (--memory)",
            *(format_size(nbytes), format_size(free)),
        )
