"""Replays beside twins that are plain lists and dictionaries, and the optimum beside every possible choice."""

from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from sparseflow.engine.replay import OPTIMUM, POLICIES, WARM_UP_SHARE, fetches_of, replay, replay_under
from sparseflow.engine.replay_budgets import DIVISIONS, replay_budgets
from sparseflow.engine.rival_evictions import Budgeted, PlainLeastRecentlyUsed
from sparseflow.engine.trace import Step, Trace
from sparseflow.errors import BadRequest

Bundle = tuple[int, int]  # layer, id


def random_trace(rng: np.random.Generator, n_layers: int, ffn_dim: int, n_tokens: int, share: float = 0.2) -> Trace:
    """Neurons that fire unequally often, and longer than one token."""
    often = rng.random((n_layers, ffn_dim)) ** 3 * share * 3
    fires = rng.random((n_layers, ffn_dim)) < often
    steps = []
    for _ in range(n_tokens):
        for layer in range(n_layers):
            is_new = rng.random(ffn_dim) < 0.6
            fires[layer] = np.where(is_new, rng.random(ffn_dim) < often[layer], fires[layer])
            steps.append(Step(layer, np.flatnonzero(fires[layer]).astype(np.uint32)))
    return Trace.from_steps((n_layers, ffn_dim, 64), "", steps)


Order = Callable[[set[Bundle]], list[Bundle]]


class Twin:
    """An arena as a set. A step's bundles are in it together; `leaves` says who goes first of those that may."""

    def __init__(self, trace: Trace, n_slots: int) -> None:
        self.n_slots = n_slots
        self.here: set[Bundle] = set()
        self.steps = [[(layer, int(i)) for i in ids] for layer, ids in fetches_of(trace, n_slots)]
        self.now = 0
        self.turn = [0] * trace.n_layers

    def misses(self) -> list[int]:
        """Of each step."""
        found = []
        for n, step in enumerate(self.steps):
            self.now = n
            missing = [bundle for bundle in step if bundle not in self.here]
            if step:
                self.turn[step[0][0]] += 1
            self.asked([bundle for bundle in step if bundle in self.here])
            n_short = len(self.here) + len(missing) - self.n_slots
            for _ in range(max(0, n_short)):
                gone = self.leaves(self.here - set(step))
                self.here.remove(gone)
            self.here |= set(missing)
            self.came(missing)
            found.append(len(missing))
        return found

    def asked(self, bundles: list[Bundle]) -> None: ...

    def came(self, bundles: list[Bundle]) -> None: ...

    def leaves(self, may_go: set[Bundle]) -> Bundle:
        raise NotImplementedError


class FurthestTwin(Twin):
    def leaves(self, may_go: set[Bundle]) -> Bundle:
        def next_use(bundle: Bundle) -> int:
            later = (n for n in range(self.now + 1, len(self.steps)) if bundle in self.steps[n])
            return next(later, len(self.steps))

        return max(sorted(may_go), key=next_use)


class SieveTwin(Twin):
    """The queue as a list, oldest first, and the hand as a position in it."""

    def __init__(self, trace: Trace, n_slots: int) -> None:
        super().__init__(trace, n_slots)
        self.queue: list[Bundle] = []
        self.hand = 0
        self.was_used: set[Bundle] = set()

    def asked(self, bundles: list[Bundle]) -> None:
        self.was_used |= set(bundles)

    def came(self, bundles: list[Bundle]) -> None:
        self.queue += bundles

    def leaves(self, may_go: set[Bundle]) -> Bundle:
        while True:
            self.hand %= len(self.queue)
            bundle = self.queue[self.hand]
            if bundle in may_go and bundle not in self.was_used:
                return self.queue.pop(self.hand)
            if bundle in may_go:
                self.was_used.remove(bundle)
            self.hand += 1


