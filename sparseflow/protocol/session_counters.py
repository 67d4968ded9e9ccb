"""One page that the server gives to each session: the client counts in it, the server reads. No message is needed.

byte 0       8
+------------+------
| tokens,    | zero
| uint64     |
+------------+------
"""

from typing import Any

COUNTERS_NBYTES = 4096


class SessionCounters:
    """A view of the page, on either side."""

    def __init__(self, page: Any) -> None:
        """
        Args:
            page: a buffer of COUNTERS_NBYTES.
        """
        self._words = memoryview(page).cast("B").cast("Q")

    @property
    def tokens(self) -> int:
        """Tokens decoded so far."""
        return self._words[0]

    def add_tokens(self, n: int) -> None:
        """Count tokens. The client's only."""
        self._words[0] += n
