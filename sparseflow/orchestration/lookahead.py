"""Whether to foresee what a layer needs, so that its reads go on while something else is computed.

Foreseeing costs a scoring of the layer, and reads some bundles in vain; what it spares is at most the time of the
reads. So it pays where the disk is slow or little of the model is in memory, and not otherwise.
"""

from typing import Literal

from sparseflow.engine.counts import ReadTimes

LookaheadMode = Literal["auto", "off", "input", "before"]

# Reads must take this many scorings. Measured, OPT-1.3B's shape: at 2 (5 % of the bundles in memory, a disk that reads
# 900 MB/s at random) tokens took 1.13 times as long with lookahead as without.
_SCORINGS = 3
_MEMORY = 0.95  # weight of the past in the running means


class Lookahead:
    """From what enters the layer (`input`), or the MLP before it (`before`); `auto`: from the latter, where it pays."""

    def __init__(self, read_times: ReadTimes, ffn_dim: int) -> None:
        self.mode: LookaheadMode = "auto" if read_times.layer_s else "off"
        self._bundle_read_s = read_times.scattered_s / ffn_dim
        self._read_s = 0.0
        self._scoring_s = 0.0

    def note(self, scoring_s: float, n_read: int) -> None:
        """After a layer step: how long its neurons took to choose, and how many bundles were read."""
        self._scoring_s += (scoring_s - self._scoring_s) * (1 - _MEMORY)
        self._read_s += (n_read * self._bundle_read_s - self._read_s) * (1 - _MEMORY)

    @property
    def from_input(self) -> bool:
        """Whether to look ahead from what enters a layer, before its attention."""
        return self.mode == "input"

    @property
    def from_before(self) -> bool:
        """Whether to look ahead from what enters the MLP of the layer before."""
        return self.mode == "before" or (self.mode == "auto" and self._read_s > _SCORINGS * self._scoring_s)
