"""How the memory of a device is divided: what must lie there, and how many bundles get a slot.

allowed = context + dense weights + codes + keys and values + buffers of dense steps + slots
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.config import OffloadStrategy
from sparseflow.core.weight_source import WeightSource
from sparseflow.engine.budgets import divide_slots, equal_shares
from sparseflow.errors import NotEnoughMemory
from sparseflow.orchestration.calibrated_predictor import calibration_of
from sparseflow.store.profile import ModelProfile
from sparseflow.utils.sizes import format_size, parse_size

if TYPE_CHECKING:
    import torch

AUTO_SHARE = 0.9
"""Of what a device has free, that `auto` takes."""

# What a process takes on the device before it does anything, and compiled kernels: 620 MB on an H200 with driver 580.
CONTEXT_NBYTES = 640 << 20
KEPT_TOKENS = 512
"""Whose keys and values have room in the plan; more take what the device has beside it."""

ACTIVATIONS_NBYTES = 96 << 20
"""Of a prompt's pass, and of what lies between kernels."""

DENSE_PART_NBYTES = 32 << 20
"""Bytes of bundles that a dense step moves together; two such parts are on the device at once."""


def plan_slots(
    source: WeightSource, device: "torch.device", device_memory: str | int, strategy: OffloadStrategy
) -> NDArray[np.int64]:
    """Bundles of each layer that get a slot, (n_layers,); once weights and codes lie on the device.

    Each layer's number is by what it gains, where the store was calibrated; else the same for all.

    Raises:
        NotEnoughMemory: not even one slot a layer.
    """
    profile = source.profile
    n_bundles = profile.num_layers * profile.ffn_dimension
    n_slots = int(strategy.gpu_cache_ratio * n_bundles)
    if device.type != "cpu":
        n_slots = min(n_slots, _room(profile, device, device_memory) // profile.bundle_nbytes)
    if n_slots < profile.num_layers:
        if device.type == "cpu":
            return equal_shares(profile.num_layers, profile.num_layers)
        least = format_size(profile.num_layers * profile.bundle_nbytes)
        raise NotEnoughMemory(
            f"device memory {device_memory}: dense weights, codes and buffers leave room for {max(n_slots, 0)} neurons "
            f"on {device}, {least} more for one neuron a layer are the least; allow more, or use a smaller model"
        )
    return _divided(source, n_slots)


def _room(profile: ModelProfile, device: "torch.device", device_memory: str | int) -> int:
    """Bytes that slots may take on a GPU."""
    import torch

    taken = torch.cuda.memory_reserved(device) + CONTEXT_NBYTES
    if device_memory == "auto":
        free, _ = torch.cuda.mem_get_info(device)
        allowed = int(AUTO_SHARE * (free + taken))
    else:
        allowed = parse_size(device_memory)
    of_tokens = 2 * KEPT_TOKENS * profile.num_layers * profile.part_nbytes
    parts = 2 * min(DENSE_PART_NBYTES, profile.ffn_dimension * profile.bundle_nbytes)
    return allowed - taken - of_tokens - parts - ACTIVATIONS_NBYTES


def _divided(source: WeightSource, n_slots: int) -> NDArray[np.int64]:
    profile = source.profile
    calibration = calibration_of(source)
    curves = [] if calibration is None else [record.miss_curve for record in calibration.layers]
    if not curves or not all(len(curve) > 1 for curve in curves):
        return equal_shares(profile.num_layers, n_slots)
    least = max(1, min(profile.ffn_dimension // 64, n_slots // profile.num_layers))
    return divide_slots(curves, profile.ffn_dimension, n_slots, least)
