"""What steps on a device cost. The device adds up by itself; that is collected when somebody asks: it takes waiting."""

from collections.abc import Sequence

import torch

from sparseflow.core.weight_source import WeightSource
from sparseflow.engine.counts import FetchCounts
from sparseflow.kernels.device.placement import (
    N_CHOSEN,
    N_FORESEEN,
    N_HINTED,
    N_HINTS,
    N_MISSED,
    N_STEPS,
    N_TOTALS,
)
from sparseflow.orchestration.device.choosers import Chooser
from sparseflow.orchestration.device.dense_parts import DenseParts
from sparseflow.orchestration.stats import DeviceCounts, RunStats, StepCounts


class DeviceTally:
    """Counts prompts and decoding apart."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        profile = source.profile
        self._source = source
        self._n_neurons, self._bundle_nbytes = profile.ffn_dimension, profile.bundle_nbytes
        self._totals = torch.zeros(profile.num_layers, N_TOTALS, dtype=torch.int64, device=device)
        # Two wide: all addresses are multiples of 16, or the kernel would be compiled twice.
        self._active = torch.zeros(profile.num_layers, 2, dtype=torch.int64, device=device)[:, :1]
        self._active_at_mark = torch.zeros_like(self._active)
        self._active_collected = [0] * profile.num_layers
        self.of_layers = list(zip(self._totals, self._active, strict=True))
        """What the device adds to, by layer: `Placement.totals` and `LayerMemory.n_active`."""
        self.stats = RunStats()
        """As collected last."""
        self.is_decoding = False
        self._fetched = source.counts() or FetchCounts()
        self._nbytes_moved = 0
        self._pairs_beyond = 0

    @property
    def phase(self) -> StepCounts:
        """What is counted to now."""
        return self.stats.decode if self.is_decoding else self.stats.prefill

    def add_moved(self, nbytes: int) -> None:
        """Bytes have come to the device that are no bundles."""
        self._nbytes_moved += nbytes

    def add_sparse(self, n_tokens: int) -> None:
        """A layer step of several tokens, of which the device counts one."""
        self._pairs_beyond += (n_tokens - 1) * self._n_neurons

    def add_dense(self, n_tokens: int) -> None:
        """A layer step that computed all neurons."""
        counts = self.phase
        counts.layer_steps += 1
        counts.dense_layer_steps += 1
        counts.neurons += self._n_neurons
        counts.fetched += self._n_neurons
        counts.halves_read += 2 * self._n_neurons
        counts.pairs += n_tokens * self._n_neurons

    def add_predictor(self, nbytes: int) -> None:
        """Bytes of predictor weights were read, beside what layer steps and hints read in any case."""
        self.phase.predictor_nbytes += nbytes

    def mark_active(self) -> None:
        """To ask later what was active since. Does not wait for the device."""
        self._active_at_mark.copy_(self._active)

    def active_since_mark(self, layer: int) -> int:
        """Active pairs of token and neuron that sparse steps of a layer have computed. Waits for the device."""
        return int(self._active[layer, 0] - self._active_at_mark[layer, 0])

    def leave_out(self, fetches: FetchCounts) -> None:
        """These were for no step."""
        self._fetched += fetches

    def collect(self, choosers: Sequence[Chooser], dense_parts: DenseParts) -> list[list[int]]:
        """Add what was counted since the last time to the phase that it belongs to. Waits for the device.

        Returns:
            What each layer's `Placement.totals` had grown by.
        """
        totals: list[list[int]] = self._totals.tolist()
        active: list[int] = self._active[:, 0].tolist()
        n_active = [new - old for new, old in zip(active, self._active_collected, strict=True)]
        self._active_collected = active
        self._totals.zero_()
        counts = self.phase
        if counts.device is None:
            counts.device = DeviceCounts.zeros(len(totals))
        for layer, of_layer in enumerate(totals):
            self._add_layer(counts, counts.device, layer, of_layer, n_active[layer])
        for of_layer, chooser in zip(totals, choosers, strict=False):  # there may be none
            n_passes = of_layer[N_STEPS] + of_layer[N_HINTS]
            counts.predictor_nbytes += n_passes * chooser.pass_nbytes + chooser.take_nbytes_beyond()
        counts.pairs += self._pairs_beyond
        counts.active_pairs += dense_parts.take_active()
        counts.device.nbytes_moved += dense_parts.take_moved() + self._nbytes_moved
        self._pairs_beyond = self._nbytes_moved = 0
        fetched = self._source.counts()
        if fetched is not None:
            counts.fetches = (counts.fetches or FetchCounts()) + (fetched - self._fetched)
            self._fetched = fetched
        return totals

    def _add_layer(
        self, counts: StepCounts, device: DeviceCounts, layer: int, totals: list[int], n_active: int
    ) -> None:
        n_steps, n_candidates = totals[N_STEPS], totals[N_CHOSEN]
        counts.layer_steps += n_steps
        counts.neurons += n_steps * self._n_neurons
        counts.pairs += n_steps * self._n_neurons
        counts.fetched += n_candidates
        counts.active_pairs += n_active
        counts.halves_read += n_candidates + min(n_active, n_candidates)  # nothing in dense steps
        device.candidates[layer] += n_candidates
        device.misses[layer] += totals[N_MISSED]
        device.hinted[layer] += totals[N_HINTED]
        device.foreseen[layer] += totals[N_FORESEEN]
        device.nbytes_moved += (totals[N_MISSED] + totals[N_HINTED]) * self._bundle_nbytes
