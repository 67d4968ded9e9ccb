"""When to measure while decoding, so that it costs a fixed share of the time, on any machine and with any model."""

from collections.abc import Callable

import numpy as np

_FIRST_INTERVAL = 32  # steps, until it is known what a sample costs
_STEP_MEMORY = 0.95  # weights of the past in the running means
_COST_MEMORY = 0.75


class SamplingPace:
    """Says after which layer steps to take a sample; or after which tokens, numbered one after the other.

    On average every (cost of a sample / (share * time of a step)) steps, both as running means. The distance to the
    next sample is drawn uniformly between 1 and twice the average, so that no layer comes up more often than another.
    The first sample is not timed: compilers run, and memory is cold.
    """

    def __init__(self, share: float, rng: np.random.Generator, clock: Callable[[], float]) -> None:
        """
        Args:
            share: of the time.
            clock: seconds.
        """
        self._share, self._rng, self._clock = share, rng, clock
        self._layer = -2
        self._now_s = 0.0
        self._step_s: float | None = None
        self._cost_s: float | None = None
        self._is_warm = False
        self._n_left = self._draw()

    @property
    def interval(self) -> float:
        """Mean distance of samples, in steps."""
        if self._cost_s is None or not self._step_s:
            return _FIRST_INTERVAL
        return max(1.0, self._cost_s / (self._share * self._step_s))

    def is_due(self, layer: int) -> bool:
        """A layer step (a token) has ended; whether to take a sample of it. If so, `sampled` is to be called after."""
        now_s = self._clock()
        if layer == self._layer + 1:  # else who calls may have paused between
            self._step_s = _mean(self._step_s, now_s - self._now_s, _STEP_MEMORY)
        self._layer, self._now_s = layer, now_s
        self._n_left -= 1
        return self._n_left <= 0

    def sampled(self) -> None:
        """A sample was taken just now."""
        begin_s, self._now_s = self._now_s, self._clock()
        if self._is_warm:
            self._cost_s = _mean(self._cost_s, self._now_s - begin_s, _COST_MEMORY)
        self._is_warm = True
        self._n_left = self._draw()

    def _draw(self) -> int:
        return int(self._rng.integers(1, 2 * int(np.ceil(self.interval))))


def _mean(past: float | None, value: float, memory: float) -> float:
    return value if past is None else memory * past + (1 - memory) * value
