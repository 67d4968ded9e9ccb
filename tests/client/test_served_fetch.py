"""A fetch through a server, against one made by hand: what can be computed early, what is not taken from a server, and
what becomes of a fetch whose server ends."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from server_by_hand import (
    DEADLINE_S,
    EPOCH,
    N_SLOTS,
    ServerByHand,
    came,
    ids,
    leased,
    read,
    ready,
)

from sparseflow.client import served_fetch
from sparseflow.client.served_fetch import ServedFetch
from sparseflow.client.weight_client import WeightClient
from sparseflow.core.weight_source import HostBundles
from sparseflow.errors import NoAnswer, ServerError, ServerNotRunning, ShardCorrupt
from sparseflow.protocol.codec import encode
from sparseflow.protocol.measured_recall import MeasuredRecall
from sparseflow.protocol.messages import TOLD_COUNTS, AcquireNeurons, ErrorReply, Message

LAYER, WANTED = 0, ids(2, 5, 9, 13)


@pytest.fixture
def client(nothing_left: None, server: ServerByHand, rng: np.random.Generator) -> Iterator[WeightClient]:
    """Attached to `server`, whose slots hold anything."""
    server.slots[:] = rng.integers(0, 1 << 16, server.slots.shape)
    with server.welcoming():
        made = WeightClient("by-hand", reconnect_timeout_s=DEADLINE_S)
    yield made
    made.attachment.abandon()  # nobody is there to say goodbye to
    made.close()


class Asked:
    """A fetch, and the server's end of its line."""

    def __init__(self, client: WeightClient, server: ServerByHand, layer: int = LAYER) -> None:
        fetch = client.fetch(layer, WANTED)
        assert isinstance(fetch, ServedFetch)
        self.fetch, self.far = fetch, server.take_line()
        request = read(self.far)
        assert isinstance(request, AcquireNeurons)
        assert request.ids == WANTED.tobytes()
        self.number = request.request_id

    def is_told(self, *messages: Message) -> None:
        for message in messages:
            self.far.send(encode(message))


@pytest.fixture
def asked(client: WeightClient, server: ServerByHand) -> Asked:
    return Asked(client, server)


def bits(bundles: HostBundles) -> NDArray[np.uint16]:
    """(n, elements of a bundle)."""
    return bundles.base.view(len(bundles.base), -1).numpy().view(np.uint16)[bundles.slots]


def test_fetch_says_whether_its_bundles_shall_be_kept(client: WeightClient, server: ServerByHand) -> None:
    fetch = client.fetch(LAYER, WANTED)
    far = server.take_line()
    kept = read(far)
    look = client.fetch(LAYER, WANTED, keep=False)
    not_kept = read(far)
    assert isinstance(kept, AcquireNeurons)
    assert isinstance(not_kept, AcquireNeurons)
    assert (kept.keep, not_kept.keep) == (True, False)
    fetch.release()
    look.release()


# --- what is there, and what comes


def test_bundles_that_are_there_come_early_with_their_positions(asked: Asked, server: ServerByHand) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [0, 2]))
    early = asked.fetch.early()
    assert early.positions.tolist() == [1, 3]
    assert np.array_equal(bits(early.bundles), server.slots[[3, 11]])


def test_wait_gives_all_bundles_when_the_missing_ones_came(asked: Asked, server: ServerByHand) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [0, 2]))
    asked.fetch.early()
    server.slots[[7, 0]] = [[1], [2]]  # they are read meanwhile
    asked.is_told(came(asked.number))
    assert np.array_equal(bits(asked.fetch.wait(DEADLINE_S)), server.slots[[7, 3, 0, 11]])


def test_wait_does_not_end_before_the_missing_ones_came(asked: Asked) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [0, 2]))
    with pytest.raises(NoAnswer):
        asked.fetch.wait(0.1)
    asked.is_told(came(asked.number))
    assert asked.fetch.wait(DEADLINE_S).slots.tolist() == [7, 3, 0, 11]


def test_where_nothing_is_missing_all_is_early_and_wait_asks_nobody(asked: Asked, server: ServerByHand) -> None:
    asked.is_told(ready(asked.number, 7, 3, 0, 11))
    early = asked.fetch.early()
    asked.far.close()  # whoever waits for it now would see that
    assert early.positions.tolist() == [0, 1, 2, 3]
    assert np.array_equal(bits(early.bundles), server.slots[[7, 3, 0, 11]])
    assert asked.fetch.wait(DEADLINE_S).slots.tolist() == [7, 3, 0, 11]


def test_where_all_are_missing_nothing_is_early(asked: Asked) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [0, 1, 2, 3]))
    early = asked.fetch.early()
    assert len(early.positions) == len(early.bundles.slots) == 0


def test_wait_can_do_without_early(asked: Asked) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [3]), came(asked.number))
    assert asked.fetch.wait(DEADLINE_S).slots.tolist() == [7, 3, 0, 11]


