"""Ratios of sums over windows, and their standard errors."""

import numpy as np
import pytest

from sparseflow.evaluation.ratio import mean, ratio_of_sums


def test_the_error_is_how_far_ratios_of_other_texts_lie_apart() -> None:
    rng = np.random.default_rng()
    values, errors = [], []
    for _ in range(3000):
        wholes = rng.uniform(50, 150, 30)
        shares = rng.beta(50, 5, 30)  # windows differ in recall more than their tokens would let expect
        found = ratio_of_sums(shares * wholes, wholes)
        assert found.value is not None
        assert found.error is not None
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(values) == pytest.approx(50 / 55, abs=0.002)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.1)


def test_the_error_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng().normal(3, 2, 11)
    found = mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(11))


def test_what_cannot_be_known_is_none() -> None:
    assert ratio_of_sums([0, 0], [0, 0]) == (None, None)
    assert mean([2.0]) == (2.0, None)
