"""Several fidelities in one pass: each token computes with its own neurons only, as in decoding.

The coordinator that generates takes the union over the tokens of a prompt, which hides what a predictor misses. This
one takes its place. The batch it sees holds the same tokens once for each contestant, whose streams part as soon as
one leaves an active neuron out; a layer's weights are fetched once for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import WeightSource
from sparseflow.orchestration.layer_mlp import LayerMlp
from sparseflow.orchestration.neuron_predictor import NeuronPredictor
from sparseflow.orchestration.transfer_coordinator import LayerBiases

OnChoice = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Pairs of token and neuron, (n_contestants, n_layers) int64 each, and bytes of predictor weights read."""

    active: NDArray[np.int64]
    """Pre-activation above 0, in float32, at the contestant's own input."""
    chosen: NDArray[np.int64]
    found: NDArray[np.int64]
    """Both of it."""
    predictor_nbytes: NDArray[np.int64]

    @classmethod
    def zeros(cls, n_contestants: int, n_layers: int) -> "PairCounts":
        """Nothing seen yet."""
        return cls(*(np.zeros((n_contestants, n_layers), np.int64) for _ in range(4)))


class EvaluatingCoordinator:
    """Stands where `TransferCoordinator` does. Arithmetic is float32, the same for every contestant but the mask."""

    def __init__(
        self,
        source: WeightSource,
        biases: Sequence[LayerBiases],
        contestants: Sequence[NeuronPredictor | None],
        on_choice: OnChoice | None = None,
    ) -> None:
        """
        Args:
            biases: one a layer.
            contestants: None is the dense model.
            on_choice: called with contestant, layer and what its predictor chose, (n_tokens, ffn_dim) bool.
        """
        self._source, self._biases, self._contestants = source, biases, contestants
        self._on_choice = on_choice
        self.start_window()

    def start_window(self) -> None:
        """Count anew."""
        self.counts = PairCounts.zeros(len(self._contestants), len(self._biases))

    def hint(self, layer: int, hidden: Tensor) -> None:
        """Nothing to foresee: every layer is read whole."""

    def mlp(self, layer: int, x: Tensor, hidden: Tensor, *, decoding: bool) -> Tensor:
        """As `TransferCoordinator.mlp`. x: (n_contestants * n_tokens, hidden), one contestant after the other."""
        mlp = LayerMlp.fetch(self._source, layer, *self._biases[layer])
        parts = x.float().chunk(len(self._contestants))
        outputs = [self._contestant(n, layer, mlp, part.contiguous()) for n, part in enumerate(parts)]
        return torch.cat(outputs).to(x.dtype)

    def _contestant(self, n: int, layer: int, mlp: LayerMlp, x: Tensor) -> Tensor:
        before = mlp.pre_activations(x)
        is_active = before > 0
        predictor, counts = self._contestants[n], self.counts
        if predictor is None:
            is_chosen = torch.ones_like(is_active)
        else:
            nbytes_read = predictor.nbytes_read
            is_chosen = ~(predictor.bounds(layer, x) <= 0)
            counts.predictor_nbytes[n, layer] = predictor.nbytes_read - nbytes_read
            if self._on_choice is not None:
                self._on_choice(n, layer, is_chosen)
        counts.active[n, layer] = torch.count_nonzero(is_active)
        counts.chosen[n, layer] = torch.count_nonzero(is_chosen)
        counts.found[n, layer] = torch.count_nonzero(is_active & is_chosen)
        return mlp.output(before.relu_().mul_(is_chosen))
