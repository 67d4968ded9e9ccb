"""Bundles that come to their device slots before they are asked for, while the device computes something else.

What enters a layer's MLP, under the norm of the next layer's, is nearly what will enter that: of the demo model's
missing bundles, 60 to 70 in 100 are foreseen so, and of those foreseen 80 to 95 in 100 are asked for (its first two
layers: hardly any). Which layers gain from it is found by trying.

    main     choose n    place n    gather n    compute n    attention n+1    choose n+1    (joined)    place n+1
    beside               choose n+1, hint       gather what was given slots

The gather beside begins when the main one has ended, which would have to share the bandwidth with it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import LayerNorm

from sparseflow.kernels.device.ops import ReachableBundles
from sparseflow.kernels.device.placement import N_FORESEEN, N_HINTED, N_HINTS, N_MISSED, N_TOTALS, PlacedStep
from sparseflow.orchestration.device.layers import DeviceLayers

TRIAL_TOKENS = 64
"""After so many it is decided for which layers there will be hints."""
LEAST_USEFUL = 0.5
"""Of the bundles moved for a layer's hints, that must be asked for."""
LEAST_FORESEEN = 0.2
"""Of the bundles that a layer lacks, that must have been foreseen; else scoring it twice is not worth while."""


class Lane(Protocol):
    """Work that a device does beside what it is told otherwise."""

    def run(self, work: Callable[[], None]) -> None:
        """Do this once all is done that the device was told so far, here and otherwise."""
        ...

    def mark(self) -> None:
        """Remember how far this lane has come."""
        ...

    def wait_for_mark(self) -> None:
        """What the device is told otherwise from now on begins after that."""
        ...

    def join(self) -> None:
        """What the device is told otherwise from now on begins after all of this."""
        ...


class StreamLane:
    """On a GPU: a CUDA stream of its own, which a graph that is being captured takes along."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._mark = device, torch.cuda.Stream(device), torch.cuda.Event()
        self._is_joined = True

    def run(self, work: Callable[[], None]) -> None:
        """As `Lane.run`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._is_joined = False
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> None:
        """As `Lane.mark`."""
        self._mark.record(self._stream)

    def wait_for_mark(self) -> None:
        """As `Lane.wait_for_mark`."""
        torch.cuda.current_stream(self._device).wait_event(self._mark)

    def join(self) -> None:
        """As `Lane.join`."""
        if not self._is_joined:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._is_joined = True


class InTurn:
    """On a CPU: all is done at once."""

    def run(self, work: Callable[[], None]) -> None:
        """As `Lane.run`."""
        work()

    def mark(self) -> None:
        """As `Lane.mark`."""

    def wait_for_mark(self) -> None:
        """As `Lane.wait_for_mark`."""

    def join(self) -> None:
        """As `Lane.join`."""


class DeviceHints:
    """Foresees the next layer of a step of few tokens, and moves what it lacks."""

    def __init__(self, layers: DeviceLayers, norms: Sequence[LayerNorm]) -> None:
        """norms: one a layer, from the residual stream to the MLP's input."""
        device = layers.device
        self._layers, self._norms = layers, norms
        self._choosers = [chooser.beside() for chooser in layers.choosers]
        self._mask, self._x = torch.zeros_like(layers.masks[0]), torch.zeros_like(layers.inputs[0, :1])
        self._step = PlacedStep.empty(layers.n_neurons, device)
        self.lane: Lane = InTurn() if device.type == "cpu" else StreamLane(device)
        self.is_on = [False] + [True] * (len(layers) - 1)
        """For which layers there are hints. What was captured before this changed is out of date."""
        self._totals = [[0] * N_TOTALS for _ in range(len(layers))]
        self._n_tokens = 0

    def wants(self, layer: int) -> bool:
        """Whether a layer is to be foreseen."""
        return layer < len(self.is_on) and self.is_on[layer]

    def foresee(self, layer: int, hidden: Tensor) -> None:
        """Give slots to what a layer may lack; `move` is to follow.

        Args:
            hidden: (n_tokens, hidden), the residual stream before the MLP of the layer before. It may be changed after
                `lane.wait_for_mark`.
        """
        mask, memory = self._mask[: len(hidden)], self._layers.memory[layer]
        self.lane.run(lambda: self._choose(layer, hidden, mask))
        self.lane.mark()
        self.lane.run(lambda: self._layers.ops.hint(memory, mask, self._step))

    def move(self, layer: int, host: ReachableBundles) -> None:
        """Move what was given slots. The layer's step may begin after `lane.join`."""
        step, slab = self._step, self._layers.memory[layer].slab
        self.lane.run(lambda: self._layers.ops.gather(host, step.missing, step.places, step.counts, slab))

    def _choose(self, layer: int, hidden: Tensor, mask: Tensor) -> None:
        chooser, norm = self._choosers[layer], self._norms[layer]
        if len(hidden) == 1 and norm.elementwise_affine:
            chooser.normalise_and_choose(hidden, norm, self._x, mask)
        else:
            chooser.choose(norm(hidden).float().contiguous(), mask)

    def note(self, layer: int, totals: Sequence[int]) -> None:
        """What a layer's `Placement.totals` have grown by."""
        self._totals[layer] = [old + new for old, new in zip(self._totals[layer], totals, strict=True)]

    def ends_trial(self) -> bool:
        """A token was decoded; whether `decide` is to follow, once all totals are noted."""
        self._n_tokens += 1
        return self._n_tokens == TRIAL_TOKENS

    def decide(self) -> None:
        """Keep to the layers that gain; begin the trial anew where bundles could not be moved so far."""
        if not any(totals[N_HINTS] for totals in self._totals):
            self._n_tokens = 0
            return
        self.is_on = [is_on and _gains(totals) for is_on, totals in zip(self.is_on, self._totals, strict=True)]


def _gains(totals: Sequence[int]) -> bool:
    n_foreseen = totals[N_FORESEEN]
    is_useful = n_foreseen >= LEAST_USEFUL * totals[N_HINTED]
    return n_foreseen > 0 and is_useful and n_foreseen >= LEAST_FORESEEN * (n_foreseen + totals[N_MISSED])
