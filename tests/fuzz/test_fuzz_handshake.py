"""Whatever peers say to the attach socket, in whatever order: each is answered once, and nothing is left of them."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from choices import Choices
from hypothesis import strategies as st
from many import a_million, on_a_share, on_some
from talks import N_PEERS, Host, Talk, serving, some_packet

N_BYTES = 40  # about six events, and as many ends
DECISIONS = st.binary(min_size=N_BYTES, max_size=N_BYTES)
N_DESCRIPTORS = [0, 0, 0, 0, 0, 1, 3, 17]

Check = Callable[[bytes], None]


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    """A talk with the one server of all examples, which logs nothing of it."""
    log = logging.getLogger("sparseflow_daemon")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    with (
        tempfile.TemporaryDirectory(prefix="sf-") as folder,
        open(os.devnull, "rb") as nothing,
        serving(Path(folder)) as host,
    ):
        yield lambda decisions: talk_through(host, nothing.fileno(), decisions)
    log.setLevel(level)


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def talk_through(host: Host, fd: int, decisions: bytes) -> None:
    choices = Choices(decisions)
    n_open, n_watched = len(descriptors()), len(host.server.loop._handlers)
    talk = Talk(host, is_settled=not choices.one_in(3))
    try:
        while not choices.are_over:
            say_or_do(talk, choices, fd)
        talk.wind_down(choices)
    finally:
        talk.close()
    assert len(host.server.loop._handlers) == n_watched
    assert len(descriptors()) == n_open, "descriptors are left open"


def say_or_do(talk: Talk, choices: Choices, fd: int) -> None:
    n = choices.below(N_PEERS)
    match choices.below(32):
        case 0 | 1:
            talk.peer(n)
        case 2 | 3:
            talk.hang_up(n)
        case 4:
            talk.fall_silent(talk.peer(n))
        case 5:
            talk.fall_deaf(talk.peer(n))
        case 6:
            talk.load()
        case 7 if choices.one_in(2):
            talk.much_later()
        case 8 if choices.one_in(4):
            talk.server.stop()
        case 9 | 10 | 11:
            talk.take_turns()
            talk.check()
        case _:
            talk.say(talk.peer(n), some_packet(choices, talk), [fd] * choices.of(N_DESCRIPTORS))


def test_server_owes_each_peer_one_answer_and_keeps_nothing_of_those_who_go(check: Check) -> None:
    on_some(check, DECISIONS, n=400)


@a_million
def test_server_answers_a_million_talks(check: Check, round_: int) -> None:
    on_a_share(check, round_, DECISIONS)
