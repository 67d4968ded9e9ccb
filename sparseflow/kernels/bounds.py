"""Which neurons can be active: an upper bound on every pre-activation, from low-bit codes of fc1 alone.

With fc1's rows w_i = w^_i + e_i, where w^_i is the coded row and e_i its rounding error, and x = x^ + r, where x^ is x
in 16-bit steps:

    w_i . x + b_i  <=  w^_i . x^ + b_i  +  margin_i  +  ||w^_i|| (||r|| + float error)

`certified`: margin_i = ||e_i|| ||x|| (Cauchy-Schwarz): never too small.
`exact`: margin_i = sqrt(ln(1/d) / 2 * sum_g s_ig^2 ||x_g||^2) (Hoeffding's inequality for rounding errors of mean 0 and
width s_ig, independent of x): too small with probability d at most, for one neuron and one token.

A neuron whose bound is not <= 0 is a candidate; so a NaN is one. `candidates_ref` is the slow twin.
"""

import enum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.kernels import threads
from sparseflow.kernels.intrinsics import (
    DIGEST,
    advance,
    float32_at,
    float64_at,
    grouped_dot,
    int8_at,
    int16_at,
    int64_at,
    uint32_at,
)
from sparseflow.kernels.threads import compile_kernel, team_rank, team_size
from sparseflow.store.codes import GROUP

_FASTMATH = {"reassoc", "contract", "nsz"}

# Head-room over the rounding of these kernels' own arithmetic. Scores are float32 (unit 2**-24), margins float64.
_MARGIN_SLACK = 1 + 2.0**-20
_BIAS_SLACK = 2.0**-22
_UNDERFLOW_SLACK = 1e-30  # products of float32 scales that round to 0; a pre-activation this near to 0 is a candidate


class Margin(enum.IntEnum):
    """Which margin is added to the score."""

    CERTIFIED = 0
    EXACT = 1


class CodedRows(NamedTuple):
    """fc1 of one layer in 8-bit codes: w^_ij = scales[i, j // GROUP] * codes[i, j]. All contiguous.

    codes: (ffn_dim, n_groups * GROUP) int8, zero beyond hidden. scales: (ffn_dim, n_groups) float32.
    bias: (ffn_dim,) float32, fc1's. norms: (ffn_dim,) float32, ||w^_i|| or more. error_norms: (ffn_dim,) float32,
    ||e_i|| or more.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor
    norms: Tensor
    error_norms: Tensor


@njit(fastmath=_FASTMATH)
def _quantise_group(x, length, codes):
    """x[:length] in 16-bit steps. Returns (step, sum of x^2, sum of error^2); a NaN step if x is not finite."""
    squares = 0.0
    peak = np.float32(0)
    for j in range(length):
        squares += np.float64(x[j]) * np.float64(x[j])
        peak = max(peak, abs(x[j]))
    for j in range(GROUP):
        codes[j] = 0
    if not squares < np.inf:
        return np.float32(np.nan), squares, squares
    step = peak / np.float32(32767)
    if step < np.float32(1e-30):  # too small to divide by: all of x counts as error
        return np.float32(0), squares, squares
    residual = 0.0
    for j in range(length):
        code = min(max(np.rint(x[j] / step), np.float32(-32767)), np.float32(32767))
        codes[j] = np.int16(code)
        difference = np.float64(x[j]) - np.float64(step) * np.float64(code)
        residual += difference * difference
    return step, squares, residual


@njit(fastmath=_FASTMATH)
def _quantise_token(x, hidden, n_groups, codes, steps, squares, norms, float_unit):
    """norms: two floats, ||x|| and the bound's factor of ||w^_i||."""
    total = 0.0
    residual = 0.0
    for g in range(n_groups):
        first = g * GROUP
        steps[g], squares[g], group_residual = _quantise_group(
            advance(x, first), min(GROUP, hidden - first), advance(codes, first)
        )
        total += squares[g]
        residual += group_residual
    norms[0] = np.sqrt(total)
    norms[1] = np.sqrt(residual) + norms[0] * float_unit


@njit(fastmath=_FASTMATH)
def _hoeffding_width(scales, squares, n_groups):
    """sqrt(sum_g s_g^2 ||x_g||^2)"""
    total = 0.0
    for g in range(n_groups):
        scale = np.float64(scales[g])
        total += scale * scale * squares[g]
    return np.sqrt(total)


