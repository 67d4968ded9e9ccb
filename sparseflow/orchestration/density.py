"""From which share of neurons on a layer step is cheaper dense: measured on this machine, not assumed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sparseflow.engine.counts import ReadTimes

# The shorter of this many runs counts: compilers and other processes disturb it least, and bundles have been read.
_RUNS = 2


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


@dataclass(frozen=True, slots=True)
class Trial:
    """A way to compute some neurons of a layer, to be timed. run: for a number of tokens. share: of the neurons."""

    run: Callable[[int], object]
    share: float


class MeasuredCrossover:
    """Times one layer, once for each power of two of tokens, when it first comes up.

    Sparse costs choosing (the same whatever is chosen), computing and reading (as the share chosen); dense costs
    computing and reading all. One token never goes dense: choosing reads a quarter of the MLP's bytes, and candidates
    beyond three quarters of the neurons are no sparse model. The answer rests on timings, so near the crossover two
    runs may choose differently.
    """

    def __init__(self, choose: Callable[[int], object], sparse: Trial, dense: Trial, read_times: ReadTimes) -> None:
        """
        Args:
            choose: chooses neurons of a layer for a number of tokens.
            sparse: the sparse path over some neurons.
            dense: the dense path over some neurons.
            read_times: what reading adds where not all bundles are in memory.
        """
        self._choose, self._sparse, self._dense, self._read_times = choose, sparse, dense, read_times
        self._measured: dict[int, float] = {0: 1.0}

    def density(self, n_tokens: int) -> float:
        """The share at which both cost the same; 0 where dense costs less than choosing alone."""
        bucket = (n_tokens - 1).bit_length()
        if bucket not in self._measured:
            dense_s = _seconds(self._dense.run, n_tokens) / self._dense.share + self._read_times.layer_s
            left_s = dense_s - _seconds(self._choose, n_tokens)
            sparse_s = 1.0
            if left_s > 0:
                sparse_s = _seconds(self._sparse.run, n_tokens) / self._sparse.share + self._read_times.scattered_s
            self._measured[bucket] = min(1.0, max(0.0, left_s / sparse_s))
        return self._measured[bucket]


def _seconds(run: Callable[[int], object], n_tokens: int) -> float:
    times_s = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run(n_tokens)
        times_s.append(time.perf_counter() - start)
    return min(times_s)
