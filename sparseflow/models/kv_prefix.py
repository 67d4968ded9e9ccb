"""Keys and values that outlive a text: what the next one begins with is not computed anew."""

from collections.abc import Sequence
from itertools import takewhile

from transformers import DynamicCache, PretrainedConfig


class KVPrefix:
    """A cache of keys and values, and the tokens that they are of."""

    def __init__(self, config: PretrainedConfig) -> None:
        """config: of the model."""
        self._config = config
        self.forget()

    def forget(self) -> None:
        """Begin with nothing: also after a step that was left half done, where layers hold different numbers."""
        self.cache = DynamicCache(config=self._config)
        self.ids: list[int] = []

    def note(self, ids: Sequence[int]) -> None:
        """Tell what was computed with the cache. ids: the whole text, of which the last tokens may not be in it."""
        self.ids = list(ids[: self.cache.get_seq_length()])

    def keep(self, ids: Sequence[int]) -> int:
        """Cut back to what these tokens begin with; how many are kept. The last one is always computed."""
        pairs = zip(ids[:-1], self.ids, strict=False)
        n_known = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        self.cut(n_known)
        return n_known

    def cut(self, n_tokens: int) -> None:
        """Keep so many at most."""
        n_too_many = len(self.ids) - n_tokens
        if n_tokens == 0:
            self.forget()
        elif n_too_many > 0:
            self.cache.crop(-n_too_many)
            del self.ids[n_tokens:]
