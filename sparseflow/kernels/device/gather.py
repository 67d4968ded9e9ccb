"""Bundles from host memory to device slots: one kernel that reads page-locked memory itself, as the GPU sees it.

`ops.PlainOps` has the slow twin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.device.placement import N_PLACED

_WORDS = 1024  # of 8 bytes, that a program moves at a time
_MOST_PROGRAMS = 264


@triton.jit
def _gather(
    host, rows_ptr, places_ptr, n_rows_ptr, slab_ptr, stride_words, bundle_words,
    WORDS: tl.constexpr, N_PROGRAMS: tl.constexpr,
):  # fmt: skip
    n_rows = tl.load(n_rows_ptr)
    n_pieces = tl.cdiv(bundle_words, WORDS)
    base = host.to(tl.pointer_type(tl.int64))
    for piece in range(tl.program_id(0), n_rows * n_pieces, N_PROGRAMS):
        k = piece // n_pieces
        word = (piece % n_pieces) * WORDS + tl.arange(0, WORDS)
        row = tl.load(rows_ptr + k).to(tl.int64)
        slot = tl.load(places_ptr + k).to(tl.int64)
        words = tl.load(base + row * stride_words + word, mask=word < bundle_words, other=0)
        tl.store(slab_ptr + slot * bundle_words + word, words, mask=word < bundle_words)


def gather(host_address: int, stride_nbytes: int, rows: Tensor, places: Tensor, counts: Tensor, slab: Tensor) -> None:
    """Copy bundle `rows[k]` to slot `places[k]`, for as many as `counts[N_PLACED]` says.

    Args:
        host_address: of bundle 0, as the device sees it: memory that is page-locked, or the device's own.
        stride_nbytes: from one bundle to the next there; a multiple of 8.
        rows, places: int32.
        slab: (n_slots, 2, hidden), contiguous.
    """
    words = slab.view(slab.shape[0], -1).view(torch.int64)
    n_programs = min(_MOST_PROGRAMS, len(rows) * triton.cdiv(words.shape[1], _WORDS))
    _gather[(n_programs,)](
        host_address, rows, places, counts[N_PLACED:], words, stride_nbytes // 8, words.shape[1],
        WORDS=_WORDS, N_PROGRAMS=n_programs, num_warps=8,
    )  # fmt: skip
