"""What the engine counts and measures."""

from dataclasses import dataclass, fields
from operator import add, attrgetter, sub
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class FetchCounts:
    """Sums since the store was opened."""

    hits: int = 0
    """Bundles that were in host memory, or on their way there, when asked for."""
    misses: int = 0
    evictions: int = 0
    hinted: int = 0
    """Bundles read because of a hint."""
    hints_useful: int = 0
    """Of those, asked for when they had come."""
    hints_late: int = 0
    """Of those, asked for while they were on their way."""
    hints_wasted: int = 0
    """Of those, evicted before anybody asked."""
    reads: int = 0
    bytes_from_disk: int = 0
    wait_s: float = 0.0
    """Time for which fetches were waited for."""
    messages: int = 0
    """Sent to a weight server and received from it."""

    def __add__(self, other: "FetchCounts") -> "FetchCounts":
        """Both together."""
        return FetchCounts(*map(add, _values(self), _values(other)))

    def __sub__(self, earlier: "FetchCounts") -> "FetchCounts":
        """What was counted since `earlier`."""
        return FetchCounts(*map(sub, _values(self), _values(earlier)))

    @property
    def hit_rate(self) -> float | None:
        """Share of bundles asked for that were hits."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


_values = attrgetter(*(field.name for field in fields(FetchCounts)))


class ReadTimes(NamedTuple):
    """Seconds to read all bundles of a layer: one after the other, and from scattered places. 0: all are in memory."""

    layer_s: float
    scattered_s: float
