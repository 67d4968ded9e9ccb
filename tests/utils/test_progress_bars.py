"""Bars: silent for programs and where asked to, delayed, and gone at the end."""

import io
import sys
import threading
import time

import pytest

from sparseflow.utils import progress as progress_module
from sparseflow.utils.progress import is_silent, progress, waiting


class Screen(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen_of(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Put one in place; in the test itself, for pytest puts its own in place before that."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    return screen


def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long takes 50 ms."""
    monkeypatch.setattr(progress_module, "DELAY_S", 0.05)
    monkeypatch.setattr(progress_module, "_TICK_S", 0.01)


def work(quiet: bool = False) -> None:
    for _ in progress(range(30), "steps", quiet=quiet, mininterval=0):
        time.sleep(0.005)
    with waiting("something", quiet=quiet):
        time.sleep(0.15)


def test_what_takes_long_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    soon(monkeypatch)
    work()
    assert "steps:" in screen.getvalue()
    assert "30/30" in screen.getvalue()
    assert "something: 00:00" in screen.getvalue()
    assert screen.getvalue().endswith("\r")  # the line of what was waited for is cleared


def test_what_is_done_soon_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    work()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("reason", ["quiet", "no terminal", "HF_HUB_DISABLE_PROGRESS_BARS"])
def test_nothing_is_shown_and_no_thread_started(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    screen = screen_of(monkeypatch)
    soon(monkeypatch)
    if reason == "no terminal":
        monkeypatch.setattr(Screen, "isatty", lambda _: False)
    elif reason != "quiet":
        monkeypatch.setenv(reason, "1")
    assert is_silent(reason == "quiet")
    n_threads = threading.active_count()
    with waiting("something", quiet=reason == "quiet"):
        assert threading.active_count() == n_threads
    work(quiet=reason == "quiet")
    assert screen.getvalue() == ""


def test_bytes_that_are_done_are_asked_for_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    soon(monkeypatch)
    asked: list[int] = []

    def n_done() -> int:
        asked.append(1)
        return min(len(asked) * 10**6, 5 * 10**6)

    with waiting("reading", quiet=False, total=4 * 10**6, n_done=n_done):
        time.sleep(0.3)
    assert "reading:  25%" in screen.getvalue()
    assert "reading: 100%" in screen.getvalue()  # never more
    assert "4.00M/4.00M" in screen.getvalue()


def test_a_failure_ends_the_bar_and_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    soon(monkeypatch)
    with pytest.raises(KeyError), waiting("something", quiet=False):
        {}[time.sleep(0.1)]
    assert "something" in screen.getvalue()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
