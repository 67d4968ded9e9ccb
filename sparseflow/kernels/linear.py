"""y = W x + b with float32 sums, for weights of 16 or 32 bits.

torch's own products of 16-bit weights reach a fraction of what a CPU can do, and for matrices that lie transposed far
less (scripts/bench/NOTES.md). So for a few tokens each row of W is read once, at the memory's speed, and multiplied
with all of them; for many, W is widened to float32 tile by tile, and a tile stays in the cache while BLAS uses it.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional

from sparseflow.kernels import threads
from sparseflow.kernels.intrinsics import DIGEST, advance, bfloat_at, float32_at, half_at, int64_at, take_next, to_float
from sparseflow.kernels.threads import compile_kernel

_FASTMATH = {"reassoc", "contract", "nsz"}

_FEW_TOKENS = 32  # above, BLAS on widened tiles is faster
_TILE_ROWS = 512
_PARTS_A_THREAD = 4
_NEXT_PART = 10  # place of a counter in the argument block


@njit(fastmath=_FASTMATH)
def _dot(row, x, n_in):
    total = np.float32(0)
    for j in range(n_in):
        total += to_float(row[j]) * x[j]
    return total


@njit(fastmath=_FASTMATH)
def _four_dots(row, x, n_in):
    """With four tokens at once, for which a weight is widened once."""
    second, third, fourth = advance(x, n_in), advance(x, 2 * n_in), advance(x, 3 * n_in)
    a = b = c = d = np.float32(0)
    for j in range(n_in):
        weight = to_float(row[j])
        a += weight * x[j]
        b += weight * second[j]
        c += weight * third[j]
        d += weight * fourth[j]
    return a, b, c, d


@njit(fastmath=_FASTMATH)
def _products(block, weight, bias):
    """Each thread takes one part of the rows after the other.

    block: as `argument_block` has it. weight, bias: pointers of the weights' type. x, y: float32, contiguous.
    """
    n_parts, n_out, n_in, n_tokens, stride, has_bias = block[0], block[1], block[2], block[3], block[5], block[7]
    x, y, next_part = float32_at(block[8]), float32_at(block[9]), advance(block, _NEXT_PART)
    part = take_next(next_part)
    while part < n_parts:
        for i in range(n_out * part // n_parts, n_out * (part + 1) // n_parts):
            row = advance(weight, i * stride)
            start = to_float(bias[i]) if has_bias else np.float32(0)
            t = np.int64(0)
            while t + 4 <= n_tokens:
                a, b, c, d = _four_dots(row, advance(x, t * n_in), n_in)
                place = t * n_out + i
                y[place], y[place + n_out] = start + a, start + b
                y[place + 2 * n_out], y[place + 3 * n_out] = start + c, start + d
                t += 4
            while t < n_tokens:
                y[t * n_out + i] = start + _dot(row, advance(x, t * n_in), n_in)
                t += 1
        part = take_next(next_part)


@cache
def kernel(dtype: torch.dtype) -> Any:
    """Compiled on first use. Its argument block is `argument_block`'s."""
    digest = DIGEST

    def float16(args):
        block = int64_at(args)
        if digest:
            _products(block, half_at(block[4]), half_at(block[6]))

    def bfloat16(args):
        block = int64_at(args)
        if digest:
            _products(block, bfloat_at(block[4]), bfloat_at(block[6]))

    def float32(args):
        block = int64_at(args)
        if digest:
            _products(block, float32_at(block[4]), float32_at(block[6]))

    return compile_kernel({torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}[dtype])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = W x + b for each token, on torch's threads.

    Args:
        x: (n_tokens, n_in), float16, bfloat16 or float32.
        weight: (n_out, n_in) of those dtypes; rows contiguous, any stride between them.
        bias: (n_out,), dtype of the weights, contiguous; None: zeros.

    Returns:
        (n_tokens, n_out) float32.
    """
    if len(x) > _FEW_TOKENS:
        return _by_tiles(x.float(), weight, bias)
    wide = x.float().contiguous()
    y = torch.empty(len(x), len(weight))
    n_threads = torch.get_num_threads()
    block = argument_block(weight, bias, len(x), wide.data_ptr(), y.data_ptr(), n_threads)
    threads.run(kernel(weight.dtype), np.array(block, np.int64), n_threads)
    return y


def argument_block(
    weight: Tensor, bias: Tensor | None, n_tokens: int, x: int, y: int, n_threads: int
) -> tuple[int, ...]:
    """What `kernel` is told for one call. x, y: addresses of (n_tokens, n_in) and (n_tokens, n_out) float32."""
    n_out, n_in = weight.shape
    return (
        *(n_threads * _PARTS_A_THREAD, n_out, n_in, n_tokens, weight.data_ptr(), weight.stride(0)),
        *(0 if bias is None else bias.data_ptr(), bias is not None, x, y, 0),
    )


def _by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide_bias = None if bias is None else bias.float()
    if weight.dtype is torch.float32:
        return functional.linear(x, weight, wide_bias)
    y = torch.empty(len(x), len(weight))
    tile = torch.empty(_TILE_ROWS, weight.shape[1])
    for rows, part in zip(weight.split(_TILE_ROWS), y.split(_TILE_ROWS, dim=1), strict=True):
        torch.mm(x, tile[: len(rows)].copy_(rows).T, out=part)
    return y if wide_bias is None else y.add_(wide_bias)


def linear_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = W^T x + b for each token: `weight` has a row for each input.

    Args:
        x: (n_tokens, n_in), float16, bfloat16 or float32.
        weight: (n_in, n_out) of those dtypes.
        bias: (n_out,), dtype of the weights; None: zeros.

    Returns:
        (n_tokens, n_out) float32.
    """
    y = torch.zeros(len(x), weight.shape[1]) if bias is None else bias.float().repeat(len(x), 1)
    wide = x.float()
    if weight.dtype is torch.float32:
        return y.addmm_(wide, weight)
    tile = torch.empty(_TILE_ROWS, weight.shape[1])
    for rows, columns in zip(weight.split(_TILE_ROWS), wide.split(_TILE_ROWS, dim=1), strict=True):
        y.addmm_(columns, tile[: len(rows)].copy_(rows))
    return y


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in float64; `linear_ref(x, weight.T, bias)` is `linear_transposed`."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()