def test_early_is_the_same_when_it_is_asked_again(asked: Asked) -> None:
    """Or later: what came meanwhile is for `wait`."""
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1]), came(asked.number))
    first = asked.fetch.early()
    again = asked.fetch.early()
    assert first.positions.tolist() == again.positions.tolist() == [0, 2, 3]
    assert first.bundles.slots.tolist() == again.bundles.slots.tolist() == [7, 0, 11]


def test_counts_are_told_with_the_leases(asked: Asked, client: WeightClient) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1], counts=list(range(len(TOLD_COUNTS)))))
    asked.fetch.early()
    counts = client.counts()
    assert [getattr(counts, name) for name in TOLD_COUNTS] == list(range(len(TOLD_COUNTS)))
    asked.is_told(came(asked.number))
    asked.fetch.wait(DEADLINE_S)
    assert client.counts() - counts == type(counts)(wait_s=client.counts().wait_s, messages=1)


def test_fetch_that_is_given_up_after_it_was_leased_is_no_bother_to_the_next(
    asked: Asked, client: WeightClient
) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1]))
    asked.fetch.early()
    asked.fetch.release()
    asked.is_told(came(asked.number))
    following = client.fetch(1, ids(4))
    request = read(asked.far)
    assert isinstance(request, AcquireNeurons)
    assert request.released == [asked.number]
    asked.is_told(ready(request.request_id, 5))
    assert following.early().bundles.slots.tolist() == [5]
    assert following.wait(DEADLINE_S).slots.tolist() == [5]


# --- what is not taken from a server

WRONG: dict[str, Callable[[int], list[Message]]] = {
    "a slot that is none": lambda n: [leased(n, [7, 3, N_SLOTS, 11], [1])],
    "a slot far away": lambda n: [leased(n, [7, 3, 2**32 - 1, 11], [1])],
    "a slot that is none, at once": lambda n: [ready(n, 7, 3, N_SLOTS, 11)],
    "a position that is none": lambda n: [leased(n, [7, 3, 0, 11], [1, len(WANTED)])],
    "a position far away": lambda n: [leased(n, [7, 3, 0, 11], [2**32 - 1])],
    "too few slots": lambda n: [leased(n, [7, 3, 0], [1])],
    "too many slots": lambda n: [ready(n, 7, 3, 0, 11, 1)],
    "no slots at all": lambda n: [came(n)],
}


@pytest.mark.parametrize("first_use", ["early", "wait"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_an_error_of_the_server(
    asked: Asked, wrong: Callable[[int], list[Message]], first_use: str
) -> None:
    """Else it would be a wrong result, or a fault."""
    asked.is_told(*wrong(asked.number), came(asked.number))
    with pytest.raises(ServerError, match=r"the server (named \d+ of|leased \d+ slots for 4 neurons)"):
        asked.fetch.early() if first_use == "early" else asked.fetch.wait(DEADLINE_S)


@pytest.mark.parametrize("after_leased", [False, True], ids=["at once", "after it was leased"])
def test_error_of_a_fetch_is_raised_by_whoever_asks_next(asked: Asked, after_leased: bool) -> None:
    if after_leased:
        asked.is_told(leased(asked.number, [7, 3, 0, 11], [1]))
        asked.fetch.early()
    asked.is_told(ErrorReply(asked.number, EPOCH, "shard_corrupt", "layer 0, neuron 5"))
    with pytest.raises(ShardCorrupt, match="layer 0, neuron 5"):
        asked.fetch.wait(DEADLINE_S) if after_leased else asked.fetch.early()


def test_server_that_does_not_say_where_bundles_are_is_waited_for_until_the_deadline(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_fetch, "FETCH_TIMEOUT_S", 0.2)
    begin = time.monotonic()
    with pytest.raises(NoAnswer):
        asked.fetch.early()
    assert 0.2 <= time.monotonic() - begin < 5


# --- a server that ends


class Successor:
    """Takes the place of a server, welcomes one client, and tells its one request what it is given to tell."""

    def __init__(self, first: ServerByHand, epoch: int = EPOCH + 2, n_slots: int = N_SLOTS) -> None:
        first.stop()
        self.server = ServerByHand(epoch, n_slots)
        self.server.slots[:] = 4711
        self._pool = ThreadPoolExecutor(1)

    def tells(self, *told: Callable[[int, int], Message]) -> "Future[AcquireNeurons]":
        """Begin; the request that it was asked. told: (request_id, epoch) -> message."""
        return self._pool.submit(self._serve, told)

    def _serve(self, told: tuple[Callable[[int, int], Message], ...]) -> AcquireNeurons:
        self.server.welcome()
        far = self.server.take_line()
        request = read(far)
        assert isinstance(request, AcquireNeurons)
        for each in told:
            far.send(encode(each(request.request_id, self.server.epoch)))
        return request

    def close(self) -> None:
        self._pool.shutdown()
        self.server.close()


@pytest.fixture
def succeeded() -> Iterator[Callable[..., Successor]]:
    """The arguments of `Successor` -> one that is closed at the end."""
    made: list[Successor] = []

    def make(*arguments: object, **options: int) -> Successor:
        made.append(Successor(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_fetch_whose_server_ends_after_it_was_leased_is_asked_of_the_next(
    asked: Asked, server: ServerByHand, client: WeightClient, succeeded: Callable[..., Successor]
) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1, 2]))
    early = asked.fetch.early()
    expected = server.slots[[7, 11]]
    successor = succeeded(server)
    its = successor.tells(
        lambda number, epoch: leased(number, [1, 2, 3, 4], [0, 1], epoch=epoch),
        came,
    )
    bundles = asked.fetch.wait(DEADLINE_S)
    request = its.result(DEADLINE_S)
    assert (request.epoch, request.layer, request.ids) == (EPOCH + 2, LAYER, WANTED.tobytes())
    assert request.released == []
    assert bundles.slots.tolist() == [1, 2, 3, 4]
    assert np.array_equal(bits(bundles), successor.server.slots[[1, 2, 3, 4]])
    assert np.array_equal(bits(early.bundles), expected), "what was early stays what it was"
    assert client.attachment.welcome.epoch == EPOCH + 2


def test_slots_of_the_server_that_ended_are_not_taken_for_those_of_the_next(
    asked: Asked, server: ServerByHand, succeeded: Callable[..., Successor]
) -> None:
    """Its arena may be smaller, and its bundles lie elsewhere."""
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1]))
    asked.fetch.early()
    its = succeeded(server, n_slots=5).tells(came)
    with pytest.raises(ServerError, match="leased 0 slots for 4 neurons"):
        asked.fetch.wait(DEADLINE_S)
    its.result(DEADLINE_S)


