"""A decoder layer up to its MLP, for one token, in one call: norm, q-k-v, attention, output, residual, norm.

Between two products of a token lies little to compute, and Python, whose data the weights have thrown out of the
caches meanwhile, takes longer for it than the machine. So the small parts are computed here, one after the other on the
calling thread, and the products and the attention are started from here on all threads.

Only for layers whose norms stand before attention and MLP (all OPT but 350m); `models.opt_layers` has the same in
parts, for any layer and any number of tokens, which is also the slow twin.
"""

import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sparseflow.kernels import attention, linear, threads
from sparseflow.kernels.intrinsics import DIGEST, advance, bfloat_at, float32_at, half_at, int64_at, store, to_float
from sparseflow.kernels.threads import compile_kernel, run_team

_FASTMATH = {"reassoc", "contract", "nsz"}

_DIGEST = zlib.crc32(Path(attention.__file__).read_bytes(), DIGEST) | 1  # whose fields are used here

# Places in the argument block: numbers; addresses, of the weights' type, of float32 and of kernels; and the blocks of
# the kernels that are called.
_HIDDEN, _N_HEADS, _HEAD_DIM, _N_THREADS, _CONSTANTS, _SELF = range(6)
_RESIDUAL, _NORM, _NORM_BIAS, _MLP_NORM, _MLP_NORM_BIAS, _STREAM = range(6, 12)
_X, _PROJECTED, _QUERY, _ADDED = range(12, 16)
_LINEAR, _ATTENTION = range(16, 18)
_QKV_BLOCK = 18
_ATTEND_BLOCK = _QKV_BLOCK + linear.N_FIELDS
_OUT_BLOCK = _ATTEND_BLOCK + attention.N_FIELDS
_N_FIELDS = _OUT_BLOCK + linear.N_FIELDS
_KEYS, _VALUES = _ATTEND_BLOCK + attention.KEYS, _ATTEND_BLOCK + attention.VALUES
_EPS, _MLP_EPS, _SCALING = range(3)  # of the constants, float32


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
def _spread(projected, n_heads, head_dim, scaling, query, keys, values, head_strides):
    """From (n_heads, 3, head_dim): the query, scaled; key and value to their places, a head's stride apart."""
    for head in range(n_heads):
        row = advance(projected, 3 * head * head_dim)
        to_query = advance(query, head * head_dim)
        to_key, to_value = advance(keys, head * head_strides[0]), advance(values, head * head_strides[1])
        for j in range(head_dim):
            to_query[j] = row[j] * np.float32(scaling)
            store(to_key, j, row[head_dim + j])
            store(to_value, j, row[2 * head_dim + j])


@njit(fastmath=_FASTMATH)
def _layer(block, residual, norm, norm_bias, mlp_norm, mlp_norm_bias, keys, values, stream):
    """block: as `AttentionStep` lays it out. Pointers of the weights' type."""
    hidden, n_heads, head_dim, n_threads = block[_HIDDEN], block[_N_HEADS], block[_HEAD_DIM], block[_N_THREADS]
    x, projected, query, added = (
        float32_at(block[_X]), float32_at(block[_PROJECTED]), float32_at(block[_QUERY]), float32_at(block[_ADDED]),
    )  # fmt: skip
    constants, here, attend = float32_at(block[_CONSTANTS]), block[_SELF], advance(block, _ATTEND_BLOCK)
    _normalise(residual, norm, norm_bias, constants[_EPS], hidden, x)
    run_team(block[_LINEAR], here + 8 * _QKV_BLOCK, n_threads, 0)
    position = attend[attention.LENGTH] - 1
    new_keys = advance(keys, position * attend[attention.KEY_STRIDE])
    new_values = advance(values, position * attend[attention.VALUE_STRIDE])
    head_strides = attend[attention.KEY_HEAD_STRIDE], attend[attention.VALUE_HEAD_STRIDE]
    _spread(projected, n_heads, head_dim, constants[_SCALING], query, new_keys, new_values, head_strides)
    run_team(block[_ATTENTION], here + 8 * _ATTEND_BLOCK, n_threads, 0)
    run_team(block[_LINEAR], here + 8 * _OUT_BLOCK, n_threads, 0)
    for j in range(hidden):
        store(stream, j, to_float(residual[j]) + added[j])
    _normalise(stream, mlp_norm, mlp_norm_bias, constants[_MLP_EPS], hidden, x)


