"""Record `sparseflow status --watch`: a server of the demo model, two clients, of which one is killed half way.

    python scripts/record_status.py --out status-watch.svg

Real processes and a real terminal of 100x30; the recording is an SVG that plays by CSS alone.
"""

import argparse
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import sparseflow
from sparseflow.errors import ServerError
from sparseflow.protocol.inquiry import ask_status

COLUMNS, ROWS = 100, 30
SERVER = "demo"
PROMPTS = "In the beginning", "Enter HAMLET"
CLIENT = f"""
import sys
from transformers import AutoTokenizer
from sparseflow import SparseOPTForCausalLM
model = SparseOPTForCausalLM.from_server({SERVER!r})
inputs = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors="pt")
while True:
    model.generate(**inputs, max_new_tokens=200, do_sample=True)
"""
DEMO_MODEL = Path(sparseflow.__file__).parent / "assets" / "demo_model"
_DEADLINE_S = 120.0
_END_S = 10.0
_NEW_PAGE = b"\x1b[H"
_LEAVE = b"\x1b[?1049l"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Frame:
    """What the terminal shows from a moment on. at_s: since the recording began."""

    at_s: float
    lines: tuple[str, ...]
    caption: str = ""


# --- processes


@contextlib.contextmanager
def process(words: list[str], environment: Mapping[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A program for this Python; it is ended with the block."""
    with open(log, "ab") as output:
        started = subprocess.Popen([sys.executable, *words], stdout=output, stderr=output, env=environment)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(_END_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait(_END_S)


def until(found: Callable[[dict[str, Any]], bool], log: Path) -> None:
    """Wait until the server's status is such.

    Raises:
        TimeoutError: it does not get so; with what the processes have written.
    """
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ServerError):  # not there yet
            if found(ask_status(SERVER)):
                return
        time.sleep(0.1)
    raise TimeoutError(f"not within {_DEADLINE_S:g} s\n{log.read_text('utf-8', errors='replace')}")


def record(seconds: float, interval_s: float) -> list[Frame]:
    """Start everything, watch it for so long, and end everything."""
    with tempfile.TemporaryDirectory(prefix="sf-") as folder, contextlib.ExitStack() as running:
        places = {"SPARSEFLOW_RUNTIME_DIR": f"{folder}/run", "SPARSEFLOW_HOME": f"{folder}/home"}
        os.environ.update(places)  # for asking here too
        environment, log = os.environ | {"OMP_NUM_THREADS": "1"}, Path(folder, "log")
        daemon = ["-m", "sparseflow_daemon", str(DEMO_MODEL), "--name", SERVER, "--cpu-cache-ratio", "0.3"]
        running.enter_context(process(daemon, environment, log))
        until(lambda status: status["state"] == "ready", log)
        clients = [
            running.enter_context(process(["-c", CLIENT, str(DEMO_MODEL), prompt], environment, log))
            for prompt in PROMPTS
        ]
        until(lambda status: sum(session["tokens"] > 0 for session in status["sessions"]) == len(clients), log)
        count = round(seconds / interval_s) + 1
        words = ["-m", "sparseflow", "status", "--server", SERVER, "--watch", str(interval_s), "--count", str(count)]
        return watched(words, environment, clients[-1], seconds / 2)


def watched(
    words: list[str], environment: Mapping[str, str], victim: "subprocess.Popen[bytes]", kill_at_s: float
) -> list[Frame]:
    """What a program shows in a terminal; meanwhile another one is killed."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
        watching = subprocess.Popen(
            [sys.executable, *words], stdin=theirs, stdout=theirs, env=environment | {"TERM": "xterm"}
        )
    finally:
        os.close(theirs)
    try:
        return _frames_from(ours, victim, kill_at_s, time.monotonic() + 2 * kill_at_s + _DEADLINE_S)
    finally:
        os.close(ours)
        watching.terminate()
        watching.wait(_END_S)


def _frames_from(terminal: int, victim: "subprocess.Popen[bytes]", kill_at_s: float, deadline_s: float) -> list[Frame]:
    shown, caption = b"", "two clients generate"
    arrivals: list[tuple[float, str]] = []  # of each page
    begin_s: float | None = None
    while _LEAVE not in shown:
        ready, _, _ = select.select([terminal], [], [], 0.02)
        now = time.monotonic()
        if now > deadline_s:
            raise TimeoutError(f"the recording has not ended; so far: {shown!r}")
        if begin_s is not None and now - begin_s >= kill_at_s and victim.poll() is None:
            victim.kill()
            victim.wait(_END_S)
            caption = f"kill -9 {victim.pid}"
        if ready:
            shown += os.read(terminal, 1 << 16)
            if begin_s is None and _NEW_PAGE in shown:
                begin_s = now
            arrivals += [(now - (begin_s or now), caption)] * (shown.count(_NEW_PAGE) - len(arrivals))
    pages = shown.partition(_LEAVE)[0].split(_NEW_PAGE)[1:]
    frames = [Frame(at_s, lines_of(page), said) for (at_s, said), page in zip(arrivals, pages, strict=True)][1:]
    first_s = frames[0].at_s  # the first look has nothing to compare with
    return [replace(frame, at_s=frame.at_s - first_s) for frame in frames]


def lines_of(page: bytes) -> tuple[str, ...]:
    """A page without what only a terminal understands."""
    return tuple(line.rstrip() for line in _ESCAPE.sub("", page.decode()).splitlines())


# --- SVG

_FONT_PX, _CHARACTER_PX, _LINE_PX, _MARGIN_PX, _BAR_PX = 14, 8.4, 19, 14, 34
_STYLE = """\
text { font: %dpx ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d6deeb; }
.head { font-weight: bold; fill: #82d8a0; } .columns, .title { fill: #8291a5; } .ill { fill: #ff7b72; }
.caption { fill: #f2cc60; }
#film { animation: play %.2fs step-end infinite; }
@keyframes play { %s }
@media (prefers-reduced-motion: reduce) { #film { animation: none; } }
"""


def svg(frames: list[Frame], title: str, hold_s: float = 2.0) -> str:
    """A strip of frames that moves behind a window. hold_s: how long the last one stays before it begins again."""
    width = round(COLUMNS * _CHARACTER_PX) + 2 * _MARGIN_PX
    height = max(len(frame.lines) for frame in frames) * _LINE_PX + _MARGIN_PX + _BAR_PX  # of a frame
    total_s = frames[-1].at_s + hold_s
    moves = " ".join(
        f"{100 * frame.at_s / total_s:.2f}% {{ transform: translateY({-n * height}px); }}"
        for n, frame in enumerate(frames)
    )
    whole = height + _BAR_PX
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" width="{width}" height="{whole}">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE % (_FONT_PX, total_s, moves)}</style>",
            f'<rect width="{width}" height="{whole}" rx="8" fill="#11161d"/>',
            _text(_MARGIN_PX, _BAR_PX - _MARGIN_PX, f"$ {title}", "title"),
            f'<svg y="{_BAR_PX}" width="{width}" height="{height}" overflow="hidden">',
            '<g id="film">',
            *(line for n, frame in enumerate(frames) for line in _drawn(frame, n * height, (n + 1) * height)),
            "</g>",
            "</svg>",
            "</svg>\n",
        ]
    )


