"""What one GPU child was asked: its states, the order of questions, their deadlines, and whose stay unanswered."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sparseflow_daemon.gpu.desk import Ask, GpuDesk

from sparseflow.errors import ServerError
from sparseflow.protocol.device_messages import (
    BundlesCopied,
    BundlesRecorded,
    ChildReady,
    CloseSlab,
    CopyBundles,
    OpenSlab,
    SlabClosed,
    SlabOpened,
)
from sparseflow.protocol.messages import ErrorReply, Message

START_S, ANSWER_S = 30.0, 10.0


@pytest.fixture
def desk() -> GpuDesk:
    return GpuDesk(100.0, start_timeout_s=START_S, answer_timeout_s=ANSWER_S)


def opening(number: int) -> Ask:
    return Ask(OpenSlab(number, 1, {}, "model", 8, 512), f"open {number}")


def copying(number: int) -> Ask:
    return Ask(CopyBundles(number, 1, b"", b""), f"copy {number}")


def closing(number: int) -> Ask:
    return Ask(CloseSlab(number, 1), f"close {number}")


def make_ready(desk: GpuDesk) -> None:
    desk.hear(ChildReady("GPU", bytes(16)), 100.0)


def send_all(desk: GpuDesk, now: float = 100.0) -> list[int]:
    """Numbers of what can be sent."""
    numbers = []
    while (ask := desk.to_send()) is not None:
        numbers.append(ask.message.request_id)
        desk.sent(now)
    return numbers


def test_nothing_is_sent_before_the_child_is_ready(desk: GpuDesk) -> None:
    desk.ask(opening(1))
    assert desk.to_send() is None
    make_ready(desk)
    assert (desk.state, desk.device_name) == ("ready", "GPU")
    assert send_all(desk) == [1]


def test_two_are_sent_at_once_and_the_next_when_one_has_been_recorded(desk: GpuDesk) -> None:
    make_ready(desk)
    for number in range(1, 6):
        desk.ask(copying(number))
    assert send_all(desk) == [1, 2]
    assert desk.hear(BundlesRecorded(1), 101.0) == [("copy 1", BundlesRecorded(1))]
    assert send_all(desk) == [3]
    assert desk.hear(BundlesCopied(1), 101.0) == [("copy 1", BundlesCopied(1))]
    assert send_all(desk) == []


@pytest.mark.parametrize(
    ("ask", "answer"), [(opening(7), SlabOpened(7, {})), (copying(7), BundlesCopied(7)), (closing(7), SlabClosed(7))]
)
def test_each_question_ends_with_its_answer_or_an_error(ask: Ask, answer: Message) -> None:
    for last in (answer, ErrorReply(7, 0, "internal", "no")):
        desk = GpuDesk(100.0, start_timeout_s=START_S, answer_timeout_s=ANSWER_S)
        make_ready(desk)
        desk.ask(ask)
        send_all(desk)
        assert desk.is_waiting
        assert desk.hear(last, 100.0) == [(ask.about, last)]
        assert not desk.is_waiting
        with pytest.raises(ServerError, match="nobody has asked for"):
            desk.hear(last, 100.0)


@pytest.mark.parametrize(
    "message", [SlabOpened(1, {}), BundlesRecorded(2), SlabClosed(1), ChildReady("x", bytes(16)), CloseSlab(1, 1)]
)
def test_what_a_child_may_not_say_is_an_error(desk: GpuDesk, message: Message) -> None:
    make_ready(desk)
    desk.ask(copying(1))
    desk.ask(closing(2))
    send_all(desk)
    with pytest.raises(ServerError, match=type(message).__name__):
        desk.hear(message, 100.0)


def test_answer_to_what_was_not_sent_is_an_error(desk: GpuDesk) -> None:
    desk.ask(opening(1))
    with pytest.raises(ServerError):
        desk.hear(SlabOpened(1, {}), 100.0)


def test_child_that_does_not_get_ready_is_overdue(desk: GpuDesk) -> None:
    assert desk.overdue(100 + START_S - 0.1) == ""
    assert "not ready within 30 s" in desk.overdue(100 + START_S)


def test_deadline_runs_from_sending_and_anew_from_recording(desk: GpuDesk) -> None:
    make_ready(desk)
    desk.ask(copying(1))
    assert desk.overdue(1e9) == ""
    send_all(desk, now=200.0)
    assert desk.overdue(200 + ANSWER_S - 0.1) == ""
    assert "did not finish CopyBundles within 10 s" in desk.overdue(200 + ANSWER_S)
    desk.hear(BundlesRecorded(1), 209.0)
    assert desk.overdue(200 + ANSWER_S) == ""
    assert desk.overdue(209 + ANSWER_S)


def test_child_that_says_it_ends_is_asked_nothing_more_and_its_reason_stays(desk: GpuDesk) -> None:
    make_ready(desk)
    desk.ask(copying(1))
    desk.ask(copying(2))
    send_all(desk)
    desk.ask(copying(3))
    assert desk.hear(ErrorReply(0, 0, "internal", "the GPU is lost"), 101.0) == []
    desk.end("another reason")
    assert (desk.state, desk.why, desk.to_send()) == ("ending", "the GPU is lost", None)
    assert desk.overdue(1e9) == ""
    assert desk.gone() == ["copy 1", "copy 2", "copy 3"]
    assert desk.state == "gone"
    assert desk.gone() == []


class AnyOrder(RuleBasedStateMachine):
    """Whatever is asked, answered and ended in whatever order: each question is told of once at the end, in full."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = GpuDesk(0.0, start_timeout_s=START_S, answer_timeout_s=ANSWER_S)
        self.now, self.n = 0.0, 0
        self.open: list[str] = []  # in their order
        self.sent: dict[int, Any] = {}
        self.is_recorded: set[int] = set()

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.desk.is_usable)
    @rule(make=st.sampled_from([opening, copying, closing]))
    def ask(self, make: Any) -> None:
        self.n += 1
        ask = make(self.n)
        self.open.append(ask.about)
        self.desk.ask(ask)

    @precondition(lambda self: self.desk.state == "starting")
    @rule()
    def ready(self) -> None:
        self.desk.hear(ChildReady("x", bytes(16)), self.now)

    @rule()
    def send(self) -> None:
        ask = self.desk.to_send()
        if ask is not None:
            self.desk.sent(self.now)
            self.sent[ask.message.request_id] = ask

    @precondition(lambda self: self.sent and self.desk.state == "ready")
    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data: st.DataObject, fails: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.sent)))
        ask = self.sent[number]
        if isinstance(ask.message, CopyBundles) and not fails and number not in self.is_recorded:
            self.is_recorded.add(number)
            assert self.desk.hear(BundlesRecorded(number), self.now) == [(ask.about, BundlesRecorded(number))]
            return
        last = {OpenSlab: SlabOpened(number, {}), CopyBundles: BundlesCopied(number), CloseSlab: SlabClosed(number)}
        message = ErrorReply(number, 0, "internal", "") if fails else last[type(ask.message)]
        assert self.desk.hear(message, self.now) == [(ask.about, message)]
        del self.sent[number]
        self.open.remove(ask.about)

    @rule()
    def die(self) -> None:
        assert sorted(self.desk.gone()) == sorted(self.open)
        self.open, self.sent = [], {}

    @invariant()
    def waits_exactly_while_something_is_open(self) -> None:
        assert self.desk.is_waiting == (self.desk.state == "starting" or bool(self.open))
        assert sum(number not in self.is_recorded for number in self.sent) <= 2


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, deadline=None, database=None)
