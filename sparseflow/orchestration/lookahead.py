"""Whether to foresee what a layer needs, so that its reads go on while something else is computed.

Foreseeing costs a scoring of the layer, and reads some bundles in vain; what it spares is at most the time of the
reads. So it pays where the disk is slow or little of the model is in memory, and not otherwise. A calibrated store has
predictors made for this, which see what entered a layer earlier and cost less than scoring the layer itself.
"""

import time
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.engine.counts import ReadTimes
from sparseflow.orchestration.low_rank import LowRank, normalised

LookaheadMode = Literal["auto", "off", "input", "before", "trained"]

# From how many layers earlier trained predictors foresee. One gives the disk a layer's time; from two earlier they see
# less: on the demo model 0.45-0.6 of those named are active then, instead of 0.6-0.7.
DEFAULT_DISTANCE = 1

# Of the bundles that trained predictors name. Below, their reads cost the disk more than they spare.
LEAST_USEFUL = 0.5

# Reads must take this many scorings. Measured, OPT-1.3B's shape: at 2 (5 % of the bundles in memory, a disk that reads
# 900 MB/s at random) tokens took 1.13 times as long with lookahead as without.
_SCORINGS = 3
_MEMORY = 0.95  # weight of the past in the running means


class TrainedLookahead:
    """Calibrated predictors of layers that are still to come."""

    def __init__(self, predictors: Mapping[int, LowRank], distance: int) -> None:
        """
        Args:
            predictors: by the layer that is foreseen.
            distance: from what entered so many layers before, or the first layer.
        """
        self._predictors = predictors
        self._distance = distance

    def __bool__(self) -> bool:
        return bool(self._predictors)

    def targets(self, layer: int) -> list[int]:
        """The layers that are foreseen from what enters this one."""
        last = layer + self._distance
        return [target for target in range(layer if layer == 0 else last, last + 1) if target in self._predictors]

    def foresee(self, target: int, hidden: Tensor) -> NDArray[np.uint32]:
        """Neurons that a layer may need for all of these tokens. hidden: (n_tokens, hidden), the residual stream."""
        is_foreseen = (self._predictors[target].scores(normalised(hidden)) > 0).any(0)
        return is_foreseen.nonzero().flatten().numpy().astype(np.uint32)

    def seconds(self, hidden: int) -> float:
        """What foreseeing a layer takes, measured; the shorter of two runs."""
        times_s = []
        for _ in range(2):
            begin = time.perf_counter()
            self.foresee(next(iter(self._predictors)), torch.zeros(1, hidden))
            times_s.append(time.perf_counter() - begin)
        return min(times_s)


class Lookahead:
    """When to look ahead, and from what.

    `input`: by scoring with what enters the layer; `before`: with what enters the MLP before it; `trained`: by trained
    predictors, those layers that have one; `auto`: by trained ones if there are any, else as `before`, where it pays.
    """

    def __init__(self, read_times: ReadTimes, ffn_dim: int, trained_s: float | None = None) -> None:
        """
        Args:
            trained_s: what trained predictors take for a layer; None: there are none.
        """
        self.mode: LookaheadMode = "auto" if read_times.layer_s else "off"
        self._bundle_read_s = read_times.scattered_s / ffn_dim
        self._trained_s = trained_s
        self._read_s = 0.0
        self._scoring_s = 0.0
        self._useful_share = 1.0

    def note(self, scoring_s: float, n_read: int, n_useful: int = 0, n_wasted: int = 0) -> None:
        """After a layer step: how long its neurons took to choose, and how many bundles were read.

        n_useful, n_wasted: bundles read on a hint that were asked for since, and that were evicted instead.
        """
        if n_useful + n_wasted:
            self._useful_share += (n_useful / (n_useful + n_wasted) - self._useful_share) * (1 - _MEMORY)
        self._scoring_s += (scoring_s - self._scoring_s) * (1 - _MEMORY)
        self._read_s += (n_read * self._bundle_read_s - self._read_s) * (1 - _MEMORY)

    @property
    def from_input(self) -> bool:
        """Whether to look ahead from what enters a layer, before its attention."""
        return self.mode == "input"

    @property
    def from_before(self) -> bool:
        """Whether to look ahead from what enters the MLP of the layer before."""
        return self.mode == "before" or (
            self.mode == "auto" and self._trained_s is None and self._pays(self._scoring_s)
        )

    @property
    def by_training(self) -> bool:
        """Whether to look ahead by trained predictors."""
        if self._trained_s is None:
            return False
        pays = self._useful_share > LEAST_USEFUL and self._pays(self._trained_s)
        return self.mode == "trained" or (self.mode == "auto" and pays)

    def _pays(self, cost_s: float) -> bool:
        return self._read_s > _SCORINGS * cost_s
