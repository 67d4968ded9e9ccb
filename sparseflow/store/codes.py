"""8-bit codes of fc1 in two planes of 4 bits, from which predictors bound every pre-activation.

q_ij = floor(w_ij / s_ig + u_j) and w^_ij = s_ig * (q_ij + 1/2 - u_j), with g = j // GROUP. That is subtractive dither:
u_j is drawn evenly from [-8, 8), once a layer and column, so each error w_ij - w^_ij is uniform on a width of s_ig and
independent of the errors of other columns, whatever w is and x will be. A uniform error is worth less than rounding up
or down at random: its moments are those of a Gaussian of variance s^2 / 12 or smaller, where a width s alone gives
s^2 / 4 (kernels/bounds.py).

The upper four bits of q are the coarse plane. As u_j is even on 16 steps, the coarse code alone has the same law with
steps of 16 s_ig: q // 16 stands for s_ig * (16 * (q // 16) + 8 - u_j). The step s_ig is the largest |w_ij| of the group
over 120, which with a dither of 8 is 128: no code is ever clipped.

A group of a row in a plane, 32 words of 16 bits, each with four codes from 0 to 15:

    word            0          1              31
    bits 0-3     column 0   column 1  ...  column 31
    bits 4-7     column 32  column 33 ...  column 63
    bits 8-11    column 64  column 65 ...  column 95
    bits 12-15   column 96  column 97 ...  column 127

coarse holds q // 16 + 8, fine q % 16. Columns from hidden on have dither 0 and stand for nothing.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflow.store.shard_format import TensorSpec

# Columns that share a step. scripts/bench/NOTES.md compares planes and groups by bytes per token; kernels rely on 128
# for the packing above, and for sums that int32 holds.
GROUP = 128
CODES_PER_WORD = 4
ROW_GROUP_WORDS = GROUP // CODES_PER_WORD  # of a group of a row, in each plane: a cache line
FINE_STEPS = 16  # fine steps in a coarse step
STEP_LIMIT = 120  # the largest weight of a group, in steps
DITHER_SEED = 20231109
DITHER_UNIT = 2.0**-20  # a dither is a multiple of this, so that float32 holds it
_ROWS_AT_ONCE = 128  # float64 temporaries of a block stay small beside a layer

# Norms are stored as upper bounds; this covers the rounding of float64 sums over any width.
_UPWARD = 1 + 2.0**-30
# A group's coded row is at least so many steps long: its largest weight, less half a coarse step. Kernels rely on it
# for their float errors; so it holds for `norms` even where a step is a denormal, and far too large.
_SHORTEST = STEP_LIMIT - FINE_STEPS // 2


_LARGEST = float(np.finfo(np.float32).max)

# What bounds rely on, least and most. Norms may be infinite, as `_norm_above` says: then a bound is, and its neuron a
# candidate; `exact` takes its margin from scales, which are finite.
CODE_RANGES: Mapping[str, tuple[float, float]] = {
    "dither": (-FINE_STEPS / 2, FINE_STEPS / 2 - DITHER_UNIT),
    "scales": (0.0, _LARGEST),
    "norms": (0.0, np.inf),
    "coarse_error_norms": (0.0, np.inf),
    "fine_error_norms": (0.0, np.inf),
}


class Codes(NamedTuple):
    """Some rows of a layer; n_groups = group_count(hidden).

    coarse, fine: (n, n_groups * ROW_GROUP_WORDS) int16, four codes a word. scales: (n, n_groups) float32, fine steps.
    norms: (n,) float32, ||w^_i|| or more, at either plane. coarse_error_norms, fine_error_norms: (n,) float32,
    ||w_i - w^_i|| or more.
    """

    coarse: NDArray[np.int16]
    fine: NDArray[np.int16]
    scales: NDArray[np.float32]
    norms: NDArray[np.float32]
    coarse_error_norms: NDArray[np.float32]
    fine_error_norms: NDArray[np.float32]


def group_count(hidden: int) -> int:
    """Groups a row of `hidden` weights is coded in; the last may be partly empty."""
    return -(-hidden // GROUP)


def code_specs(ffn_dim: int, hidden: int) -> list[TensorSpec]:
    """The tensors of one layer's predictor file: the dither, then those of `Codes`."""
    n_groups = group_count(hidden)
    return [
        TensorSpec("dither", "F32", (n_groups * GROUP,)),
        TensorSpec("coarse", "I16", (ffn_dim, n_groups * ROW_GROUP_WORDS)),
        TensorSpec("fine", "I16", (ffn_dim, n_groups * ROW_GROUP_WORDS)),
        TensorSpec("scales", "F32", (ffn_dim, n_groups)),
        TensorSpec("norms", "F32", (ffn_dim,)),
        TensorSpec("coarse_error_norms", "F32", (ffn_dim,)),
        TensorSpec("fine_error_norms", "F32", (ffn_dim,)),
    ]


