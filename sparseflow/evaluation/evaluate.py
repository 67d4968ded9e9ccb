"""A store and texts to the quality and the cost of each fidelity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.errors import BadRequest
from sparseflow.evaluation.disk_replay import DiskReplay
from sparseflow.evaluation.fidelity_run import FidelityRun, Observed
from sparseflow.evaluation.ratio import mean, ratio_of_sums
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.fidelity import make_predictor
from sparseflow.orchestration.neuron_predictor import LayeredPredictor, NeuronPredictor
from sparseflow.store.profile import ModelProfile
from sparseflow.utils.progress import progress
from sparseflow.utils.tokenizer import token_windows, tokenizer_of

DEFAULT_WINDOW = 256


def evaluate(
    model: SparseOPTForCausalLM,
    texts: Sequence[Path],
    fidelities: Sequence[str],
    *,
    n_tokens: int | None = None,
    window: int | None = None,
    activation_threshold: float = 1.0,
    cache_ratios: Sequence[float] = (),
    quiet: bool = True,
) -> dict[str, Any]:
    """Compare fidelities with the dense model, on the same texts; see `Evaluation` for what is returned.

    Args:
        model: of any fidelity.
        fidelities: as `SparseOPTForCausalLM.from_pretrained` takes them.
        n_tokens: at most so many of the texts, in whole windows; None: all.
        window: tokens that attend to each other; None: DEFAULT_WINDOW, or the model's positions if fewer. No more than
            `n_tokens`.
        cache_ratios: shares of all bundles kept in host memory, to tell what would be read from disk.
        quiet: no progress bar.

    Raises:
        BadRequest, DiskError: as their texts say.
    """
    positions = model.config.max_position_embeddings
    window = min(DEFAULT_WINDOW, positions) if window is None else window
    if not 2 <= window <= positions:
        raise BadRequest(f"window {window}: give 2 to {positions} tokens, the positions that the model has")
    if n_tokens is not None:
        window = min(window, max(2, n_tokens))
    windows = token_windows(tokenizer_of(model.source.model_files), texts, window, n_tokens)
    predictors = [make_predictor(model.source, fidelity, activation_threshold) for fidelity in fidelities]
    disk = DiskReplay(model.source.profile, cache_ratios)
    observed = FidelityRun(model, predictors, disk.note if cache_ratios else None).run(windows, quiet=quiet)
    result = Evaluation(model.source.profile, windows, observed).as_fields(fidelities, predictors)
    for n, found in enumerate(progress(result["fidelities"], "replay", quiet=quiet), start=1):
        found["bytes_per_token"]["disk"] = disk.bytes_per_token(n)
    return result


@dataclass(frozen=True)
class Evaluation:
    """What all windows showed, as result fields: shares from 0 to 1, None for what is not known."""

    profile: ModelProfile
    windows: Tensor
    observed: Sequence[Observed]

    def as_fields(self, fidelities: Sequence[str], predictors: Sequence[NeuronPredictor | None]) -> dict[str, Any]:
        """The whole result, in the order of `fidelities`."""
        surprise = mean([seen.dense_surprise for seen in self.observed]).value or 0.0
        every_layer = range(self.profile.num_layers)
        return {
            "tokens": self.windows.numel(),
            "window": self.windows.shape[1],
            "dense": {
                "perplexity": math.exp(surprise),
                "active_share": self._pairs(0, every_layer)["active_share"],
                "mlp_bytes_per_token": self.profile.neurons_nbytes,
            },
            "fidelities": [
                {"fidelity": asked} | self._fidelity(n, surprise, predictor)
                for n, (asked, predictor) in enumerate(zip(fidelities, predictors, strict=True))
            ],
        }

    def _fidelity(self, n: int, surprise: float, predictor: NeuronPredictor | None) -> dict[str, Any]:
        distances = [seen.distances[n] for seen in self.observed]
        log_ratio = mean([d.log_ratio for d in distances])
        ratio = math.exp(log_ratio.value or 0.0)
        layers = range(self.profile.num_layers)
        kinds = predictor.kinds if isinstance(predictor, LayeredPredictor) else [None] * len(layers)
        return {
            "predictor": "dense" if predictor is None else predictor.fidelity,
            "perplexity_dense": math.exp(surprise),
            "perplexity_sparse": math.exp(surprise) * ratio,
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": None if log_ratio.error is None else ratio * log_ratio.error,
            "top1_agreement": mean([d.agreement for d in distances]).value,
            "kl_divergence": mean([d.divergence for d in distances]).value,
            **self._pairs(n + 1, layers, reads_all=predictor is None),
            "layers": [
                {"layer": layer, "kind": kinds[layer], **self._pairs(n + 1, [layer], reads_all=predictor is None)}
                for layer in layers
            ],
        }

    def _pairs(self, contestant: int, layers: Sequence[int], *, reads_all: bool = False) -> dict[str, Any]:
        """What pairs of token and neuron say of some layers together. reads_all: without asking which fire."""
        active, chosen, found, predictor_nbytes = (
            self._sums(name, contestant, layers) for name in ("active", "chosen", "found", "predictor_nbytes")
        )
        n_tokens = self.windows.numel()
        n_neurons = len(layers) * self.profile.ffn_dimension
        recall = ratio_of_sums(found, active)
        halves = chosen.sum() + (chosen if reads_all else found).sum()
        predictor_bytes = float(predictor_nbytes.sum() / n_tokens)
        memory_bytes = float(halves * self.profile.part_nbytes / n_tokens)
        return {
            "recall": recall.value,
            "recall_error": recall.error,
            "precision": ratio_of_sums(found, chosen).value,
            "active_share": float(active.sum() / (n_tokens * n_neurons)),
            "candidate_share": float(chosen.sum() / (n_tokens * n_neurons)),
            "bytes_per_token": {"predictor": predictor_bytes, "memory": memory_bytes, "disk": None},
            "share_of_dense_mlp_bytes": (predictor_bytes + memory_bytes) / (n_neurons * self.profile.bundle_nbytes),
        }

    def _sums(self, name: str, contestant: int, layers: Sequence[int]) -> NDArray[np.int64]:
        """One of `PairCounts`' fields, one number a window."""
        return np.array([getattr(seen.counts, name)[contestant, layers].sum() for seen in self.observed])
