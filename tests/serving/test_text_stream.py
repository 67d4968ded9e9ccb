"""Text as it comes against the whole text decoded at once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import sparseflow
from sparseflow.serving.messages import ScoredToken
from sparseflow.serving.text_stream import TextStream
from sparseflow.serving.token_names import TokenNames

TOKENIZER: Any = AutoTokenizer.from_pretrained(Path(sparseflow.__file__).parent / "assets" / "demo_model")
TEXTS = st.one_of(st.text(max_size=12), st.text("abé☃ 🙂", max_size=12))
WHOLE = TEXTS.map(lambda text: TOKENIZER(text).input_ids)  # characters
IDS = st.one_of(
    st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=20),
    TEXTS.map(lambda text: TOKENIZER(text, add_special_tokens=False).input_ids),
)


def whole_text(ids: list[int], stop: list[str]) -> str:
    """The slow twin: decoded anew for each token, until a stop string is complete: the one that ends first."""
    text = ""
    for n_tokens in range(len(ids) + 1):
        text = TOKENIZER.decode(ids[:n_tokens], skip_special_tokens=True)
        if found := [(text.index(word) + len(word), text.index(word)) for word in stop if word in text]:
            return text[: min(found)[1]]
    return text


@settings(max_examples=300, deadline=None)
@given(WHOLE, IDS, st.lists(st.text("abé☃ 🙂e", min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_whole_text_before_its_first_stop_string(
    prompt: list[int], ids: list[int], stop: list[str]
) -> None:
    stream, shown = TextStream(TOKENIZER, prompt, stop), ""
    for token_id in ids:
        shown += stream.push(token_id, None).text
        if stream.is_stopped:
            break
    shown += stream.finish().text
    assert shown == whole_text(ids, stop)


@settings(max_examples=300, deadline=None)
@given(IDS)
def test_every_token_comes_once_in_order_with_where_its_text_begins(ids: list[int]) -> None:
    stream, names = TextStream(TOKENIZER, [], [], offset=7), TokenNames(TOKENIZER)
    tokens: list[ScoredToken] = []
    text = ""
    for token_id in ids:
        shown = stream.push(token_id, ScoredToken(names.of(token_id), -1.0, [], 0))
        tokens += shown.tokens
        text += shown.text
    rest = stream.finish()
    assert [token.name for token in tokens + rest.tokens] == [names.of(token_id) for token_id in ids]
    offsets = [token.offset for token in tokens + rest.tokens]
    assert offsets == sorted(offsets)
    assert all(7 <= offset <= 7 + len(text + rest.text) for offset in offsets)


def test_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = TextStream(TOKENIZER, [], ["the end"])
    shown = [
        stream.push(token_id, None).text for token_id in TOKENIZER("the enough", add_special_tokens=False).input_ids
    ]
    assert "the en" not in shown
    assert "".join(shown) + stream.finish().text == "the enough"


def test_the_stop_string_that_ends_first_counts_in_one_token_too() -> None:
    """`had` comes in one token: it ends with the longer one, which begins earlier."""
    ids = TOKENIZER(" had", add_special_tokens=False).input_ids
    assert len(ids) == 1
    stream = TextStream(TOKENIZER, [2], ["had", "a"])
    assert stream.push(ids[0], None).text + stream.finish().text == " h"
    assert stream.is_stopped


def test_names_of_all_tokens_differ_and_give_their_bytes() -> None:
    """Programs look alternatives up by name: two tokens of one name would hide each other."""
    names = TokenNames(TOKENIZER)
    found = [names.of(token_id) for token_id in range(len(TOKENIZER))]
    assert len({name.text for name in found}) == len(found)
    text = "é☃ In the beginning 🙂"
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert b"".join(names.of(token_id).raw for token_id in ids).decode() == text


@pytest.mark.parametrize(("token", "name"), [("</s>", "</s>"), ("Ġthe", " the"), ("Ċ", "\n")])
def test_name_is_the_text(token: str, name: str) -> None:
    assert TokenNames(TOKENIZER).of(TOKENIZER.convert_tokens_to_ids(token)).text == name
