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
# A square below the least normal float32 may come out as 0; so a norm may lack 1.1e-19 a column.
_LOST_NORM = tl.constexpr(2.0**-54)  # of 260 000 columns
_LOST_SQUARE = tl.constexpr(2e-36)  # of a group


class TokenSums:
    """What scoring knows of some tokens.

    codes: (n_tokens, N_CODES, n_groups * GROUP_WORDS) int32, packed as above; a start is -8 times the sum of the eight
    codes that a word of a row meets, so that the row's count from -8 to 7. steps, squares, coarse_offsets and
    fine_offsets: (n_tokens, n_groups) float32: x's step; ||x_g||^2 or a little more; and one of `PARTS` of what a
    plane's dither adds to a score for each step of the row. norms: (n_tokens, 2) float32: ||x|| and ||x - x^||, or a
    little more.
    """

    def __init__(self, n_tokens: int, n_groups: int, device: torch.device) -> None:
        self.codes = torch.empty(n_tokens, N_CODES, n_groups * GROUP_WORDS, dtype=torch.int32, device=device)
        sums = torch.empty(4, n_tokens, n_groups, device=device)
        self.steps, self.squares, self.coarse_offsets, self.fine_offsets = sums
        self.norms = torch.empty(n_tokens, 2, device=device)


