"""What the engine counts and measures."""

from dataclasses import dataclass, fields
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class FetchCounts:
    """Sums since the store was opened."""

    hits: int
    """Bundles that were in host memory, or on their way there, when asked for."""
    misses: int
    evictions: int
    hinted: int
    """Bundles read because of a hint."""
    reads: int
    bytes_from_disk: int
    wait_s: float
    """Time for which fetches were waited for."""

    def __sub__(self, earlier: "FetchCounts") -> "FetchCounts":
        """What was counted since `earlier`."""
        return FetchCounts(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float | None:
        """Share of bundles asked for that were hits."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


class ReadTimes(NamedTuple):
    """Seconds to read all bundles of a layer: one after the other, and from scattered places. 0: all are in memory."""

    layer_s: float
    scattered_s: float
