"""Checks of anything that might come, on many examples: a few hundred in the suite, a million in a run of its own.

    def check(content: bytes) -> None: ...           # asserts what holds whatever `content` is

    def test_...() -> None:
        on_some(check, st.binary())

    @a_million
    def test_..._a_million_times(round_: int) -> None:
        on_a_share(check, round_, st.binary())

A million examples of one run would not fit: hypothesis remembers all of a run. So they are rounds of their own seeds,
and of a round ten are drawn and checked at a time, since drawing one takes longer than most checks.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy, lists, tuples

N_ROUNDS = 50
N_OF_A_ROUND = 20_000
N_AT_A_TIME = 10
assert N_ROUNDS * N_OF_A_ROUND >= 1_000_000

Check = Callable[..., None]


def a_million(test: Callable[[int], None]) -> Any:
    """A test of one round, for the long run: `pytest -m fuzz`."""
    return pytest.mark.fuzz(pytest.mark.parametrize("round_", range(N_ROUNDS))(test))


def on_some(check: Check, *strategies: SearchStrategy[Any], n: int = 200) -> None:
    """Run a check on `n` examples, other ones each time."""
    assert _count(check, n, 1, strategies, None) >= n // 2, "hypothesis found few examples: widen the strategies"


def on_a_share(check: Check, round_: int, *strategies: SearchStrategy[Any]) -> None:
    """Run a check on the examples of one round."""
    n = _count(check, N_OF_A_ROUND, N_AT_A_TIME, strategies, round_)
    assert n >= N_OF_A_ROUND, f"{n} examples only: widen the strategies"


def _count(
    check: Check, n: int, n_at_a_time: int, strategies: tuple[SearchStrategy[Any], ...], round_: int | None
) -> int:
    """Returns the number of examples that were checked."""
    n_checked = 0

    def counted(examples: list[tuple[Any, ...]]) -> None:
        nonlocal n_checked
        for values in examples:
            n_checked += 1
            check(*values)

    examples = lists(tuples(*strategies), min_size=n_at_a_time, max_size=n_at_a_time)
    run = settings(
        max_examples=n // n_at_a_time, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )(given(examples)(counted))
    (run if round_ is None else seed(round_)(run))()
    return n_checked
