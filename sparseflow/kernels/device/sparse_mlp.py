"""The sparse MLP on a GPU: y = W2 relu(W1 x + b1) + b2 over candidates, read from their device slots.

What has no slot is read from host memory, where it lies. Sums are float32 and made in the same order each time.
`sparse_mlp_ref` is the slow twin.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.device.placement import N_CANDIDATES, PlacedStep


@dataclass(frozen=True, slots=True)
class Shape:
    """How the kernels are cut. programs: that share the candidates, of all tokens; each writes a sum of its own.

    at_once: bytes that a program reads together, of one half of its bundles. warps: of such a program. columns: of y,
    for which a program adds those sums.
    """

    programs: int = 132
    at_once: int = 2**16
    warps: int = 16
    columns: int = 16

    def candidates(self, row_nbytes: int) -> int:
        """How many a program takes at a time, where a row takes so many bytes."""
        return max(1, min(8, self.at_once // row_nbytes))


SHAPE = Shape()
_MOST_PROGRAMS = 264  # of any shape, for few tokens
_FEWEST_PROGRAMS = 8  # of a token


@triton.jit
def _rows_at(slab_ptr, slot, host, rows_ptr, stride, bundle_size, IS_ALIGNED: tl.constexpr):
    """Where bundles lie: in their slots, or in host memory."""
    in_slot = slab_ptr + slot.to(tl.int64) * bundle_size
    row = tl.load(rows_ptr + tl.maximum(-1 - slot, 0), mask=slot < 0, other=0).to(tl.int64)
    bundle = tl.where(slot >= 0, in_slot, host.to(slab_ptr.dtype) + row * stride)
    return tl.multiple_of(bundle, 16) if IS_ALIGNED else bundle


@triton.jit
def _multiply(
    slab_ptr, host, rows_ptr, stride, ids_ptr, slots_ptr, counts_ptr, bias_ptr, x_ptr, parts_ptr, n_active_ptr,
    n_neurons, hidden,
    IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, N_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Both products over every N_PROGRAMS-th candidate; both halves of a slot are asked for together."""
    token = tl.program_id(1)
    k = tl.program_id(0) + tl.arange(0, AT_ONCE) * N_PROGRAMS
    slot = tl.load(slots_ptr + k, mask=k < n_neurons, other=0)  # at first, before it is known how many there are
    n_candidates = tl.load(counts_ptr)
    column = tl.arange(0, BLOCK)
    is_column = column < hidden
    x = tl.load(x_ptr + token * hidden + column, mask=is_column, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    n_active = 0
    for _ in range(tl.program_id(0), n_candidates, N_PROGRAMS * AT_ONCE):
        is_here = k < n_candidates
        slot = tl.where(is_here, slot, 0)
        place = _rows_at(slab_ptr, slot, host, rows_ptr, stride, 2 * hidden, IS_ALIGNED)[:, None] + column[None, :]
        is_read = is_here[:, None] & is_column[None, :]
        is_near = is_read & (slot >= 0)[:, None]
        into = tl.load(place, mask=is_read, other=0.0)
        out_of = tl.load(place + hidden, mask=is_near, other=0.0)
        bias = tl.load(bias_ptr + tl.load(ids_ptr + k, mask=is_here, other=0), mask=is_here, other=0.0)
        h = tl.sum(into.to(tl.float32) * x[None, :], 1) + bias
        is_active = is_here & ~(h <= 0)
        h = tl.where(is_active, h, 0.0)
        n_active += tl.sum(is_active.to(tl.int32), 0)
        # what is not active adds nothing, whatever it holds
        total += tl.sum(tl.where(is_active[:, None], h[:, None] * out_of.to(tl.float32), 0.0), 0)
        is_far = is_active & (slot < 0)
        if tl.sum(is_far.to(tl.int32), 0) > 0:
            far = tl.load(place + hidden, mask=is_far[:, None] & is_column[None, :], other=0.0)
            total += tl.sum(h[:, None] * far.to(tl.float32), 0)
        k += N_PROGRAMS * AT_ONCE
        slot = tl.load(slots_ptr + k, mask=k < n_neurons, other=0)
    tl.store(parts_ptr + (token * N_PROGRAMS + tl.program_id(0)) * hidden + column, total, mask=is_column)
    if n_active > 0:
        tl.atomic_add(n_active_ptr, tl.cast(n_active, tl.int64))


@triton.jit
def _add_parts(
    parts_ptr, bias_ptr, residual_ptr, y_ptr, hidden,
    HAS_RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr, N_PARTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1)
    is_column = column < hidden
    part = tl.arange(0, PARTS)
    place = (token * N_PARTS + part)[:, None] * hidden + column[None, :]
    parts = tl.load(parts_ptr + place, mask=(part < N_PARTS)[:, None] & is_column[None, :], other=0.0)
    y = tl.sum(parts, 0) + tl.load(bias_ptr + column, mask=is_column, other=0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + token * hidden + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * hidden + column, y.to(y_ptr.dtype.element_ty), mask=is_column)


class MLPScratch:
    """Memory for the programs' sums, for up to `n_tokens` tokens. Shared by the layers of a model."""

    def __init__(self, n_tokens: int, n_neurons: int, hidden: int, device: torch.device) -> None:
        n_parts = max(_MOST_PROGRAMS, _FEWEST_PROGRAMS * n_tokens)
        self.parts = torch.empty(min(n_parts, n_neurons * n_tokens), hidden, device=device)


def sparse_mlp(
    slab: Tensor, host_address: int, stride_nbytes: int, rows: Tensor, step: PlacedStep,
    fc1_bias: Tensor, fc2_bias: Tensor, x: Tensor, scratch: MLPScratch, n_active: Tensor, y: Tensor,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    """
    Args:
        slab: (n_slots, 2, hidden), the layer's slots.
        host_address, stride_nbytes: as `gather` is told.
        rows: int32, for each missing neuron which bundle it is there.
        step: of `Placement.place`.
        fc1_bias, fc2_bias: (ffn_dim,) and (hidden,) float32.
        x: (n_tokens, hidden) float32, contiguous.
        n_active: (1,) int64, to which pairs of token and active neuron are added.
        y: (n_tokens, hidden), to be filled, in its own dtype.
        residual: (n_tokens, hidden), what to add to it; may be y itself.
    """
    n_tokens, hidden = x.shape
    itemsize, shape = slab.element_size(), SHAPE
    n_programs = min(max(shape.programs // n_tokens, _FEWEST_PROGRAMS), len(step.slots))
    block = triton.next_power_of_2(hidden)
    is_aligned = all(n % 16 == 0 for n in (hidden * itemsize, stride_nbytes, host_address, slab.data_ptr()))
    _multiply[(n_programs, n_tokens)](
        slab, host_address, rows, stride_nbytes // itemsize,
        step.ids, step.slots, step.counts[N_CANDIDATES:], fc1_bias, x, scratch.parts, n_active, len(step.slots), hidden,
        IS_ALIGNED=is_aligned, BLOCK=block, AT_ONCE=triton.next_power_of_2(shape.candidates(block * itemsize)),
        N_PROGRAMS=n_programs, num_warps=shape.warps,
    )  # fmt: skip
    _add_parts[(triton.cdiv(hidden, shape.columns), n_tokens)](
        scratch.parts, fc2_bias, y if residual is None else residual, y, hidden,
        HAS_RESIDUAL=residual is not None, COLUMNS=shape.columns, N_PARTS=n_programs,
        PARTS=triton.next_power_of_2(n_programs), num_warps=8,
    )  # fmt: skip


def sparse_mlp_ref(bundles: Tensor, ids: Tensor, fc1_bias: Tensor, fc2_bias: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """The same in float64. bundles: (n, 2, hidden), of the neurons `ids`. Returns y and the number of active pairs."""
    h = torch.relu(x.double() @ bundles[:, 0].double().T + fc1_bias[ids.long()].double())
    return h @ bundles[:, 1].double() + fc2_bias.double(), int(torch.count_nonzero(h))
