"""One layer step: choose neurons, plan, fetch, compute, release, count.

On a CPU bundles are computed where they lie in host memory, so nothing moves. `plan_transfer` is the plan of a step
whose bundles need a slot on a device.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.device_cache import WeightCache
from sparseflow.core.weight_source import FETCH_TIMEOUT_S, HostBundles, WeightSource
from sparseflow.engine.counts import FetchCounts
from sparseflow.engine.memory_plan import DENSE_PART_NBYTES
from sparseflow.errors import ArenaBusy, BadRequest
from sparseflow.kernels.dense_mlp import dense_mlp
from sparseflow.kernels.mlp_step import MLPStep, Stepped
from sparseflow.kernels.sparse_mlp import sparse_mlp
from sparseflow.orchestration.calibrated_predictor import lookahead_predictors
from sparseflow.orchestration.density import Crossover, MeasuredCrossover, Trial
from sparseflow.orchestration.live_recall import LiveRecall, SparseStep
from sparseflow.orchestration.lookahead import DEFAULT_DISTANCE, Lookahead, TrainedLookahead
from sparseflow.orchestration.neuron_predictor import NeuronPredictor, active_neurons, fc1_biases
from sparseflow.orchestration.stats import RunStats, StepCounts

# A prompt's neurons are chosen this many tokens at a time, and no further once their union is dense.
_TOKENS_AT_ONCE = 8

# The sparse path is timed on every _SAMPLE_STEP-th neuron, as far as they can be fetched at once.
_SAMPLE_STEP = 8


@dataclass(frozen=True, slots=True)
class NeuronTransferPlan:
    """What one layer step moves to a device. Neurons are ids, positions are device slots."""

    neurons_to_load: NDArray[np.int64]
    """(n,): have no slot yet."""
    neurons_to_evict: NDArray[np.int64]
    """(m,), m <= n: lose theirs to these."""
    neurons_already_cached: NDArray[np.int64]
    """(k,): have one, and stay."""
    transfer_positions: NDArray[np.int64]
    """(n,): transfer_positions[i] is where neurons_to_load[i] goes."""

    def get_total_transfer_count(self) -> int:
        """How many bundles to copy."""
        return len(self.neurons_to_load)

    def is_empty(self) -> bool:
        """Whether nothing has to move."""
        return not len(self.neurons_to_load)


def plan_transfer(cache: WeightCache, neurons: NDArray[np.int64]) -> NeuronTransferPlan:
    """Give all neurons of a step a device slot, and say what must be copied for that.

    Raises:
        BadRequest: more neurons than slots.
    """
    missing = cache.slots(neurons) < 0
    placement = cache.place(neurons)
    return NeuronTransferPlan(neurons[missing], placement.evicted, neurons[~missing], placement.slots[missing])


class LayerBiases(NamedTuple):
    """Biases of one MLP: fc1 (ffn_dim,), fc2 (hidden,). None where the model has none."""

    fc1: Tensor | None
    fc2: Tensor | None


class TransferCoordinator:
    """Runs the MLPs of one model: decides per layer step what is read, reads it, computes, and counts."""

    def __init__(
        self,
        source: WeightSource,
        predictor: NeuronPredictor | None,
        biases: list[LayerBiases],
        norms: Sequence[Callable[[Tensor], Tensor]],
        crossover: Crossover | None = None,
    ) -> None:
        """
        Args:
            predictor: chooses neurons; None computes every layer dense.
            biases: one a layer, dtype of the store.
            norms: one a layer, from the residual stream to the MLP's input.
            crossover: when a step goes dense; None: measured.
        """
        self.source = source
        profile = source.profile
        self._everything = np.arange(profile.ffn_dimension, dtype=np.uint32)
        self.stats = RunStats()
        self.profiling = True
        """Count; off, all counts stay 0."""
        self._n_layer_steps = 0
        self.audit_every = 0
        """Compare every Nth layer step with the true active set; 0: never. An audit reads the whole layer."""
        self.live_recall = LiveRecall(source)
        self.use_lookahead_from(DEFAULT_DISTANCE)
        self._norms = norms
        self._scoring_s = 0.0
        self._choice_nbytes = 0
        self._counted = source.counts() or FetchCounts()
        self._biases = biases
        fc2 = [torch.zeros(profile.hidden_dimension) if bias.fc2 is None else bias.fc2.float() for bias in biases]
        self._no_bias = torch.zeros(profile.hidden_dimension)
        self._wide_biases = list(zip(fc1_biases(source), fc2, strict=True))
        self.crossover = crossover or self._measured_crossover()
        self.predictor = predictor

    @property
    def predictor(self) -> NeuronPredictor | None:
        """Chooses neurons; None computes every layer dense."""
        return self._predictor

    @predictor.setter
    def predictor(self, predictor: NeuronPredictor | None) -> None:
        self._predictor = predictor
        self._steps: list[MLPStep | None] = []
        for layer, biases in enumerate(self._wide_biases):
            scorer = None if predictor is None else predictor.scorer(layer)
            self._steps.append(None if scorer is None else MLPStep(scorer, *biases))

    def close(self) -> None:
        """Let go of all that shows the source's memory. May be called twice."""
        self._biases, self._wide_biases, self._norms = [], [], []
        self.predictor = None

    def use_lookahead_from(self, distance: int) -> None:
        """Let trained predictors, where the store has them, foresee a layer from so many layers earlier: 0, 1 or 2."""
        profile = self.source.profile
        self._trained = TrainedLookahead(lookahead_predictors(self.source, distance), distance)
        trained_s = self._trained.seconds(profile.hidden_dimension) if self._trained else None
        self.lookahead = Lookahead(self.source.read_times, profile.ffn_dimension, trained_s)

    def hint(self, layer: int, hidden: Tensor) -> None:
        """Before a layer's attention: start to read what MLPs may need, judged by what enters the layer.

        hidden: (..., hidden), the residual stream.
        """
        if self.lookahead.mode == "off":
            return
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if self.lookahead.from_input:
            self._look_ahead(layer, hidden)
        elif self.lookahead.by_training and len(hidden) <= _TOKENS_AT_ONCE:
            for target in self._trained.targets(layer):
                self.source.hint(target, self._trained.foresee(target, hidden))

    def mlp(self, layer: int, x: Tensor, hidden: Tensor, *, decoding: bool) -> Tensor:
        """One MLP.

        Args:
            x: (n_tokens, hidden) float32, the MLP's input.
            hidden: (n_tokens, hidden), the residual stream that the result will be added to.

        Returns:
            (n_tokens, hidden) float32.

        Raises:
            BadRequest: gradients are asked for; the kernels have none.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise BadRequest("gradients: sparse layers have none; use torch.no_grad(), or the dense checkpoint")
        x = x.contiguous()
        ids: NDArray[np.uint32] | None
        if (stepped := self._stepped(layer, x)) is not None:
            y, ids, n_active, _ = stepped
        else:
            ids = self._choose(layer, x)
            y, n_active = self._computed(layer, ids, x, hidden)
        fetches = self._fetches_since_last_step()
        if fetches is not None and len(x) <= _TOKENS_AT_ONCE:
            read, useful, wasted = fetches.misses + fetches.hinted, fetches.hints_useful, fetches.hints_wasted
            self.lookahead.note(self._scoring_s, read, useful, wasted)
        if decoding and layer + 1 == self.source.profile.num_layers:
            self.source.note_tokens(len(x))
        if self.profiling:
            counts = self.stats.decode if decoding else self.stats.prefill
            counts.predictor_nbytes += self._choice_nbytes
            self._count(counts, layer, x, ids, n_active)
            if fetches is not None:
                counts.fetches = (counts.fetches or FetchCounts()) + fetches
            if decoding and ids is not None and self.predictor is not None and not self.audit_every:
                step = SparseStep(layer, x, ids, n_active, self._wide_biases[layer][0])
                if self.live_recall.step(self.predictor, step, counts.sampled):
                    self._fetches_since_last_step()  # what was read for that is no step's
        return y

    def _stepped(self, layer: int, x: Tensor) -> Stepped | None:
        """One token by codes with all bundles in memory, in one call; None where it is not so."""
        step = self._steps[layer] if len(x) == 1 else None
        if step is None or self.crossover.density(1) < 1:
            return None
        bundles = self.source.resident_bundles(layer)
        if bundles is None:
            return None
        stepped = step(x, bundles)
        self._choice_nbytes = step.scorer.nbytes_read(1, stepped.n_fine_rows)
        return stepped

    def _computed(self, layer: int, ids: NDArray[np.uint32] | None, x: Tensor, hidden: Tensor) -> tuple[Tensor, int]:
        """Once more where a server with a smaller arena has taken the place of the one that the step began with."""
        while True:
            limit = self.source.fetch_limit
            try:
                return self._dense(layer, x) if ids is None else self._sparse(layer, ids, x, hidden)
            except ArenaBusy:
                if self.source.fetch_limit >= limit:
                    raise

    def _fetches_since_last_step(self) -> FetchCounts | None:
        counted = self.source.counts()
        if counted is None:
            return None
        since, self._counted = counted - self._counted, counted
        return since

    def _choose(self, layer: int, x: Tensor) -> NDArray[np.uint32] | None:
        """Neurons to compute, or None for all: there is no predictor, or dense is cheaper."""
        self._choice_nbytes = 0
        if self.predictor is None:
            return None
        limit = self.crossover.density(len(x)) * len(self._everything)
        n_read = self.predictor.nbytes_read
        ids = self._union(self.predictor, layer, x, limit) if limit > 0 else None
        self._choice_nbytes = self.predictor.nbytes_read - n_read
        return ids

    def _union(self, predictor: NeuronPredictor, layer: int, x: Tensor, limit: float) -> NDArray[np.uint32] | None:
        """Neurons that any of these tokens needs; None as soon as they are more than `limit`."""
        if len(x) <= _TOKENS_AT_ONCE:
            begin = time.perf_counter()
            ids = predictor.select(layer, x)
            self._scoring_s = time.perf_counter() - begin
            return ids if len(ids) <= limit else None
        chosen = np.zeros(len(self._everything), bool)
        n_parts = -(-len(x) // _TOKENS_AT_ONCE)
        for part in range(n_parts):  # tokens from all over the prompt, so that its union shows early
            chosen[predictor.select(layer, x[part::n_parts].contiguous())] = True
            if np.count_nonzero(chosen) > limit:
                return None
        return np.flatnonzero(chosen).astype(np.uint32)

    def _sparse(self, layer: int, ids: NDArray[np.uint32], x: Tensor, hidden: Tensor) -> tuple[Tensor, int]:
        """The chosen neurons, in as many parts as their bundles need."""
        fc1_bias, fc2_bias = self._wide_biases[layer]
        total: Tensor | None = None
        n_active = 0

        def add(bundles: HostBundles, computed: NDArray[np.uint32]) -> None:
            nonlocal total, n_active
            bias = fc2_bias if total is None else self._no_bias
            y, active = sparse_mlp(bundles.base, bundles.slots, computed, fc1_bias, bias, x)
            total = y if total is None else total.add_(y)
            n_active += active

        parts = _parts(ids, self.source.fetch_limit)
        for n, part in enumerate(parts):
            with self.source.fetch(layer, part) as fetch:
                is_last = n + 1 == len(parts)
                if is_last and self.lookahead.from_before:
                    self._look_ahead(layer + 1, hidden)
                early, positions = fetch.early()
                if len(positions) == len(part):
                    add(early, part)
                    continue
                add(early, part[positions])
                is_late = np.ones(len(part), bool)
                is_late[positions] = False
                late = is_late.nonzero()[0]
                bundles = fetch.wait(FETCH_TIMEOUT_S)
                if not is_last:
                    self.source.hint(layer, parts[n + 1])
                add(HostBundles(bundles.base, bundles.slots[late]), part[late])
        assert total is not None  # there is one part at least
        return total, n_active

    def _dense(self, layer: int, x: Tensor) -> tuple[Tensor, int]:
        """All neurons, streamed in parts where not all are in memory: one is computed while the next is read."""
        parts = _parts(self._everything, self._n_dense_neurons)
        following = [*parts[1:], parts[0]]
        total: Tensor | None = None
        n_active = 0
        for n, part in enumerate(parts):
            with self.source.fetch(layer, part) as fetch:
                bundles = fetch.wait(FETCH_TIMEOUT_S)
                next_layer = layer + (n + 1 == len(parts))
                if self.lookahead.mode != "off" and next_layer < self.source.profile.num_layers:
                    self.source.hint(next_layer, following[n])
                y, active = self._compute_dense(layer, part, bundles, x, is_first=n == 0)
            total = y if total is None else total.add_(y)
            n_active += active
        assert total is not None  # there is one part at least
        return total, n_active

    @property
    def _n_dense_neurons(self) -> int:
        """Neurons of a dense layer step that are computed together."""
        most = DENSE_PART_NBYTES // self.source.profile.bundle_nbytes
        is_mapped = self.source.fetch_limit == len(self._everything) and not self.source.read_times.layer_s
        return len(self._everything) if is_mapped else max(1, min(self.source.fetch_limit, most))

    def _compute_dense(
        self, layer: int, ids: NDArray[np.uint32], bundles: HostBundles, x: Tensor, *, is_first: bool
    ) -> tuple[Tensor, int]:
        base, slots = bundles.base, bundles.slots.astype(np.int64)
        if (np.diff(slots) == 1).all():
            chosen = base[int(slots[0]) : int(slots[-1]) + 1]
        else:
            chosen = base[torch.from_numpy(slots)]
        fc1, fc2 = self._biases[layer]
        fc1 = None if fc1 is None else fc1[int(ids[0]) : int(ids[-1]) + 1]
        return dense_mlp(chosen, fc1, fc2 if is_first else None, x)

    def _look_ahead(self, layer: int, hidden: Tensor) -> None:
        """Hint what a layer would need if the residual stream reached its MLP as it is now."""
        if layer >= self.source.profile.num_layers or self.predictor is None or len(hidden) > _TOKENS_AT_ONCE:
            return
        x = self._norms[layer](hidden).float().contiguous()
        self.source.hint(layer, self.predictor.select(layer, x))

    def _count(self, counts: StepCounts, layer: int, x: Tensor, ids: NDArray[np.uint32] | None, n_active: int) -> None:
        n_neurons = len(self._everything)
        counts.layer_steps += 1
        counts.dense_layer_steps += ids is None
        counts.neurons += n_neurons
        counts.fetched += n_neurons if ids is None else len(ids)
        counts.halves_read += 2 * n_neurons if ids is None else len(ids) + min(n_active, len(ids))
        counts.pairs += len(x) * n_neurons
        counts.active_pairs += n_active
        self._n_layer_steps += 2 if layer == 0 else 1  # so that no multiple of the layers audits one layer alone
        if self.audit_every and self._n_layer_steps % self.audit_every == 0:
            active = active_neurons(self.source, layer, x, self._wide_biases[layer][0])
            counts.audited += len(active)
            counts.missed += 0 if ids is None else len(np.setdiff1d(active, ids, assume_unique=True))
            self._fetches_since_last_step()  # what the audit read is no step's

    def _measured_crossover(self) -> MeasuredCrossover:
        n_neurons = len(self._everything)
        sample = _parts(self._everything[::_SAMPLE_STEP].copy(), self.source.fetch_limit)[0]
        part = self._everything[: self._n_dense_neurons]
        hidden = self.source.profile.hidden_dimension

        def choose(n_tokens: int) -> None:
            if self.predictor is not None:
                self._union(self.predictor, 0, torch.zeros(n_tokens, hidden), n_neurons)

        def sparse(n_tokens: int) -> None:
            with self.source.fetch(0, sample) as fetch:
                bundles = fetch.wait(FETCH_TIMEOUT_S)
                x = torch.zeros(n_tokens, hidden)
                sparse_mlp(bundles.base, bundles.slots, sample, *self._wide_biases[0], x)

        def dense(n_tokens: int) -> None:
            with self.source.fetch(0, part) as fetch:
                bundles = fetch.wait(FETCH_TIMEOUT_S)
                x = torch.zeros(n_tokens, hidden)
                self._compute_dense(0, part, bundles, x, is_first=True)

        return MeasuredCrossover(
            choose,
            Trial(sparse, len(sample) / n_neurons),
            Trial(dense, len(part) / n_neurons),
            self.source.read_times,
        )


def _parts(ids: NDArray[np.uint32], most: int) -> list[NDArray[np.uint32]]:
    """Ids in parts of at most `most`; at least one part, which may be empty."""
    return [ids[start : start + most] for start in range(0, max(len(ids), 1), most)]
