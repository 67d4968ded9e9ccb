"""The loop over real descriptors: who is called, when, and what a handler may do to the others."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from sparseflow_daemon.loop import Loop

LONG_S = 10.0


class Bell:
    """A descriptor that is readable while it rings, and a handler that notes being called."""

    def __init__(self, calls: list["Bell"]) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._calls = calls

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def answer(self) -> None:
        """The handler: takes what has come, if anything."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._calls.append(self)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@pytest.fixture
def loop(no_descriptor_left: None) -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def calls() -> list[Bell]:
    """Whose handlers were called, in their order."""
    return []


@pytest.fixture
def make_bell(loop: Loop, calls: list[Bell]) -> Iterator[Callable[[], Bell]]:
    """A bell that nobody watches yet; it is closed at the end."""
    made: list[Bell] = []

    def make() -> Bell:
        made.append(Bell(calls))
        return made[-1]

    yield make
    for bell in made:
        bell.close()


@pytest.fixture
def bells(loop: Loop, make_bell: Callable[[], Bell]) -> list[Bell]:
    """Three that the loop watches."""
    made = [make_bell() for _ in range(3)]
    for bell in made:
        loop.watch(bell.fd, bell.answer)
    return made


# --- who is called


def test_handlers_of_those_that_are_readable_are_called_and_no_others(
    loop: Loop, bells: list[Bell], calls: list[Bell]
) -> None:
    bells[0].ring()
    bells[2].ring()
    loop.turn(LONG_S)
    assert set(calls) == {bells[0], bells[2]}
    assert len(calls) == 2
    loop.turn(0)
    assert len(calls) == 2, "they are quiet now"


def test_handler_is_called_again_for_as_long_as_there_is_something_to_read(
    loop: Loop, make_bell: Callable[[], Bell]
) -> None:
    bell, n_calls = make_bell(), 0

    def look_away() -> None:
        nonlocal n_calls
        n_calls += 1

    loop.watch(bell.fd, look_away)
    bell.ring()
    for _ in range(3):
        loop.turn(LONG_S)
    assert n_calls == 3