@cache
def _kernel(dtype: torch.dtype) -> Any:
    """Compiled on first use."""
    digest = _DIGEST

    def float16(args):
        b = int64_at(args)
        if digest:
            _layer(
                b, half_at(b[_RESIDUAL]), half_at(b[_NORM]), half_at(b[_NORM_BIAS]), half_at(b[_MLP_NORM]),
                half_at(b[_MLP_NORM_BIAS]), half_at(b[_KEYS]), half_at(b[_VALUES]), half_at(b[_STREAM]),
            )  # fmt: skip

    def bfloat16(args):
        b = int64_at(args)
        if digest:
            _layer(
                b, bfloat_at(b[_RESIDUAL]), bfloat_at(b[_NORM]), bfloat_at(b[_NORM_BIAS]), bfloat_at(b[_MLP_NORM]),
                bfloat_at(b[_MLP_NORM_BIAS]), bfloat_at(b[_KEYS]), bfloat_at(b[_VALUES]), bfloat_at(b[_STREAM]),
            )  # fmt: skip

    def float32(args):
        b = int64_at(args)
        if digest:
            _layer(
                b, float32_at(b[_RESIDUAL]), float32_at(b[_NORM]), float32_at(b[_NORM_BIAS]), float32_at(b[_MLP_NORM]),
                float32_at(b[_MLP_NORM_BIAS]), float32_at(b[_KEYS]), float32_at(b[_VALUES]), float32_at(b[_STREAM]),
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
        self._constants = np.array([eps, mlp_eps, scaling], np.float32)
        block = self._block = np.zeros(_N_FIELDS, np.int64)
        block[[_HIDDEN, _N_HEADS, _HEAD_DIM]] = hidden, n_heads, hidden // n_heads
        block[_CONSTANTS] = self._constants.ctypes.data
        block[_NORM], block[_NORM_BIAS] = weights.norm_weight.data_ptr(), weights.norm_bias.data_ptr()
        block[_MLP_NORM], block[_MLP_NORM_BIAS] = weights.mlp_norm_weight.data_ptr(), weights.mlp_norm_bias.data_ptr()
        block[_LINEAR], block[_ATTENTION] = linear.kernel(dtype).address, attention.kernel(dtype).address

    def _use_threads(self, n_threads: int) -> None:
        weights, block = self._weights, self._block
        block[_N_THREADS] = n_threads
        qkv = linear.argument_block(weights.qkv, weights.qkv_bias, 1, 0, 0, n_threads)
        out = linear.argument_block(weights.out, weights.out_bias, 1, 0, 0, n_threads)
        block[_QKV_BLOCK : _QKV_BLOCK + linear.N_FIELDS] = qkv
        block[_OUT_BLOCK : _OUT_BLOCK + linear.N_FIELDS] = out

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
        if n_threads != self._block[_N_THREADS]:
            self._use_threads(n_threads)
        stream, x = torch.empty(1, hidden, dtype=self._dtype), torch.empty(1, hidden)
        scratch = np.empty(hidden * 6 + self._n_heads * length, np.float32)
        projected = threads.address_of(scratch)
        query, attended, added, scores = (projected + 4 * hidden * n for n in (3, 4, 5, 6))
        block = self._block.copy()
        block[_SELF], block[_RESIDUAL] = threads.address_of(block), residual.data_ptr()
        block[_STREAM : _ADDED + 1] = stream.data_ptr(), x.data_ptr(), projected, query, added
        block[_QKV_BLOCK + linear.X : _QKV_BLOCK + linear.Y + 1] = x.data_ptr(), projected
        block[_OUT_BLOCK + linear.X : _OUT_BLOCK + linear.Y + 1] = attended, added
        attend = attention.argument_block(keys, values, query, attended, scores)
        block[_ATTEND_BLOCK : _ATTEND_BLOCK + attention.N_FIELDS] = attend
        threads.run_serial(self._kernel, block)
        return stream, x
