"""Text that comes token by token: whole characters, and the spaces between words."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparseflow.utils.token_text import TokenText


def test_characters_are_shown_whole_and_all_of_them(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = "naïve café — 日本語 🙂 end"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    flow = TokenText(tokenizer)
    pieces = [flow.push(token_id) for token_id in ids]
    assert len(ids) > len(text)  # so that some characters are of several tokens
    assert "".join(pieces) + flow.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if "🙂" in piece]


def test_half_a_character_comes_at_the_end_only(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer("🙂", add_special_tokens=False).input_ids
    assert len(ids) > 1
    flow = TokenText(tokenizer)
    assert [flow.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🙂"]
    assert flow.rest() == ""
    half = TokenText(tokenizer)
    assert half.push(ids[0]) == ""
    assert half.rest() == "\ufffd"


def test_a_space_between_prompt_and_text_is_kept() -> None:
    """A tokenizer as sentencepiece makes them drops the space before the first word that it decodes."""
    backend = Tokenizer(models.WordLevel({"▁to": 0, "▁be": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert TokenText(tokenizer, [0]).push(1) == " be"
    assert TokenText(tokenizer).push(1) == "be"
