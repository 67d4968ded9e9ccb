"""From which share of neurons on a layer step is cheaper dense: measured on this machine, not assumed."""

import time
from collections.abc import Callable
from typing import Protocol

# Both paths are timed on a whole layer; the shorter of this many runs counts, which other processes disturb least.
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
    """Times both paths once for each power of two of tokens, when it first comes up.

    For one token the sparse kernel is never slower than reading everything: it reads a subset of the same bytes at the
    same speed, so the answer is 1 without measuring.
    """

    def __init__(self, run_sparse: Callable[[int], object], run_dense: Callable[[int], object]) -> None:
        """Both compute one layer with all its neurons for a number of tokens."""
        self._run_sparse = run_sparse
        self._run_dense = run_dense
        self._measured: dict[int, float] = {0: 1.0}

    def density(self, n_tokens: int) -> float:
        """Time of the dense path over time of the sparse one with all neurons, whose time grows with their number."""
        bucket = (n_tokens - 1).bit_length()
        if bucket not in self._measured:
            size = 1 << bucket
            self._run_sparse(size)  # compiles
            sparse_s, dense_s = float("inf"), float("inf")
            for _ in range(_RUNS):
                sparse_s = min(sparse_s, _seconds(self._run_sparse, size))
                dense_s = min(dense_s, _seconds(self._run_dense, size))
            self._measured[bucket] = min(1.0, dense_s / sparse_s)
        return self._measured[bucket]


def _seconds(run: Callable[[int], object], n_tokens: int) -> float:
    start = time.perf_counter()
    run(n_tokens)
    return time.perf_counter() - start
