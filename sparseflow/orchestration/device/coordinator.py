"""One layer step on a device: choose there, give slots, move what is missing, compute. `DeviceCoordinator` runs them.

Where all bundles are in host memory that the device reaches, a step is a row of kernels and the host waits for nothing;
with `device_hints`, what the next layer may lack is moved meanwhile. Else the host learns from one copy which bundles
are missing, fetches them, and hints what the next layer may lack.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import LayerNorm

from sparseflow.core.weight_source import WeightSource
from sparseflow.engine.counts import FetchCounts
from sparseflow.errors import BadRequest
from sparseflow.kernels.device.ops import DeviceOps, LayerMemory, PlainOps, ReachableBundles, TritonOps
from sparseflow.kernels.device.placement import (
    N_MISSES,
    PlacedStep,
    Placement,
)
from sparseflow.orchestration.device.bringing import Bringer
from sparseflow.orchestration.device.choosers import Chooser, ChooserOnHost, Mover
from sparseflow.orchestration.device.dense_parts import DenseParts
from sparseflow.orchestration.device.hints import DeviceHints
from sparseflow.orchestration.device.slots import TOKENS_AT_ONCE
from sparseflow.orchestration.device.tally import DeviceTally
from sparseflow.orchestration.live_recall import LiveRecall, SparseStep
from sparseflow.orchestration.lookahead import Lookahead
from sparseflow.orchestration.neuron_predictor import LayeredPredictor, NeuronPredictor, fc1_biases, pre_activations
from sparseflow.orchestration.stats import RunStats


class Ahead(NamedTuple):
    """What the next layer is foreseen from: the residual stream before this one's MLP, and where bundles lie."""

    stream: Tensor
    host: ReachableBundles


