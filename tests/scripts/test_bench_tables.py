"""The pages' tables of speed are those of the committed results."""

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))

import tables  # noqa: E402


def test_pages_show_the_committed_results() -> None:
    made = tables.all_tables()
    assert made
    shown: list[str] = []
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.written_into(text, made) == text
        shown += [title for title, content in made.items() if content in text]
    assert sorted(shown) == sorted(made)


def test_a_table_goes_between_its_marks() -> None:
    text = "before\n<!-- bench x -->\nold\n<!-- end -->\nbetween\n<!-- bench y -->\n<!-- end -->"
    assert tables.written_into(text, {"x": "| new |", "z": "nowhere"}) == text.replace("old", "| new |")
