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
_FEW_TOKENS_TRANSPOSED = 16
_ROWS_AT_ONCE = 16  # of a transposed matrix, which stay in the cache for all tokens
_TILE_ROWS = 512
_PARTS_A_THREAD = 4
# Places in the argument block.
X, Y = 8, 9
_NEXT_PART = 10
N_FIELDS = 11


@njit(fastmath=_FASTMATH)
def _dot(row, x, n_in):
    total = np.float32(0)
    for j in range(n_in):
        total += to_float(row[j]) * x[j]
    return total


@njit(fastmath=_FASTMATH)
def _dots_of_four_rows(row, stride, x, n_in):
    """Four streams keep the memory busier than one; most where rows do not follow each other."""
    second, third, fourth = advance(row, stride), advance(row, 2 * stride), advance(row, 3 * stride)
    a = b = c = d = np.float32(0)
    for j in range(n_in):
        a += to_float(row[j]) * x[j]
        b += to_float(second[j]) * x[j]
        c += to_float(third[j]) * x[j]
        d += to_float(fourth[j]) * x[j]
    return a, b, c, d


@njit(fastmath=_FASTMATH)
def _dots_of_four_tokens(row, x, n_in):
    """A weight is widened once for four."""
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
def _row_products(row, x, n_in, n_tokens, y, n_out):
    """One row and all tokens. y: n_out elements from token to token."""
    t = np.int64(0)
    while t + 4 <= n_tokens:
        a, b, c, d = _dots_of_four_tokens(row, advance(x, t * n_in), n_in)
        y[t * n_out], y[(t + 1) * n_out], y[(t + 2) * n_out], y[(t + 3) * n_out] = a, b, c, d
        t += 4
    while t < n_tokens:
        y[t * n_out] = _dot(row, advance(x, t * n_in), n_in)
        t += 1


@njit(fastmath=_FASTMATH)
def _products(block, weight, bias):
    """Each thread takes one part of the rows after the other.

    block: as `argument_block` has it. weight, bias: pointers of the weights' type. x, y: float32, contiguous.
    """
    n_parts, n_out, n_in, n_tokens, stride, has_bias = block[0], block[1], block[2], block[3], block[5], block[7]
    x, y, next_part = float32_at(block[8]), float32_at(block[9]), advance(block, _NEXT_PART)
    part = take_next(next_part)
    while part < n_parts:
        i, last = n_out * part // n_parts, n_out * (part + 1) // n_parts
        while n_tokens == 1 and i + 4 <= last:
            y[i], y[i + 1], y[i + 2], y[i + 3] = _dots_of_four_rows(advance(weight, i * stride), stride, x, n_in)
            i += 4
        for row in range(i, last):
            _row_products(advance(weight, row * stride), x, n_in, n_tokens, advance(y, row), n_out)
        if has_bias:
            for t in range(n_tokens):
                for row in range(n_out * part // n_parts, last):
                    y[t * n_out + row] += to_float(bias[row])
        part = take_next(next_part)


@njit(fastmath=_FASTMATH)
def _add_rows(weight, stride, x, n_rows, n_out, total):
    """total += sum over rows of x[row] * weight[row]; four at once, so that `total` is read and written less often."""
    i = 0
    while i + 4 <= n_rows:
        first = advance(weight, i * stride)
        second, third, fourth = advance(first, stride), advance(first, 2 * stride), advance(first, 3 * stride)
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(n_out):
            total[j] += (a * to_float(first[j]) + b * to_float(second[j])) + (
                c * to_float(third[j]) + d * to_float(fourth[j])
            )
        i += 4
    while i < n_rows:
        row = advance(weight, i * stride)
        for j in range(n_out):
            total[j] += x[i] * to_float(row[j])
        i += 1


@njit(fastmath=_FASTMATH)
def _transposed_products(block, weight):
    """Each thread takes one part of the rows after the other, and adds up each part apart.

    block: as `linear_transposed` lays it out. weight: pointer of the weights' type.
    """
    n_parts, n_in, n_out, n_tokens, stride = block[0], block[1], block[2], block[3], block[5]
    x, sums, next_part = float32_at(block[8]), float32_at(block[9]), advance(block, _NEXT_PART)
    part = take_next(next_part)
    while part < n_parts:
        first, last = n_in * part // n_parts, n_in * (part + 1) // n_parts
        totals = advance(sums, part * n_tokens * n_out)
        for j in range(n_tokens * n_out):
            totals[j] = np.float32(0)
        for start in range(first, last, _ROWS_AT_ONCE):
            n_rows = min(_ROWS_AT_ONCE, last - start)
            rows = advance(weight, start * stride)
            for t in range(n_tokens):
                _add_rows(rows, stride, advance(x, t * n_in + start), n_rows, n_out, advance(totals, t * n_out))
        part = take_next(next_part)


@cache
def _transposed_kernel(dtype: torch.dtype) -> Any:
    """Compiled on first use."""
    digest = DIGEST

    def float16(args):
        block = int64_at(args)
        if digest:
            _transposed_products(block, half_at(block[4]))

    def bfloat16(args):
        block = int64_at(args)
        if digest:
            _transposed_products(block, bfloat_at(block[4]))

    def float32(args):
        block = int64_at(args)
        if digest:
            _transposed_products(block, float32_at(block[4]))

    return compile_kernel({torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}[dtype])


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
    """y = W x + b for each token, on torch's threads; on a GPU by its library, with x rounded to the weights' dtype.

    Args:
        x: (n_tokens, n_in), float16, bfloat16 or float32.
        weight: (n_out, n_in) of those dtypes; rows contiguous, any stride between them.
        bias: (n_out,), dtype of the weights, contiguous; None: zeros.

    Returns:
        (n_tokens, n_out) float32.
    """
    if weight.device.type != "cpu":
        return functional.linear(x.to(weight.dtype), weight, bias).float()
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
        weight: (n_in, n_out) of those dtypes; rows contiguous, any stride between them.
        bias: (n_out,), dtype of the weights; None: zeros.

    Returns:
        (n_tokens, n_out) float32.
    """
    if len(x) > _FEW_TOKENS_TRANSPOSED:
        y = _transposed_by_tiles(x.float(), weight)
    else:
        n_in, n_out = weight.shape
        wide = x.float().contiguous()
        n_threads = torch.get_num_threads()
        sums = torch.empty(n_threads * _PARTS_A_THREAD, len(x), n_out)
        sizes = (len(sums), n_in, n_out, len(x))
        block = (*sizes, weight.data_ptr(), weight.stride(0), 0, 0, wide.data_ptr(), sums.data_ptr(), 0)
        threads.run(_transposed_kernel(weight.dtype), np.array(block, np.int64), n_threads)
        y = sums.sum(0)
    return y if bias is None else y.add_(bias)


def _transposed_by_tiles(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype is torch.float32:
        return x @ weight
    y = torch.zeros(len(x), weight.shape[1])
    tile = torch.empty(_TILE_ROWS, weight.shape[1])
    for rows, columns in zip(weight.split(_TILE_ROWS), x.split(_TILE_ROWS, dim=1), strict=True):
        y.addmm_(columns, tile[: len(rows)].copy_(rows))
    return y


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in float64; `linear_ref(x, weight.T, bias)` is `linear_transposed`."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()
