"""The sparse MLP on a CPU: y = W2 relu(W1 x + b1) + b2 over chosen neurons, read where their bundles lie.

A bundle is one neuron's fc1 row followed by its fc2 column. It is read once, in place; the fc2 half only if the neuron
is active. Weights may be float16, bfloat16 or float32; sums are float32. `sparse_mlp_ref` is the slow twin.
"""

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
    bfloat_at,
    float32_at,
    half_at,
    int64_at,
    take_next,
    to_float,
    uint32_at,
)
from sparseflow.kernels.threads import compile_kernel, run_team

# Sums may be reordered into vectors; NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz"}

_PARTS_A_THREAD = 4

# Places in the argument block: numbers; addresses, float32 but bundles (weights' type), slots and ids (uint32); and in
# scratch memory: sums (n_parts x tokens x hidden), n_active (n_parts, int64), and for several tokens wide, (n_parts x 2
# x hidden).
N_THREADS, N_NEURONS, N_TOKENS, HIDDEN, STRIDE, NEXT_PART = range(6)
BUNDLES, SLOTS, IDS, FC1_BIAS, FC2_BIAS, X, Y, KERNEL = range(6, 14)
SUMS, N_ACTIVE, WIDE = range(14, 17)
N_FIELDS = 17


class SparseMLPOutput(NamedTuple):
    """y: (n_tokens, hidden) float32. n_active: pairs of token and neuron whose pre-activation was not at most 0."""

    y: Tensor
    n_active: int


@njit(fastmath=_FASTMATH)
def _add_neuron(total, bundle, bias, x, hidden):
    """total += relu(w1 . x + bias) * w2; returns 1 if the neuron was active, and reads w2 only then."""
    h = np.float32(0)
    for j in range(hidden):
        h += to_float(bundle[j]) * x[j]
    h += bias
    if h <= 0:
        return 0
    column = advance(bundle, hidden)
    for j in range(hidden):
        total[j] += h * to_float(column[j])
    return 1


@njit(fastmath=_FASTMATH)
def _four_dots(first, second, third, fourth, x, hidden):
    a = b = c = d = np.float32(0)
    for j in range(hidden):
        a += to_float(first[j]) * x[j]
        b += to_float(second[j]) * x[j]
        c += to_float(third[j]) * x[j]
        d += to_float(fourth[j]) * x[j]
    return a, b, c, d


@njit(fastmath=_FASTMATH)
def _add_column(total, column, h, hidden):
    for j in range(hidden):
        total[j] += h * to_float(column[j])


@njit(fastmath=_FASTMATH)
def _add_four(total, bundles, stride, slots, ids, fc1_bias, x, hidden):
    """As `_add_neuron` for four at once: bundles lie anywhere, and four streams keep the memory busier than one."""
    first, second = advance(bundles, np.int64(slots[0]) * stride), advance(bundles, np.int64(slots[1]) * stride)
    third, fourth = advance(bundles, np.int64(slots[2]) * stride), advance(bundles, np.int64(slots[3]) * stride)
    a, b, c, d = _four_dots(first, second, third, fourth, x, hidden)
    a, b = a + fc1_bias[ids[0]], b + fc1_bias[ids[1]]
    c, d = c + fc1_bias[ids[2]], d + fc1_bias[ids[3]]
    first, second = advance(first, hidden), advance(second, hidden)
    third, fourth = advance(third, hidden), advance(fourth, hidden)
    count = (not a <= 0) + (not b <= 0) + (not c <= 0) + (not d <= 0)
    if count == 4:
        for j in range(hidden):
            total[j] += (a * to_float(first[j]) + b * to_float(second[j])) + (
                c * to_float(third[j]) + d * to_float(fourth[j])
            )
        return 4
    if not a <= 0:
        _add_column(total, first, a, hidden)
    if not b <= 0:
        _add_column(total, second, b, hidden)
    if not c <= 0:
        _add_column(total, third, c, hidden)
    if not d <= 0:
        _add_column(total, fourth, d, hidden)
    return count


@njit(fastmath=_FASTMATH)
def _add_neurons(block, bundles):
    """Each thread takes one part of the neurons after the other, and adds each to that part's sum.

    A thread that loses its core for a while (a weight server reads, another process computes) leaves the others more
    parts; which thread has which makes no difference to the sums.

    block: as above; stride in elements. bundles: a pointer of the weights' type.
    """
    n_parts, n_neurons, n_tokens = block[N_THREADS] * _PARTS_A_THREAD, block[N_NEURONS], block[N_TOKENS]
    hidden, stride = block[HIDDEN], block[STRIDE]
    slots, ids, fc1_bias = uint32_at(block[SLOTS]), uint32_at(block[IDS]), float32_at(block[FC1_BIAS])
    x, sums, n_active = float32_at(block[X]), float32_at(block[SUMS]), int64_at(block[N_ACTIVE])
    width = n_tokens * hidden
    next_part = advance(block, NEXT_PART)
    part = take_next(next_part)
    while part < n_parts:
        total = advance(sums, part * width)
        wide = advance(float32_at(block[WIDE]), part * 2 * hidden)
        for j in range(width):
            total[j] = np.float32(0)
        count = 0
        end = n_neurons * (part + 1) // n_parts
        n = n_neurons * part // n_parts
        while n_tokens == 1 and n + 4 <= end:
            count += _add_four(total, bundles, stride, advance(slots, n), advance(ids, n), fc1_bias, x, hidden)
            n += 4
        for neuron in range(n, end):
            bundle = advance(bundles, np.int64(slots[neuron]) * stride)
            bias = fc1_bias[ids[neuron]]
            if n_tokens == 1:
                count += _add_neuron(total, bundle, bias, x, hidden)
                continue
            for j in range(2 * hidden):  # once, not once a token
                wide[j] = to_float(bundle[j])
            for row in range(0, width, hidden):
                count += _add_neuron(advance(total, row), wide, bias, advance(x, row), hidden)
        n_active[part] = count
        part = take_next(next_part)


