"""A layer whose pre-activations are given, and a predictor that is as near or far as it is told."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparseflow.core.host_bundles import MappedFetch
from sparseflow.core.weight_source import HostBundles
from sparseflow.orchestration.live_recall import SparseStep
from sparseflow.protocol.measured_recall import MeasuredRecall


class MadeUpLayer:
    """A source of one layer. Token t is the t-th unit vector, so fc1 holds what comes out."""

    def __init__(self, pre_activations: NDArray[np.float32], fetch_limit: int = 1000) -> None:
        """pre_activations: (n_tokens, ffn_dim)."""
        n_tokens, ffn_dim = pre_activations.shape
        self.profile: Any = SimpleNamespace(ffn_dimension=ffn_dim)
        self.fetch_limit = fetch_limit
        self.x = torch.eye(n_tokens)
        self.kept: list[bool] = []
        fc1 = torch.from_numpy(pre_activations.T.copy())
        self._base = torch.stack([fc1, torch.full_like(fc1, torch.nan)], 1)  # (ffn_dim, 2, hidden)

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> MappedFetch:
        assert len(ids) <= self.fetch_limit
        assert (np.diff(ids.astype(np.int64)) > 0).all()
        self.kept.append(keep)
        return MappedFetch(HostBundles(self._base, ids))

    def note_recall(self, measured: MeasuredRecall) -> None:
        """Nobody shows it."""


@dataclass
class MadeUpPredictor:
    """Says how near each neuron was: (n_tokens, ffn_dim) float32."""

    nearness: NDArray[np.float32]
    fidelity: str = "made up"
    nbytes_read: int = 0

    def scorer(self, layer: int) -> None:
        """It asks no codes."""

    def select(self, layer: int, x: torch.Tensor) -> NDArray[np.uint32]:
        return (~(self.nearness <= 0)).any(0).nonzero()[0].astype(np.uint32)

    def bounds(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.nearness)


@dataclass
class MadeUpStep:
    """One step: what is active, what was computed, and what was missed."""

    source: MadeUpLayer
    predictor: MadeUpPredictor
    step: SparseStep
    n_missed: int
    """Active pairs among skipped neurons."""


def made_up_step(
    rng: np.random.Generator, *, near: float, far: float, n_tokens: int = 1, ffn_dim: int = 1500
) -> MadeUpStep:
    """
    Args:
        near: how probably the nearest skipped neurons are active; this fades with their distance.
        far: how probably any skipped neuron is.
    """
    nearness = (rng.random((n_tokens, ffn_dim)) - 0.9).astype(np.float32)  # a tenth is chosen
    predictor = MadeUpPredictor(nearness)
    ids = predictor.select(0, torch.empty(0))
    probability = far + near * np.exp(40 * np.minimum(nearness, 0))
    probability[:, ids] = 0.7
    is_active = rng.random((n_tokens, ffn_dim)) < probability
    source = MadeUpLayer(np.where(is_active, 1.0, -1.0).astype(np.float32) * rng.random(ffn_dim, np.float32))
    n_active = int(is_active[:, ids].sum())
    step = SparseStep(0, source.x, ids, n_active, torch.zeros(ffn_dim))
    return MadeUpStep(source, predictor, step, int(is_active.sum()) - n_active)
