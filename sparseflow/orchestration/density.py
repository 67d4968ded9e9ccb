"""From which share of neurons on a layer step is cheaper dense: measured on this machine, not assumed."""

import time
from collections.abc import Callable
from typing import Protocol

# The shorter of this many runs counts: compilers and other processes disturb it least.
_RUNS = 2

# The sparse path is timed on every SAMPLE_STEP-th neuron; its time grows with their number.
SAMPLE_STEP = 8


class Crossover(Protocol):
    """Answers one question."""

    def density(self, n_tokens: int) -> float:
        """The share of a layer's neurons above which computing it dense is cheaper, for a step of `n_tokens` tokens."""
        ...


class FixedCrossover:
    """The same share for every step."""

    def __init__(self, density: float) -> None:
        self._density = density

    def density(self, n_tokens: int) -> float:
        """As given."""
        return self._density


class MeasuredCrossover:
    """Times one layer, once for each power of two of tokens, when it first comes up.

    Sparse costs choosing (the same whatever is chosen) and computing (as the share chosen); dense always the same.
    One token never goes dense: choosing reads a quarter of the MLP's bytes, and candidates beyond three quarters of the
    neurons are no sparse model. The answer rests on timings, so near the crossover two runs may choose differently.
    """

    def __init__(
        self, choose: Callable[[int], object], compute: Callable[[int], object], dense: Callable[[int], object]
    ) -> None:
        """
        Args:
            choose: chooses neurons of a layer for a number of tokens.
            compute: computes every SAMPLE_STEP-th neuron of a layer by the sparse path.
            dense: computes the layer dense.
        """
        self._choose, self._compute, self._dense = choose, compute, dense
        self._measured: dict[int, float] = {0: 1.0}

    def density(self, n_tokens: int) -> float:
        """The share at which both cost the same; 0 where dense costs less than choosing alone."""
        bucket = (n_tokens - 1).bit_length()
        if bucket not in self._measured:
            left_s = _seconds(self._dense, n_tokens) - _seconds(self._choose, n_tokens)
            compute_s = _seconds(self._compute, n_tokens) * SAMPLE_STEP if left_s > 0 else 1.0
            self._measured[bucket] = min(1.0, max(0.0, left_s / compute_s))
        return self._measured[bucket]


def _seconds(run: Callable[[int], object], n_tokens: int) -> float:
    times_s = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run(n_tokens)
        times_s.append(time.perf_counter() - start)
    return min(times_s)