@njit(fastmath=_FASTMATH)
def join(block):
    """y = fc2's bias and the sums of all parts; all counts of active neurons become the first part's."""
    n_parts, n_tokens, hidden = block[N_THREADS] * _PARTS_A_THREAD, block[N_TOKENS], block[HIDDEN]
    sums, n_active = float32_at(block[SUMS]), int64_at(block[N_ACTIVE])
    fc2_bias, y = float32_at(block[FC2_BIAS]), float32_at(block[Y])
    width = n_tokens * hidden
    for row in range(0, width, hidden):
        for j in range(hidden):
            y[row + j] = fc2_bias[j]
    for part in range(n_parts):
        of_part = advance(sums, part * width)
        for j in range(width):
            y[j] += of_part[j]
    for part in range(1, n_parts):
        n_active[0] += n_active[part]


@cache
def _team_kernel() -> Any:
    """`_kernel` on several threads, and what they found added up. Compiled on first use."""
    digest = DIGEST

    def compute_by_team(args):
        block = int64_at(args)
        if digest:
            run_team(block[KERNEL], args, block[N_THREADS], 0)
            join(block)

    return compile_kernel(compute_by_team)


@cache
def kernel(dtype: torch.dtype) -> Any:
    """Compiled on first use."""
    digest = DIGEST

    def float16(args):
        block = int64_at(args)
        if digest:
            _add_neurons(block, half_at(block[BUNDLES]))

    def bfloat16(args):
        block = int64_at(args)
        if digest:
            _add_neurons(block, bfloat_at(block[BUNDLES]))

    def float32(args):
        block = int64_at(args)
        if digest:
            _add_neurons(block, float32_at(block[BUNDLES]))

    return compile_kernel({torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}[dtype])


def sparse_mlp(
    bundles: Tensor, slots: NDArray[np.uint32], ids: NDArray[np.uint32], fc1_bias: Tensor, fc2_bias: Tensor, x: Tensor
) -> SparseMLPOutput:
    """Compute the chosen neurons of one MLP for some tokens, on torch's threads.

    Args:
        bundles: (n_slots, 2, hidden) float16, bfloat16 or float32, rows of `stride(0)` elements, each contiguous.
        slots: (n,) uint32, where each chosen neuron's bundle lies.
        ids: (n,) uint32, which neuron it is (chooses its fc1 bias).
        fc1_bias, fc2_bias: (ffn_dim,) and (hidden,) float32.
        x: (n_tokens, hidden) float32, contiguous.

    Returns:
        The sum over the chosen neurons plus fc2's bias. Repeatable for the same ids and number of threads.
    """
    n_tokens, hidden = x.shape
    n_threads = torch.get_num_threads()
    y = torch.empty(n_tokens, hidden)
    scratch = np.empty(scratch_nbytes(n_threads, n_tokens, hidden), np.uint8)
    block = np.array(
        (
            *(n_threads, len(ids), n_tokens, hidden, bundles.stride(0), 0),
            *(bundles.data_ptr(), slots.ctypes.data, ids.ctypes.data, fc1_bias.data_ptr(), fc2_bias.data_ptr()),
            *(x.data_ptr(), y.data_ptr(), kernel(bundles.dtype).address),
            *scratch_fields(n_threads, n_tokens, hidden, threads.address_of(scratch)),
        ),
        np.int64,
    )
    threads.run_serial(_team_kernel(), block)
    return SparseMLPOutput(y, int(scratch[:8].view(np.int64)[0]))


def scratch_fields(n_threads: int, n_tokens: int, hidden: int, address: int) -> tuple[int, int, int]:
    """The argument block's last fields, for scratch memory at an address; counts of active neurons come first."""
    n_parts = n_threads * _PARTS_A_THREAD
    sums = address + 8 * n_parts
    return sums, address, sums + 4 * n_parts * n_tokens * hidden


def scratch_nbytes(n_threads: int, n_tokens: int, hidden: int) -> int:
    """Of that memory."""
    n_parts = n_threads * _PARTS_A_THREAD
    return 8 * n_parts + 4 * n_parts * n_tokens * hidden + 8 * n_parts * hidden * (n_tokens > 1)


def sparse_mlp_ref(
    bundles: Tensor, slots: NDArray[np.uint32], ids: NDArray[np.uint32], fc1_bias: Tensor, fc2_bias: Tensor, x: Tensor
) -> SparseMLPOutput:
    """The same in plain PyTorch and float64: gather, two products."""
    chosen = bundles[torch.from_numpy(slots.astype(np.int64))].double()  # (n, 2, hidden)
    bias = fc1_bias[torch.from_numpy(ids.astype(np.int64))].double()
    h = torch.relu(x.double() @ chosen[:, 0].T + bias)  # (n_tokens, n)
    y = h @ chosen[:, 1] + fc2_bias.double()
    return SparseMLPOutput(y.float(), int((~(h <= 0)).sum()))
