"""Tokens to text as they come, each with its place: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparseflow.serving.messages import ScoredToken
from sparseflow.utils.stop_filter import StopFilter
from sparseflow.utils.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Shown:
    """Text that may be shown now, and the tokens whose text begins in it."""

    text: str
    tokens: list[ScoredToken]


class TextStream:
    """The text of one choice. It ends before the stop string that is complete first."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int], stop: Sequence[str], offset: int = 0
    ) -> None:
        """
        Args:
            prompt_ids: what comes before, which may matter for how the first token is written.
            offset: characters of this choice's text before the first token's.
        """
        self._text = TokenText(tokenizer, prompt_ids)
        self._stop = StopFilter(stop)
        self._shown = offset  # characters given out
        self._tokens: list[ScoredToken] = []  # not given out

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.is_found

    def push(self, token_id: int, token: ScoredToken | None) -> Shown:
        """One more token; its offset is set here. What may be shown after it."""
        if token is not None:
            self._tokens.append(replace(token, offset=self._shown + self._stop.n_held))
        return self._give_out(self._stop.push(self._text.push(token_id)))

    def finish(self) -> Shown:
        """The end: all that is left."""
        shown = self._give_out(self._stop.push(self._text.rest()) + self._stop.rest())
        tokens, self._tokens = ([] if self.is_stopped else self._tokens), []
        return Shown(shown.text, shown.tokens + tokens)

    def _give_out(self, text: str) -> Shown:
        self._shown += len(text)
        n_tokens = sum(token.offset < self._shown for token in self._tokens)
        tokens, self._tokens = self._tokens[:n_tokens], self._tokens[n_tokens:]
        return Shown(text, tokens)
