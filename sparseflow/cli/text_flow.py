"""Text as it comes, token by token: whole characters only, and nothing of a stop text."""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what a character decodes to whose last bytes are still to come


class TextFlow:
    """Tokens in, the characters out that are whole."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """decode: what a tokenizer makes of ids."""
        self._decode = decode
        self._ids: list[int] = []
        self._start = self._n_shown = 0

    def push(self, token: int) -> str:
        """What is new in the text; nothing where a character is not whole yet."""
        self._ids.append(token)
        new = self.rest()
        if not new or new.endswith(_BROKEN):
            return ""
        self._start, self._n_shown = self._n_shown, len(self._ids)
        return new

    def rest(self) -> str:
        """What `push` has held back."""
        # Decoded behind what came before: a tokenizer may drop the space at the beginning of a text.
        before = self._decode(self._ids[self._start : self._n_shown])
        return self._decode(self._ids[self._start :])[len(before) :]


class StopFilter:
    """Text in, out what certainly stands before a stop text. The one that is whole first counts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False

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
