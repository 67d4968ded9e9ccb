"""`scripts/record_status.py`: pages of a terminal, frames, and the SVG that plays them."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from record_status import Frame, lines_of, svg

RECORDING = Path(__file__).parents[2] / "scripts" / "bench" / "results" / "status-watch.svg"
NAMESPACE = "{http://www.w3.org/2000/svg}"
FRAMES = [
    Frame(0.0, ("server s: ready", '  model      a <b> & "c"', "      PID  MODEL"), "before"),
    Frame(0.5, ("server s: degraded", "  ! why"), "before"),
    Frame(1.25, ("server s: ready",), "after"),
]


def texts(content: str) -> list[ElementTree.Element]:
    return [*ElementTree.fromstring(content).iter(f"{NAMESPACE}text")]


def test_lines_of_a_page_are_without_what_only_a_terminal_understands() -> None:
    assert lines_of(b"one\x1b[K\r\n  two \xc2\xb1\x1b[1m!\x1b[K\x1b[J") == ("one", "  two ±!")


def test_each_frame_has_its_lines_and_its_caption_as_they_are() -> None:
    shown = [element.text for element in texts(svg(FRAMES, "a title"))]
    assert shown[0] == "$ a title"
    assert shown[1:] == [
        *("server s: ready", 'model      a <b> & "c"', "PID  MODEL", "before"),
        *("server s: degraded", "! why", "before"),
        *("server s: ready", "after"),
    ]


def test_frames_come_at_their_times_and_the_last_one_stays_a_while() -> None:
    content = svg(FRAMES, "a title", hold_s=1.25)
    assert "play 2.50s step-end infinite" in content
    moves = re.findall(r"([\d.]+)% \{ transform: translateY\((-?\d+)px\)", content)
    height = -int(moves[1][1])
    assert [(float(share), int(shift)) for share, shift in moves] == [(0, 0), (20, -height), (50, -2 * height)]


def test_characters_stand_in_columns_whatever_font_there_is() -> None:
    first, second = (
        next(element for element in texts(svg(FRAMES, "t")) if element.text == text)
        for text in ("server s: ready", "PID  MODEL")
    )
    width = float(first.get("textLength", 0)) / len("server s: ready")
    assert float(second.get("x", 0)) - float(first.get("x", 0)) == pytest.approx(6 * width)


def test_recording_is_small_has_no_script_and_shows_one_of_two_clients_killed() -> None:
    content = RECORDING.read_text(encoding="utf-8")
    assert len(content) < 300_000
    root = ElementTree.fromstring(content)
    assert {element.tag.removeprefix(NAMESPACE) for element in root.iter()} <= {
        "svg",
        "title",
        "style",
        "rect",
        "text",
        "g",
    }
    shown = [element.text or "" for element in texts(content)]
    assert not [text for text in shown if not text.isprintable() or "/tmp" in text or "/home" in text]
    killed = next(text for text in shown if text.startswith("kill -9 ")).split()[-1]
    n_with_it = [
        sum(text.startswith(f"{killed} ") for text in shown),
        sum(text.startswith("sessions   2") for text in shown),
    ]
    assert n_with_it[0] == n_with_it[1] > 5
    assert sum(text.startswith("sessions   1") for text in shown) > 5


def test_lines_of_the_recording_fit_their_window() -> None:
    content = RECORDING.read_text(encoding="utf-8")
    width = float(ElementTree.fromstring(content).get("width", 0))
    for element in texts(content):
        assert float(element.get("x", 0)) + float(element.get("textLength", 0)) <= width, element.text