def test_later_handler_takes_the_place_of_the_one_before(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    loop.watch(bells[0].fd, bells[1].answer)
    bells[0].ring()
    loop.turn(LONG_S)
    assert calls == [bells[1]]


# --- how long it waits


def test_turn_ends_after_its_time_where_nothing_comes(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    begin = time.monotonic()
    loop.turn(0.1)
    assert 0.09 <= time.monotonic() - begin < 5
    assert calls == []


def test_turn_ends_as_soon_as_something_comes(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    later = threading.Timer(0.1, bells[1].ring)
    later.start()
    begin = time.monotonic()
    loop.turn(LONG_S)
    assert time.monotonic() - begin < LONG_S / 2
    assert calls == [bells[1]]
    later.join(LONG_S)


# --- who is not called any more


def test_nobody_is_called_for_what_is_not_watched_any_more(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    for _ in range(2):
        loop.unwatch(bells[0].fd)
    bells[0].ring()
    bells[1].ring()
    loop.turn(LONG_S)
    loop.turn(0)
    assert calls == [bells[1]]


def test_what_was_unwatched_can_be_watched_again(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    loop.unwatch(bells[0].fd)
    loop.watch(bells[0].fd, bells[0].answer)
    bells[0].ring()
    loop.turn(LONG_S)
    assert calls == [bells[0]]


def test_handler_may_unwatch_itself(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    def answer_once() -> None:
        bells[0].answer()
        loop.unwatch(bells[0].fd)

    loop.watch(bells[0].fd, answer_once)
    for _ in range(2):
        bells[0].ring()
        loop.turn(0)
    assert calls == [bells[0]]


def test_handler_may_unwatch_others_that_are_readable_too(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    """Whoever is called first; the others are not, in this turn or later."""

    def answer_alone(bell: Bell) -> None:
        bell.answer()
        for other in bells:
            if other is not bell:
                loop.unwatch(other.fd)

    for bell in bells:
        loop.watch(bell.fd, lambda bell=bell: answer_alone(bell))  # type: ignore[misc]
        bell.ring()
    loop.turn(LONG_S)
    assert len(calls) == 1
    loop.turn(0)
    assert len(calls) == 1


def test_event_of_a_descriptor_that_was_closed_is_not_taken_for_the_next_of_its_number(
    loop: Loop, bells: list[Bell], make_bell: Callable[[], Bell], calls: list[Bell]
) -> None:
    """Of two that are readable, whoever is called first closes the other, whose number is taken by a third at once."""
    one, other, _ = bells
    successors: list[Bell] = []

    def answer_and_replace(bell: Bell, replaced: Bell) -> None:
        bell.answer()
        number = replaced.fd
        loop.unwatch(number)
        replaced.close()
        successors.append(make_bell())
        assert successors[0].fd == number, "the kernel gives the lowest number that is free"
        loop.watch(number, successors[0].answer)

    loop.watch(one.fd, lambda: answer_and_replace(one, other))
    loop.watch(other.fd, lambda: answer_and_replace(other, one))
    one.ring()
    other.ring()
    loop.turn(LONG_S)
    assert len(calls) == 1
    (successor,) = successors
    assert successor not in calls
    successor.ring()
    loop.turn(LONG_S)
    assert calls[1:] == [successor]


# --- a handler that stops early


def test_handler_that_asks_to_be_called_again_is_called_in_the_next_turn_without_waiting(
    loop: Loop, bells: list[Bell], calls: list[Bell]
) -> None:
    loop.call_again(bells[0].fd)
    begin = time.monotonic()
    loop.turn(LONG_S)
    assert time.monotonic() - begin < LONG_S / 2
    assert calls == [bells[0]], "though there was nothing to read"
    loop.turn(0)
    assert calls == [bells[0]], "once"


def test_others_have_their_turn_before_a_handler_is_called_again(
    loop: Loop, bells: list[Bell], calls: list[Bell]
) -> None:
    def answer_without_end() -> None:
        bells[0].answer()
        loop.call_again(bells[0].fd)

    loop.watch(bells[0].fd, answer_without_end)
    bells[0].ring()
    for n in range(1, 4):
        bells[1].ring()
        loop.turn(LONG_S)
        assert (calls.count(bells[0]), calls.count(bells[1])) == (n, n)


def test_handler_that_is_readable_and_to_be_called_again_is_called_once(
    loop: Loop, bells: list[Bell], calls: list[Bell]
) -> None:
    loop.call_again(bells[0].fd)
    bells[0].ring()
    loop.turn(LONG_S)
    assert calls == [bells[0]]


def test_nobody_is_called_again_who_was_unwatched_meanwhile(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    loop.call_again(bells[0].fd)
    loop.unwatch(bells[0].fd)
    loop.turn(0)
    assert calls == []


def test_error_of_a_handler_comes_out_and_those_that_were_not_called_are_called_later(
    loop: Loop, bells: list[Bell], calls: list[Bell]
) -> None:
    n_errors = 0

    def fail() -> None:
        os.eventfd_read(bells[0].fd)
        raise RuntimeError("a test's own")

    loop.watch(bells[0].fd, fail)
    for bell in bells:
        bell.ring()
    for _ in range(5):
        try:
            loop.turn(0)
        except RuntimeError:
            n_errors += 1
    assert n_errors == 1
    assert sorted(calls, key=id) == sorted(bells[1:], key=id)


def test_loop_that_is_closed_watches_nothing(loop: Loop, bells: list[Bell], calls: list[Bell]) -> None:
    bells[0].ring()
    loop.close()
    with pytest.raises(ValueError, match="closed"):
        loop.turn(0)
    assert calls == []
