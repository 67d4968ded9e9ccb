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

from sparseflow.kernels.device.ops import DeviceOps, LayerMemory, ReachableBundles
from sparseflow.kernels.device.placement import N_FORESEEN, N_HINTED, N_MISSED, N_TOTALS, PlacedStep
from sparseflow.orchestration.device.choosers import Chooser

TRIAL_TOKENS = 64
"""After so many it is decided for which layers there will be hints."""
LEAST_USEFUL = 0.5
"""Of the bundles moved for a layer's hints, that must be asked for."""
LEAST_FORESEEN = 0.2
"""Of the bundles that a layer lacks, that must have been foreseen; else scoring it twice is not worth while."""


class Row(Protocol):
    """Work that a device does beside what it is told otherwise."""

    def run(self, work: Callable[[], None]) -> None:
        """Do this once all is done that the device was told so far, here and otherwise."""
        ...

    def mark(self) -> None:
        """Remember how far this row has come."""
        ...

    def wait_for_mark(self) -> None:
        """What the device is told otherwise from now on begins after that."""
        ...

    def join(self) -> None:
        """What the device is told otherwise from now on begins after all of this."""
        ...


class StreamBeside:
    """On a GPU: a stream of its own, which a graph that is being captured takes along."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._mark = device, torch.cuda.Stream(device), torch.cuda.Event()
        self._is_joined = True

    def run(self, work: Callable[[], None]) -> None:
        """As `Row.run`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._is_joined = False
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> None:
        """As `Row.mark`."""
        self._mark.record(self._stream)

    def wait_for_mark(self) -> None:
        """As `Row.wait_for_mark`."""
        torch.cuda.current_stream(self._device).wait_event(self._mark)

    def join(self) -> None:
        """As `Row.join`."""
        if not self._is_joined:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._is_joined = True


class InTurn:
    """On a CPU: all is done at once."""

    def run(self, work: Callable[[], None]) -> None:
        """As `Row.run`."""
        work()

    def mark(self) -> None:
        """As `Row.mark`."""

    def wait_for_mark(self) -> None:
        """As `Row.wait_for_mark`."""

    def join(self) -> None:
        """As `Row.join`."""


class DeviceHints:
    """Foresees the next layer of a step of few tokens, and moves what it lacks."""

    def __init__(
        self,
        layers: Sequence[LayerMemory],
        choosers: Sequence[Chooser],
        norms: Sequence[LayerNorm],
        ops: DeviceOps,
        mask: Tensor,
        hidden: int,
    ) -> None:
        """
        Args:
            choosers: one a layer. norms: what stands before each MLP.
            mask: one such as the steps use, (most tokens, ffn_dim) int8.
        """
        device = mask.device
        self.ops = ops
        self._layers, self._norms = layers, norms
        self._choosers = [chooser.beside() for chooser in choosers]
        self._mask, self._x = torch.zeros_like(mask), torch.zeros(1, hidden, device=device)
        self._step = PlacedStep.empty(mask.shape[1], device)
        self.row: Row = InTurn() if device.type == "cpu" else StreamBeside(device)
        self.is_on = [False] + [True] * (len(layers) - 1)
        """For which layers there are hints. What was captured before this changed is out of date."""
        self._totals = torch.zeros(len(layers), N_TOTALS, dtype=torch.int64)
        self._n_tokens = 0

    def foresee(self, layer: int, stream: Tensor) -> bool:
        """Give slots to what a layer may lack; `move` is to follow. False, and nothing done, if there are no hints.

        Args:
            stream: (n_tokens, hidden), the residual stream before the MLP of the layer before. It may be changed after
                `row.wait_for_mark`.
        """
        if layer >= len(self._layers) or not self.is_on[layer]:
            return False
        mask = self._mask[: len(stream)]
        self.row.run(lambda: self._choose(layer, stream, mask))
        self.row.mark()
        self.row.run(lambda: self.ops.hint(self._layers[layer], mask, self._step))
        return True

    def move(self, layer: int, host: ReachableBundles) -> None:
        """Move what was given slots. The layer's step may begin after `row.join`."""
        step, slab = self._step, self._layers[layer].slab
        self.row.run(lambda: self.ops.gather(host, step.missing, step.places, step.counts, slab))

    def _choose(self, layer: int, stream: Tensor, mask: Tensor) -> None:
        chooser, norm = self._choosers[layer], self._norms[layer]
        if len(stream) == 1:
            chooser.normalise_and_choose(stream, norm, self._x, mask)
        else:
            chooser.choose(norm(stream).float().contiguous(), mask)

    def note(self, layer: int, totals: Sequence[int]) -> None:
        """What a layer's `Placement.totals` have grown by."""
        self._totals[layer] += torch.tensor(totals)

    def ends_trial(self) -> bool:
        """A token was decoded; whether that was the last of the trial: `decide` is to follow."""
        self._n_tokens += 1
        return self._n_tokens == TRIAL_TOKENS

    def decide(self) -> None:
        """Keep to the layers that gain, by all that was noted."""
        for layer, totals in enumerate(self._totals.tolist()):
            n_missed, n_hinted, n_foreseen = (totals[place] for place in (N_MISSED, N_HINTED, N_FORESEEN))
            is_useful = n_foreseen >= LEAST_USEFUL * n_hinted
            self.is_on[layer] &= is_useful and n_foreseen >= LEAST_FORESEEN * (n_foreseen + n_missed) > 0
