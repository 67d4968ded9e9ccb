"""Which neurons can be active, on a GPU: the bounds of `kernels/bounds.py`, whose `upper_bounds_ref` is the slow twin.

With a coarse code from -8 to 7 named Q, a fine one F, and x^ the quantised token of `token_codes`, a score is

    sum_g s_g (16 step_g sum_j Q_j c_j + sum_j (8 - u_j) x^_j)   on the coarse plane, and on the fine one besides
    sum_g s_g (step_g sum_j F_j c_j + sum_j x^_j / 2)            as  q + 1/2 - u = 16 Q + (8 - u) + F + 1/2.

Sums over j of whole numbers are exact: at most 32 products, below 2^23 in all, are added before a float is made of
them. Else a sum in float32 is wrong by at most n 2^-24 times its terms' sizes, where each goes through n roundings. A
group's row is at least 112 steps long (`store.codes`), so over a row, in units of ||w^||, the terms 16 Q s are at most
1 + 16 sqrt(128) / 112 < 2.62 long, those of the dither 1.62, F s 0.81 and s / 2 0.06: 5.11 in all. Each goes through
6 roundings for itself and at the end, one a group, and at most 31 where threads add up; those of the dither before that
through at most GROUP + 4 in `token_codes`. x - x^ is itself known to 2 roundings of x. With ||x^|| <= 1.001 ||x||:

    error <= ||w^|| ||x - x^|| + 2^-24 (5.2 (n_groups + 40) + 1.7 (GROUP + 4)) ||w^|| ||x||

Norms and margins are roots of sums of squares, of at most GROUP + n_groups + 40 roundings: _MARGIN_SLACK is over that.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.bounds import CodedRows, Margin
from sparseflow.kernels.device import token_codes
from sparseflow.kernels.device.token_codes import GROUP_WORDS, PARTS, TokenSums
from sparseflow.store.codes import DITHER_UNIT, FINE_STEPS, GROUP


@dataclass(frozen=True, slots=True)
class Shape:
    """How the kernel is cut. rows: of a program. open_rows: of the fine plane, read at once. words: of 32 bits, of a
    row, at once; at most 128, for the roundings counted above. warps: of a program.

    registers: the most that a thread may have; None: as the compiler sees fit.
    """

    rows: int = 16
    open_rows: int = 4
    words: int = 64
    warps: int = 4
    registers: int | None = None


SHAPE = Shape()

_MARGIN_SLACK = 1 + 2.0**-16  # over the float32 rounding of margins, norms and their square roots
_BIAS_SLACK = tl.constexpr(2.0**-22)
# Squares s^2 ||x_g||^2 below the least normal float32 may come out as 0: 3.5e-18 less width for 1000 groups, times a
# margin's factor. A pre-activation this near to 0 is a candidate.
_UNDERFLOW_SLACK = tl.constexpr(1e-15)


@triton.jit
def _dots(words, high_even, high_odd, low_even, low_odd, start, USES_DP4A: tl.constexpr):
    """start + sum of code times c over each word's eight codes, exact. All int32, as `token_codes` packs them."""
    if USES_DP4A:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 even, odd, high, low;
            and.b32 even, $1, 0x0F0F0F0F;
            shr.u32 odd, $1, 4;
            and.b32 odd, odd, 0x0F0F0F0F;
            dp4a.u32.s32 high, even, $2, 0;
            dp4a.u32.s32 high, odd, $3, high;
            dp4a.u32.u32 low, even, $4, $6;
            dp4a.u32.u32 low, odd, $5, low;
            mad.lo.s32 $0, high, 256, low;
            }""",
            "=r,r,r,r,r,r,r",
            [words, high_even, high_odd, low_even, low_odd, start],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    total = tl.zeros_like(words) + start
    for place in tl.static_range(4):
        even = (high_even << (24 - 8 * place) >> 24 << 8) + (low_even >> 8 * place & 255)
        odd = (high_odd << (24 - 8 * place) >> 24 << 8) + (low_odd >> 8 * place & 255)
        total += (words >> 8 * place & 15) * even + (words >> 8 * place + 4 & 15) * odd
    return total


@triton.jit
def _weigh(
    plane_ptr, scales_ptr, codes_ptr, steps_ptr, offsets_ptr, squares_ptr, row,
    STEPS: tl.constexpr, HAS_SQUARES: tl.constexpr, N_GROUPS: tl.constexpr, WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr, PARTS: tl.constexpr, USES_DP4A: tl.constexpr,
):  # fmt: skip
    """(rows,): what a plane adds to the score; and sum_g s_g^2 ||x_g||^2, if HAS_SQUARES.

    STEPS: of the row, in a unit of the plane's codes.
    """
    N_WORDS: tl.constexpr = N_GROUPS * GROUP_WORDS
    N_PARTS: tl.constexpr = WORDS // (GROUP_WORDS // PARTS)
    total = tl.zeros([row.shape[0], N_PARTS], tl.float32)
    squares = tl.zeros([row.shape[0], N_PARTS], tl.float32)
    for first in tl.static_range(0, N_WORDS, WORDS):
        word = first + tl.arange(0, WORDS)
        group = (first + tl.arange(0, N_PARTS) * (GROUP_WORDS // PARTS)) // GROUP_WORDS
        place = row[:, None] * N_WORDS + word[None, :]
        scale_place = row[:, None] * N_GROUPS + group[None, :]
        if first + WORDS <= N_WORDS:
            words = tl.load(plane_ptr + place)
            scale = tl.load(scales_ptr + scale_place)
        else:
            words = tl.load(plane_ptr + place, mask=(word < N_WORDS)[None, :], other=0)
            scale = tl.load(scales_ptr + scale_place, mask=(group < N_GROUPS)[None, :], other=0.0)
        x = codes_ptr + word
        high_even = tl.load(x, mask=word < N_WORDS, other=0)[None, :]
        high_odd = tl.load(x + N_WORDS, mask=word < N_WORDS, other=0)[None, :]
        low_even = tl.load(x + 2 * N_WORDS, mask=word < N_WORDS, other=0)[None, :]
        low_odd = tl.load(x + 3 * N_WORDS, mask=word < N_WORDS, other=0)[None, :]
        start = tl.load(x + 4 * N_WORDS, mask=word < N_WORDS, other=0)[None, :]
        dots = _dots(words, high_even, high_odd, low_even, low_odd, start, USES_DP4A)
        parts = tl.sum(tl.reshape(dots, [row.shape[0], N_PARTS, GROUP_WORDS // PARTS]), 2).to(tl.float32)
        step = tl.load(steps_ptr + group, mask=group < N_GROUPS, other=0.0) * STEPS
        offset = tl.load(offsets_ptr + group, mask=group < N_GROUPS, other=0.0)
        total += scale * (parts * step[None, :] + offset[None, :])
        if HAS_SQUARES:  # each group's once for each part
            square = tl.load(squares_ptr + group, mask=group < N_GROUPS, other=0.0)
            squares += scale * scale * square[None, :]
    return tl.sum(total, 1), tl.sum(squares, 1) / PARTS


@triton.jit
def _bound(
    score, width, row, bias_ptr, norms_ptr, errors_ptr, token_norm, residual, factor, threshold, float_unit,
    IS_EXACT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(rows,): the bound of each row on the plane whose codes are so many steps apart."""
    bias = tl.load(bias_ptr + row)
    norm = tl.load(norms_ptr + row)
    slack = norm * (token_norm * float_unit + residual) + tl.abs(bias) * _BIAS_SLACK
    slack += tl.where(norm > 0, _UNDERFLOW_SLACK, 0.0)
    margin = factor * STEPS * width if IS_EXACT else factor * token_norm * tl.load(errors_ptr + row)
    return bias + score + threshold * (margin + slack)


