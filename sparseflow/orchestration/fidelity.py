"""What people ask for, such as `exact` or `calibrated:0.98`, and the predictor that does it."""

import warnings
from dataclasses import dataclass

from sparseflow.core.weight_source import WeightSource
from sparseflow.errors import BadRequest
from sparseflow.kernels.bounds import Margin
from sparseflow.orchestration.calibrated_predictor import calibrated_predictor, calibration_of
from sparseflow.orchestration.neuron_predictor import NeuronPredictor, OraclePredictor, bound_predictor
from sparseflow.store.calibration import KINDS

DEFAULT_FIDELITY = "exact"
_NAMES = ("exact", "certified", "calibrated", "dense", "oracle")


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
        if name not in _NAMES or (rest and name != "calibrated") or len(rest) > 2:
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


def make_predictor(source: WeightSource, fidelity: str, activation_threshold: float) -> NeuronPredictor | None:
    """The predictor of a fidelity; None for `dense`, which needs none.

    A store that was never calibrated runs `exact` where `calibrated` is asked for, with a warning.

    Raises:
        BadRequest: no such fidelity, or not with this store.
    """
    asked = Fidelity.parse(fidelity)
    match asked.name:
        case "dense":
            return None
        case "oracle":
            return OraclePredictor(source)
        case "certified":
            return bound_predictor(source, Margin.CERTIFIED, activation_threshold)
        case "calibrated":
            calibration = calibration_of(source)
            if calibration is not None:
                return calibrated_predictor(source, calibration, asked.recall, asked.kind, activation_threshold)
            warnings.warn(
                f"fidelity {fidelity}: the store of {source.profile.model_identifier} is not calibrated, so it runs "
                "exact; calibrate it with: sparseflow calibrate STORE --text FILE",
                stacklevel=2,
            )
    return bound_predictor(source, Margin.EXACT, activation_threshold)


def require_fidelity(fidelity: str) -> None:
    """
    Raises:
        BadRequest: no such fidelity.
    """
    Fidelity.parse(fidelity)
