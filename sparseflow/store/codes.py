"""8-bit codes of fc1, from which the exact and certified predictors bound every pre-activation.

w_ij = s_ig * q_ij + e_ij with q in [-127, 127], g = j // GROUP. The step s_ig is the largest |w_ij| of the group over
127, so no code is ever clipped. Rounding is stochastic: up with probability equal to the fraction, so that each e_ij
has mean 0 and lies in an interval of width s_ig whatever x will be. That is what Hoeffding's inequality needs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflow.store.shard_format import TensorSpec

# Columns that share a step. scripts/bench/NOTES.md compares widths and groups by bytes per token; kernels rely on a
# multiple of 32 whose sums int32 holds: GROUP * 127 * 32767 < 2**31.
GROUP = 128
CODE_LIMIT = 127
ROUNDING_SEED = 20231109
_ROWS_AT_ONCE = 128  # float64 temporaries of a block stay small beside a layer

# Norms are stored as upper bounds; this covers the rounding of float64 sums over any width.
_UPWARD = 1 + 2.0**-30


class Codes(NamedTuple):
    """codes: (n, n_groups * GROUP) int8. scales: (n, n_groups), norms: (n,), error_norms: (n,), float32."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    norms: NDArray[np.float32]
    error_norms: NDArray[np.float32]


def group_count(hidden: int) -> int:
    """Groups a row of `hidden` weights is coded in; the last may be partly empty."""
    return -(-hidden // GROUP)


def code_specs(ffn_dim: int, hidden: int) -> list[TensorSpec]:
    """The tensors of one layer's predictor file."""
    n_groups = group_count(hidden)
    return [
        TensorSpec("codes", "I8", (ffn_dim, n_groups * GROUP)),
        TensorSpec("scales", "F32", (ffn_dim, n_groups)),
        TensorSpec("norms", "F32", (ffn_dim,)),
        TensorSpec("error_norms", "F32", (ffn_dim,)),
    ]


def code_rows(weight: NDArray[np.float64], generator: np.random.Generator) -> Codes:
    """Code some rows of fc1.

    Args:
        weight: (n, hidden) float64, finite.
        generator: the rounding draws from it, one number a weight.
    """
    n, hidden = weight.shape
    padded = np.zeros((n, group_count(hidden) * GROUP))
    padded[:, :hidden] = weight
    grouped = padded.reshape(n, -1, GROUP)
    scales = _float32_above(np.abs(grouped).max(axis=2) / CODE_LIMIT)  # above, so that no code is clipped
    steps = scales.astype(np.float64)[:, :, None]
    ratio = np.divide(grouped, steps, out=np.zeros_like(grouped), where=steps > 0)
    floor = np.floor(ratio)
    codes = floor + (generator.random(grouped.shape) < ratio - floor)
    coded = codes * steps
    return Codes(
        codes.astype(np.int8).reshape(n, -1),
        scales,
        _norm_above(coded.reshape(n, -1)),
        _norm_above((grouped - coded).reshape(n, -1)),
    )


def code_layer(weight: NDArray[np.generic], layer: int, seed: int = ROUNDING_SEED) -> Iterator[Codes]:
    """Code a layer's fc1 block by block. Each layer has its own random stream, so any layer can be coded alone.

    weight: (ffn_dim, hidden), any float type that numpy has.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, layer]))
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        yield code_rows(weight[start : start + _ROWS_AT_ONCE].astype(np.float64), generator)


def _norm_above(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n,): the norm of each row or a little more, infinite where float32 ends."""
    return _float32_above(np.sqrt(np.einsum("ij,ij->i", rows, rows)) * _UPWARD)


def _float32_above(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The next float32 at or above each value."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)
