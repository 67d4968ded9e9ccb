"""What a model asks of whoever runs its MLPs, in host memory (`TransferCoordinator`) or on a device."""

from typing import Protocol

from torch import Tensor

from sparseflow.core.weight_source import WeightSource
from sparseflow.orchestration.neuron_predictor import NeuronPredictor
from sparseflow.orchestration.stats import RunStats


class Coordinator(Protocol):
    """Runs the MLPs of one model."""

    source: WeightSource
    stats: RunStats
    profiling: bool
    audit_every: int

    @property
    def predictor(self) -> NeuronPredictor | None:
        """Chooses neurons; None computes every layer dense."""
        ...

    def hint(self, layer: int, hidden: Tensor) -> None:
        """As `TransferCoordinator.hint`."""
        ...

    def mlp(self, layer: int, x: Tensor, hidden: Tensor, *, decoding: bool) -> Tensor:
        """As `TransferCoordinator.mlp`."""
        ...

    def close(self) -> None:
        """Let go of all that shows the source's memory. May be called twice."""
        ...