def draw_dither(hidden: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """(n_groups * GROUP,): even on [-8, 8) in units of DITHER_UNIT; 0 from `hidden` on."""
    limit = round(FINE_STEPS / 2 / DITHER_UNIT)
    dither = np.zeros(group_count(hidden) * GROUP, np.float32)
    dither[:hidden] = generator.integers(-limit, limit, hidden) * DITHER_UNIT
    return dither


def layer_dither(hidden: int, layer: int, seed: int = DITHER_SEED) -> NDArray[np.float32]:
    """A layer's dither, as `draw_dither`. Each layer has its own random stream, so any layer can be coded alone."""
    return draw_dither(hidden, np.random.Generator(np.random.Philox(key=[seed, layer])))


def code_rows(weight: NDArray[np.float64], dither: NDArray[np.float32]) -> Codes:
    """Code some rows of fc1.

    Args:
        weight: (n, hidden) float64, finite.
        dither: (n_groups * GROUP,), the layer's.
    """
    n, hidden = weight.shape
    padded = np.zeros((n, len(dither)))
    padded[:, :hidden] = weight
    grouped = padded.reshape(n, -1, GROUP)
    scales = _float32_above(np.abs(grouped).max(axis=2) / STEP_LIMIT)  # above, so that no code is clipped
    steps = scales.astype(np.float64)[:, :, None]
    offset = dither.astype(np.float64).reshape(-1, GROUP)
    codes = np.floor(np.divide(grouped, steps, out=np.zeros_like(grouped), where=steps > 0) + offset)
    coarse = np.floor(codes / FINE_STEPS)
    inside = (np.arange(len(dither)) < hidden).reshape(-1, GROUP)
    coarse_rows = steps * (FINE_STEPS * coarse + FINE_STEPS / 2 - offset) * inside  # exact: 24 bits times 28
    fine_rows = steps * (codes + 0.5 - offset) * inside
    lengths = np.maximum(_squares(coarse_rows), _squares(fine_rows))
    return Codes(
        _pack(coarse + FINE_STEPS / 2),
        _pack(codes - FINE_STEPS * coarse),
        scales,
        _norm_above(np.maximum(lengths, (_SHORTEST * steps[:, :, 0]) ** 2)),
        _norm_above(_squares(grouped - coarse_rows)),
        _norm_above(_squares(grouped - fine_rows)),
    )


def code_layer(weight: NDArray[np.generic], dither: NDArray[np.float32]) -> Iterator[Codes]:
    """Code a layer's fc1 block by block.

    weight: (ffn_dim, hidden), any float type that numpy has. dither: the layer's.
    """
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        yield code_rows(weight[start : start + _ROWS_AT_ONCE].astype(np.float64), dither)


def _pack(codes: NDArray[np.float64]) -> NDArray[np.int16]:
    """(n, n_groups, GROUP) whole numbers from 0 to 15 -> (n, n_groups * ROW_GROUP_WORDS) int16."""
    quarters = codes.astype(np.uint16).reshape(len(codes), -1, CODES_PER_WORD, ROW_GROUP_WORDS)
    packed = quarters[:, :, 0] | quarters[:, :, 1] << 4 | quarters[:, :, 2] << 8 | quarters[:, :, 3] << 12
    return packed.view(np.int16).reshape(len(codes), -1)


def _squares(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n_groups, GROUP) -> (n, n_groups): the squared norm of each group."""
    squares: NDArray[np.float64] = np.einsum("igj,igj->ig", rows, rows)
    return squares


def _norm_above(squares: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n, n_groups) -> (n,): the norm of each row or a little more, infinite where float32 ends."""
    return _float32_above(np.sqrt(squares.sum(axis=1)) * _UPWARD)


def _float32_above(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The next float32 at or above each value."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)