@triton.jit
def _columns(GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """(GROUPS, GROUP): all columns, in the order in which their bytes lie."""
    k = tl.arange(0, GROUP)
    in_group = k // 8 * 2 + k // 4 % 2 * 32 + k % 2 * 64 + k // 2 % 2
    return tl.arange(0, GROUPS)[:, None] * GROUP + in_group[None, :]


@triton.jit
def _store_packed(bytes_of, codes_ptr, n_words, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Four bytes a word; first all words of the even columns, then those of the odd ones."""
    shifted = (bytes_of & 255) << (tl.arange(0, GROUP) % 4 * 8)[None, :]
    packed = tl.sum(tl.reshape(shifted, [GROUPS * GROUP // 4, 4]), 1)
    k = tl.arange(0, GROUPS * GROUP // 4)
    tl.store(codes_ptr + k % 2 * n_words + k // 2, packed, mask=k // 2 < n_words)


@triton.jit
def _quantise(
    x, dither_ptr, codes_ptr, steps_ptr, squares_ptr, coarse_offsets_ptr, fine_offsets_ptr, norms_ptr, n_groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, FINE_STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Fill one token's place. x: (GROUPS, GROUP) float32, ordered as `_columns`, 0 beyond hidden."""
    group = tl.arange(0, GROUPS)
    is_group = group < n_groups
    dither = tl.load(dither_ptr + _columns(GROUPS, GROUP), mask=is_group[:, None], other=0.0)
    squares = tl.sum(x * x, 1)
    x = tl.where((squares < float("inf"))[:, None], x, 0.0)  # else the norms are inf or NaN, and so are the bounds
    step = tl.max(tl.abs(x), 1) / _LIMIT
    step = tl.where(step < _SHORTEST_STEP, 0.0, step)
    scaled = tl.floor(x / tl.where(step > 0, step, 1.0)[:, None] + 0.5)
    scaled = tl.where((step > 0)[:, None], tl.minimum(tl.maximum(scaled, -_LIMIT), _LIMIT), 0.0)
    error = x - step[:, None] * scaled
    tl.store(steps_ptr + group, step, mask=is_group)
    tl.store(squares_ptr + group, squares + _LOST_SQUARE, mask=is_group)
    coarse_offset = tl.sum((FINE_STEPS // 2 - dither) * scaled, 1) * (step / PARTS)
    tl.store(coarse_offsets_ptr + group, coarse_offset, mask=is_group)
    codes = scaled.to(tl.int32)
    tl.store(fine_offsets_ptr + group, tl.sum(codes, 1).to(tl.float32) * (step * (0.5 / PARTS)), mask=is_group)
    tl.store(norms_ptr, tl.sqrt(tl.sum(squares, 0)) + _LOST_NORM)
    tl.store(norms_ptr + 1, tl.sqrt(tl.sum(tl.sum(error * error, 1), 0)) + _LOST_NORM)
    n_words = n_groups * (GROUP // 8)
    _store_packed(codes >> 8, codes_ptr, n_words, GROUPS, GROUP)
    _store_packed(codes, codes_ptr + 2 * n_words, n_words, GROUPS, GROUP)
    word = tl.arange(0, GROUPS * GROUP // 8)
    start = tl.sum(tl.reshape(codes, [GROUPS * GROUP // 8, 8]), 1) * (-FINE_STEPS // 2)
    tl.store(codes_ptr + 4 * n_words + word, start, mask=word < n_words)


@triton.jit
def _sum_tokens(
    x_ptr, dither_ptr, codes_ptr, steps_ptr, squares_ptr, coarse_offsets_ptr, fine_offsets_ptr, norms_ptr,
    hidden, n_groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, N_CODES: tl.constexpr, FINE_STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = _columns(GROUPS, GROUP)
    x = tl.load(x_ptr + token * hidden + column, mask=column < hidden, other=0.0)
    codes_ptr += token * n_groups * (N_CODES * GROUP // 8)
    first = token * n_groups
    _quantise(
        x, dither_ptr, codes_ptr, steps_ptr + first, squares_ptr + first, coarse_offsets_ptr + first,
        fine_offsets_ptr + first, norms_ptr + 2 * token, n_groups, GROUPS, GROUP, FINE_STEPS, PARTS,
    )  # fmt: skip


@triton.jit
def _normalise_and_sum(
    stream_ptr, weight_ptr, bias_ptr, x_ptr, eps,
    dither_ptr, codes_ptr, steps_ptr, squares_ptr, coarse_offsets_ptr, fine_offsets_ptr, norms_ptr, hidden, n_groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, FINE_STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    column = _columns(GROUPS, GROUP)
    is_here = column < hidden
    weight = tl.load(weight_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    stream = tl.load(stream_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(stream, 1), 0) / hidden
    centred = tl.where(is_here, stream - mean, 0.0)
    scale = tl.rsqrt(tl.sum(tl.sum(centred * centred, 1), 0) / hidden + eps)
    x = centred * scale * weight + bias
    tl.store(x_ptr + column, x, mask=is_here)
    _quantise(
        x, dither_ptr, codes_ptr, steps_ptr, squares_ptr, coarse_offsets_ptr, fine_offsets_ptr, norms_ptr, n_groups,
        GROUPS, GROUP, FINE_STEPS, PARTS,
    )  # fmt: skip


WARPS = 16


def sum_tokens(x: Tensor, dither: Tensor, sums: TokenSums) -> None:
    """Fill `sums`. x: (n_tokens, hidden) float32, contiguous. dither: the layer's."""
    n_groups = len(dither) // GROUP
    _sum_tokens[(len(x),)](
        x, dither, sums.codes, sums.steps, sums.squares, sums.coarse_offsets, sums.fine_offsets, sums.norms,
        x.shape[1], n_groups, GROUPS=triton.next_power_of_2(n_groups), GROUP=GROUP, N_CODES=N_CODES,
        FINE_STEPS=FINE_STEPS, PARTS=PARTS, num_warps=WARPS,
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
    _normalise_and_sum[(1,)](
        stream, weight, bias, x, eps, dither,
        sums.codes, sums.steps, sums.squares, sums.coarse_offsets, sums.fine_offsets, sums.norms, len(weight), n_groups,
        GROUPS=triton.next_power_of_2(n_groups), GROUP=GROUP, FINE_STEPS=FINE_STEPS, PARTS=PARTS, num_warps=WARPS,
    )  # fmt: skip
