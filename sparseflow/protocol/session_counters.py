"""One page that the server gives to each session: the client counts in it, the server reads. No message is needed.

byte 0       8        16        24          32         40
+------------+--------+---------+-----------+----------+------
| tokens,    | found, | missed, | variance, | samples, | zero
| uint64     | float64, as in `MeasuredRecall`         |
+------------+--------+---------+-----------+----------+------

The client may write anything at any time, and the numbers of a measurement need not be of one moment.
"""

from typing import Any

from sparseflow.protocol.measured_recall import MeasuredRecall

COUNTERS_NBYTES = 4096
_RECALL_WORDS = range(1, 1 + len(MeasuredRecall._fields))


class SessionCounters:
    """A view of the page, on either side."""

    def __init__(self, page: Any) -> None:
        """
        Args:
            page: a buffer of COUNTERS_NBYTES.
        """
        content = memoryview(page).cast("B")
        self._words, self._floats = content.cast("Q"), content.cast("d")

    @property
    def tokens(self) -> int:
        """Tokens decoded so far."""
        return self._words[0]

    def add_tokens(self, n: int) -> None:
        """Count tokens. The client's only."""
        self._words[0] += n

    @property
    def recall(self) -> MeasuredRecall:
        """As measured so far."""
        return MeasuredRecall(*(self._floats[word] for word in _RECALL_WORDS))

    def set_recall(self, measured: MeasuredRecall) -> None:
        """Say what has been measured so far. The client's only."""
        for word, value in zip(_RECALL_WORDS, measured, strict=True):
            self._floats[word] = value
