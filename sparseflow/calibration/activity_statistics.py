"""How often a layer's neurons fire, and how long they go on."""

from typing import Any

import numpy as np

from sparseflow.calibration.activations import LayerActivity

_AT_ONCE = 4096


def layer_statistics(activity: LayerActivity, window: int) -> dict[str, Any]:
    """`active_share`, `overlap`, `active_counts` and `miss_curve`, as in `LayerRecord`."""
    bits, ffn_dim = activity.is_active, len(activity.bias)
    counts = np.zeros(ffn_dim, np.int64)
    for start in range(0, len(bits), _AT_ONCE):
        counts += np.unpackbits(bits[start : start + _AT_ONCE], axis=1, count=ffn_dim).sum(0, dtype=np.int64)
    by_window = bits.reshape(-1, window, bits.shape[1])
    before, after = by_window[:, :-1], by_window[:, 1:]
    n_before = int(np.bitwise_count(before).sum(dtype=np.int64))
    n_kept = int(np.bitwise_count(before & after).sum(dtype=np.int64))
    return {
        "active_share": int(counts.sum()) / (len(bits) * ffn_dim),
        "overlap": n_kept / n_before if n_before else 0.0,
        "active_counts": counts.tolist(),
        "miss_curve": [],
    }
