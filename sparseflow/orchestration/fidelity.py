"""The predictor that does what people ask for, such as `exact` or `calibrated:0.98`."""

import warnings

from sparseflow.core.fidelity_name import Fidelity
from sparseflow.core.weight_source import WeightSource
from sparseflow.kernels.bounds import Margin
from sparseflow.orchestration.calibrated_predictor import calibrated_predictor, calibration_of
from sparseflow.orchestration.neuron_predictor import NeuronPredictor, OraclePredictor, bound_predictor


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
