"""Recall, measured while decoding: in some layer steps, some of the skipped neurons are computed after all.

A predictor says how near each neuron was to being chosen (`bounds`), and what it misses lies mostly near. So skipped
neurons are ordered by that, nearest first, and cut into strata that double in size. From each the same small number is
drawn without replacement, which takes all of the nearest stratum. How likely a neuron was to be drawn is thus known,
and misses seen are weighted with its inverse (D. G. Horvitz and D. J. Thompson, JASA 47, 1952): an estimate without
bias, wherever the misses are.

The model computes the same with and without: nothing that is found here enters it, and bundles are fetched without
being kept.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import WeightSource
from sparseflow.errors import SparseFlowError
from sparseflow.orchestration.neuron_predictor import NeuronPredictor, pre_activations
from sparseflow.orchestration.recall_sums import RecallSums, StepSample
from sparseflow.orchestration.sampling_pace import SamplingPace

_TIME_SHARE = 0.007  # of decoding; what it throws out of the caches costs about as much again
_DRAWN = 16  # neurons of each stratum; half as many cost three quarters of the time, and say half as much


@dataclass(frozen=True, slots=True)
class SparseStep:
    """One layer step that skipped neurons. x: (n_tokens, hidden) float32. ids: (n,) uint32, the neurons computed.

    n_active: pairs of token and neuron among them whose pre-activation was above 0. fc1_bias: (ffn_dim,) float32.
    """

    layer: int
    x: Tensor
    ids: NDArray[np.uint32]
    n_active: int
    fc1_bias: Tensor


class LiveRecall:
    """Decides which steps to sample, and samples them."""

    def __init__(self, source: WeightSource, *, clock: Callable[[], float] = time.perf_counter, seed: int = 0) -> None:
        """
        Args:
            seed: of all draws.
        """
        self._source = source
        self._rng = np.random.default_rng(seed)
        self.pace = SamplingPace(_TIME_SHARE, self._rng, clock)
        self._n_tokens = 0
        self.is_on = True
        self.every_step = False
        """Sample all, whatever that costs."""

    def step(self, predictor: NeuronPredictor, step: SparseStep, sums: RecallSums) -> bool:
        """A sparse step has been decoded. Returns whether it was sampled, and something fetched for that."""
        if not self.is_on or predictor.fidelity == "oracle":  # which computes all, and chooses by that
            return False
        sums.steps += 1
        if not self.pace.is_due(step.layer) and not self.every_step:
            return False
        self._sample(predictor, step.layer, lambda _: step, sums)
        self.pace.sampled()
        return True

    def token(
        self, predictor: NeuronPredictor, n_layers: int, step_of: Callable[[int], SparseStep], sums: RecallSums
    ) -> None:
        """A token was decoded, sparse in all layers, by a device that keeps what each was given.

        Args:
            step_of: asks for what a layer did, which takes time.
        """
        if not self.is_on:
            return
        sums.steps += n_layers
        self._n_tokens += 1
        if self.every_step:
            layers = list(range(n_layers))
        elif self.pace.is_due(self._n_tokens):
            layers = [int(self._rng.integers(n_layers))]
        else:
            return
        for layer in layers:
            self._sample(predictor, layer, step_of, sums)
        self.pace.sampled()

    def pause(self) -> None:
        """What comes between the last token and the next is no token's time."""
        self._n_tokens += 1

    def _sample(
        self, predictor: NeuronPredictor, layer: int, step_of: Callable[[int], SparseStep], sums: RecallSums
    ) -> None:
        try:
            step = step_of(layer)
            sums.add(step.n_active, sample_misses(self._source, predictor, step, self._rng))
            self._source.note_recall(sums.measured)
        except (SparseFlowError, TimeoutError) as error:  # the step itself went well
            warnings.warn(f"recall was not measured in a step of layer {layer}: {error}", stacklevel=3)


def sample_misses(
    source: WeightSource, predictor: NeuronPredictor, step: SparseStep, rng: np.random.Generator
) -> StepSample:
    """Compute some of the neurons that a step skipped, and estimate from them what it missed."""
    skipped = _nearest_first(predictor.bounds(step.layer, step.x), step.ids)
    if not len(skipped):
        return StepSample(0.0, 0.0, 0, 0)
    strata = doubling_strata(len(skipped))
    drawn = [stratum.start + rng.choice(len(stratum), min(_DRAWN, len(stratum)), replace=False) for stratum in strata]
    positions = np.concatenate(drawn)
    ids, order = np.unique(skipped[positions], return_inverse=True)
    is_active = pre_activations(source, step.layer, step.x, step.fc1_bias, ids) > 0  # (n_tokens, n)
    n_missed = is_active.sum(0).numpy()[order]  # tokens for which each neuron drawn is active
    missed, variance = stratified(strata, np.split(n_missed, np.cumsum([len(part) for part in drawn])[:-1]))
    return StepSample(missed, variance, len(skipped), len(positions))


def _nearest_first(bounds: Tensor, computed: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """All other neurons, by how near they were to being chosen for any token. bounds: (n_tokens, ffn_dim)."""
    nearness = bounds.amax(0).numpy()
    is_skipped = np.ones(len(nearness), bool)
    is_skipped[computed] = False
    skipped = is_skipped.nonzero()[0]
    far_first = np.nan_to_num(nearness[skipped], nan=np.inf).argsort()
    return skipped[far_first[::-1]].astype(np.uint32)


def doubling_strata(n: int) -> list[range]:
    """Positions 0..n cut into strata of _DRAWN, twice that, four times, and so on; the last takes what is left."""
    strata, start, size = [], 0, _DRAWN
    while start < n:
        strata.append(range(start, min(start + size, n)))
        start, size = start + size, 2 * size
    return strata


def stratified(strata: list[range], drawn: list[NDArray[np.int64]]) -> tuple[float, float]:
    """A total and the variance of its estimate, both without bias, from some values of each stratum.

    With n of N values drawn, of mean a and variance s^2: sums of N a, and of N^2 (1 - n / N) s^2 / n
    (Cochran, Sampling Techniques, 5.3 and 5.4).
    """
    total = variance = 0.0
    for stratum, values in zip(strata, drawn, strict=True):
        size, n = len(stratum), len(values)
        total += size * float(values.mean())
        if n < size:
            variance += size * (size - n) * float(values.var(ddof=1)) / n
    return total, variance
