"""The README's tables of speed are those of the committed results."""

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))

import tables  # noqa: E402


def test_readme_shows_the_committed_results() -> None:
    readme = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    made = tables.all_tables()
    assert made
    assert tables.written_into(readme, made) == readme
    shown = [title for title, content in made.items() if content in readme]
    assert shown == list(made)


def test_a_table_goes_between_its_marks() -> None:
    text = "before\n<!-- bench x -->\nold\n<!-- end -->\nbetween\n<!-- bench y -->\n<!-- end -->"
    assert tables.written_into(text, {"x": "| new |", "z": "nowhere"}) == text.replace("old", "| new |")
