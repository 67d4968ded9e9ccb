"""What people ask for, such as `exact` or `calibrated:0.98`: how that is written."""

from dataclasses import dataclass

from sparseflow.errors import BadRequest
from sparseflow.store.calibration import KINDS

DEFAULT_FIDELITY = "exact"
_NAMES = ("exact", "certified", "calibrated", "dense")
_FOR_TESTS = "oracle"
"""Computes all neurons to tell which are active."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """`exact`, `certified`, `dense`, `oracle`, or `calibrated[:RECALL[:KIND]]`."""

    name: str
    recall: float | None = None
    kind: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Fidelity":
        """
        Raises:
            BadRequest: not of this form.
        """
        name, *rest = text.split(":")
        if name not in (*_NAMES, _FOR_TESTS) or (rest and name != "calibrated") or len(rest) > 2:
            raise BadRequest(
                f"fidelity {text!r}: give one of {', '.join(_NAMES)}, "
                "or calibrated:RECALL such as calibrated:0.98, or calibrated:RECALL:PREDICTOR"
            )
        if len(rest) == 2 and rest[1] not in KINDS:
            raise BadRequest(f"fidelity {text!r}: predictors are {', '.join(KINDS)}")
        return cls(name, _recall(text, rest[0]) if rest else None, rest[1] if len(rest) == 2 else None)


def _recall(text: str, number: str) -> float:
    try:
        recall = float(number)
    except ValueError:
        recall = 0.0
    if not 0 < recall < 1:
        raise BadRequest(f"fidelity {text!r}: the recall is a number between 0 and 1, such as 0.98")
    return recall


def require_fidelity(fidelity: str) -> None:
    """
    Raises:
        BadRequest: no such fidelity.
    """
    Fidelity.parse(fidelity)
