"""Tokens as scoring on a GPU reads them: 16-bit codes, cut and packed for dot products of bytes, and what bounds need.

x^_j = step_g c_j with whole c_j from -32767 to 32767; 32767 steps are the largest |x_j| of the group. A coded row is
read 32 bits at a time, two words of `store.codes`: columns p and p + 1, and those 32, 64 and 96 on. Codes at bits 0, 8,
16, 24 are the even ones, of columns p, p + 64, p + 1, p + 65; those at bits 4, 12, 20, 28 the odd ones, 32 columns on.
With c = 256 high + low, four high bytes (signed) make a word in the same order, and four low bytes (unsigned) too.

All sums are float32; what that takes from a bound is worked out in `scoring`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.store.codes import FINE_STEPS, GROUP, ROW_GROUP_WORDS

GROUP_WORDS = ROW_GROUP_WORDS // 2  # of 32 bits, in a group of a row
PARTS = 4  # that a group's sums are made in: 4 words each, 16 bytes of a row
N_CODES = 5
"""Rows of `TokenSums.codes`: high bytes of even and of odd columns, low bytes of both, starts."""
_LIMIT = tl.constexpr(32767)
_SHORTEST_STEP = tl.constexpr(1e-30)  # what is smaller is not divided by: all of x counts as error
# A square below the least normal float32, 1.2e-38, may come out as 0.
_LOST_SQUARE = tl.constexpr(2e-36)  # of a group


class TokenSums:
    """What scoring knows of some tokens.

    codes: (n_tokens, N_CODES, n_groups * GROUP_WORDS) int32, packed as above; a start is -8 times the sum of the eight
    codes that a word of a row meets, so that the row's count from -8 to 7. steps, squares, errors, coarse_offsets and
    fine_offsets: (n_tokens, n_groups) float32: x's step; ||x_g||^2 and ||x_g - x^_g||^2, or a little more; and one of
    `PARTS` of what a plane's dither adds to a score for each step of the row.
    """

    def __init__(self, n_tokens: int, n_groups: int, device: torch.device) -> None:
        self.codes = torch.empty(n_tokens, N_CODES, n_groups * GROUP_WORDS, dtype=torch.int32, device=device)
        sums = torch.empty(5, n_tokens, n_groups, device=device)
        self.steps, self.squares, self.errors, self.coarse_offsets, self.fine_offsets = sums


@triton.jit
def _columns(GROUP: tl.constexpr):
    """(GROUP,): columns of a group, in the order in which their bytes lie."""
    k = tl.arange(0, GROUP)
    return k // 8 * 2 + k // 4 % 2 * 32 + k % 2 * 64 + k // 2 % 2


@triton.jit
def _store_packed(bytes_of, codes_ptr, n_words, GROUP: tl.constexpr):
    """Four bytes a word; the even columns' words in one row, those of the odd ones in the next."""
    shifted = (bytes_of & 255) << (tl.arange(0, GROUP) % 4 * 8)
    packed = tl.sum(tl.reshape(shifted, [GROUP // 4, 4]), 1)
    k = tl.arange(0, GROUP // 4)
    tl.store(codes_ptr + k % 2 * n_words + k // 2, packed)


@triton.jit
def _quantise(
    x, dither_ptr, codes_ptr, steps_ptr, squares_ptr, errors_ptr, coarse_offsets_ptr, fine_offsets_ptr,
    token, group, n_groups,
    GROUP: tl.constexpr, N_CODES: tl.constexpr, FINE_STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Fill one group's place. x: (GROUP,) float32, ordered as `_columns`, 0 beyond hidden."""
    dither = tl.load(dither_ptr + group * GROUP + _columns(GROUP))
    square = tl.sum(x * x, 0)
    x = tl.where(square < float("inf"), x, 0.0)  # else the norms are inf or NaN, and so are the bounds
    step = tl.max(tl.abs(x), 0) / _LIMIT
    step = tl.where(step < _SHORTEST_STEP, 0.0, step)
    scaled = tl.floor(x / tl.where(step > 0, step, 1.0) + 0.5)
    scaled = tl.where(step > 0, tl.minimum(tl.maximum(scaled, -_LIMIT), _LIMIT), 0.0)
    error = x - step * scaled
    place = token * n_groups + group
    tl.store(steps_ptr + place, step)
    tl.store(squares_ptr + place, square + _LOST_SQUARE)
    tl.store(errors_ptr + place, tl.sum(error * error, 0) + _LOST_SQUARE)
    tl.store(coarse_offsets_ptr + place, tl.sum((FINE_STEPS // 2 - dither) * scaled, 0) * (step / PARTS))
    codes = scaled.to(tl.int32)
    tl.store(fine_offsets_ptr + place, tl.sum(codes, 0).to(tl.float32) * (step * (0.5 / PARTS)))
    n_words = n_groups * (GROUP // 8)
    codes_ptr += token * N_CODES * n_words + group * (GROUP // 8)
    _store_packed(codes >> 8, codes_ptr, n_words, GROUP)
    _store_packed(codes, codes_ptr + 2 * n_words, n_words, GROUP)
    start = tl.sum(tl.reshape(codes, [GROUP // 8, 8]), 1) * (-FINE_STEPS // 2)
    tl.store(codes_ptr + 4 * n_words + tl.arange(0, GROUP // 8), start)


@triton.jit
def _sum_tokens(
    x_ptr, dither_ptr, codes_ptr, steps_ptr, squares_ptr, errors_ptr, coarse_offsets_ptr, fine_offsets_ptr,
    hidden, n_groups,
    GROUP: tl.constexpr, N_CODES: tl.constexpr, FINE_STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    token = tl.program_id(1)
    column = group * GROUP + _columns(GROUP)
    x = tl.load(x_ptr + token * hidden + column, mask=column < hidden, other=0.0)
    _quantise(
        x, dither_ptr, codes_ptr, steps_ptr, squares_ptr, errors_ptr, coarse_offsets_ptr, fine_offsets_ptr,
        token, group, n_groups, GROUP, N_CODES, FINE_STEPS, PARTS,
    )  # fmt: skip


@triton.jit
def _normalise_and_sum(
    stream_ptr, weight_ptr, bias_ptr, x_ptr, eps, dither_ptr, codes_ptr, steps_ptr, squares_ptr, errors_ptr,
    coarse_offsets_ptr, fine_offsets_ptr, hidden, n_groups,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, N_CODES: tl.constexpr, FINE_STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    every = tl.arange(0, BLOCK)  # each program finds mean and variance for itself
    stream = tl.load(stream_ptr + every, mask=every < hidden, other=0.0).to(tl.float32)
    mean = tl.sum(stream, 0) / hidden
    centred = tl.where(every < hidden, stream - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / hidden + eps)
    column = group * GROUP + _columns(GROUP)
    is_here = column < hidden
    weight = tl.load(weight_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    own = tl.load(stream_ptr + column, mask=is_here, other=0.0).to(tl.float32) - mean
    x = tl.where(is_here, own * scale * weight + bias, 0.0)
    tl.store(x_ptr + column, x, mask=is_here)
    _quantise(
        x, dither_ptr, codes_ptr, steps_ptr, squares_ptr, errors_ptr, coarse_offsets_ptr, fine_offsets_ptr,
        0, group, n_groups, GROUP, N_CODES, FINE_STEPS, PARTS,
    )  # fmt: skip


def sum_tokens(x: Tensor, dither: Tensor, sums: TokenSums) -> None:
    """Fill `sums`. x: (n_tokens, hidden) float32, contiguous. dither: the layer's."""
    n_groups = len(dither) // GROUP
    _sum_tokens[(n_groups, len(x))](
        x, dither, sums.codes, sums.steps, sums.squares, sums.errors, sums.coarse_offsets, sums.fine_offsets,
        x.shape[1], n_groups, GROUP=GROUP, N_CODES=N_CODES, FINE_STEPS=FINE_STEPS, PARTS=PARTS, num_warps=1,
    )  # fmt: skip


def normalise_and_sum(
    stream: Tensor, weight: Tensor, bias: Tensor, eps: float, dither: Tensor, x: Tensor, sums: TokenSums
) -> None:
    """Fill x and `sums` with the layer norm of one token, in one launch.

    Args:
        stream: (hidden,), any float dtype. weight, bias: the same size.
        dither: the layer's.
        x: (hidden,) float32.
    """
    n_groups = len(dither) // GROUP
    _normalise_and_sum[(n_groups,)](
        stream, weight, bias, x, eps, dither, sums.codes, sums.steps, sums.squares, sums.errors, sums.coarse_offsets,
        sums.fine_offsets, len(weight), n_groups, BLOCK=triton.next_power_of_2(len(weight)),
        GROUP=GROUP, N_CODES=N_CODES, FINE_STEPS=FINE_STEPS, PARTS=PARTS, num_warps=4,
    )  # fmt: skip
