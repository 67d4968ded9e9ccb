"""The page of `sparseflow status`: what it says of a server, how it goes on, and how it fits a terminal."""

import re
import signal
from typing import Any

import pytest
from made_status import GPU_CHILD, SHARED_DENSE, made_model, made_session, made_status

from sparseflow.cli.main import main
from sparseflow.cli.status import _fitted, _frame, page
from sparseflow.errors import NoAnswer, ServerNotRunning

Capture = pytest.CaptureFixture[str]


def line(text: str, begin: str) -> str:
    """The only line that begins so."""
    (found,) = [line for line in text.splitlines() if line.lstrip().startswith(begin)]
    return found


# --- what it says


def test_page_says_how_the_server_and_its_memory_are() -> None:
    text = page(made_status())
    assert text.startswith("server s: ready, pid 77, up 0:01:40, version 1.2.3, epoch abc\n")
    assert "hit rate 88%, 17 evictions" in line(text, "arena")
    assert line(text, "disk").endswith("11 reads of 2.5 bundles; a layer takes 2.0 ms, 99 % under 50.0 ms")
    assert line(text, "sessions").endswith("1 (at most 8 for each model)")
    assert line(text, "threads").endswith("2, all well")
    assert "40 of 50 slots used" in line(text, "model")
    assert line(text, "hits by layer").split()[3:] == ["50%", "75%"]


def test_sessions_stand_in_columns_under_their_headings() -> None:
    text = page(made_status(sessions=[made_session(), made_session(pid=7, tokens=123456, last_error="arena busy")]))
    heading, first, second = text.splitlines()[-4:-1]
    for name, one, other in (("TOKENS ", "31 ", "123456 "), ("PID", "4242", "7")):
        end = heading.index(name) + len(name.rstrip())
        assert first[:end].endswith(one.rstrip())
        assert second[:end].endswith(other.rstrip())
    assert second.endswith("arena busy")
    assert second.index("arena busy") == heading.index("LAST ERROR")


def test_what_is_unknown_is_said_to_be_and_is_never_0() -> None:
    status = made_status(hit_rate=None, sessions=[made_session(recall=None, recall_error=None, hit_rate=None)])
    status["disk"] |= {"latency_p50_s": None, "latency_p99_s": None, "bundles_per_read": None}
    status["memory"]["page_cache"] = None
    text = page(status)
    assert "n/a of the stores in the page cache" in text
    assert "hit rate n/a" in text
    assert "a layer takes n/a, 99 % under n/a" in text
    assert text.splitlines()[-2].split()[4:6] == ["n/a", "n/a"]


def test_reasons_and_dead_threads_are_named() -> None:
    threads = [{"name": "loop", "alive": False, "last_tick_age_s": 9, "errors": 0}]
    text = page(made_status(state="degraded", reasons=["the disk is gone"], threads=threads))
    assert text.splitlines()[1] == "  ! the disk is gone"
    assert line(text, "threads").endswith("1, dead: loop")


def test_gpus_and_metrics_are_there_where_they_are_used() -> None:
    text = page(made_status(gpu_children=[GPU_CHILD], shared_dense=SHARED_DENSE, metrics="http://127.0.0.1:1/metrics"))
    assert line(text, "gpu        A GPU").endswith("4KiB in 5 pushes, 1 slabs; 1 errors, the last: it fell asleep")
    assert line(text, "gpu 0").endswith("0.68KiB of opt for all: ready, used by 2 sessions")
    assert line(text, "metrics").split() == ["metrics", "http://127.0.0.1:1/metrics"]
    assert not re.search("gpu|metrics", page(made_status()))


@pytest.mark.parametrize("said", ["\x1b[2Jgone", "two\nlines", "a\rb", "\x9b31m"])
def test_what_a_stranger_has_sent_does_nothing_to_a_terminal(said: str) -> None:
    n_lines = len(page(made_status(reasons=["x"])).splitlines())
    text = page(made_status(reasons=[said], sessions=[made_session(last_error=said)]))
    assert len(text.splitlines()) == n_lines
    assert all(character.isprintable() or character == "\n" for character in text)


# --- how it goes on


def later(seconds: float, **more: int) -> dict[str, Any]:
    """The same server after a while. more: what was added to its counts; `bytes` are those from disk."""
    status = made_status()
    status["uptime_s"] += seconds
    status["disk"]["bytes"] += more.pop("bytes", 0)
    return status | {name: status[name] + n for name, n in more.items()}


