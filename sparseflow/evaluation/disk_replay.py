"""What decoding a text would read from disk: each token's neurons, replayed through arenas of some sizes."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.engine.engine import DEFAULT_EVICTION
from sparseflow.engine.replay import replay
from sparseflow.engine.trace import Step, Trace
from sparseflow.store.profile import ModelProfile

REPLAYED_TOKENS = 2048  # of a text, the first so many: their neurons are kept in memory


class DiskReplay:
    """Keeps what the contestants of a run chose, as `EvaluatingCoordinator` tells it."""

    def __init__(self, profile: ModelProfile, cache_ratios: Sequence[float]) -> None:
        """
        Args:
            cache_ratios: shares of all bundles that the arena holds.
        """
        self._profile, self._ratios = profile, cache_ratios
        self._chosen: defaultdict[tuple[int, int], list[NDArray[np.uint32]]] = defaultdict(list)

    def note(self, contestant: int, layer: int, is_chosen: Tensor) -> None:
        """One layer of one window. is_chosen: (n_tokens, ffn_dim) bool."""
        tokens = self._chosen[contestant, layer]
        tokens += [np.flatnonzero(row).astype(np.uint32) for row in is_chosen[: REPLAYED_TOKENS - len(tokens)].numpy()]

    def bytes_per_token(self, contestant: int) -> dict[str, float] | None:
        """By cache ratio, once the arena is warm; None where nothing was chosen or no ratio is asked for.

        Raises:
            BadRequest: a ratio that gives no arena.
        """
        if not self._ratios or (contestant, 0) not in self._chosen:
            return None
        trace, n_bundles = self._trace(contestant), self._profile.num_layers * self._profile.ffn_dimension
        slots = {f"{ratio:g}": max(2, math.ceil(ratio * n_bundles)) for ratio in self._ratios}
        return {
            ratio: replay(trace, n_slots, DEFAULT_EVICTION).misses_per_token * self._profile.bundle_nbytes
            for ratio, n_slots in slots.items()
        }

    def _trace(self, contestant: int) -> Trace:
        profile = self._profile
        layers = range(profile.num_layers)
        by_token = zip(*(self._chosen[contestant, layer] for layer in layers), strict=True)
        steps = [Step(layer, ids) for token in by_token for layer, ids in enumerate(token)]
        return Trace.from_steps((len(layers), profile.ffn_dimension, profile.bundle_nbytes), "", steps)
