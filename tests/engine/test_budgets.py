"""Miss curves beside an LRU cache for each size, and divisions of slots beside all possible ones."""

from itertools import product

import numpy as np
import pytest

from sparseflow.engine.budgets import divide_slots, equal_shares, miss_curve, shares_of, sizes
from sparseflow.errors import BadRequest


def misses_of_a_cache(tokens: list[np.ndarray], n_slots: int) -> float:
    """Misses a token after the first tenth. An LRU cache as a list, the last use first, of one token by ids."""
    cache: list[int] = []
    n_warm_up, misses = int(0.1 * len(tokens)), 0
    for n, ids in enumerate(tokens):
        own = ids.tolist()
        if n >= n_warm_up:
            misses += len([neuron for neuron in own if neuron not in cache])
        cache = (own + [neuron for neuron in cache if neuron not in own])[:n_slots]
    return misses / (len(tokens) - n_warm_up)


def random_tokens(rng: np.random.Generator, ffn_dim: int, n_tokens: int) -> list[np.ndarray]:
    often = rng.random(ffn_dim) ** 4
    return [np.flatnonzero(rng.random(ffn_dim) < often).astype(np.uint32) for _ in range(n_tokens)]


@pytest.mark.parametrize(("ffn_dim", "n_points"), [(40, 41), (50, 7), (3, 9)])
def test_curve_gives_the_misses_of_a_cache_of_each_size(rng: np.random.Generator, ffn_dim: int, n_points: int) -> None:
    tokens = random_tokens(rng, ffn_dim, 60)
    curve = miss_curve(tokens, ffn_dim, n_points)
    largest = max(map(len, tokens))
    assert curve.shape == (n_points,)
    for n_slots, misses in zip(sizes(ffn_dim, n_points).tolist(), curve, strict=True):
        if n_slots >= largest:
            assert misses == pytest.approx(misses_of_a_cache(tokens, n_slots))
    assert curve[0] == pytest.approx(np.mean([len(ids) for ids in tokens[6:]]))
    assert (np.diff(curve) <= 0).all()


def test_curve_of_masks_is_that_of_their_ids(rng: np.random.Generator) -> None:
    masks = rng.random((50, 30)) < 0.2
    ids = [np.flatnonzero(mask) for mask in masks]
    assert (miss_curve(masks, 30) == miss_curve(ids, 30)).all()


def test_curve_of_nothing_is_zero() -> None:
    assert (miss_curve([], 10) == 0).all()
    assert (miss_curve([np.empty(0, np.uint32)] * 5, 10) == 0).all()


def cost(curves: np.ndarray, slots: list[int], ffn_dim: int) -> float:
    points = sizes(ffn_dim, curves.shape[1])
    return float(sum(np.interp(n, points, curve) for n, curve in zip(slots, curves, strict=True)))


@pytest.mark.parametrize("least", [0, 2])
def test_no_division_of_convex_curves_is_better(rng: np.random.Generator, least: int) -> None:
    n_layers, ffn_dim = 3, 12
    for _ in range(5):
        slopes = -np.sort(-rng.random((n_layers, 6)), axis=1) * 10
        curves = np.cumsum(np.concatenate([slopes.sum(1, keepdims=True), -slopes], axis=1), axis=1)
        for n_slots in (n_layers * least, 10, 17, n_layers * ffn_dim):
            slots = divide_slots(curves, ffn_dim, n_slots, least).tolist()
            assert sum(slots) == n_slots
            assert all(least <= n <= ffn_dim for n in slots)
            every = product(range(least, ffn_dim + 1), repeat=n_layers)
            best = min(cost(curves, list(n), ffn_dim) for n in every if sum(n) == n_slots)
            assert cost(curves, slots, ffn_dim) == pytest.approx(best, abs=1e-9)


def test_cliff_behind_a_plain_is_worth_the_way() -> None:
    """Layer 0 gains nothing but with all of its slots, and then more than layer 1 with as many."""
    curves = np.array([[100.0, 100.0, 100.0, 0.0], [60.0, 40.0, 20.0, 0.0]])
    assert divide_slots(curves, 30, 30).tolist() == [30, 0]
    assert divide_slots(curves, 30, 45).tolist() == [30, 15]


def test_division_by_curves_beats_equal_shares_where_layers_differ(rng: np.random.Generator) -> None:
    """On tokens that the curves have not seen."""
    ffn_dim = 60
    often = np.array([0.02, 0.05, 0.1, 0.4])[:, None] * (0.2 + rng.random((4, ffn_dim)))
    layers = [[np.flatnonzero(rng.random(ffn_dim) < layer) for _ in range(400)] for layer in often]
    curves = np.array([miss_curve(tokens[:200], ffn_dim) for tokens in layers])

    def missed(slots: np.ndarray) -> float:
        own = [miss_curve(tokens[200:], ffn_dim, ffn_dim + 1) for tokens in layers]
        return float(sum(curve[n] for curve, n in zip(own, slots, strict=True)))

    assert missed(divide_slots(curves, ffn_dim, 120)) < 0.95 * missed(equal_shares(4, 120))


def test_equal_shares_use_every_slot() -> None:
    assert equal_shares(4, 11).tolist() == [3, 3, 3, 2]


@pytest.mark.parametrize("ffn_dim", [7, 49, 1024, 8192, 12345])
def test_share_rounded_down_is_the_number_again(ffn_dim: int) -> None:
    slots = np.arange(ffn_dim + 1)
    shares = shares_of(slots, ffn_dim)
    assert [int(ffn_dim * shares[n]) for n in slots.tolist()] == slots.tolist()
    assert max(shares.values()) <= 1


@pytest.mark.parametrize(("n_slots", "least"), [(31, 0), (-1, 0), (5, 2)])
def test_division_that_cannot_be_is_refused(n_slots: int, least: int) -> None:
    with pytest.raises(BadRequest, match=f"{n_slots} slots"):
        divide_slots(np.ones((3, 5)), 10, n_slots, least)
