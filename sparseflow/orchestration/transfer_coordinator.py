"""One layer step: choose neurons, plan, fetch, compute, release, count.

On a CPU bundles are computed where they lie in host memory, so nothing moves. `plan_transfer` is the plan of a step
whose bundles need a slot on a device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.device_cache import WeightCache
from sparseflow.core.weight_source import FETCH_TIMEOUT_S, WeightSource
from sparseflow.errors import BadRequest
from sparseflow.kernels.dense_mlp import dense_mlp
from sparseflow.kernels.sparse_mlp import sparse_mlp
from sparseflow.orchestration.density import SAMPLE_STEP, Crossover, MeasuredCrossover
from sparseflow.orchestration.neuron_predictor import NeuronPredictor, active_neurons, fc1_biases
from sparseflow.orchestration.stats import RunStats, StepCounts

# A prompt's neurons are chosen this many tokens at a time, and no further once their union is dense.
_TOKENS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class NeuronTransferPlan:
    """What one layer step moves to a device. Neurons are ids, positions are device slots.

    transfer_positions[i] is where neurons_to_load[i] goes.
    """

    neurons_to_load: NDArray[np.int64]
    neurons_to_evict: NDArray[np.int64]
    neurons_already_cached: NDArray[np.int64]
    transfer_positions: NDArray[np.int64]

    def get_total_transfer_count(self) -> int:
        """Bundles to copy."""
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
        crossover: Crossover | None = None,
    ) -> None:
        """
        Args:
            predictor: chooses neurons; None computes every layer dense.
            biases: one a layer, dtype of the store.
            crossover: when a step goes dense; None: measured.
        """
        self.source = source
        self.predictor = predictor
        self.crossover = crossover or MeasuredCrossover(self._try_choosing, self._try_sparse, self._try_dense)
        self.stats = RunStats()
        self.profiling = True
        """Count; off, all counts stay 0."""
        self._n_layer_steps = 0
        self.audit_every = 0
        """Compare every Nth layer step with the true active set; 0: never. An audit reads the whole layer."""
        profile = source.profile
        self._biases = biases
        fc2 = [torch.zeros(profile.hidden_dimension) if bias.fc2 is None else bias.fc2.float() for bias in biases]
        self._wide_biases = list(zip(fc1_biases(source), fc2, strict=True))
        self._everything = np.arange(profile.ffn_dimension, dtype=np.uint32)

    @torch.compiler.disable  # kernels are given addresses, which a tracer would not keep
    def mlp(self, layer: int, x: Tensor, *, decoding: bool) -> Tensor:
        """One MLP. x: (n_tokens, hidden), dtype of the store; so is the result.

        Raises:
            BadRequest: gradients are asked for; the kernels have none.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise BadRequest("gradients: sparse layers have none; use torch.no_grad(), or the dense checkpoint")
        wide = x.float().contiguous()
        ids = self._choose(layer, wide)
        counts = self.stats.decode if decoding else self.stats.prefill
        with self.source.fetch(layer, self._everything if ids is None else ids) as fetch:
            bundles = fetch.wait(FETCH_TIMEOUT_S)
            if ids is None:
                y, n_active = self._dense(layer, bundles.base, bundles.slots, x)
            else:
                y, n_active = sparse_mlp(bundles.base, bundles.slots, ids, *self._wide_biases[layer], wide)
        if self.profiling:
            self._count(counts, layer, wide, ids, n_active)
        return y.to(x.dtype)

    def _choose(self, layer: int, x: Tensor) -> NDArray[np.uint32] | None:
        """Neurons to compute, or None for all: there is no predictor, or dense is cheaper."""
        if self.predictor is None:
            return None
        limit = self.crossover.density(len(x)) * len(self._everything)
        return self._union(self.predictor, layer, x, limit) if limit > 0 else None

    def _union(self, predictor: NeuronPredictor, layer: int, x: Tensor, limit: float) -> NDArray[np.uint32] | None:
        """Neurons that any of these tokens needs; None as soon as they are more than `limit`."""
        if len(x) <= _TOKENS_AT_ONCE:
            ids = predictor.select(layer, x)
            return ids if len(ids) <= limit else None
        chosen = np.zeros(len(self._everything), bool)
        n_parts = -(-len(x) // _TOKENS_AT_ONCE)
        for part in range(n_parts):  # tokens from all over the prompt, so that its union shows early
            chosen[predictor.select(layer, x[part::n_parts].contiguous())] = True
            if np.count_nonzero(chosen) > limit:
                return None
        return np.flatnonzero(chosen).astype(np.uint32)

    def _dense(self, layer: int, base: Tensor, slots: NDArray[np.uint32], x: Tensor) -> tuple[Tensor, int]:
        in_place = len(base) == len(slots) and np.array_equal(slots, self._everything)
        bundles = base if in_place else base[torch.from_numpy(slots.astype(np.int64))]
        return dense_mlp(bundles, *self._biases[layer], x)

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

    def _try_choosing(self, n_tokens: int) -> None:
        if self.predictor is not None:
            x = torch.zeros(n_tokens, self.source.profile.hidden_dimension)
            self._union(self.predictor, 0, x, len(self._everything))

    def _try_sparse(self, n_tokens: int) -> None:
        x = torch.zeros(n_tokens, self.source.profile.hidden_dimension)
        ids = self._everything[::SAMPLE_STEP].copy()
        with self.source.fetch(0, ids) as fetch:
            bundles = fetch.wait(FETCH_TIMEOUT_S)
            sparse_mlp(bundles.base, bundles.slots, ids, *self._wide_biases[0], x)

    def _try_dense(self, n_tokens: int) -> None:
        with self.source.fetch(0, self._everything) as fetch:
            bundles = fetch.wait(FETCH_TIMEOUT_S)
            x = torch.zeros(n_tokens, self.source.profile.hidden_dimension, dtype=bundles.base.dtype)
            self._dense(0, bundles.base, bundles.slots, x)
