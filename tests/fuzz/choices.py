"""Bytes read as one decision after another.

What a check needs is made of few bytes by the check itself: strategies of strategies are too slow for a million
examples. The first of what there is to choose from is the simplest, and so is what comes once the bytes have ended.
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Of one example."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._begin = 0

    @property
    def are_over(self) -> bool:
        """Nothing but zeros will come."""
        return self._begin >= len(self._content)

    def take(self, n: int) -> bytes:
        """As many bytes, or fewer at the end."""
        taken = self._content[self._begin : self._begin + n]
        self._begin += n
        return taken

    def number(self, nbytes: int) -> int:
        """0 to 256**nbytes - 1."""
        return int.from_bytes(self.take(nbytes), "little")

    def below(self, n: int) -> int:
        """0 to n - 1, where n is 256 at most."""
        return self.number(1) * n >> 8

    def one_in(self, n: int) -> bool:
        """True once in n times."""
        return self.below(n) == n - 1

    def of(self, options: Sequence[T]) -> T:
        """One of 256 at most."""
        return options[self.below(len(options))]
