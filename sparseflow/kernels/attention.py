"""Attention of one new token to all that is cached, read once where it lies: softmax(q K^T) V, head by head.

Sums are float32. `attend_ref` is the slow twin.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sparseflow.kernels import threads
from sparseflow.kernels.intrinsics import DIGEST, advance, bfloat_at, float32_at, half_at, int64_at, take_next, to_float
from sparseflow.kernels.threads import compile_kernel

_FASTMATH = {"reassoc", "contract", "nsz"}

# Places in the argument block.
LENGTH, KEYS, VALUES = 2, 4, 5
KEY_HEAD_STRIDE, KEY_STRIDE, VALUE_HEAD_STRIDE, VALUE_STRIDE = 7, 8, 10, 11
_NEXT_PART = 15
N_FIELDS = 16


@njit(fastmath=_FASTMATH)
def _scores(query, keys, stride, length, head_dim, scores):
    """scores = q K^T. Returns the largest."""
    largest = np.float32(-np.inf)
    for n in range(length):
        key = advance(keys, n * stride)
        score = np.float32(0)
        for j in range(head_dim):
            score += query[j] * to_float(key[j])
        scores[n] = score
        largest = max(largest, score)
    return largest


@njit(fastmath=_FASTMATH)
def _attend(query, keys, values, key_stride, value_stride, length, head_dim, scores, output):
    """One head of one sequence. query, scores (length), output: float32*."""
    largest = _scores(query, keys, key_stride, length, head_dim, scores)
    total = np.float32(0)
    for j in range(head_dim):
        output[j] = np.float32(0)
    for n in range(length):
        share = np.float32(math.exp(scores[n] - largest))
        total += share
        value = advance(values, n * value_stride)
        for j in range(head_dim):
            output[j] += share * to_float(value[j])
    for j in range(head_dim):
        output[j] /= total


@njit(fastmath=_FASTMATH)
def _attend_all(block, keys, values):
    """Each thread takes one head of one sequence after the other.

    block: as `argument_block` has it. keys, values: pointers of their type.
    """
    n_parts, n_heads, length, head_dim = block[0], block[1], block[2], block[3]
    query, output, scores = float32_at(block[12]), float32_at(block[13]), float32_at(block[14])
    next_part = advance(block, _NEXT_PART)
    part = take_next(next_part)
    while part < n_parts:
        sequence, head = part // n_heads, part % n_heads
        _attend(
            advance(query, part * head_dim),
            advance(keys, sequence * block[6] + head * block[7]),
            advance(values, sequence * block[9] + head * block[10]),
            block[8], block[11], length, head_dim,
            advance(scores, part * length), advance(output, part * head_dim),
        )  # fmt: skip
        part = take_next(next_part)


@cache
def kernel(dtype: torch.dtype) -> Any:
    """Compiled on first use. Its argument block is `argument_block`'s."""
    digest = DIGEST

    def float16(args):
        block = int64_at(args)
        if digest:
            _attend_all(block, half_at(block[4]), half_at(block[5]))

    def bfloat16(args):
        block = int64_at(args)
        if digest:
            _attend_all(block, bfloat_at(block[4]), bfloat_at(block[5]))

    def float32(args):
        block = int64_at(args)
        if digest:
            _attend_all(block, float32_at(block[4]), float32_at(block[5]))

    return compile_kernel({torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}[dtype])


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q K^T) V for one token of each sequence, on torch's threads. The query comes scaled.

    Args:
        query: (n_sequences, n_heads, head_dim) float32.
        keys, values: (n_sequences, n_heads, length, head_dim), float16, bfloat16 or float32; a head's part of one
            position contiguous, any strides else. length > 0.

    Returns:
        (n_sequences, n_heads, head_dim) float32.
    """
    n_sequences, n_heads, length, _ = keys.shape
    query = query.contiguous()
    output = torch.empty_like(query)
    scores = torch.empty(n_sequences * n_heads, length)
    block = argument_block(keys, values, query.data_ptr(), output.data_ptr(), scores.data_ptr())
    threads.run(kernel(keys.dtype), np.array(block, np.int64), torch.get_num_threads())
    return output


def argument_block(keys: Tensor, values: Tensor, query: int, output: int, scores: int) -> tuple[int, ...]:
    """What `kernel` is told for one call. query, output, scores: addresses; scores of (sequences * heads, length)."""
    n_sequences, n_heads, length, head_dim = keys.shape
    return (
        *(n_sequences * n_heads, n_heads, length, head_dim, keys.data_ptr(), values.data_ptr()),
        *keys.stride()[:3],
        *values.stride()[:3],
        *(query, output, scores, 0),
    )


def attend_ref(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same in float64."""
    shares = torch.softmax(torch.einsum("shd,shnd->shn", query.double(), keys.double()), -1)
    return torch.einsum("shn,shnd->shd", shares, values.double())
