"""Text through the dense model and through several fidelities at once, window by window."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseflow.evaluation.evaluating_coordinator import EvaluatingCoordinator, OnChoice, PairCounts
from sparseflow.evaluation.next_token import Distance, distance, log_probabilities, surprise
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.neuron_predictor import NeuronPredictor
from sparseflow.orchestration.transfer_coordinator import LayerBiases
from sparseflow.utils.progress import progress


@dataclass(frozen=True, slots=True)
class Observed:
    """What one window showed."""

    dense_surprise: float
    """Negative log-likelihood of the text under the dense model, nats a token."""
    distances: list[Distance]
    """One a fidelity."""
    counts: PairCounts
    """Of the dense model, then one row a fidelity."""


class FidelityRun:
    """The dense model and its fidelities as contestants on the same windows."""

    def __init__(
        self,
        model: SparseOPTForCausalLM,
        predictors: Sequence[NeuronPredictor | None],
        on_choice: OnChoice | None = None,
    ) -> None:
        """
        Args:
            model: of any fidelity; its own predictor is not used.
            predictors: one a fidelity; None is the dense model once more.
            on_choice: as `EvaluatingCoordinator`; contestant 0 is the dense model.
        """
        self._model = model
        self._n_contestants = 1 + len(predictors)
        biases = [LayerBiases(layer.fc1.bias, layer.fc2.bias) for layer in model.model.decoder.layers]
        self._coordinator = EvaluatingCoordinator(model.source, biases, [None, *predictors], on_choice)

    def run(self, windows: Tensor, *, quiet: bool = True) -> list[Observed]:
        """windows: (n_windows, window) int64, each alone. quiet: no progress bar."""
        with torch.inference_mode():
            return [self._observe(tokens) for tokens in progress(windows, "evaluate", quiet=quiet, unit="window")]

    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """Of each contestant in turn, (window, vocabulary), dtype of the store. tokens: (window,)."""
        self._coordinator.start_window()
        batch = tokens.expand(self._n_contestants, -1)
        with self._in_place():
            hidden = self._model.model(input_ids=batch, use_cache=False).last_hidden_state
        return (self._model.lm_head(rows) for rows in hidden)

    def _observe(self, tokens: Tensor) -> Observed:
        each = map(log_probabilities, self.logits(tokens))
        dense = next(each)
        distances = [distance(dense, sparse, tokens) for sparse in each]
        return Observed(surprise(dense, tokens), distances, self._coordinator.counts)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let every layer ask this run's coordinator."""
        layers = self._model.model.decoder.layers
        kept = [layer.coordinator for layer in layers]
        try:
            for layer in layers:
                layer.coordinator = self._coordinator
            yield
        finally:
            for layer, coordinator in zip(layers, kept, strict=True):
                layer.coordinator = coordinator
