"""How much of what is active a session finds, as it says itself: four numbers, and what follows from them."""

import math
from typing import NamedTuple

_MOST_SAMPLES = 2.0**53  # beyond these a float counts no further


class MeasuredRecall(NamedTuple):
    """Sums over layer steps. They may come from anybody: whatever they are, what follows is a number or None."""

    found: float = 0.0
    """Active pairs of token and neuron that were computed."""
    missed: float = 0.0
    """Those that were not, as estimated."""
    variance: float = 0.0
    """Of found - recall * (found + missed), so that over (found + missed)^2 it is the variance of recall."""
    samples: float = 0.0
    """Skipped neurons that were computed after all."""

    @property
    def recall(self) -> float | None:
        """found / (found + missed); None where nothing was measured, or the numbers make no sense."""
        return self.found / (self.found + self.missed) if self._makes_sense else None

    @property
    def recall_error(self) -> float | None:
        """One standard error of `recall`, at most 1; None where that is."""
        return min(1.0, math.sqrt(self.variance) / (self.found + self.missed)) if self._makes_sense else None

    @property
    def recall_samples(self) -> int | None:
        """`samples`; None where there are none, or not so many."""
        return int(self.samples) or None if 0 <= self.samples <= _MOST_SAMPLES else None

    @property
    def _makes_sense(self) -> bool:
        """Finite, not negative, and of one active pair at least."""
        return all(0 <= value < math.inf for value in self[:3]) and 1 <= self.found + self.missed < math.inf
