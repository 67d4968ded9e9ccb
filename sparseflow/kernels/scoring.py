"""The kernel of `kernels/bounds.py`, which says what it computes: bounds of all neurons for some tokens.

Each thread quantises the tokens for itself (no barrier), then takes one part of the neurons after the other and goes
over it twice: the coarse plane of all, then the fine plane of those that are left. A row is asked for while others
before it are read.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from sparseflow.kernels.intrinsics import (
    DIGEST,
    LANES,
    advance,
    float32_at,
    float64_at,
    int16_at,
    int32_at,
    int64_at,
    nibble_dot,
    take_next,
    uint32_at,
)
from sparseflow.kernels.threads import compile_kernel, run_team, team_rank
from sparseflow.store.codes import FINE_STEPS, GROUP, ROW_GROUP_WORDS

_FASTMATH = {"reassoc", "contract", "nsz"}

_BIAS_SLACK = 2.0**-48  # float64 scores are rounded where the bias is added
_UNDERFLOW_SLACK = 1e-30  # products of float32 scales that round to 0; a pre-activation this near to 0 is a candidate
_ROWS_AHEAD = 3  # how many rows before its turn a row is asked for
PARTS_A_THREAD = 4

# Places in the argument block: numbers; addresses; and where in the scratch memory things lie, bytes from its start.
N_THREADS, N_NEURONS, N_GROUPS, N_TOKENS, HIDDEN, NEEDS_ALL, NEXT_PART = range(7)
COARSE, FINE, SCALES, BIAS, NORMS, COARSE_ERROR_NORMS, FINE_ERROR_NORMS, DITHER = range(7, 15)
SETTINGS, X, SCRATCH, KERNEL = range(15, 19)
COUNTS, BOUNDS, IDS, CODES, STARTS, STEPS, SQUARES, COARSE_OFFSETS, FINE_OFFSETS, TOKEN_NORMS, SCORES = range(19, 30)
N_FIELDS = 30


class Layer(NamedTuple):
    """A layer's codes, for one call. Pointers; the field names are those of `bounds.CodedRows`."""

    coarse: Any
    fine: Any
    scales: Any
    bias: Any
    norms: Any
    coarse_error_norms: Any
    fine_error_norms: Any
    n_neurons: Any
    n_groups: Any


class Tokens(NamedTuple):
    """What a thread knows of the tokens. Pointers, each to a block a token.

    codes: int16, n_groups * GROUP. starts: int32, n_groups * LANES, the sum of -8 codes for each lane of `nibble_dot`,
    so that a row's codes count from -8 to 7. steps: float32, n_groups. squares: float64, n_groups, ||x_g||^2.
    coarse_offsets, fine_offsets: float64, n_groups: what a plane's dither adds to a score, for each step of the row.
    norms: float64, two: ||x||, and the bound's factor of ||w^_i||.
    """

    codes: Any
    starts: Any
    steps: Any
    squares: Any
    coarse_offsets: Any
    fine_offsets: Any
    norms: Any
    n_tokens: Any


class Settings(NamedTuple):
    """is_exact: which margin. factor: its own, in fine steps. threshold: of all margins. planes: 1 or 2."""

    is_exact: Any
    factor: Any
    threshold: Any
    planes: Any


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