def _drawn(frame: Frame, top: int, bottom: int) -> Iterator[str]:
    for n, line in enumerate(frame.lines, 1):
        if line:
            yield _text(_MARGIN_PX, top + n * _LINE_PX, line, _kind(line))
    yield _text(_MARGIN_PX, bottom - _MARGIN_PX, frame.caption, "caption")


def _kind(line: str) -> str:
    if line.startswith("server "):
        return "head"
    if line.startswith("  !"):
        return "ill"
    return "columns" if line.split()[:1] == ["PID"] else ""


def _text(left: float, base: float, line: str, kind: str) -> str:
    """A line, as wide as its characters are in a terminal, whatever font there is."""
    bare = line.lstrip()
    x, width = left + (len(line) - len(bare)) * _CHARACTER_PX, len(bare) * _CHARACTER_PX
    place = f'x="{x:.1f}" y="{base}" textLength="{width:.1f}" xml:space="preserve"'
    style = f' class="{kind}"' if kind else ""
    return f"<text{style} {place}>{escape(bare, False)}</text>"


def main() -> None:
    """Record, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the SVG")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the recording (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two pages (default: %(default)s)")
    arguments = parser.parse_args()
    frames = record(arguments.seconds, arguments.interval)
    arguments.out.write_text(
        svg(frames, f"sparseflow status --server {SERVER} --watch {arguments.interval:g}"), encoding="utf-8"
    )
    print(f"{len(frames)} pages, {arguments.out.stat().st_size / 1e3:.0f} kB: {arguments.out}")


if __name__ == "__main__":
    main()
