"""A decoder layer up to its MLP, for one token, in one call: norm, q-k-v, attention, output, residual, norm.

Between two products of a token lies little to compute, and Python, whose data the weights have thrown out of the
caches meanwhile, takes longer for it than the machine. So the small parts are computed here, one after the other on the
calling thread, and the products and the attention are started from here on all threads.

Only for layers whose norms stand before attention and MLP (all OPT but 350m); `models.opt_layers` has the same in
parts, for any layer and any number of tokens, which is also the slow twin.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sparseflow.kernels import attention, linear, threads
from sparseflow.kernels.intrinsics import DIGEST, advance, bfloat_at, float32_at, half_at, int64_at, store, to_float
from sparseflow.kernels.threads import compile_kernel, run_team

_FASTMATH = {"reassoc", "contract", "nsz"}

# Places in the argument block, and of the blocks of the kernels that are called.
_QKV, _ATTEND, _OUT = 24, 40, 64
_SIZE = 80


class AttentionWeights(NamedTuple):
    """Of one layer, all contiguous and of one dtype.

    Both norms' weight and bias: (hidden,). qkv: (n_heads * 3 * head_dim, hidden), head by head. out: (hidden, hidden).
    Their biases: of as many as rows, or None.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor


@njit(fastmath=_FASTMATH)
def _normalise(x, weight, bias, eps, length, y):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias. y: float32*; may be x."""
    total = np.float32(0)
    for j in range(length):
        total += to_float(x[j])
    mean = total / np.float32(length)
    squares = np.float32(0)
    for j in range(length):
        difference = to_float(x[j]) - mean
        squares += difference * difference
    scale = np.float32(1) / np.sqrt(squares / np.float32(length) + np.float32(eps))
    for j in range(length):
        y[j] = (to_float(x[j]) - mean) * scale * to_float(weight[j]) + to_float(bias[j])


@njit(fastmath=_FASTMATH)
def _spread(qkv, n_heads, head_dim, scaling, query, keys, key_stride, values, value_stride):
    """From (n_heads, 3, head_dim): the query, scaled; key and value to their places, a head's `stride` apart."""
    for head in range(n_heads):
        row = advance(qkv, 3 * head * head_dim)
        to_query = advance(query, head * head_dim)
        to_key, to_value = advance(keys, head * key_stride), advance(values, head * value_stride)
        for j in range(head_dim):
            to_query[j] = row[j] * np.float32(scaling)
            store(to_key, j, row[head_dim + j])
            store(to_value, j, row[2 * head_dim + j])


@njit(fastmath=_FASTMATH)
def _layer(block, residual, norm, norm_bias, mlp_norm, mlp_norm_bias, keys, values, stream):
    """block: as `AttentionStep` lays it out. Pointers of the weights' type."""
    hidden, n_heads, head_dim, n_threads = block[0], block[1], block[2], block[3]
    numbers = float32_at(block[4])
    x, qkv, query, y = float32_at(block[14]), float32_at(block[15]), float32_at(block[16]), float32_at(block[17])
    _normalise(residual, norm, norm_bias, numbers[0], hidden, x)
    run_team(block[19], block[22] + 8 * _QKV, n_threads, 0)
    position = block[_ATTEND + 2] - 1
    new_keys, new_values = advance(keys, position * block[_ATTEND + 8]), advance(values, position * block[_ATTEND + 11])
    _spread(qkv, n_heads, head_dim, numbers[2], query, new_keys, block[_ATTEND + 7], new_values, block[_ATTEND + 10])
    run_team(block[20], block[22] + 8 * _ATTEND, n_threads, 0)
    run_team(block[19], block[22] + 8 * _OUT, n_threads, 0)
    for j in range(hidden):
        store(stream, j, to_float(residual[j]) + y[j])
    _normalise(stream, mlp_norm, mlp_norm_bias, numbers[1], hidden, x)