@njit
def _fill_starts(codes, starts):
    """Of one group. codes: GROUP; starts: LANES."""
    for lane in range(LANES):
        total = np.int32(0)
        for j in range(2 * lane, GROUP, ROW_GROUP_WORDS):
            total += np.int32(codes[j]) + np.int32(codes[j + 1])
        starts[lane] = -np.int32(FINE_STEPS // 2) * total


@njit(fastmath=_FASTMATH)
def _quantise_token(tokens, t, x, hidden, n_groups, dither, float_unit):
    """Fill a token's place in `tokens`. x: its hidden floats."""
    codes = advance(tokens.codes, t * n_groups * GROUP)
    total = 0.0
    residual = 0.0
    for g in range(n_groups):
        first = g * GROUP
        step, squares, group_residual = _quantise_group(
            advance(x, first), min(GROUP, hidden - first), advance(codes, first)
        )
        _fill_starts(advance(codes, first), advance(tokens.starts, (t * n_groups + g) * LANES))
        plain = 0.0
        dithered = 0.0
        for j in range(GROUP):
            code = np.float64(codes[first + j])
            plain += code
            dithered += code * np.float64(dither[first + j])
        # With codes from -8 to 7 a coarse q stands for 16 q + 8 - u, and a fine one adds q + 1/2 to that.
        tokens.coarse_offsets[t * n_groups + g] = np.float64(step) * (plain * (FINE_STEPS // 2) - dithered)
        tokens.fine_offsets[t * n_groups + g] = np.float64(step) * plain * 0.5
        tokens.steps[t * n_groups + g] = step
        tokens.squares[t * n_groups + g] = squares
        total += squares
        residual += group_residual
    tokens.norms[2 * t] = np.sqrt(total)
    tokens.norms[2 * t + 1] = np.sqrt(residual) + np.sqrt(total) * float_unit


@njit(fastmath=_FASTMATH, forceinline=True)
def _score_and_width(plane, offsets, layer, i, ahead, tokens, t):
    """What a plane's row adds to neuron i's score: in units of the plane's codes, and apart from them.

    Also sqrt(sum_g s_ig^2 ||x_g||^2), in fine steps. ahead: a neuron whose row will be read soon.
    """
    scales, first = advance(layer.scales, i * layer.n_groups), t * layer.n_groups
    row_words = layer.n_groups * ROW_GROUP_WORDS
    row, row_ahead = advance(plane, i * row_words), advance(plane, ahead * row_words)
    codes, starts = advance(tokens.codes, first * GROUP), advance(tokens.starts, first * LANES)
    product = nibble_dot(row, row_ahead, codes, starts, scales, advance(tokens.steps, first), layer.n_groups)
    offset = 0.0
    squares = 0.0
    for g in range(layer.n_groups):
        scale = np.float64(scales[g])
        offset += scale * offsets[first + g]
        squares += scale * scale * tokens.squares[first + g]
    return np.float64(product), offset, np.sqrt(squares)


@njit(fastmath=_FASTMATH, forceinline=True)
def _bound(score, width, error_norm, layer, i, tokens, t, settings):
    """Neuron i's upper bound. width: in fine steps, times the plane's step."""
    margin = settings.factor * (width if settings.is_exact else np.float64(error_norm) * tokens.norms[2 * t])
    margin += np.float64(layer.norms[i]) * tokens.norms[2 * t + 1] + np.float64(abs(layer.bias[i])) * _BIAS_SLACK
    if layer.norms[i] > 0 and tokens.norms[2 * t] > 0:  # else the score is the bias itself
        margin += _UNDERFLOW_SLACK
    return score + settings.threshold * margin


@njit
def _is_settled(bound):
    """NaN and overflow stay candidates."""
    return -np.inf < bound and bound <= 0


@njit
def _rounded(bound):
    """A bound as float32 that is <= 0 just where it is settled."""
    rounded = np.float32(bound)
    return rounded if _is_settled(bound) or not rounded <= 0 else np.float32(np.inf)


@njit(fastmath=_FASTMATH)
def _coarse_pass(layer, tokens, settings, first, last, scores, bounds, found):
    """List in `found` the neurons that the coarse plane does not settle for all tokens. Returns how many.

    scores: (n_tokens, n_neurons) float64, to be filled. bounds: the same of float32.
    """
    count = 0
    for i in range(first, last):
        ahead = i + _ROWS_AHEAD
        is_open = False
        for t in range(tokens.n_tokens):
            product, offset, width = _score_and_width(layer.coarse, tokens.coarse_offsets, layer, i, ahead, tokens, t)
            score = np.float64(layer.bias[i]) + (product * FINE_STEPS + offset)
            bound = _bound(score, width * FINE_STEPS, layer.coarse_error_norms[i], layer, i, tokens, t, settings)
            scores[t * layer.n_neurons + i] = score
            bounds[t * layer.n_neurons + i] = _rounded(bound)
            is_open = is_open or not _is_settled(bound)
        found[count] = i
        count += is_open
    return count


@njit(fastmath=_FASTMATH)
def _fine_pass(layer, tokens, settings, scores, bounds, found, n_open, needs_all):
    """Leave in `found` the neurons that the fine plane does not settle either. Returns (how many, rows read).

    needs_all: bounds of every token are wanted, and a row counts once a token.
    """
    count = 0
    n_read = 0
    for k in range(n_open):
        i, ahead = np.int64(found[k]), np.int64(found[min(k + _ROWS_AHEAD, n_open - 1)])
        is_open = False
        n_scored = 0
        for t in range(tokens.n_tokens):
            place = t * layer.n_neurons + i
            if bounds[place] <= 0 or (is_open and not needs_all):
                continue
            product, offset, width = _score_and_width(layer.fine, tokens.fine_offsets, layer, i, ahead, tokens, t)
            score = scores[place] + (product + offset)
            bound = _bound(score, width, layer.fine_error_norms[i], layer, i, tokens, t, settings)
            bounds[place] = _rounded(bound)
            is_open = is_open or not _is_settled(bound)
            n_scored += 1
        n_read += n_scored if needs_all else 1
        found[count] = i
        count += is_open
    return count, n_read


@njit(fastmath=_FASTMATH)
def _score_parts(block, rank):
    """Quantise the tokens; bound part after part of the neurons, listing each one's candidates from its first on.

    A thread that loses its core for a while leaves the others more parts. block: as `bounds.Scorer` lays it out.
    """
    n_neurons, n_groups, n_tokens, hidden = block[N_NEURONS], block[N_GROUPS], block[N_TOKENS], block[HIDDEN]
    layer = Layer(
        int16_at(block[COARSE]), int16_at(block[FINE]), float32_at(block[SCALES]), float32_at(block[BIAS]),
        float32_at(block[NORMS]), float32_at(block[COARSE_ERROR_NORMS]), float32_at(block[FINE_ERROR_NORMS]),
        n_neurons, n_groups,
    )  # fmt: skip
    scratch, places = block[SCRATCH], rank * n_tokens * n_groups
    tokens = Tokens(
        advance(int16_at(scratch + block[CODES]), places * GROUP),
        advance(int32_at(scratch + block[STARTS]), places * LANES),
        advance(float32_at(scratch + block[STEPS]), places),
        advance(float64_at(scratch + block[SQUARES]), places),
        advance(float64_at(scratch + block[COARSE_OFFSETS]), places),
        advance(float64_at(scratch + block[FINE_OFFSETS]), places),
        advance(float64_at(scratch + block[TOKEN_NORMS]), rank * n_tokens * 2),
        n_tokens,
    )
    numbers = float64_at(block[SETTINGS])
    settings = Settings(numbers[0] != 0, numbers[1], numbers[2], numbers[3])
    scores, bounds = float64_at(scratch + block[SCORES]), float32_at(scratch + block[BOUNDS])
    counts, ids = int64_at(scratch + block[COUNTS]), uint32_at(scratch + block[IDS])
    for t in range(n_tokens):
        x = advance(float32_at(block[X]), t * hidden)
        _quantise_token(tokens, t, x, hidden, n_groups, float32_at(block[DITHER]), numbers[4])
    n_parts = block[N_THREADS] * PARTS_A_THREAD
    part = take_next(advance(block, NEXT_PART))
    while part < n_parts:
        first, last = n_neurons * part // n_parts, n_neurons * (part + 1) // n_parts
        found = advance(ids, first)
        count = _coarse_pass(layer, tokens, settings, first, last, scores, bounds, found)
        n_read = 0
        if settings.planes > 1:
            count, n_read = _fine_pass(layer, tokens, settings, scores, bounds, found, count, block[NEEDS_ALL] != 0)
        counts[2 * part], counts[2 * part + 1] = count, n_read
        part = take_next(advance(block, NEXT_PART))


@njit
def join(block):
    """What the parts have found, one after the other from the first place on; both counts become the first part's."""
    n_parts, n_neurons = block[N_THREADS] * PARTS_A_THREAD, block[N_NEURONS]
    found, counts = uint32_at(block[SCRATCH] + block[IDS]), int64_at(block[SCRATCH] + block[COUNTS])
    count = counts[0]
    for part in range(1, n_parts):
        first = n_neurons * part // n_parts
        for k in range(counts[2 * part]):
            found[count + k] = found[first + k]
        count += counts[2 * part]
        counts[1] += counts[2 * part + 1]
    counts[0] = count


@cache
def team_kernel() -> Any:
    """`kernel` on all threads, and what they found joined. Compiled on first use."""
    digest = DIGEST

    def score_by_team(args):
        block = int64_at(args)
        if digest:
            run_team(block[KERNEL], args, block[N_THREADS], 0)
            join(block)

    return compile_kernel(score_by_team)


@cache
def kernel() -> Any:
    """Compiled on first use. Its argument block is laid out in `bounds.Scorer`."""
    digest = DIGEST

    def score_neurons(args):
        block = int64_at(args)
        if digest:
            _score_parts(block, np.int64(team_rank()))

    return compile_kernel(score_neurons)
