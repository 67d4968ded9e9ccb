"""Pages of documentation as tests read them: their blocks of code, their tables, their links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORE = ROOT / "sparseflow" / "store" / "README.md"
PROTOCOL = ROOT / "sparseflow" / "protocol" / "README.md"
TUNING = ROOT / "sparseflow" / "engine" / "TUNING.md"
OPERATING = ROOT / "daemon" / "README.md"
PAGES = (STORE, PROTOCOL, TUNING, OPERATING)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    code: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """What stands outside of blocks."""
    return _BLOCK.sub("", text_of(page))


def blocks(page: Path, *languages: str) -> list[Block]:
    """Those of these languages, in their order; all of them where none is named."""
    found = [Block(*match) for match in _BLOCK.findall(text_of(page))]
    return [block for block in found if not languages or block.language in languages]


def rows(page: Path, head: str) -> list[list[str]]:
    """The cells of all tables whose first line begins with `head`."""
    lines = text_of(page).splitlines()
    found = []
    for n, line in enumerate(lines):
        if line.startswith(head) and lines[n + 1].startswith("|---"):
            for row in lines[n + 2 :]:
                if not row.startswith("|"):
                    break
                found.append([cell.strip() for cell in row.strip("|").split("|")])
    assert found, f"{page}: no table {head!r}"
    return found


def names(cell: str) -> list[str]:
    """What a cell has in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def column(page: Path, head: str) -> list[str]:
    """All names in the first cells of a table."""
    return [name for row in rows(page, head) for name in names(row[0])]


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
