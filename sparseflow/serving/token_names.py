"""How single tokens are shown: text where their bytes are characters, else the bytes."""

from functools import cache
from typing import TYPE_CHECKING

from sparseflow.serving.messages import TokenName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenNames:
    """The names of a tokenizer's tokens. A token of a byte-level vocabulary need not be whole characters; then its name
    is `bytes:\\xe2\\x80`, so that different tokens have different names."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"
        self.of = cache(self._of)

    def _of(self, token_id: int) -> TokenName:
        raw = self._bytes(token_id)
        try:
            return TokenName(raw.decode(), raw)
        except UnicodeDecodeError:
            return TokenName("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    def _bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a model may have more rows than its tokenizer has tokens
            return f"<{token_id}>".encode()
        if self._is_byte_level and token not in self._tokenizer.added_tokens_encoder:
            return bytes(_byte_of()[char] for char in token)
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()


@cache
def _byte_of() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}