class S3FifoTwin(Twin):
    """Three lists, oldest first."""

    def __init__(self, trace: Trace, n_slots: int) -> None:
        super().__init__(trace, n_slots)
        self.short: list[Bundle] = []
        self.long: list[Bundle] = []
        self.ghosts: list[Bundle] = []
        self.uses: dict[Bundle, int] = {}

    def asked(self, bundles: list[Bundle]) -> None:
        for bundle in bundles:
            self.uses[bundle] = min(3, self.uses[bundle] + 1)

    def came(self, bundles: list[Bundle]) -> None:
        for bundle in bundles:
            self.uses[bundle] = 0
            (self.long if bundle in self.ghosts else self.short).append(bundle)
            self.ghosts = [ghost for ghost in self.ghosts if ghost != bundle]

    def leaves(self, may_go: set[Bundle]) -> Bundle:
        n_short = max(1, self.n_slots // 10)
        while True:
            of_short, of_long = may_go & set(self.short), may_go & set(self.long)
            queue = self.short if of_short and (len(self.short) > n_short or not of_long) else self.long
            bundle = queue.pop(0)
            if bundle not in may_go:
                queue.append(bundle)
            elif queue is self.short and self.uses[bundle] > 1:
                self.uses[bundle] = 0
                self.long.append(bundle)
            elif queue is self.long and self.uses[bundle]:
                self.uses[bundle] -= 1
                self.long.append(bundle)
            else:
                if queue is self.short:
                    self.ghosts = [*self.ghosts, bundle][-(self.n_slots - n_short) :]
                return bundle


def misses_of_steps(trace: Trace, n_slots: int, policy: str) -> int:
    """All of them: a trace before which as many tokens of warm-up stand that use nothing."""
    n_tokens = 1 + int(trace.n_tokens * WARM_UP_SHARE / (1 - WARM_UP_SHARE))
    idle = [Step(layer, np.empty(0, np.uint32)) for _ in range(n_tokens) for layer in range(trace.n_layers)]
    sizes = trace.n_layers, trace.ffn_dim, trace.bundle_nbytes
    return replay(Trace.from_steps(sizes, "", [*idle, *trace]), n_slots, policy).misses


TWINS: dict[str, type[Twin]] = {OPTIMUM: FurthestTwin, "sieve": SieveTwin, "s3-fifo": S3FifoTwin}


@pytest.mark.parametrize("policy", TWINS)
@pytest.mark.parametrize("n_slots", [9, 24, 60])
def test_replay_misses_what_the_twin_misses(rng: np.random.Generator, policy: str, n_slots: int) -> None:
    trace = random_trace(rng, 3, 30, 40)
    assert misses_of_steps(trace, n_slots, policy) == sum(TWINS[policy](trace, n_slots).misses())


class OrderTwin(Twin):
    """By a key of each bundle, from when it came and was last asked for."""

    def __init__(self, trace: Trace, n_slots: int, key: Callable[["OrderTwin", Bundle], Any]) -> None:
        super().__init__(trace, n_slots)
        self.key = key
        self.came_at: dict[Bundle, int] = {}
        self.used_at: dict[Bundle, int] = {}
        self.used_in: dict[Bundle, int] = {}
        self.victims: list[tuple[Any, list[Any]]] = []

    def asked(self, bundles: list[Bundle]) -> None:
        for bundle in bundles:
            self.used_at[bundle], self.used_in[bundle] = self.now, self.turn[bundle[0]]

    def came(self, bundles: list[Bundle]) -> None:
        self.came_at |= dict.fromkeys(bundles, self.now)
        self.asked(bundles)

    def leaves(self, may_go: set[Bundle]) -> Bundle:
        return min(sorted(may_go), key=lambda bundle: self.key(self, bundle))


def test_plain_lru_and_last_tokens_choose_by_their_keys(rng: np.random.Generator) -> None:
    """Of one bundle a step, so that no two are equal and the twin's choice is the only one."""
    steps = [Step(0, rng.integers(12, size=1).astype(np.uint32)) for _ in range(300)]
    trace = Trace.from_steps((1, 12, 64), "", steps)
    for n_slots in (2, 4, 7):
        plain = OrderTwin(trace, n_slots, lambda twin, bundle: twin.used_at[bundle])
        assert misses_of_steps(trace, n_slots, "lru-plain") == sum(plain.misses())
        last = OrderTwin(
            trace, n_slots, lambda twin, bundle: (twin.turn[0] - twin.used_in[bundle] < 4, twin.came_at[bundle])
        )
        assert misses_of_steps(trace, n_slots, "last-tokens") == sum(last.misses())


@pytest.mark.parametrize("n_slots", [8, 20, 45])
def test_nothing_misses_less_than_the_optimum(rng: np.random.Generator, n_slots: int) -> None:
    trace = random_trace(rng, 3, 30, 60)
    missed = {policy: misses_of_steps(trace, n_slots, policy) for policy in POLICIES}
    print(missed)
    assert min(missed.values()) == missed[OPTIMUM]
    assert missed[OPTIMUM] < missed["fifo"], "the sizes tell nothing"


def fewest_misses(steps: list[frozenset[Bundle]], n_slots: int) -> int:
    """Of all ways to evict: any set that may go, as large as must be. Bundles of a step are in the arena together."""

    @cache
    def least(n: int, here: frozenset[Bundle]) -> int:
        if n == len(steps):
            return 0
        missing, may_go = steps[n] - here, sorted(here - steps[n])
        n_short = max(0, len(here | steps[n]) - n_slots)
        choices = combinations(may_go, n_short)
        return len(missing) + min(least(n + 1, (here | steps[n]) - set(gone)) for gone in choices)

    return least(0, frozenset())


def test_optimum_is_the_best_of_all_ways_to_evict(rng: np.random.Generator) -> None:
    """Proved here for small traces only, by trying them all."""
    n_evicting = 0
    for _ in range(30):
        n_layers, n_slots = int(rng.integers(1, 3)), int(rng.integers(4, 7))
        trace = random_trace(rng, n_layers, 7, 8, share=0.5)
        steps = [frozenset((layer, int(i)) for i in ids) for layer, ids in fetches_of(trace, n_slots)]
        best = fewest_misses(steps, n_slots)
        assert misses_of_steps(trace, n_slots, OPTIMUM) == best, (n_slots, steps)
        n_evicting += best > len(frozenset().union(*steps))
    assert n_evicting > 5


def test_first_tenth_is_not_counted(rng: np.random.Generator) -> None:
    ids = np.arange(4, dtype=np.uint32)
    trace = Trace.from_steps((2, 10, 64), "", [Step(layer, ids) for _ in range(20) for layer in range(2)])
    found = replay(trace, 16, "lru")
    assert (found.n_tokens, found.hits, found.misses) == (18, 18 * 8, 0)
    assert found.hit_rate == 1


def test_step_larger_than_half_the_arena_comes_in_parts() -> None:
    trace = Trace.from_steps((1, 10, 64), "", [Step(0, np.arange(10, dtype=np.uint32))] * 5)
    assert [len(ids) for _, ids in fetches_of(trace, 8)] == [4, 4, 2] * 5
    assert replay(trace, 8, OPTIMUM).misses > 0


def test_budgeted_evicts_from_the_layer_most_above_its_budget_in_the_order_inside() -> None:
    """Budgets 2, 1, 3; the layers hold 4, 2, 3 and layer 2 is to get more."""
    order = PlainLeastRecentlyUsed(3, 10, 9)
    policy = Budgeted(order, np.array([2, 1, 3]), 9)
    for layer, slots in enumerate(([3, 1, 2, 0], [4, 5], [6, 7, 8])):
        for slot in slots:
            policy.used(layer, np.empty(0, np.int64))
            policy.filled(layer, np.array([slot]), np.array([slot]))
    may_go = np.ones(9, bool)
    may_go[1] = False
    assert set(policy.victims(1, may_go).tolist()) == {3}
    policy.filled(2, np.array([3]), np.array([9]))  # now they are above by 1, 1, 1, and it is layer 2's turn
    assert set(policy.victims(2, may_go).tolist()) == {6, 7}
    assert set(policy.victims(2, may_go).tolist()) <= {2, 4, 8}


def test_layers_with_budgets_are_caches_of_their_own(rng: np.random.Generator) -> None:
    """As many misses as each layer alone in an arena of its budget. One bundle a step: no two were used at once."""
    ids = rng.integers(60, size=(3000, 2, 1)).astype(np.uint32)
    trace = Trace.from_steps((2, 60, 64), "", [Step(layer, token[layer]) for token in ids for layer in range(2)])
    budgets = np.array([20, 35])
    both = replay_under(trace, 55, Budgeted(PlainLeastRecentlyUsed(2, 60, 55), budgets, 55))
    alone = 0
    for layer, n_slots in enumerate(budgets.tolist()):
        own = Trace.from_steps((1, 60, 64), "", [Step(0, ids) for ids in trace.of_layer(layer)])
        alone += replay_under(own, n_slots, PlainLeastRecentlyUsed(1, 60, n_slots)).misses
    assert both.misses == alone > 1000


@pytest.mark.parametrize("division", DIVISIONS)
def test_divisions_are_replayed_on_what_they_have_not_seen(rng: np.random.Generator, division: str) -> None:
    trace = random_trace(rng, 3, 40, 60)
    assert replay_budgets(trace, 40, division).n_tokens == 27
    assert 0 < replay_budgets(trace, 40, division).hit_rate < 1


def test_what_cannot_be_replayed_is_refused(rng: np.random.Generator) -> None:
    trace = random_trace(rng, 2, 10, 10)
    with pytest.raises(BadRequest, match="policy 'best': one of lfu"):
        replay(trace, 8, "best")
    with pytest.raises(BadRequest, match="1 slots"):
        replay(trace, 1, "lru")
    with pytest.raises(BadRequest, match="holds no token"):
        replay(trace.part(0, 1), 8, "lru")
    with pytest.raises(BadRequest, match="policy 'shared': one of lfu-equal"):
        replay_budgets(trace, 8, "shared")
