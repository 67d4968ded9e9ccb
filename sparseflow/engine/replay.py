"""A trace replayed through an arena of some size: what each eviction would have found.

Residency itself is driven, as by one session whose reads are done at once: the bundles of one step are in the arena
together, and no step evicts what it needs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.eviction import Eviction
from sparseflow.engine.residency import Acquire, Load, Loaded, Release, Residency
from sparseflow.engine.rival_evictions import (
    LastTokens,
    LeastOftenUsedExactly,
    Optimum,
    PlainLeastRecentlyUsed,
    S3Fifo,
    Sieve,
)
from sparseflow.engine.trace import Step, Trace
from sparseflow.errors import BadRequest

# Of a trace's tokens, the first so many fill the arena and are not counted.
WARM_UP_SHARE = 0.1

_RIVALS: dict[str, Callable[[int, int, int], Eviction]] = {
    "lfu-exact": LeastOftenUsedExactly,
    "lru-plain": PlainLeastRecentlyUsed,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
    "last-tokens": LastTokens,
}
_BY_SIZES = EVICTIONS | _RIVALS
OPTIMUM = "optimum"
POLICIES = (*_BY_SIZES, OPTIMUM)


class Replayed(NamedTuple):
    """What was found. Without the warm-up."""

    n_tokens: int
    layer_hits: NDArray[np.int64]
    """(n_layers,)"""
    layer_misses: NDArray[np.int64]

    @property
    def hits(self) -> int:
        """Bundles that were there when asked for."""
        return int(self.layer_hits.sum())

    @property
    def misses(self) -> int:
        """Bundles that had to be read."""
        return int(self.layer_misses.sum())

    @property
    def hit_rate(self) -> float:
        """Of the bundles asked for; 0 where none were."""
        return self.hit_rate_of(slice(None))

    def hit_rate_of(self, layers: slice) -> float:
        """The same of some layers."""
        hits, misses = int(self.layer_hits[layers].sum()), int(self.layer_misses[layers].sum())
        return hits / (hits + misses) if hits + misses else 0.0

    @property
    def misses_per_token(self) -> float:
        """Bundles read for a token."""
        return self.misses / self.n_tokens


def replay(trace: Trace, n_slots: int, policy: str) -> Replayed:
    """Replay a trace under one of `POLICIES`.

    Raises:
        BadRequest: another policy, fewer than 2 slots, or less than one token beside the warm-up.
    """
    require_policy(policy, POLICIES)
    require_slots(n_slots)
    if policy == OPTIMUM:
        return replay_under(trace, n_slots, Optimum(fetches_of(trace, n_slots), n_slots))
    return replay_under(trace, n_slots, _BY_SIZES[policy](trace.n_layers, trace.ffn_dim, n_slots))


def require_policy(policy: str, known: Sequence[str]) -> None:
    """
    Raises:
        BadRequest: not one of those known.
    """
    if policy not in known:
        raise BadRequest(f"policy {policy!r}: one of {', '.join(known)}")


def require_slots(n_slots: int) -> None:
    """
    Raises:
        BadRequest: fewer than an arena has.
    """
    if n_slots < 2:
        raise BadRequest(f"{n_slots} slots: an arena has 2 at least; give a larger share")


def replay_under(trace: Trace, n_slots: int, eviction: Eviction) -> Replayed:
    """Replay a trace in an arena of so many slots, 2 at least.

    Raises:
        BadRequest: less than one token beside the warm-up.
    """
    if not trace.n_tokens:
        raise BadRequest("the trace holds no token; record a longer one")
    n_warm_up = int(WARM_UP_SHARE * trace.n_tokens)
    residency = Residency(trace.n_layers, trace.ffn_dim, n_slots, eviction)
    before = residency.layer_hits.copy(), residency.layer_misses.copy()
    for n, step in enumerate(trace):
        if n == n_warm_up * trace.n_layers:
            before = residency.layer_hits.copy(), residency.layer_misses.copy()
        for part in _parts(step, n_slots // 2):
            _fetch(residency, part)
    hits, misses = residency.layer_hits - before[0], residency.layer_misses - before[1]
    return Replayed(trace.n_tokens - n_warm_up, hits, misses)


def fetches_of(trace: Trace, n_slots: int) -> Trace:
    """The steps as an arena of so many slots is asked for them: in parts, where one takes more than half of it."""
    parts = (part for step in trace for part in _parts(step, n_slots // 2))
    return Trace.from_steps((trace.n_layers, trace.ffn_dim, trace.bundle_nbytes), trace.fingerprint, parts)


def _parts(step: Step, most: int) -> Iterator[Step]:
    for start in range(0, max(1, len(step.ids)), most):
        yield Step(step.layer, step.ids[start : start + most])


def _fetch(residency: Residency, step: Step) -> None:
    for instruction in residency.handle(Acquire(0, step.layer, step.ids)):
        if isinstance(instruction, Load):
            residency.handle(Loaded(instruction.slots))
    residency.handle(Release(0))
