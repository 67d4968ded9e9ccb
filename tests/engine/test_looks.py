"""Fetches of the engine that keep nothing: right bytes, and no trace of them."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import Shards, neurons, some_ids

from sparseflow.engine.engine import Engine

DEADLINE_S = 20.0
N_SLOTS = 60


@pytest.fixture
def engine(nothing_left: None, make_shards: type[Shards]) -> Iterator[tuple[Engine, Shards]]:
    """Three layers of 61 neurons, 60 slots."""
    shards = make_shards()
    opened = Engine(shards.folder, shards.manifest, N_SLOTS, io="buffered")
    yield opened, shards
    opened.close()


def fetched(engine: Engine, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> NDArray[np.uint8]:
    """A copy of bundles, fetched and released."""
    fetch = engine.fetch(layer, ids, keep)
    try:
        return engine.slots[engine.wait(fetch, DEADLINE_S)].copy()
    finally:
        engine.release(fetch)


def hits_and_misses(engine: Engine) -> tuple[int, int, list[int], list[int]]:
    counts, state = engine.counts(), engine.state()
    return counts.hits, counts.misses, state.hits.tolist(), state.misses.tolist()


def test_look_gives_the_right_bytes_and_leaves_no_more_than_there_was(
    engine: tuple[Engine, Shards], rng: np.random.Generator
) -> None:
    opened, shards = engine
    fetched(opened, 0, some_ids(rng, 61, 20))
    before, n_resident = hits_and_misses(opened), opened.n_resident
    for _ in range(20):
        layer, ids = int(rng.integers(3)), some_ids(rng, 61, int(rng.integers(1, 31)))
        assert np.array_equal(fetched(opened, layer, ids, keep=False), shards.content(layer, ids))
        assert opened.n_resident == n_resident
    assert hits_and_misses(opened) == before
    assert opened.counts().evictions == 0


def test_what_is_read_for_a_look_is_read_again_when_it_is_needed(engine: tuple[Engine, Shards]) -> None:
    opened, _ = engine
    for _ in range(2):
        before = opened.counts().reads
        fetched(opened, 1, neurons(3, 9), keep=False)
        assert opened.counts().reads > before
    fetched(opened, 1, neurons(3, 9))
    assert (opened.counts().hits, opened.counts().misses) == (0, 2)


def test_look_that_is_given_up_while_it_is_read_leaves_nothing(engine: tuple[Engine, Shards]) -> None:
    opened, _ = engine
    opened.release(opened.fetch(1, neurons(*range(30)), keep=False))
    opened.settle(DEADLINE_S)
    assert (opened.n_resident, opened.state().n_leased) == (0, 0)


def test_look_at_a_damaged_bundle_says_so_and_leaves_nothing(engine: tuple[Engine, Shards]) -> None:
    opened, shards = engine
    with shards.flipped(1, 5), pytest.raises(OSError, match="layer-001"):
        fetched(opened, 1, neurons(4, 5, 6), keep=False)
    opened.settle(DEADLINE_S)
    assert opened.n_resident == 0
    assert np.array_equal(fetched(opened, 1, neurons(4, 5, 6)), shards.content(1, neurons(4, 5, 6)))
