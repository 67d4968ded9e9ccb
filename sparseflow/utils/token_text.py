"""Tokens to text as they come: whole characters only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CONTEXT = 32  # tokens before, which say how the next one is written


class TokenText:
    """Tokens of a text that goes on after a prompt in, the characters out that are whole. Special tokens have none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int] = ()) -> None:
        """
        Args:
            tokenizer: one with a `backend_tokenizer`.
            prompt_ids: what comes before: a tokenizer may drop the space at the beginning of a text.
        """
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        # One by one: given as a whole, a prompt that ends within a character would come out with the first token.
        for token_id in prompt_ids[-_CONTEXT:]:
            self._stream.step(tokenizer.backend_tokenizer, token_id)
        self._pending: list[int] = []  # tokens of a character that is not whole yet

    def push(self, token_id: int) -> str:
        """What is new in the text; nothing where a character is not whole yet."""
        self._pending.append(token_id)
        text: str | None = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
        if text is None:
            return ""
        self._pending.clear()
        return text

    def rest(self) -> str:
        """What `push` has held back: part of a character, as the tokenizer shows such."""
        return str(self._tokenizer.decode(self._pending, skip_special_tokens=True)) if self._pending else ""
