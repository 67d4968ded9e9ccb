"""A ratio of sums over windows of text, and how far it may be off."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Ratio(NamedTuple):
    """None where it cannot be known: nothing to divide by; one window alone has no spread."""

    value: float | None
    error: float | None
    """Standard error over windows, so that tokens of one window may resemble each other."""


def ratio_of_sums(parts: ArrayLike, wholes: ArrayLike) -> Ratio:
    """sum(parts) / sum(wholes), one each a window.

    With R the ratio and d = part - R * whole, its variance is n / (n - 1) * sum d^2 / sum(wholes)^2 (W. G. Cochran,
    Sampling Techniques, 3rd ed., 6.4; the windows are few of those there could be). With wholes of 1, it is a mean.
    """
    parts, wholes = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    total, n = wholes.sum(), len(wholes)
    if not total:
        return Ratio(None, None)
    value = parts.sum() / total
    if n < 2:
        return Ratio(float(value), None)
    residuals = parts - value * wholes
    return Ratio(float(value), float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / total))


def mean(values: ArrayLike) -> Ratio:
    """Of one value a window."""
    return ratio_of_sums(values, np.ones_like(np.asarray(values, np.float64)))
