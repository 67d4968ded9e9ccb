"""One layer step on a device: choose there, give slots, move what is missing, compute. `DeviceCoordinator` runs them.

Where all bundles are in host memory that the device reaches, a step is a row of kernels and the host waits for nothing;
with `device_hints`, what the next layer may lack is moved meanwhile. Else `FetchingSteps` runs it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import LayerNorm

from sparseflow.core.weight_source import WeightSource
from sparseflow.errors import BadRequest, SparseFlowError
from sparseflow.kernels.device.ops import ReachableBundles
from sparseflow.orchestration.device.bringing import Bringer
from sparseflow.orchestration.device.choosers import TOKENS_AT_ONCE, Chooser, ChooserOnHost, Mover
from sparseflow.orchestration.device.dense_parts import DenseParts
from sparseflow.orchestration.device.fetching import FetchingSteps
from sparseflow.orchestration.device.hints import DeviceHints
from sparseflow.orchestration.device.layers import DeviceLayers
from sparseflow.orchestration.device.tally import DeviceTally
from sparseflow.orchestration.live_recall import LiveRecall, SparseStep
from sparseflow.orchestration.neuron_predictor import LayeredPredictor, NeuronPredictor
from sparseflow.orchestration.stats import RunStats


class Ahead(NamedTuple):
    """What the next layer is foreseen from: the residual stream before this one's MLP, and where bundles lie."""

    hidden: Tensor
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
        self.source, self.device, self.predictor = source, device, predictor
        self.profiling = True
        self.before_pass: Callable[[], None] = lambda: None
        """Called before weights on the device are touched."""
        self._streamed_nbytes = streamed_nbytes
        self._is_in_pass = False
        self._tally = DeviceTally(source, device)
        self.layers = DeviceLayers(source, choosers, fc2_biases, slots, self._tally, device)
        self.hints = DeviceHints(self.layers, norms) if moves_hints and choosers else None
        self.bringer = Bringer(source, device)
        self._fetching = FetchingSteps(source, self.layers, norms, self.bringer, self._tally)
        self.lookahead = self._fetching.lookahead
        self.live_recall = LiveRecall(source)
        self.dense_parts = DenseParts(
            source, self.layers.memory, self.layers.ops, device, keeps_first=predictor is None
        )

    def hint(self, layer: int, hidden: Tensor) -> None:
        """Nothing: the MLP of the layer before has done it, so that its reads have had more time."""

    def mlp(self, layer: int, x: Tensor, hidden: Tensor, *, decoding: bool) -> Tensor:
        """As `TransferCoordinator.mlp`, on the device."""
        if x.requires_grad and torch.is_grad_enabled():
            raise BadRequest("gradients: sparse layers have none; use torch.no_grad(), or the dense checkpoint")
        if layer == 0:
            self.begin_pass(decoding=decoding)
        x = x.contiguous()
        if self.predictor is None or len(x) > TOKENS_AT_ONCE:
            y = self._dense(layer, x)
        else:
            y = torch.empty_like(x)
            self._tally.add_sparse(len(x))
            self.layers.inputs[layer, : len(x)] = x
            if not self.run(layer, x, y, hidden):
                self._join_hints()
                self._fetching.run(layer, x, y, hidden)
        if layer + 1 == len(self.layers):
            self._end_pass(len(x))
        return y

    def begin_pass(self, *, decoding: bool) -> None:
        """Before tokens go through the layers: under which phase they are counted. Waits where that changes."""
        self.before_pass()
        if self._is_in_pass:  # the one before did not come to its end: slots may lack what they are to hold
            self._join_hints()
            self.layers.empty()
        self._is_in_pass = True
        if decoding is not self._tally.is_decoding:
            self._collect()
            self._tally.is_decoding = decoding
            self.live_recall.pause()
        self._tally.mark_active()

    def _end_pass(self, n_tokens: int) -> None:
        self._is_in_pass = False
        self._tally.add_moved(self._streamed_nbytes)
        if not self.bringer.is_idle:
            self.synchronize()
            self.bringer.release()
        if not self._tally.is_decoding:
            return
        self.source.note_tokens(n_tokens)
        if self.predictor is None or n_tokens > TOKENS_AT_ONCE:
            return
        if self.hints is not None and self.hints.ends_trial():
            self._collect()
            self.hints.decide()
        if self.profiling:
            self._measure_recall(self.predictor, n_tokens)

    def run(self, layer: int, x: Tensor, y: Tensor, hidden: Tensor) -> bool:
        """One sparse step without waiting for the device; False, and nothing done, where bundles have to be fetched.

        Args:
            x: (n_tokens, hidden) float32. y: (n_tokens, hidden), to be filled.
            hidden: (n_tokens, hidden), the residual stream that the result will be added to.
        """
        host, ahead = self.bringer.reach(layer), None
        if host is None:
            return False
        self.layers.choose(layer, x)
        if self.hints is not None and self.hints.wants(layer + 1):
            host_ahead = self.bringer.reach(layer + 1)
            ahead = None if host_ahead is None else Ahead(hidden, host_ahead)
        self.run_chosen(layer, host, x, y, None, ahead)
        return True

    def normalise_and_choose(self, layer: int, hidden: Tensor, norm: LayerNorm, x: Tensor) -> None:
        """Fill x, (1, hidden) float32, with the norm of one token's residual stream, and choose neurons for it."""
        if self.layers.choosers:
            self.layers.choosers[layer].normalise_and_choose(hidden, norm, x, self.layers.masks[layer, :1])
        else:
            from sparseflow.kernels.device.norm import normalise

            normalise(hidden, norm.weight, norm.bias, norm.eps, x)

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
        layers, step, ops, memory = self.layers, self.layers.step, self.layers.ops, self.layers.memory[layer]
        hints = self.hints if ahead is not None and self.hints is not None and self.hints.wants(layer + 1) else None
        if layers.choosers:
            self._join_hints()
            if hints is not None and ahead is not None:
                hints.foresee(layer + 1, ahead.hidden)
            ops.place(memory, layers.masks[layer, : len(x)], step, 0, layers.n_neurons)
            ops.gather(host, step.missing, step.places, step.counts, memory.slab)
            if hints is not None and ahead is not None:
                hints.move(layer + 1, ahead.host)
                hints.lane.wait_for_mark()  # y may be what is foreseen from
        ops.compute(memory, host, step.missing, step, x, y, residual)

    def can_step(self) -> bool:
        """Whether `run_chosen` computes a layer as it should: sparse always, dense once all neurons are in slots."""
        return self.predictor is not None or self.dense_parts.holds_all()

    @property
    def hinted_layers(self) -> tuple[bool, ...]:
        """For which layers `run_chosen` moves hints. A graph that was made before this changed is out of date."""
        return () if self.hints is None else tuple(self.hints.is_on)

    def note_token(self) -> None:
        """A token was decoded by `run_chosen` in all layers."""
        if self.predictor is None:
            for _ in range(len(self.layers)):
                self._tally.add_dense(1)
        self._end_pass(1)

    def _join_hints(self) -> None:
        if self.hints is not None:
            self.hints.lane.join()

    def _dense(self, layer: int, x: Tensor) -> Tensor:
        """All neurons, part after part; what has no slot comes from host memory."""
        self._join_hints()
        bringer = self.bringer
        bringer.release()
        self._tally.add_dense(len(x))
        y = bringer.once_more_with_less(
            lambda: self.dense_parts.compute(layer, x, bringer.reach(layer), bringer.bring, bringer.limit)
        )
        self._fetching.leave_out()
        return y

    # --- counting

    @property
    def audit_every(self) -> int:
        """0: a device compares no step with the true active set."""
        return 0

    @audit_every.setter
    def audit_every(self, n: int) -> None:
        if n:
            raise BadRequest(f"audit {n}: steps on a device are not audited; audit the same store on the CPU")

    def _measure_recall(self, predictor: NeuronPredictor, n_tokens: int) -> None:
        before = self.source.counts()
        sums = self._tally.phase.sampled
        self.live_recall.token(predictor, len(self.layers), lambda layer: self._taken(layer, n_tokens), sums)
        after = self.source.counts()
        if before is not None and after is not None:
            self._tally.leave_out(after - before)
            self._fetching.leave_out()

    def _taken(self, layer: int, n_tokens: int) -> SparseStep:
        """What a layer was given in this pass, and chose."""
        x = self.layers.inputs[layer, :n_tokens].cpu()
        ids = self.layers.masks[layer, :n_tokens].any(0).nonzero().flatten().cpu().numpy().astype(np.uint32)
        return SparseStep(layer, x, ids, self._tally.active_since_mark(layer), self.layers.fc1_biases[layer])

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
        if not len(self.layers):  # closed
            return
        for layer, totals in enumerate(self._tally.collect(self.layers.choosers, self.dense_parts)):
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
            "n_slots": len(self.layers.slab),
            "slots": [memory.placement.n_slots for memory in self.layers.memory],
            "nbytes": {
                "codes": sum(chooser.nbytes for chooser in self.layers.choosers),
                "slots": self.layers.slab.nbytes,
                "buffers": self.dense_parts.nbytes,
            },
        }

    def close(self) -> None:
        """Let go of the device's memory, and of the source's, before that is closed. May be called twice."""
        self.synchronize()
        with suppress(SparseFlowError):  # what a source that was closed before has fetched is not known any more
            self._collect()
        self.bringer.close()
        self.dense_parts.close()
        self.layers.close()
        self.predictor = self.hints = None


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