@triton.jit
def _is_settled(bound):
    """NaN and overflow stay candidates."""
    return (bound <= 0) & (bound > float("-inf"))


@triton.jit
def _pick(values, is_kth):
    """(k,) of (rows,): the value where is_kth, (k, rows), is set."""
    return tl.sum(tl.where(is_kth, values[None, :], 0), 1)


@triton.jit
def _bound_rows(
    codes_ptr, steps_ptr, squares_ptr, errors_ptr, coarse_offsets_ptr, fine_offsets_ptr,
    coarse_ptr, fine_ptr, scales_ptr, bias_ptr, norms_ptr, coarse_errors_ptr, fine_errors_ptr,
    mask_ptr, bounds_ptr, n_fine_rows_ptr, n_neurons, factor, threshold, float_unit,
    IS_EXACT: tl.constexpr, PLANES: tl.constexpr, KEEP_BOUNDS: tl.constexpr, USES_DP4A: tl.constexpr,
    ROWS: tl.constexpr, OPEN_ROWS: tl.constexpr, WORDS: tl.constexpr, N_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr, N_CODES: tl.constexpr, GROUP_WORDS: tl.constexpr, PARTS: tl.constexpr,
    FINE_STEPS: tl.constexpr, MARGIN_SLACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_neurons
    row = tl.minimum(row, n_neurons - 1)  # loads need no mask then
    codes_ptr += token * (N_CODES * N_GROUPS * GROUP_WORDS)
    first = token * N_GROUPS
    mask_ptr += token * n_neurons
    bounds_ptr += token * n_neurons
    group = tl.arange(0, GROUPS)
    token_norm = tl.sqrt(tl.sum(tl.load(squares_ptr + first + group, mask=group < N_GROUPS, other=0.0), 0))
    residual = tl.sqrt(tl.sum(tl.load(errors_ptr + first + group, mask=group < N_GROUPS, other=0.0), 0)) * MARGIN_SLACK
    score, squares = _weigh(
        coarse_ptr, scales_ptr, codes_ptr, steps_ptr + first, coarse_offsets_ptr + first, squares_ptr + first, row,
        FINE_STEPS, IS_EXACT, N_GROUPS, WORDS, GROUP_WORDS, PARTS, USES_DP4A,
    )  # fmt: skip
    width = tl.sqrt(squares)
    bound = _bound(
        score, width, row, bias_ptr, norms_ptr, coarse_errors_ptr, token_norm, residual, factor, threshold, float_unit,
        IS_EXACT, FINE_STEPS,
    )  # fmt: skip
    is_open = is_row & ~_is_settled(bound)
    if PLANES == 1:
        tl.store(mask_ptr + row, is_open.to(tl.int8), mask=is_row)
        if KEEP_BOUNDS:
            tl.store(bounds_ptr + row, bound, mask=is_row)
    else:
        tl.store(mask_ptr + row, tl.zeros([ROWS], tl.int8), mask=is_row & ~is_open)
        if KEEP_BOUNDS:
            tl.store(bounds_ptr + row, bound, mask=is_row & ~is_open)
        opened = is_open.to(tl.int32)
        rank = tl.cumsum(opened, 0)  # counts from 1
        n_open = tl.sum(opened, 0)
        if n_open > 0:
            tl.atomic_add(n_fine_rows_ptr, n_open.to(tl.int64))
        for k in range(0, n_open, OPEN_ROWS):
            nth = tl.minimum(k + 1 + tl.arange(0, OPEN_ROWS), n_open)  # beyond the last, the last once more
            is_nth = is_open[None, :] & (rank[None, :] == nth[:, None])
            fine_row = _pick(row, is_nth)
            fine, _ = _weigh(
                fine_ptr, scales_ptr, codes_ptr, steps_ptr + first, fine_offsets_ptr + first, squares_ptr, fine_row,
                1, False, N_GROUPS, WORDS, GROUP_WORDS, PARTS, USES_DP4A,
            )  # fmt: skip
            fine_bound = _bound(
                _pick(score, is_nth) + fine, _pick(width, is_nth), fine_row, bias_ptr, norms_ptr, fine_errors_ptr,
                token_norm, residual, factor, threshold, float_unit, IS_EXACT, 1,
            )  # fmt: skip
            tl.store(mask_ptr + fine_row, (~_is_settled(fine_bound)).to(tl.int8))
            if KEEP_BOUNDS:
                tl.store(bounds_ptr + fine_row, fine_bound)


class DeviceScorer:
    """Bounds of one layer's neurons for up to `n_tokens` tokens, on the device where the codes lie."""

    uses_dp4a = not triton.knobs.runtime.interpret
    """The GPU's own dot product of bytes; else the same in plain whole numbers."""

    def __init__(
        self, rows: CodedRows, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
    ) -> None:
        """As `kernels.bounds.candidates` is told. With one plane `rows.fine` may be empty."""
        self.rows, self.planes = rows, planes
        self.n_neurons, self.n_groups = rows.scales.shape
        self._coarse, self._fine = rows.coarse.view(torch.int32), rows.fine.view(torch.int32)
        self._is_exact = margin is Margin.EXACT
        n_columns = self.n_groups * GROUP
        exact = math.sqrt(math.log(2 / failure_probability) / 6) + DITHER_UNIT * math.sqrt(n_columns)
        self._factor = (exact if self._is_exact else 1.0) * _MARGIN_SLACK
        self._threshold = threshold
        self._float_unit = (5.2 * (self.n_groups + 40) + 1.7 * (GROUP + 4)) * 2.0**-24

    def sum_tokens(self, x: Tensor, sums: TokenSums) -> None:
        """Fill `sums`. x: (n_tokens, hidden) float32, contiguous."""
        token_codes.sum_tokens(x, self.rows.dither, sums)

    def normalise(self, stream: Tensor, weight: Tensor, bias: Tensor, eps: float, x: Tensor, sums: TokenSums) -> None:
        """Fill x, (hidden,) float32, with the layer norm of one token, and `sums` with what that is here."""
        token_codes.normalise_and_sum(stream, weight, bias, eps, self.rows.dither, x, sums)

    def select(
        self, x: Tensor, sums: TokenSums, mask: Tensor, n_fine_rows: Tensor, bounds: Tensor | None = None
    ) -> None:
        """Say which neurons are candidates.

        Args:
            x, sums: as `sum_tokens` has them.
            mask: (n_tokens, ffn_dim) int8, to be filled: 1 for a candidate.
            n_fine_rows: (1,) int64, to which the rows of the fine plane read are added.
            bounds: (n_tokens, ffn_dim) float32, to be filled with the last bound of each neuron; None: not wanted.
        """
        rows, shape = self.rows, SHAPE
        options = {} if shape.registers is None else {"maxnreg": shape.registers}
        _bound_rows[(triton.cdiv(self.n_neurons, shape.rows), len(x))](
            sums.codes, sums.steps, sums.squares, sums.errors, sums.coarse_offsets, sums.fine_offsets,
            self._coarse, self._fine, rows.scales, rows.bias,
            rows.norms, rows.coarse_error_norms, rows.fine_error_norms,
            mask, mask if bounds is None else bounds, n_fine_rows, self.n_neurons,
            self._factor, self._threshold, self._float_unit,
            IS_EXACT=self._is_exact, PLANES=self.planes, KEEP_BOUNDS=bounds is not None, USES_DP4A=self.uses_dp4a,
            ROWS=shape.rows, OPEN_ROWS=shape.open_rows,
            WORDS=min(shape.words, triton.next_power_of_2(self.n_groups * GROUP_WORDS)), N_GROUPS=self.n_groups,
            GROUPS=triton.next_power_of_2(self.n_groups), N_CODES=token_codes.N_CODES, GROUP_WORDS=GROUP_WORDS,
            PARTS=PARTS, FINE_STEPS=FINE_STEPS, MARGIN_SLACK=_MARGIN_SLACK, num_warps=shape.warps, **options,
        )  # fmt: skip