@njit(fastmath=_FASTMATH)
def _find_candidates(block, part, n_parts):
    """Quantise the tokens, bound one part of the neurons, and list its candidates from its first neuron's place on.

    block: n_parts, n_neurons, n_groups, n_tokens, hidden, codes (int8), scales, bias, norms, error norms, x,
    x codes (int16), x steps, x squares (float64), x norms (float64) (these four: parts x tokens x ...),
    settings (float64), ids (uint32: n_neurons), counts (int64: n_parts); float32 where not said.
    settings: which margin (0 or 1), its factor, the factor of all margins, the float error unit.
    """
    n_neurons, n_groups, n_tokens, hidden = block[1], block[2], block[3], block[4]
    codes, scales, bias = int8_at(block[5]), float32_at(block[6]), float32_at(block[7])
    norms, error_norms, x = float32_at(block[8]), float32_at(block[9]), float32_at(block[10])
    settings, ids, counts = float64_at(block[15]), uint32_at(block[16]), int64_at(block[17])
    exact, factor, threshold, float_unit = settings[0] != 0, settings[1], settings[2], settings[3]
    width, token = n_groups * GROUP, part * n_tokens
    x_codes, x_steps = advance(int16_at(block[11]), token * width), advance(float32_at(block[12]), token * n_groups)
    x_squares, x_norms = advance(float64_at(block[13]), token * n_groups), advance(float64_at(block[14]), token * 2)

    for t in range(n_tokens):
        _quantise_token(
            advance(x, t * hidden), hidden, n_groups, advance(x_codes, t * width), advance(x_steps, t * n_groups),
            advance(x_squares, t * n_groups), advance(x_norms, t * 2), float_unit,
        )  # fmt: skip
    first = n_neurons * part // n_parts
    found = advance(ids, first)
    count = 0
    for i in range(first, n_neurons * (part + 1) // n_parts):
        row, row_scales = advance(codes, i * width), advance(scales, i * n_groups)
        rounding = np.float64(abs(bias[i])) * _BIAS_SLACK
        for t in range(n_tokens):
            score = bias[i] + grouped_dot(
                row, advance(x_codes, t * width), row_scales, advance(x_steps, t * n_groups), n_groups
            )
            if exact:
                margin = factor * _hoeffding_width(row_scales, advance(x_squares, t * n_groups), n_groups)
            else:
                margin = factor * np.float64(error_norms[i]) * x_norms[2 * t]
            margin += np.float64(norms[i]) * x_norms[2 * t + 1] + rounding
            if norms[i] > 0 and x_norms[2 * t] > 0:  # else the score is the bias itself
                margin += _UNDERFLOW_SLACK
            bound = np.float64(score) + threshold * margin
            if not (-np.inf < bound and bound <= 0):  # NaN and overflow stay candidates
                found[count] = i
                count += 1
                break
    counts[part] = count


@cache
def _kernel() -> Any:
    """Compiled on first use."""
    digest = DIGEST

    def find_candidates(args):
        block = int64_at(args)
        if digest:
            for part in range(np.int64(team_rank()), block[0], np.int64(team_size())):
                _find_candidates(block, part, block[0])

    return compile_kernel(find_candidates)


def _settings(margin: Margin, failure_probability: float, threshold: float, n_groups: int) -> NDArray[np.float64]:
    factor = _MARGIN_SLACK
    if margin is Margin.EXACT:
        factor *= float(np.sqrt(np.log(1 / failure_probability) / 2))
    float_unit = (n_groups + 24) * 2.0**-23  # products and sums of n_groups terms in 16 lanes
    return np.array([margin, factor, threshold, float_unit])


def candidates(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> NDArray[np.uint32]:
    """Neurons whose pre-activation may be above 0 for at least one token, on torch's threads.

    Args:
        rows: the layer's codes.
        x: (n_tokens, hidden) float32, contiguous: the inputs of fc1.
        margin: which bound.
        failure_probability: d, for one neuron and one token; used by `Margin.EXACT` alone.
        threshold: multiplies all margins; 1.0 is the bound as stated.

    Returns:
        (n,) uint32, ascending.
    """
    n_neurons, n_groups = rows.scales.shape
    n_tokens, hidden = x.shape
    n_parts = torch.get_num_threads()
    x_codes = np.empty((n_parts, n_tokens, n_groups * GROUP), np.int16)
    x_steps = np.empty((n_parts, n_tokens, n_groups), np.float32)
    x_squares, x_norms = np.empty((n_parts, n_tokens, n_groups)), np.empty((n_parts, n_tokens, 2))
    settings = _settings(margin, failure_probability, threshold, n_groups)
    ids, counts = np.empty(n_neurons, np.uint32), np.zeros(n_parts, np.int64)
    block = (
        *(n_parts, n_neurons, n_groups, n_tokens, hidden),
        *(rows.codes.data_ptr(), rows.scales.data_ptr(), rows.bias.data_ptr()),
        *(rows.norms.data_ptr(), rows.error_norms.data_ptr(), x.data_ptr(), x_codes.ctypes.data),
        *(x_steps.ctypes.data, x_squares.ctypes.data, x_norms.ctypes.data),
        *(settings.ctypes.data, ids.ctypes.data, counts.ctypes.data),
    )
    threads.run(_kernel(), np.array(block, np.int64), n_parts)
    return np.concatenate([ids[n_neurons * part // n_parts :][: counts[part]] for part in range(n_parts)])


def upper_bounds(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> Tensor:
    """The bounds themselves, (n_tokens, ffn_dim) float32: a neuron is a candidate where its bound is not <= 0."""
    return upper_bounds_ref(rows, x, margin, failure_probability, threshold).float()


def candidates_ref(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> NDArray[np.uint32]:
    """The same bounds in float64 without quantising x: never a neuron more than `candidates`, few fewer."""
    bound = upper_bounds_ref(rows, x, margin, failure_probability, threshold)
    return torch.nonzero((~(bound <= 0)).any(0)).flatten().numpy().astype(np.uint32)


def upper_bounds_ref(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> Tensor:
    """(n_tokens, ffn_dim) float64."""
    n_groups = rows.scales.shape[1]
    padded = torch.nn.functional.pad(x.double(), (0, n_groups * GROUP - x.shape[1])).unflatten(1, (n_groups, GROUP))
    coded = rows.codes.double().unflatten(1, (n_groups, GROUP)) * rows.scales.double()[:, :, None]
    score = padded.flatten(1) @ coded.flatten(1).T + rows.bias.double()  # (n_tokens, ffn_dim)
    if margin is Margin.EXACT:
        width = padded.square().sum(2) @ rows.scales.double().square().T
        return score + threshold * torch.sqrt(width * (np.log(1 / failure_probability) / 2))
    return score + threshold * rows.error_norms.double() * padded.flatten(1).norm(dim=1, keepdim=True)
