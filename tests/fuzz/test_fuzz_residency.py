"""Any events in any order, beside a model of them: each fetch is answered once, and no slot is given away early."""

from choices import Choices
from hypothesis import strategies as st
from many import a_million, on_a_share, on_some
from residency_model import Bundle, Checker

from sparseflow.engine.engine import EVICTIONS

N_BYTES = 64  # about fourteen events
DECISIONS = st.binary(min_size=N_BYTES, max_size=N_BYTES)
NAMES = sorted(EVICTIONS)


def some_of(choices: Choices, n: int) -> list[int]:
    """Numbers below n, 16 at most; few as often as many."""
    chosen = choices.number(2)
    if choices.one_in(2):
        chosen &= choices.number(2)
    return [number for number in range(n) if chosen >> number & 1]


def some_loading(choices: Choices, checker: Checker) -> list[Bundle]:
    """Some that are on their way, of any loads, at least one: reads end in any order, and several at once."""
    loading = sorted(checker.model.loading)
    return [loading[n] for n in some_of(choices, min(len(loading), 16))] or loading[:1]


def check(decisions: bytes) -> None:
    choices = Choices(decisions)
    n_layers, ffn_dim, n_slots = 1 + choices.below(3), 1 + choices.below(16), 1 + choices.below(14)
    checker = Checker(n_layers, ffn_dim, n_slots, choices.of(NAMES))
    while not choices.are_over:
        match choices.below(10):
            case 0 | 1 | 2:
                keep = not choices.one_in(3)
                checker.acquire(choices.below(n_layers), some_of(choices, ffn_dim)[:n_slots], keep)
            case 3 | 4:
                checker.hint(choices.below(n_layers), some_of(choices, ffn_dim))
            case 5 | 6:  # any there ever was: waiting, loading, ready, refused, or released before; or one that was not
                checker.release(choices.below(checker.n_fetches + 2))
            case 7 | 8 if checker.model.loading:
                checker.load_ends(some_loading(choices, checker))
            case 9 if checker.model.loading:
                checker.load_fails(some_loading(choices, checker))
        checker.check()
    checker.check_resident(n_layers, ffn_dim)
    checker.wind_down()


def test_residency_keeps_its_promises_whatever_happens_in_whatever_order() -> None:
    on_some(check, DECISIONS, n=400)


@a_million
def test_residency_keeps_its_promises_a_million_times(round_: int) -> None:
    on_a_share(check, round_, DECISIONS)
