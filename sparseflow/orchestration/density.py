"""From which share of neurons on a layer step is cheaper dense: measured on this machine, not assumed."""

import time
from collections.abc import Callable
from typing import Protocol

# The shortest of this many runs counts: compilers and other processes disturb it least.
_RUNS = 3


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
    For one token choosing and computing read a subset of what dense reads, at the same speed: 1, without measuring.
    """

    def __init__(
        self, choose: Callable[[int], object], compute: Callable[[int], object], dense: Callable[[int], object]
    ) -> None:
        """
        Args:
            choose: chooses neurons of a layer for a number of tokens.
            compute: computes all neurons of a layer by the sparse path.
            dense: computes the layer dense.
        """
        self._runs = (choose, compute, dense)
        self._measured: dict[int, float] = {0: 1.0}

    def density(self, n_tokens: int) -> float:
        """The share at which both cost the same; 0 where dense costs less than choosing alone."""
        bucket = (n_tokens - 1).bit_length()
        if bucket not in self._measured:
            best_s = [float("inf")] * len(self._runs)
            for _ in range(_RUNS):
                for n, run in enumerate(self._runs):
                    best_s[n] = min(best_s[n], _seconds(run, 1 << bucket))
            choose_s, compute_s, dense_s = best_s
            self._measured[bucket] = min(1.0, max(0.0, (dense_s - choose_s) / compute_s))
        return self._measured[bucket]


def _seconds(run: Callable[[int], object], n_tokens: int) -> float:
    start = time.perf_counter()
    run(n_tokens)
    return time.perf_counter() - start