def test_rates_are_those_between_two_looks() -> None:
    text = page(later(2, tokens=50, hits=300, misses=100, bytes=9_000_000), made_status())
    assert line(text, "now").split(maxsplit=1)[1] == "25.0 tokens/s, 4.5 MB/s from disk, hit rate 75%"


@pytest.mark.parametrize(
    "before",
    [None, made_status(epoch=1), made_status(uptime_s=1e9)],
    ids=["the first look", "another server", "a clock that was set back"],
)
def test_rates_are_unknown_where_there_are_no_two_looks_at_one_server(before: dict[str, Any] | None) -> None:
    text = page(later(2, tokens=50), before, is_watching=True)
    assert line(text, "now").split(maxsplit=1)[1] == "n/a tokens/s, n/a MB/s from disk, hit rate n/a"


def test_server_that_is_asked_for_nothing_has_no_hit_rate_now() -> None:
    assert line(page(later(1), made_status()), "now").endswith("0.0 tokens/s, 0.0 MB/s from disk, hit rate n/a")


def test_single_look_says_nothing_of_rates_and_pages_of_one_watch_have_the_same_lines() -> None:
    assert "  now" not in page(made_status())
    first, second = page(made_status(), is_watching=True), page(later(1), made_status(), is_watching=True)
    assert len(first.splitlines()) == len(second.splitlines())


# --- watching


GONE, STUCK, INTERRUPT = ServerNotRunning("no server"), NoAnswer("said nothing"), "Ctrl-C, while it is answered"


@pytest.mark.parametrize(
    ("looks", "code", "n_pages", "said"),
    [
        ([made_status(), GONE, GONE, made_status()], 0, 2, ["server s: no server; waiting"]),
        ([made_status(), STUCK, made_status()], 0, 2, ["server s: no answer; waiting"]),
        ([made_status(), INTERRUPT, made_status()], 0, 2, []),
        ([made_status(state="degraded", reasons=["x"]), made_status()], 0, 2, []),
        ([made_status(), made_status(state="degraded", reasons=["x"])], 1, 2, []),
        ([made_status(), GONE], 3, 1, ["sparseflow: error: no server"]),
        ([GONE], 3, 0, ["sparseflow: error: no server"]),
        ([STUCK], 4, 0, ["sparseflow: error: said nothing"]),
    ],
)
def test_watch_that_has_begun_goes_on_until_its_last_look_or_ctrl_c(
    looks: list[Any], code: int, n_pages: int, said: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    def ask_status(*_: object) -> dict[str, Any]:
        look = left.pop(0)
        if isinstance(look, BaseException):
            raise look
        if look == INTERRUPT:
            signal.raise_signal(signal.SIGINT)
            return made_status()
        return dict(look)

    monkeypatch.setattr("sparseflow.protocol.inquiry.ask_status", ask_status)
    for words in ([], ["--json"]):
        left = [*looks]
        count = ["--count", str(len(looks))]
        assert main(["status", "--server", "s", "--watch", "0.1", *count, *words]) == code
        out, err = capfd.readouterr()
        told = [text for text in said if text in (err if words or "error" in text else out)]
        assert told == said
        assert out.count('"status_version"' if words else "server s: ready") + out.count("server s: degr") == n_pages


def test_ctrl_c_at_a_single_look_is_no_end_that_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_status(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparseflow.protocol.inquiry.ask_status", ask_status)
    assert main(["status", "--server", "s"]) == 130


# --- how it fits


@pytest.mark.parametrize("columns", [20, 40, 79, 80, 120, 500])
def test_lines_are_never_longer_than_the_terminal_and_no_word_is_lost(columns: int) -> None:
    session = made_session(last_error="a reason " * 30 + "x" * 200)
    text = page(made_status(models=[made_model(hit_rate_by_layer=[0.5] * 60)], sessions=[session]))
    fitted = _fitted(text, columns)
    assert max(map(len, fitted.splitlines())) <= columns
    assert "".join(fitted.split()) == "".join(text.split())


def test_page_that_fits_is_left_as_it_is() -> None:
    text = page(made_status(sessions=[made_session(), made_session(pid=7)]))
    assert _fitted(text, 120) == text


@pytest.mark.parametrize(
    ("rows", "expected"), [(3, ["a", "b", "c"]), (2, ["a", "  ... 2 more lines; make the window higher"])]
)
def test_frame_has_no_more_lines_than_the_terminal(rows: int, expected: list[str]) -> None:
    frame = _frame("a\nb\nc", 80, rows)
    assert frame.startswith("\x1b[H")
    assert frame.endswith("\x1b[J")
    assert frame.replace("\x1b[H", "").replace("\x1b[K", "").replace("\x1b[J", "").split("\n") == expected
