"""Sparse steps whose bundles have to be fetched: the host learns from one copy what is missing, and has it brought.

Once a step is told to the device, what the next layer may lack is hinted, so that its reads have a layer's time.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import LayerNorm

from sparseflow.core.weight_source import WeightSource
from sparseflow.engine.counts import FetchCounts
from sparseflow.kernels.device.ops import LayerMemory, ReachableBundles
from sparseflow.kernels.device.placement import N_MISSES, PlacedStep
from sparseflow.orchestration.device.bringing import Bringer
from sparseflow.orchestration.device.layers import DeviceLayers
from sparseflow.orchestration.device.tally import DeviceTally
from sparseflow.orchestration.lookahead import Lookahead

_AHEAD_OF_MISSING = 4  # counts in `PlacedStep.told`
_TOLD_AT_ONCE = _AHEAD_OF_MISSING + 1020


class FetchingSteps:
    """Runs them."""

    def __init__(
        self,
        source: WeightSource,
        layers: DeviceLayers,
        norms: Sequence[LayerNorm],
        bringer: Bringer,
        tally: DeviceTally,
    ) -> None:
        """norms: one a layer, from the residual stream to the MLP's input."""
        self._source, self._layers, self._norms = source, layers, norms
        self._bringer, self._tally = bringer, tally
        self.lookahead = Lookahead(source.read_times, layers.n_neurons)
        self._hint_times_s: list[float] = []  # of the first, and the shortest since
        self._fetched = FetchCounts()
        self.leave_out()

    def run(self, layer: int, x: Tensor, y: Tensor, hidden: Tensor) -> None:
        """As `DeviceCoordinator.run`, for bundles that it does not reach."""
        self._bringer.once_more_with_less(lambda: self._run_in_parts(layer, x, y))
        if layer + 1 < len(self._layers) and self.lookahead.from_before:
            self._hint(layer + 1, hidden)
        before = self._fetched
        self.leave_out()
        since = self._fetched - before
        hinting_s = self._hint_times_s[1] if len(self._hint_times_s) > 1 else 0.0
        self.lookahead.note(hinting_s, since.misses + since.hinted, since.hints_useful, since.hints_wasted)

    def leave_out(self) -> None:
        """What was fetched since the last step was for none."""
        self._fetched = self._source.counts() or FetchCounts()

    def _hint(self, layer: int, hidden: Tensor) -> None:
        """What a layer would lack if the residual stream reached its MLP as it is now."""
        layers = self._layers
        if layers.device.type == "cuda":
            torch.cuda.current_stream(layers.device).synchronize()  # so that only this is timed
        began_s = time.perf_counter()
        layers.choose(layer, self._norms[layer](hidden).float().contiguous())
        mask, placement = layers.masks[layer, : len(hidden)], layers.memory[layer].placement
        lacking = (mask.any(0) & (placement.slot_of < 0)).nonzero().flatten()
        self._source.hint(layer, lacking.cpu().numpy().astype(np.uint32))
        self._tally.add_predictor(layers.choosers[layer].pass_nbytes)
        hint_s = time.perf_counter() - began_s
        self._hint_times_s = [*self._hint_times_s[:1], min([hint_s, *self._hint_times_s[1:]])]

    def _run_in_parts(self, layer: int, x: Tensor, y: Tensor) -> None:
        """In as many parts as slots and leases ask for."""
        ops, step, bringer = self._layers.ops, self._layers.step, self._bringer
        memory, mask = self._layers.memory[layer], self._layers.masks[layer, : len(x)]
        self._layers.choose(layer, x)
        most = min(memory.placement.n_slots, bringer.limit)
        n_candidates = int(mask.any(0).sum())
        for first in range(0, max(n_candidates, 1), most):
            ops.place(memory, mask, step, first, first + most)
            missing = _told_missing(step)
            bringer.release()  # the device has done all that was before
            try:
                host, rows, lease = bringer.bring(layer, missing)
            except BaseException:
                memory.placement.forget(step)  # or what has not come would be taken for being there
                raise
            bringer.hold(lease)
            if len(missing):
                ops.gather(host, rows, step.places, step.counts, memory.slab)
            if first == 0:
                ops.compute(memory, host, rows, step, x, y, None)
            else:
                self._add(memory, host, rows, x, y)

    def _add(self, memory: LayerMemory, host: ReachableBundles, rows: Tensor, x: Tensor, y: Tensor) -> None:
        """A further part of a step: the bias is in the first."""
        part = torch.empty_like(y)
        self._layers.ops.compute(memory, host, rows, self._layers.step, x, part, None)
        y.add_(part).sub_(memory.fc2_bias)


def _told_missing(step: PlacedStep) -> NDArray[np.uint32]:
    """Waits for the device."""
    told = step.told[:_TOLD_AT_ONCE].cpu()
    n_missing = int(told[N_MISSES])
    if n_missing > len(told) - _AHEAD_OF_MISSING:
        told = step.told[: _AHEAD_OF_MISSING + n_missing].cpu()
    return told[_AHEAD_OF_MISSING : _AHEAD_OF_MISSING + n_missing].numpy().astype(np.uint32)
