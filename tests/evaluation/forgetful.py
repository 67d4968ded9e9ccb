"""A predictor that errs both ways: it misses the weakly active neurons, and chooses others in vain."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import WeightSource
from sparseflow.orchestration.neuron_predictor import OraclePredictor

NBYTES_READ = 10  # as it says of itself, a token and layer


class Forgetful:
    """Chooses neurons whose pre-activation is above `least`, and every eighth. Keeps what it was asked about."""

    fidelity = "forgetful"

    def __init__(self, source: WeightSource, least: float) -> None:
        self._oracle, self._least = OraclePredictor(source), least
        self.nbytes_read = 0
        self.asked: list[tuple[int, Tensor]] = []

    def scorer(self, layer: int) -> None:
        """It asks no codes."""

    def select(self, layer: int, x: Tensor) -> NDArray[np.uint32]:
        chosen = (self.bounds(layer, x) > 0).any(0)
        return chosen.nonzero().flatten().numpy().astype(np.uint32)

    def bounds(self, layer: int, x: Tensor) -> Tensor:
        self.asked.append((layer, x))
        self.nbytes_read += NBYTES_READ * len(x)
        bounds = self._oracle.bounds(layer, x) - self._least
        bounds[:, ::8] = 1
        return bounds
