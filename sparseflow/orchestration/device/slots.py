"""How the memory of a device is divided: what must lie there, and how many bundles get a slot.

allowed = context + dense weights + codes + keys and values + buffers of steps + slots
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.weight_source import WeightSource
from sparseflow.engine.budgets import divide_slots, equal_shares
from sparseflow.errors import NotEnoughMemory
from sparseflow.orchestration.calibrated_predictor import calibration_of
from sparseflow.orchestration.device.choosers import TOKENS_AT_ONCE
from sparseflow.utils.sizes import format_size, parse_size

if TYPE_CHECKING:
    import torch

AUTO_SHARE = 0.9
"""Of what a device has free, that `auto` takes."""

# What a process takes on the device beside its tensors: its context and compiled kernels. 810 MB on an H200 with driver
# 580; a bare context is 550 of these.
CONTEXT_NBYTES = 800 << 20
KEPT_TOKENS = 256
"""Whose keys and values have room in the plan; more take what the device has beside it."""

ACTIVATIONS_NBYTES = 64 << 20
"""Of a prompt's pass, and of what lies between kernels."""

DENSE_PART_NBYTES = 16 << 20
"""Bytes of bundles that a dense step moves together; two such parts are on the device at once."""
HINTS_NBYTES = 16 << 20
"""Of what moves bundles before they are asked for: what lies between its kernels, and its branch of a graph."""

LEAST_SHARE = 1 / 64
"""Of all bundles that have a slot before layers are streamed for want of memory."""


class DevicePlan:
    """Divides the memory of one device for one model, as weights come to lie there."""

    def __init__(self, source: WeightSource, device: "torch.device", device_memory: str | int) -> None:
        """
        Args:
            device_memory: the most of it, a size, or `auto`: nine tenths of what is free (of a CPU: all one likes).
        """
        self._source, self._device, self._memory = source, device, device_memory
        self._allowed = _allowed(device, device_memory)
        self._taken = self.fixed_nbytes

    @property
    def fixed_nbytes(self) -> int:
        """What decoding takes beside weights, codes and slots."""
        profile = self._source.profile
        of_tokens = 2 * KEPT_TOKENS * profile.num_layers * profile.part_nbytes
        parts = 2 * min(DENSE_PART_NBYTES, profile.ffn_dimension * profile.bundle_nbytes)
        kept_nbytes = profile.ffn_dimension + 4 * profile.hidden_dimension  # candidates and input of a token
        coded_nbytes = 3 * profile.hidden_dimension  # the same as codes, and sums of it
        of_steps = TOKENS_AT_ONCE * profile.num_layers * (kept_nbytes + coded_nbytes)
        context = 0 if self._device.type == "cpu" else CONTEXT_NBYTES
        return of_tokens + parts + of_steps + ACTIVATIONS_NBYTES + context

    def take(self, nbytes: int) -> None:
        """Something lies there now."""
        self._taken += nbytes

    def n_streamed_layers(self, layer_nbytes: int, other_nbytes: int) -> int:
        """How many layers' attention is streamed: as few as leave room for the least number of slots.

        Args:
            layer_nbytes: of one layer's attention.
            other_nbytes: of all other dense weights.

        Raises:
            NotEnoughMemory: too little even with all of them streamed.
        """
        profile = self._source.profile
        least = int(LEAST_SHARE * profile.neurons_nbytes)
        room = self._allowed - self._taken - other_nbytes - least
        if room >= profile.num_layers * layer_nbytes:
            return 0
        n_kept = (room - 2 * layer_nbytes) // layer_nbytes
        if n_kept < 0:
            raise self._too_little(2 * layer_nbytes - room)
        return profile.num_layers - n_kept

    def slots(self, ratio: float) -> NDArray[np.int64]:
        """Bundles of each layer that get a slot, (n_layers,), of what room is left now.

        Each layer's number is by what it gains, where the store was calibrated; else the same for all.

        Args:
            ratio: the most of all bundles.

        Raises:
            NotEnoughMemory: not even one slot a layer.
        """
        profile = self._source.profile
        room = (self._allowed - self._taken) // profile.bundle_nbytes
        if room < profile.num_layers:
            raise self._too_little((profile.num_layers - room) * profile.bundle_nbytes)
        n_slots = int(ratio * profile.num_layers * profile.ffn_dimension)
        return _divided(self._source, max(min(n_slots, room), profile.num_layers))

    def _too_little(self, missing_nbytes: int) -> NotEnoughMemory:
        return NotEnoughMemory(
            f"device memory {self._memory}: this model runs on {self._device} with {format_size(missing_nbytes)} more "
            "at least; allow more, or use a smaller model"
        )


def _allowed(device: "torch.device", device_memory: str | int) -> int:
    if device_memory != "auto":
        return parse_size(device_memory)
    if device.type == "cpu":
        return 1 << 62
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(AUTO_SHARE * (free + torch.cuda.memory_reserved(device) + CONTEXT_NBYTES))


def _divided(source: WeightSource, n_slots: int) -> NDArray[np.int64]:
    profile = source.profile
    calibration = calibration_of(source)
    curves = [] if calibration is None else [record.miss_curve for record in calibration.layers]
    if not curves or not all(len(curve) > 1 for curve in curves):
        return equal_shares(profile.num_layers, n_slots)
    least = max(1, min(profile.ffn_dimension // 64, n_slots // profile.num_layers))
    return divide_slots(curves, profile.ffn_dimension, n_slots, least)
