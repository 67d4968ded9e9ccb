"""Text that comes in pieces: whole characters, and what stands before a stop text."""

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparseflow.cli.text_flow import StopFilter, TextFlow

ABC = st.text("abc", max_size=30)


def before_the_stop(text: str, stops: Sequence[str]) -> str:
    """The slow way: the shortest beginning that ends with a stop text, without the longest such."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(ABC, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 5), min_size=1))
def test_a_stop_text_ends_the_text_in_whatever_pieces_it_comes(text: str, stops: list[str], sizes: list[int]) -> None:
    stop, shown, start, n = StopFilter(stops), "", 0, 0
    while start < len(text):
        size = sizes[n % len(sizes)]
        shown += stop.push(text[start : start + size])
        assert before_the_stop(text, stops).startswith(shown)  # what is shown is never taken back
        start, n = start + size, n + 1
    assert shown + stop.rest() == before_the_stop(text, stops)
    assert stop.is_found == any(stop in text for stop in stops)


def test_nothing_is_held_back_that_no_stop_text_begins_with() -> None:
    stop = StopFilter(["\n\n", "END"])
    assert [stop.push(piece) for piece in ("one\n", "two E", "ach", "\n\nmore", "x")] == [
        "one",
        "\ntwo ",
        "Each",
        "",
        "",
    ]
    assert stop.is_found


def test_characters_are_shown_whole_and_all_of_them(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = "naïve café — 日本語 🙂 end"
    flow = TextFlow(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = [flow.push(token) for token in ids]
    assert len(ids) > len(text)  # so that some characters are of several tokens
    assert "".join(pieces) + flow.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if "🙂" in piece]
