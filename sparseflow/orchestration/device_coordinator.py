"""One layer step on a device: choose there, give slots, move what is missing, compute. `DeviceCoordinator` runs them.

Where all bundles are in host memory that the device reaches, a step is a row of kernels and the host waits for nothing.
Else it learns from one copy which bundles are missing, and fetches them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import LayerNorm

from sparseflow.core.weight_source import Fetch, WeightSource
from sparseflow.engine.counts import FetchCounts
from sparseflow.errors import ArenaBusy, BadRequest
from sparseflow.kernels.device.ops import DeviceOps, LayerMemory, PlainOps, ReachableBundles, TritonOps
from sparseflow.kernels.device.placement import N_MISSES, N_TOTALS, PlacedStep, Placement
from sparseflow.orchestration.choosers import Chooser, ChooserOnHost, Mover
from sparseflow.orchestration.dense_parts import DenseParts
from sparseflow.orchestration.neuron_predictor import LayeredPredictor, NeuronPredictor, fc1_biases
from sparseflow.orchestration.stats import DeviceCounts, RunStats, StepCounts
from sparseflow.orchestration.transport import Brought, HostMemoryReplaced, open_transport

T = TypeVar("T")
_TOKENS_AT_ONCE = 8
"""A step of more tokens is computed dense."""


class DeviceCoordinator:
    """Runs the MLPs of one model on a device, and counts."""

    def __init__(
        self,
        source: WeightSource,
        predictor: NeuronPredictor | None,
        choosers: list[Chooser],
        fc2_biases: list[Tensor | None],
        device: torch.device,
        slots: NDArray[np.int64],
        streamed_nbytes: int = 0,
    ) -> None:
        """
        Args:
            predictor: chooses neurons; None computes every layer dense, moving what has no slot.
            choosers: the same on the device, one a layer (`choosers_of`).
            fc2_biases: one a layer; None where the model has none.
            slots: (n_layers,), how many each layer has.
            streamed_nbytes: what else comes from host memory for each pass through the model; to be counted.
        """
        profile = source.profile
        self.source, self.device, self.predictor = source, device, predictor
        self.profiling = True
        self.before_pass: Callable[[], None] = lambda: None
        """Called before weights on the device are touched."""
        self._streamed_nbytes = streamed_nbytes
        self._n_neurons = profile.ffn_dimension
        dtype = getattr(torch, profile.dtype)
        is_cpu = device.type == "cpu"
        self.ops: DeviceOps = (
            PlainOps() if is_cpu else TritonOps(_TOKENS_AT_ONCE, self._n_neurons, profile.hidden_dimension, device)
        )
        shape = (int(slots.sum()), profile.parts_per_bundle, profile.hidden_dimension)
        self.slab = torch.empty(shape, dtype=dtype, device=device)
        self._totals = torch.zeros(profile.num_layers, N_TOTALS + 1, dtype=torch.int64, device=device)
        self.layers = [
            LayerMemory(
                Placement(self._n_neurons, len(slab), device, totals[:N_TOTALS]),
                slab,
                fc1.to(device),
                (torch.zeros(profile.hidden_dimension) if fc2 is None else fc2.float()).to(device),
                totals[N_TOTALS:],
            )
            for slab, fc1, fc2, totals in zip(
                self.slab.split(slots.tolist()), fc1_biases(source), fc2_biases, self._totals, strict=True
            )
        ]
        self.choosers = choosers
        self.step = PlacedStep.empty(self._n_neurons, device)
        if predictor is None:
            self.step.fill_with_all()
        self.mask = torch.zeros(_TOKENS_AT_ONCE, self._n_neurons, dtype=torch.int8, device=device)
        self.transport = open_transport(source, device, min(source.fetch_limit, self._n_neurons))
        self.dense_parts = DenseParts(source, self.layers, self.ops, device, keeps_first=predictor is None)
        self._leased: list[Fetch] = []
        self._counted = source.counts() or FetchCounts()
        self._stats = RunStats()
        self._is_decoding = False
        self._nbytes_moved = 0
        self._pairs_beyond = 0  # of token and neuron, beyond one token a step, in layers of neurons

    def hint(self, layer: int, hidden: Tensor) -> None:
        """Nothing: on a device, what is missing is known before it could be foreseen for less."""

    def mlp(self, layer: int, x: Tensor, hidden: Tensor, *, decoding: bool) -> Tensor:
        """As `TransferCoordinator.mlp`, on the device."""
        if x.requires_grad and torch.is_grad_enabled():
            raise BadRequest("gradients: sparse layers have none; use torch.no_grad(), or the dense checkpoint")
        self.enter(decoding=decoding)
        if layer == 0:
            self.before_pass()
        x = x.contiguous()
        if self.predictor is None or len(x) > _TOKENS_AT_ONCE:
            y = self._dense(layer, x)
        else:
            y = torch.empty_like(x)
            self._pairs_beyond += len(x) - 1
            if not self.run(layer, x, y, None):
                self._run_fetching(layer, x, y)
        if layer + 1 == len(self.layers):
            self._nbytes_moved += self._streamed_nbytes
            if decoding:
                self.source.note_tokens(len(x))
        return y

    def reach(self, layer: int) -> ReachableBundles | None:
        """A layer's bundles where the device reads them by itself; None: they have to be fetched."""
        bundles = self.source.resident_bundles(layer)
        if bundles is None:
            return None
        self._renew_transport()
        return self.transport.resident(bundles)

    def run(self, layer: int, x: Tensor, y: Tensor, residual: Tensor | None) -> bool:
        """One sparse step without waiting for the device; False, and nothing done, where bundles have to be fetched.

        Args:
            x: (n_tokens, hidden) float32. y: (n_tokens, hidden), to be filled.
            residual: (n_tokens, hidden), added to it.
        """
        host = self.reach(layer)
        if host is None:
            return False
        self.choose(layer, x)
        self.run_chosen(layer, host, x, y, residual)
        return True

    def choose(self, layer: int, x: Tensor) -> None:
        """Which neurons a step computes; all, without a predictor. x: (n_tokens, hidden) float32."""
        if self.choosers:
            self.choosers[layer].choose(x, self.mask[: len(x)])

    def normalise_and_choose(self, layer: int, stream: Tensor, norm: LayerNorm, x: Tensor) -> None:
        """The same for one token: x, (1, hidden) float32, becomes the norm of the stream first."""
        if self.choosers:
            self.choosers[layer].normalise_and_choose(stream, norm, x, self.mask[:1])
        else:
            from sparseflow.kernels.device.norm import normalise

            normalise(stream, norm.weight, norm.bias, norm.eps, x)

    def run_chosen(self, layer: int, host: ReachableBundles, x: Tensor, y: Tensor, residual: Tensor | None) -> None:
        """A step once its neurons are chosen: nothing here depends on the host, so that a graph can hold it.

        Args:
            host: what `reach` found.
            x, y, residual: as `run` is told.
        """
        memory, step = self.layers[layer], self.step
        if self.choosers:
            self.ops.place(memory, self.mask[: len(x)], step, 0, self._n_neurons)
            self.ops.gather(host, step.missing, step.places, step.counts, memory.slab)
        self.ops.compute(memory, host, step.missing, step, x, y, residual)

    def can_step(self) -> bool:
        """Whether `run_chosen` computes a layer as it should: sparse always, dense once all neurons are in slots."""
        return self.predictor is not None or self.dense_parts.holds_all()

    def note_token(self) -> None:
        """A token was decoded by `run_chosen` in all layers."""
        self.source.note_tokens(1)
        self._nbytes_moved += self._streamed_nbytes
        if self.predictor is None:
            for _ in self.layers:
                self._count_dense(1)

    def _run_fetching(self, layer: int, x: Tensor, y: Tensor) -> None:
        """One sparse step; the host learns what is missing, and fetches it."""
        self._once_more_with_less(lambda: self._run_in_parts(layer, x, y))
        if layer + 1 == len(self.layers):
            self.synchronize()
            self._release()

    @property
    def _most_at_once(self) -> int:
        """Bundles that can be brought together."""
        return min(self.source.fetch_limit, self.transport.limit)

    def _once_more_with_less(self, run: Callable[[], T]) -> T:
        """Again where less can be brought at once than when it began: a server's successor may have a smaller arena."""
        while True:
            most = self._most_at_once
            try:
                return run()
            except ArenaBusy:
                if self._most_at_once >= most:
                    raise

    def _run_in_parts(self, layer: int, x: Tensor, y: Tensor) -> None:
        """In as many parts as slots and leases ask for."""
        memory, step, mask = self.layers[layer], self.step, self.mask[: len(x)]
        self.choose(layer, x)
        most = min(memory.placement.n_slots, self._most_at_once)
        n_candidates = int(mask.any(0).sum())
        for first in range(0, max(n_candidates, 1), most):
            self.ops.place(memory, mask, step, first, first + most)
            missing = self._told_missing(step)
            self._release()  # the device has done all that was before
            try:
                host, rows, lease = self._brought(layer, missing)
            except BaseException:
                memory.placement.forget(step)  # or what has not come would be taken for being there
                raise
            self._leased += [] if lease is None else [lease]
            if len(missing):
                self.ops.gather(host, rows, step.places, step.counts, memory.slab)
            if first == 0:
                self.ops.compute(memory, host, rows, step, x, y, None)
            else:
                self._add(memory, host, rows, step, x, y)

    def _brought(self, layer: int, ids: NDArray[np.uint32]) -> Brought:
        while True:
            self._renew_transport()
            if len(ids) > self.transport.limit:
                raise ArenaBusy(
                    f"{len(ids)} bundles are asked for together, {self.transport.name} brings {self.transport.limit}"
                )
            try:
                return self.transport.bring(self.source, layer, ids)
            except HostMemoryReplaced:
                continue  # by that of a server's successor, which the fetch has gone to

    def _renew_transport(self) -> None:
        """Where the source has other memory than before, find the best way from there."""
        if not self.transport.is_of(self.source):
            self.transport.close()
            self.transport = open_transport(self.source, self.device, min(self.source.fetch_limit, self._n_neurons))

    def _add(
        self, memory: LayerMemory, host: ReachableBundles, rows: Tensor, step: PlacedStep, x: Tensor, y: Tensor
    ) -> None:
        """A further part of a step: the bias is in the first."""
        part = torch.empty_like(y)
        self.ops.compute(memory, host, rows, step, x, part, None)
        y.add_(part).sub_(memory.fc2_bias)

    def _told_missing(self, step: PlacedStep) -> NDArray[np.uint32]:
        told = step.told[:_TOLD_AT_ONCE].cpu()
        n_missing = int(told[N_MISSES])
        if n_missing > len(told) - _AHEAD_OF_MISSING:
            told = step.told[: _AHEAD_OF_MISSING + n_missing].cpu()
        return told[_AHEAD_OF_MISSING : _AHEAD_OF_MISSING + n_missing].numpy().astype(np.uint32)

    def _dense(self, layer: int, x: Tensor) -> Tensor:
        """All neurons, part after part; what has no slot comes from host memory."""
        self._release()
        self._count_dense(len(x))
        return self._once_more_with_less(
            lambda: self.dense_parts.compute(layer, x, self.reach(layer), self._brought, self._most_at_once)
        )

    # --- counting

    @property
    def audit_every(self) -> int:
        """0: a device compares no step with the true active set."""
        return 0

    @audit_every.setter
    def audit_every(self, n: int) -> None:
        if n:
            raise BadRequest(f"audit {n}: steps on a device are not audited; audit the same store on the CPU")

    def _count_dense(self, n_tokens: int) -> None:
        counts = self._phase
        counts.layer_steps += 1
        counts.dense_layer_steps += 1
        counts.neurons += self._n_neurons
        counts.fetched += self._n_neurons
        counts.halves_read += 2 * self._n_neurons
        counts.pairs += n_tokens * self._n_neurons

    def enter(self, *, decoding: bool) -> None:
        """Before a step: under which phase it is counted. Waits for the device where that changes."""
        if decoding is not self._is_decoding:
            self._collect()
            self._is_decoding = decoding

    @property
    def stats(self) -> RunStats:
        """What was computed so far. Waits for the device."""
        self._collect()
        return self._stats

    @stats.setter
    def stats(self, stats: RunStats) -> None:
        self._collect()
        self._stats = stats

    @property
    def _phase(self) -> StepCounts:
        return self._stats.decode if self._is_decoding else self._stats.prefill

    def _collect(self) -> None:
        """Add what the device has counted since the last time to the phase that it belongs to."""
        counts, n_layers, profile = self._phase, len(self.layers), self.source.profile
        if not n_layers:
            return
        if counts.device is None:
            counts.device = DeviceCounts([0] * n_layers, [0] * n_layers)
        totals = self._totals.tolist()
        self._totals.zero_()
        for layer, (n_steps, n_candidates, n_misses, n_active) in enumerate(totals):
            counts.layer_steps += n_steps
            counts.neurons += n_steps * self._n_neurons
            counts.pairs += n_steps * self._n_neurons
            counts.fetched += n_candidates
            counts.active_pairs += n_active
            counts.halves_read += n_candidates + min(n_active, n_candidates)  # nothing in dense steps
            counts.device.candidates[layer] += n_candidates
            counts.device.misses[layer] += n_misses
            counts.device.nbytes_moved += n_misses * profile.bundle_nbytes
            if self.choosers:
                chooser = self.choosers[layer]
                counts.predictor_nbytes += n_steps * chooser.pass_nbytes + chooser.take_nbytes_beyond()
        counts.pairs += self._pairs_beyond * self._n_neurons
        self._pairs_beyond = 0
        counts.active_pairs += self.dense_parts.take_active()
        counts.device.nbytes_moved += self.dense_parts.take_moved() + self._nbytes_moved
        self._nbytes_moved = 0
        counted = self.source.counts()
        if counted is not None:
            counts.fetches = (counts.fetches or FetchCounts()) + (counted - self._counted)
            self._counted = counted

    # --- the end

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _release(self) -> None:
        for fetch in self._leased:
            fetch.release()
        self._leased.clear()

    def report(self) -> dict[str, Any]:
        """What lies on the device, and how it gets there, for people to read."""
        return {
            "transport": self.transport.name,
            "transport_reason": self.transport.reason or None,
            "n_slots": len(self.slab),
            "slots": [memory.placement.n_slots for memory in self.layers],
            "nbytes": {
                "codes": sum(chooser.nbytes for chooser in self.choosers),
                "slots": self.slab.nbytes,
                "buffers": self.dense_parts.nbytes,
            },
        }

    def close(self) -> None:
        """Let go of the device's memory, and of the source's, before that is closed. May be called twice."""
        self.synchronize()
        self._release()
        self.dense_parts.close()
        self.transport.close()
        self.layers, self.choosers, self.predictor = [], [], None
        self.slab = self.slab[:0].clone()


_AHEAD_OF_MISSING = 4  # counts in `PlacedStep.told`
_TOLD_AT_ONCE = _AHEAD_OF_MISSING + 1020


def choosers_of(predictor: NeuronPredictor | None, move: Mover) -> list[Chooser]:
    """A predictor of all layers, on a device; none for None.

    Raises:
        BadRequest: a predictor that does not work there.
    """
    if predictor is None:
        return []
    if not isinstance(predictor, LayeredPredictor):
        raise BadRequest(f"fidelity {predictor.fidelity}: is for tests on the CPU, without device slots; use exact")
    if move.device.type == "cpu":
        return [ChooserOnHost(layer) for layer in predictor.layers]
    return [layer.on_device(move) for layer in predictor.layers]
