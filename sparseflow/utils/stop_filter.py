"""Text as it comes, and nothing of a stop text."""

from collections.abc import Sequence


class StopFilter:
    """Text in, out what certainly stands before a stop text. The one that is whole first counts."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: an empty one stops nothing."""
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_found = False

    @property
    def n_held(self) -> int:
        """Characters that were pushed and not given out, those of a stop text and behind it too."""
        return len(self._held)

    def push(self, text: str) -> str:
        """What is certain by now. After a stop text nothing is."""
        if self.is_found:
            return ""
        self._held += text
        ends = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.is_found = bool(ends)
        n_certain = min(ends)[1] if ends else len(self._held) - self._n_doubtful()
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        return certain

    def rest(self) -> str:
        """What was held back, where no stop text came of it."""
        return "" if self.is_found else self._held

    def _n_doubtful(self) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)
