"""The page that a client counts in, read by a server that trusts none of it."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflow.protocol.measured_recall import MeasuredRecall
from sparseflow.protocol.session_counters import COUNTERS_NBYTES, SessionCounters

NONSENSE = [math.nan, math.inf, -math.inf, -1.0, -5e-324]


def shown(measured: MeasuredRecall) -> tuple[float | None, float | None, int | None]:
    return measured.recall, measured.recall_error, measured.recall_samples


def test_page_is_laid_out_as_drawn() -> None:
    page = bytearray(COUNTERS_NBYTES)
    counters = SessionCounters(page)
    counters.add_tokens(7)
    counters.set_recall(MeasuredRecall(1.5, 2.5, 3.5, 4.5))
    assert page == struct.pack("<Q4d", 7, 1.5, 2.5, 3.5, 4.5).ljust(COUNTERS_NBYTES, b"\0")
    assert SessionCounters(page).recall == (1.5, 2.5, 3.5, 4.5)


def test_recall_and_its_error_follow_from_the_sums() -> None:
    assert shown(MeasuredRecall(990.0, 10.0, 25.0, 800.0)) == (0.99, 0.005, 800)


def test_nothing_was_measured_on_a_page_of_zeros() -> None:
    assert shown(SessionCounters(bytearray(COUNTERS_NBYTES)).recall) == (None, None, None)


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("field", MeasuredRecall._fields)
def test_nonsense_is_nothing(field: str, value: float) -> None:
    measured = MeasuredRecall(990.0, 10.0, 25.0, 800.0)._replace(**{field: value})
    if field == "samples":
        assert measured.recall_samples is None
    else:
        assert shown(measured)[:2] == (None, None)


@given(st.binary(min_size=40, max_size=40) | st.lists(st.floats(), min_size=5, max_size=5).map(np.array))
@settings(max_examples=300, deadline=None, database=None)
def test_any_bytes_make_valid_json(content: object) -> None:
    page = bytearray(bytes(content).ljust(COUNTERS_NBYTES, b"\0"))  # type: ignore[call-overload]
    recall, error, samples = shown(SessionCounters(page).recall)
    json.dumps([recall, error, samples], allow_nan=False)
    assert recall is None or 0 <= recall <= 1
    assert (error is None) == (recall is None)
    assert error is None or 0 <= error <= 1
    assert samples is None or 0 < samples <= 2**53