class DeviceCoordinator:
    """Runs the MLPs of one model on a device, and counts."""

    def __init__(
        self,
        source: WeightSource,
        predictor: NeuronPredictor | None,
        choosers: list[Chooser],
        fc2_biases: list[Tensor | None],
        norms: Sequence[LayerNorm],
        device: torch.device,
        slots: NDArray[np.int64],
        streamed_nbytes: int = 0,
        *,
        moves_hints: bool = False,
    ) -> None:
        """
        Args:
            predictor: chooses neurons; None computes every layer dense, moving what has no slot.
            choosers: the same on the device, one a layer (`choosers_of`).
            fc2_biases: one a layer; None where the model has none.
            norms: one a layer, from the residual stream to the MLP's input.
            slots: (n_layers,), how many each layer has.
            streamed_nbytes: what else comes from host memory for each pass through the model; to be counted.
            moves_hints: as `OffloadStrategy.device_hints`.
        """
        profile = source.profile
        self.source, self.device, self.predictor = source, device, predictor
        self.profiling = True
        self.before_pass: Callable[[], None] = lambda: None
        """Called before weights on the device are touched."""
        self._streamed_nbytes = streamed_nbytes
        self._tally = DeviceTally(source, device)
        self._n_neurons = profile.ffn_dimension
        dtype = getattr(torch, profile.dtype)
        is_cpu = device.type == "cpu"
        self.ops: DeviceOps = (
            PlainOps() if is_cpu else TritonOps(TOKENS_AT_ONCE, self._n_neurons, profile.hidden_dimension, device)
        )
        self._fc1_biases = fc1_biases(source)
        shape = (int(slots.sum()), profile.parts_per_bundle, profile.hidden_dimension)
        self.slab = torch.empty(shape, dtype=dtype, device=device)
        self.layers = [
            LayerMemory(
                Placement(self._n_neurons, len(slab), device, totals),
                slab,
                fc1.to(device),
                (torch.zeros(profile.hidden_dimension) if fc2 is None else fc2.float()).to(device),
                n_active,
            )
            for slab, fc1, fc2, (totals, n_active) in zip(
                self.slab.split(slots.tolist()), self._fc1_biases, fc2_biases, self._tally.of_layers, strict=True
            )
        ]
        self.choosers = choosers
        self.step = PlacedStep.empty(self._n_neurons, device)
        if predictor is None:
            self.step.fill_with_all()
        n_layers, hidden = profile.num_layers, profile.hidden_dimension
        self.masks = torch.zeros(n_layers, TOKENS_AT_ONCE, self._n_neurons, dtype=torch.int8, device=device)
        """(n_layers, tokens, ffn_dim), of each layer's last sparse step."""
        self.inputs = torch.zeros(n_layers, TOKENS_AT_ONCE, hidden, device=device)
        """(n_layers, tokens, hidden) float32, what the MLPs were given while decoding."""
        self.hints: DeviceHints | None = None
        if moves_hints and choosers:
            self.hints = DeviceHints(self.layers, choosers, norms, self.ops, self.masks[0], hidden)
        self.lookahead = Lookahead(source.read_times, self._n_neurons)
        self.live_recall = LiveRecall(source)
        self._norms = norms
        self._hinting_s = 0.0
        self.bringer = Bringer(source, device)
        self.dense_parts = DenseParts(source, self.layers, self.ops, device, keeps_first=predictor is None)
        self._fetched = source.counts() or FetchCounts()

    def hint(self, layer: int, hidden: Tensor) -> None:
        """Nothing: the MLP of the layer before has done it, so that its reads have had more time."""

    def mlp(self, layer: int, x: Tensor, hidden: Tensor, *, decoding: bool) -> Tensor:
        """As `TransferCoordinator.mlp`, on the device."""
        if x.requires_grad and torch.is_grad_enabled():
            raise BadRequest("gradients: sparse layers have none; use torch.no_grad(), or the dense checkpoint")
        self.enter(decoding=decoding)
        if layer == 0:
            self.before_pass()
        x = x.contiguous()
        if self.predictor is None or len(x) > TOKENS_AT_ONCE:
            y = self._dense(layer, x)
        else:
            y = torch.empty_like(x)
            self._tally.add_sparse(len(x))
            self.inputs[layer, : len(x)] = x
            if not self.run(layer, x, y, hidden):
                self._run_fetching(layer, x, y, hidden)
        if layer + 1 == len(self.layers):
            self._tally.add_moved(self._streamed_nbytes)
            if decoding:
                self._note_tokens(len(x))
        return y

    def run(self, layer: int, x: Tensor, y: Tensor, stream: Tensor) -> bool:
        """One sparse step without waiting for the device; False, and nothing done, where bundles have to be fetched.

        Args:
            x: (n_tokens, hidden) float32. y: (n_tokens, hidden), to be filled.
            stream: (n_tokens, hidden), what the result will be added to.
        """
        host = self.bringer.reach(layer)
        if host is None:
            return False
        self.choose(layer, x)
        ahead = None if self.hints is None or layer + 1 == len(self.layers) else self.bringer.reach(layer + 1)
        self.run_chosen(layer, host, x, y, None, None if ahead is None else Ahead(stream, ahead))
        return True

    def choose(self, layer: int, x: Tensor) -> None:
        """Which neurons a step computes; all, without a predictor. x: (n_tokens, hidden) float32."""
        if self.choosers:
            self.choosers[layer].choose(x, self.masks[layer, : len(x)])

    def normalise_and_choose(self, layer: int, stream: Tensor, norm: LayerNorm, x: Tensor) -> None:
        """The same for one token: x, (1, hidden) float32, becomes the norm of the stream first."""
        if self.choosers:
            self.choosers[layer].normalise_and_choose(stream, norm, x, self.masks[layer, :1])
        else:
            from sparseflow.kernels.device.norm import normalise

            normalise(stream, norm.weight, norm.bias, norm.eps, x)

    def run_chosen(
        self,
        layer: int,
        host: ReachableBundles,
        x: Tensor,
        y: Tensor,
        residual: Tensor | None,
        ahead: Ahead | None,
    ) -> None:
        """A step once its neurons are chosen: nothing here depends on the host, so that a graph can hold it.

        Args:
            host: what `Bringer.reach` found.
            x: (n_tokens, hidden) float32. y: (n_tokens, hidden), to be filled. residual: (n_tokens, hidden), added.
            ahead: to foresee the next layer from; None: it is not to be.
        """
        memory, step, hints = self.layers[layer], self.step, self.hints
        if self.choosers:
            self._join_hints()
            is_foreseen = hints is not None and ahead is not None and hints.foresee(layer + 1, ahead.stream)
            self.ops.place(memory, self.masks[layer, : len(x)], step, 0, self._n_neurons)
            self.ops.gather(host, step.missing, step.places, step.counts, memory.slab)
            if hints is not None and ahead is not None and is_foreseen:
                hints.move(layer + 1, ahead.host)
                hints.row.wait_for_mark()  # y may be the stream
        self.ops.compute(memory, host, step.missing, step, x, y, residual)

    def _join_hints(self) -> None:
        if self.hints is not None:
            self.hints.row.join()

    def can_step(self) -> bool:
        """Whether `run_chosen` computes a layer as it should: sparse always, dense once all neurons are in slots."""
        return self.predictor is not None or self.dense_parts.holds_all()

    @property
    def hinted_layers(self) -> tuple[bool, ...]:
        """For which layers `run_chosen` moves hints. A graph that was made before this changed is out of date."""
        return () if self.hints is None else tuple(self.hints.is_on)

    def note_token(self) -> None:
        """A token was decoded by `run_chosen` in all layers."""
        self._tally.add_moved(self._streamed_nbytes)
        if self.predictor is None:
            for _ in self.layers:
                self._tally.add_dense(1)
        self._note_tokens(1)

    def _note_tokens(self, n: int) -> None:
        """So many sequences have come a token further."""
        self.source.note_tokens(n)
        if self.predictor is None or n > TOKENS_AT_ONCE:
            return
        if self.hints is not None and self.hints.ends_trial():
            self._collect()
            self.hints.decide()
        if self.profiling:
            sums, before = self._tally.phase.sampled, self.source.counts()
            self.live_recall.token(self.predictor, len(self.layers), lambda layer: self._taken(layer, n), sums)
            after = self.source.counts()
            if before is not None and after is not None:
                self._tally.leave_out(after - before)
                self._fetched = after

    def _taken(self, layer: int, n_tokens: int) -> SparseStep:
        """What a layer's last step was given, and chose."""
        assert self.predictor is not None
        x = self.inputs[layer, :n_tokens].cpu()
        ids = self.masks[layer, :n_tokens].any(0).nonzero().flatten().cpu().numpy().astype(np.uint32)
        bias = self._fc1_biases[layer]
        n_active = int((pre_activations(self.source, layer, x, bias, ids) > 0).sum())
        return SparseStep(layer, x, ids, n_active, bias)

    def _run_fetching(self, layer: int, x: Tensor, y: Tensor, stream: Tensor) -> None:
        """One sparse step; the host learns what is missing, and fetches it."""
        self._join_hints()
        self.bringer.once_more_with_less(lambda: self._run_in_parts(layer, x, y))
        if layer + 1 == len(self.layers):
            self.synchronize()
            self.bringer.release()
        elif self.lookahead.from_before:
            self._hint_source(layer + 1, stream)
        fetched = self.source.counts()
        if fetched is not None:
            since, self._fetched = fetched - self._fetched, fetched
            n_read = since.misses + since.hinted
            self.lookahead.note(self._hinting_s, n_read, since.hints_useful, since.hints_wasted)

    def _hint_source(self, layer: int, stream: Tensor) -> None:
        """Hint what a layer would lack if the residual stream reached its MLP as it is now."""
        began_s = time.perf_counter()
        x, mask = self._norms[layer](stream).float().contiguous(), self.masks[layer, : len(stream)]
        self.choosers[layer].choose(x, mask)
        lacking = (mask.any(0) & (self.layers[layer].placement.slot_of < 0)).nonzero().flatten()
        self.source.hint(layer, lacking.cpu().numpy().astype(np.uint32))
        self._hinting_s = time.perf_counter() - began_s

    def _run_in_parts(self, layer: int, x: Tensor, y: Tensor) -> None:
        """In as many parts as slots and leases ask for."""
        memory, step, mask = self.layers[layer], self.step, self.masks[layer, : len(x)]
        self.choose(layer, x)
        most = min(memory.placement.n_slots, self.bringer.limit)
        n_candidates = int(mask.any(0).sum())
        for first in range(0, max(n_candidates, 1), most):
            self.ops.place(memory, mask, step, first, first + most)
            missing = self._told_missing(step)
            self.bringer.release()  # the device has done all that was before
            try:
                host, rows, lease = self.bringer.bring(layer, missing)
            except BaseException:
                memory.placement.forget(step)  # or what has not come would be taken for being there
                raise
            self.bringer.hold(lease)
            if len(missing):
                self.ops.gather(host, rows, step.places, step.counts, memory.slab)
            if first == 0:
                self.ops.compute(memory, host, rows, step, x, y, None)
            else:
                self._add(memory, host, rows, step, x, y)

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
        self._join_hints()
        bringer = self.bringer
        bringer.release()
        self._tally.add_dense(len(x))
        return bringer.once_more_with_less(
            lambda: self.dense_parts.compute(layer, x, bringer.reach(layer), bringer.bring, bringer.limit)
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

    def enter(self, *, decoding: bool) -> None:
        """Before a step: under which phase it is counted. Waits for the device where that changes."""
        if decoding is not self._tally.is_decoding:
            self._collect()
            self._tally.is_decoding = decoding

    @property
    def stats(self) -> RunStats:
        """What was computed so far. Waits for the device."""
        self._collect()
        return self._tally.stats

    @stats.setter
    def stats(self, stats: RunStats) -> None:
        self._collect()
        self._tally.stats = stats

    def _collect(self) -> None:
        if not self.layers:  # closed
            return
        for layer, totals in enumerate(self._tally.collect(self.choosers, self.dense_parts)):
            if self.hints is not None:
                self.hints.note(layer, totals)

    # --- the end

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def report(self) -> dict[str, Any]:
        """What lies on the device, and how it gets there, for people to read."""
        return {
            "transport": self.bringer.transport.name,
            "transport_reason": self.bringer.transport.reason or None,
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
        self._collect()
        self.bringer.close()
        self.dense_parts.close()
        self.layers, self.choosers, self.predictor, self.hints, self._norms = [], [], None, None, []
        self._fc1_biases = []
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
