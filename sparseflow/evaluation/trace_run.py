"""Text through a model one token at a time, and what its layer steps ask for noted as a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from sparseflow.core.weight_source import Fetch, WeightSource
from sparseflow.engine.trace import Step, Trace
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.utils.progress import progress


class RecordingSource:
    """A weight source that notes what is fetched. Everything else is the source's own."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._noted: dict[int, list[NDArray[np.uint32]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def fetch(self, layer: int, ids: NDArray[np.uint32], keep: bool = True) -> Fetch:
        """As `WeightSource.fetch`; a look that leaves no trace leaves none here either."""
        if keep:
            self._noted.setdefault(layer, []).append(ids)
        return self._source.fetch(layer, ids, keep)

    def resident_bundles(self, layer: int) -> None:
        """Nothing is, so that all is fetched."""

    def take(self) -> list[Step]:
        """A step for each layer that was fetched since the last call, in that order; parts of one step joined."""
        steps = [Step(layer, np.concatenate(parts)) for layer, parts in self._noted.items()]
        self._noted = {}
        return steps


def record_trace(
    model: SparseOPTForCausalLM, fingerprint: str, windows: Tensor, n_tokens: int, *, quiet: bool = True
) -> Trace:
    """Feed tokens one by one, each with the cache of those before it; the first of a window is a prompt, not a step.

    Args:
        fingerprint: of the weights.
        windows: (n_windows, window) int64, each alone.
        n_tokens: at most so many decoded.
        quiet: no progress bar.
    """
    profile = model.source.profile
    sizes = profile.num_layers, profile.ffn_dimension, profile.bundle_nbytes
    steps: list[Step] = []
    total = min(n_tokens, windows.numel() - len(windows))
    n_recorded = 0
    bar = progress(desc="record", quiet=quiet, total=total, unit="token")
    with _recording(model) as source, torch.inference_mode(), bar:
        for window in windows:
            cache = DynamicCache(config=model.config)
            for position, token in enumerate(window.tolist()):
                if n_recorded == total:
                    break
                model.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                asked = source.take()
                if position:
                    steps += asked
                    n_recorded += 1
                    bar.update()
    return Trace.from_steps(sizes, fingerprint, steps)


@contextmanager
def _recording(model: SparseOPTForCausalLM) -> Iterator[RecordingSource]:
    """Let the model fetch through a recorder."""
    coordinator = model.coordinator
    kept = coordinator.source, coordinator.profiling
    coordinator.profiling = False  # nothing is sampled beside the steps
    coordinator.source = source = RecordingSource(model.source)
    try:
        yield source
    finally:
        coordinator.source, coordinator.profiling = kept
