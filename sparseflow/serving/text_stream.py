"""Tokens to text as they come: whole characters only, and nothing that may be the beginning of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from sparseflow.serving.messages import ScoredToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Shown:
    """Text that may be shown now, and the tokens whose text begins in it."""

    text: str
    tokens: list[ScoredToken]


class TextStream:
    """The text of one choice. It ends before the first stop string in it."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int], stop: Sequence[str], offset: int = 0
    ) -> None:
        """
        Args:
            prompt_ids: what comes before, which may matter for how the first token is written.
            offset: characters of this choice's text before the first token's.
        """
        self._tokenizer = tokenizer
        self._decode = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._stop = [text for text in stop if text]
        self._shown = offset  # characters given out
        self._held = ""  # text that may be the beginning of a stop string
        self._pending: list[int] = []  # tokens of a character that is not whole yet
        self._tokens: list[ScoredToken] = []  # not given out
        self.is_stopped = False
        """Whether a stop string has come."""

    def push(self, token_id: int, token: ScoredToken | None) -> Shown:
        """One more token; its offset is set here. What may be shown after it."""
        if token is not None:
            self._tokens.append(replace(token, offset=self._shown + len(self._held)))
        self._pending.append(token_id)
        text = self._decode.step(self._tokenizer.backend_tokenizer, token_id)
        if text is None:
            return Shown("", [])
        self._pending.clear()
        return self._release(text)

    def finish(self) -> Shown:
        """The end: all that is left."""
        text = str(self._tokenizer.decode(self._pending, skip_special_tokens=True)) if self._pending else ""
        self._pending.clear()
        shown = self._release(text)
        rest, self._held = self._held, ""
        tokens, self._tokens = ([] if self.is_stopped else self._tokens), []
        self._shown += len(rest)
        return Shown(shown.text + rest, shown.tokens + tokens)

    def _release(self, text: str) -> Shown:
        held = self._held + text
        found = [at for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = held[: min(found)], ""
        else:
            n_held = max((_overlap(held, stop) for stop in self._stop), default=0)
            shown, self._held = held[: len(held) - n_held], held[len(held) - n_held :]
        self._shown += len(shown)
        n_tokens = sum(token.offset < self._shown for token in self._tokens)
        tokens, self._tokens = self._tokens[:n_tokens], self._tokens[n_tokens:]
        return Shown(shown, tokens)


def _overlap(text: str, stop: str) -> int:
    """So many last characters of the text are the first of the stop string, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