@pytest.mark.parametrize("code", ["resync", "draining"])
def test_fetch_that_is_refused_by_a_server_that_ends_is_asked_of_the_next(
    asked: Asked, server: ServerByHand, succeeded: Callable[..., Successor], code: str
) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1]))
    asked.fetch.early()
    asked.is_told(ErrorReply(asked.number, EPOCH, code, "the server is ending"))
    its = succeeded(server).tells(lambda number, epoch: ready(number, 4, 3, 2, 1, epoch=epoch))
    assert asked.fetch.wait(DEADLINE_S).slots.tolist() == [4, 3, 2, 1]
    its.result(DEADLINE_S)


def test_fetch_whose_server_ends_before_it_says_anything_is_early_by_the_next(
    asked: Asked, server: ServerByHand, succeeded: Callable[..., Successor]
) -> None:
    its = succeeded(server).tells(lambda number, epoch: leased(number, [4, 3, 2, 1], [0], epoch=epoch))
    early = asked.fetch.early()
    assert early.positions.tolist() == [1, 2, 3]
    assert early.bundles.slots.tolist() == [3, 2, 1]
    its.result(DEADLINE_S)


def test_fetch_whose_server_ends_and_is_not_replaced_says_so(
    server: ServerByHand, client: WeightClient, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_reconnect_timeout_s", 0.3)
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1]))
    asked.fetch.early()
    server.stop()
    begin = time.monotonic()
    with pytest.raises(ServerNotRunning, match=r"none took its place within 0\.3 s"):
        asked.fetch.wait(DEADLINE_S)
    assert time.monotonic() - begin < 5


def test_fetch_that_keeps_nothing_is_asked_of_the_next_server_as_such(
    client: WeightClient, server: ServerByHand, succeeded: Callable[..., Successor]
) -> None:
    look = client.fetch(LAYER, WANTED, keep=False)
    request = read(server.take_line())
    assert isinstance(request, AcquireNeurons)
    successor = succeeded(server)
    its = successor.tells(lambda number, epoch: ready(number, 4, 3, 2, 1, epoch=epoch))
    look.wait(DEADLINE_S)
    again = its.result(DEADLINE_S)
    assert isinstance(again, AcquireNeurons)
    assert not again.keep


def test_measured_recall_goes_on_from_one_server_to_the_next(
    asked: Asked, server: ServerByHand, client: WeightClient, succeeded: Callable[..., Successor]
) -> None:
    measured = MeasuredRecall(99.0, 1.0, 0.25, 640.0)
    client.note_recall(measured)
    client.note_tokens(5)
    its = succeeded(server).tells(lambda number, epoch: ready(number, 4, 3, 2, 1, epoch=epoch))
    asked.fetch.wait(DEADLINE_S)
    its.result(DEADLINE_S)
    counters = client.attachment.counters
    assert (counters.tokens, counters.recall) == (5, measured)


def test_counts_go_on_from_one_server_to_the_next(
    asked: Asked, server: ServerByHand, client: WeightClient, succeeded: Callable[..., Successor]
) -> None:
    asked.is_told(leased(asked.number, [7, 3, 0, 11], [1], counts=[5] * len(TOLD_COUNTS)))
    asked.fetch.early()
    counts = [2] * len(TOLD_COUNTS)
    its = succeeded(server).tells(lambda number, epoch: ready(number, 4, 3, 2, 1, epoch=epoch, counts=counts))
    asked.fetch.wait(DEADLINE_S)
    its.result(DEADLINE_S)
    assert (client.counts().hits, client.counts().misses) == (7, 7)
