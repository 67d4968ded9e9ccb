"""How often a layer's neurons fire, and how long they go on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflow.calibration.activations import LayerActivity
from sparseflow.engine.budgets import miss_curve

_AT_ONCE = 4096
_CURVE_TOKENS = 4096  # of the text: enough for a curve, and as much as is held at once


def layer_statistics(activity: LayerActivity, window: int) -> dict[str, Any]:
    """`active_share`, `overlap`, `active_counts` and `miss_curve`, as in `LayerRecord`."""
    bits, ffn_dim = activity.is_active, len(activity.bias)
    counts = np.zeros(ffn_dim, np.int64)
    for start in range(0, len(bits), _AT_ONCE):
        counts += _fires(bits[start : start + _AT_ONCE], ffn_dim).sum(0, dtype=np.int64)
    by_window = bits.reshape(-1, window, bits.shape[1])
    before, after = by_window[:, :-1], by_window[:, 1:]
    n_before = int(np.bitwise_count(before).sum(dtype=np.int64))
    n_kept = int(np.bitwise_count(before & after).sum(dtype=np.int64))
    return {
        "active_share": int(counts.sum()) / (len(bits) * ffn_dim),
        "overlap": n_kept / n_before if n_before else 0.0,
        "active_counts": counts.tolist(),
        "miss_curve": miss_curve(_fires(bits[:_CURVE_TOKENS], ffn_dim), ffn_dim).tolist(),
    }


def _fires(bits: NDArray[np.uint8], ffn_dim: int) -> NDArray[np.bool_]:
    """(n_tokens, ffn_dim), of packed bits."""
    return np.unpackbits(bits, axis=1, count=ffn_dim).view(bool)
