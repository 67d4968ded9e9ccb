"""Text that comes in pieces, and what stands before a stop text."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sparseflow.utils.stop_filter import StopFilter

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
        assert stop.is_found or len(shown) + stop.n_held == min(start, len(text))
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


def test_an_empty_stop_text_stops_nothing() -> None:
    stop = StopFilter([""])
    assert stop.push("text") == "text"
    assert not stop.is_found