@cache
def _kernel(dtype: torch.dtype) -> Any:
    """Compiled on first use."""
    digest = DIGEST

    def float16(args):
        b = int64_at(args)
        if digest:
            _layer(
                b, half_at(b[5]), half_at(b[6]), half_at(b[7]), half_at(b[8]), half_at(b[9]),
                half_at(b[_ATTEND + 4]), half_at(b[_ATTEND + 5]), half_at(b[13]),
            )  # fmt: skip

    def bfloat16(args):
        b = int64_at(args)
        if digest:
            _layer(
                b, bfloat_at(b[5]), bfloat_at(b[6]), bfloat_at(b[7]), bfloat_at(b[8]), bfloat_at(b[9]),
                bfloat_at(b[_ATTEND + 4]), bfloat_at(b[_ATTEND + 5]), bfloat_at(b[13]),
            )  # fmt: skip

    def float32(args):
        b = int64_at(args)
        if digest:
            _layer(
                b, float32_at(b[5]), float32_at(b[6]), float32_at(b[7]), float32_at(b[8]), float32_at(b[9]),
                float32_at(b[_ATTEND + 4]), float32_at(b[_ATTEND + 5]), float32_at(b[13]),
            )  # fmt: skip

    return compile_kernel({torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}[dtype])


class AttentionStep:
    """One layer's, with all that does not change from token to token."""

    def __init__(self, weights: AttentionWeights, n_heads: int, scaling: float, eps: float, mlp_eps: float) -> None:
        """
        Args:
            scaling: of the query.
            eps, mlp_eps: of the norms.
        """
        self._weights = weights  # whose addresses the block has
        dtype, hidden = weights.qkv.dtype, weights.out.shape[0]
        self._dtype, self._hidden, self._n_heads = dtype, hidden, n_heads
        self._kernel = _kernel(dtype)
        self._numbers = np.array([eps, mlp_eps, scaling], np.float32)
        norms = (weights.norm_weight, weights.norm_bias, weights.mlp_norm_weight, weights.mlp_norm_bias)
        block = np.zeros(_SIZE, np.int64)
        block[:3] = hidden, n_heads, hidden // n_heads
        block[4] = self._numbers.ctypes.data
        block[6:10] = [norm.data_ptr() for norm in norms]
        block[19:21] = linear.kernel(dtype).address, attention.kernel(dtype).address
        self._block = block

    def _use_threads(self, n_threads: int) -> None:
        weights, block = self._weights, self._block
        block[3] = n_threads
        for place, weight, bias in ((_QKV, weights.qkv, weights.qkv_bias), (_OUT, weights.out, weights.out_bias)):
            fields = linear.argument_block(weight, bias, 1, 0, 0, n_threads)
            block[place : place + len(fields)] = fields

    def __call__(self, residual: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            residual: (hidden,) contiguous, dtype of the weights: what enters the layer.
            keys, values: (1, n_heads, length, head_dim), same dtype; the last position is written here.

        Returns:
            The residual stream after attention, (1, hidden), same dtype, and the MLP's input, (1, hidden) float32.
        """
        hidden, length = self._hidden, keys.shape[2]
        n_threads = torch.get_num_threads()
        if n_threads != self._block[3]:
            self._use_threads(n_threads)
        stream, x = torch.empty(1, hidden, dtype=self._dtype), torch.empty(1, hidden)
        scratch = np.empty(hidden * 6 + self._n_heads * length, np.float32)
        qkv = scratch.ctypes.data
        query, attended, y, scores = (qkv + 4 * hidden * n for n in (3, 4, 5, 6))
        block = self._block.copy()
        block[5] = residual.data_ptr()
        block[13:18] = stream.data_ptr(), x.data_ptr(), qkv, query, y
        block[22] = block.ctypes.data
        block[_QKV + 8 : _QKV + 10] = x.data_ptr(), qkv
        block[_OUT + 8 : _OUT + 10] = attended, y
        block[_ATTEND : _ATTEND + 16] = attention.argument_block(keys, values, query, attended, scores)
        threads.run_serial(self._kernel, block)
        return stream, x
