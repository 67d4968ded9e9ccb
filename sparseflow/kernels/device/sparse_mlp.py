"""The sparse MLP on a GPU: y = W2 relu(W1 x + b1) + b2 over candidates, read from their device slots.

What has no slot is read from host memory, where it lies. Sums are float32 and made in the same order each time.
`sparse_mlp_ref` is the slow twin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseflow.kernels.device.placement import N_CANDIDATES, PlacedStep

_BLOCK = 1024  # columns that a program multiplies at a time
_MOST_PROGRAMS = 1056
_COLUMNS = 256  # that a program of the second product sums
_SPLITS = 32  # parts of the candidates, each summed by a program of its own
_AT_ONCE = 8


@triton.jit
def _bundle(slab_ptr, slot, host, rows_ptr, stride, bundle_size):
    """Where a bundle lies: in its slot, or in host memory."""
    in_slot = slab_ptr + slot.to(tl.int64) * bundle_size
    row = tl.load(rows_ptr + tl.maximum(-1 - slot, 0), mask=slot < 0, other=0).to(tl.int64)
    in_host = host.to(slab_ptr.dtype) + row * stride
    return tl.where(slot >= 0, in_slot, in_host)


@triton.jit
def _activate(
    slab_ptr, host, rows_ptr, stride, ids_ptr, slots_ptr, counts_ptr, bias_ptr, x_ptr, h_ptr, n_active_ptr,
    n_neurons, hidden, BLOCK: tl.constexpr, N_PROGRAMS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    n_candidates = tl.load(counts_ptr)
    n_active = 0
    for k in range(tl.program_id(0), n_candidates, N_PROGRAMS):
        bundle = _bundle(slab_ptr, tl.load(slots_ptr + k), host, rows_ptr, stride, 2 * hidden)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, hidden, BLOCK):
            column = first + tl.arange(0, BLOCK)
            weight = tl.load(bundle + column, mask=column < hidden, other=0.0).to(tl.float32)
            total += weight * tl.load(x_ptr + token * hidden + column, mask=column < hidden, other=0.0)
        h = tl.sum(total, 0) + tl.load(bias_ptr + tl.load(ids_ptr + k))
        is_active = ~(h <= 0)
        tl.store(h_ptr + token * n_neurons + k, tl.where(is_active, h, 0.0))
        n_active += is_active.to(tl.int32)
    if n_active > 0:
        tl.atomic_add(n_active_ptr, n_active.to(tl.int64))


@triton.jit
def _sum_columns(
    slab_ptr, host, rows_ptr, stride, slots_ptr, counts_ptr, h_ptr, parts_ptr, n_neurons, hidden,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    token = tl.program_id(2)
    n_candidates = tl.load(counts_ptr)
    total = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for first in range(split * AT_ONCE, n_candidates, SPLITS * AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        is_here = k < n_candidates
        h = tl.load(h_ptr + token * n_neurons + k, mask=is_here, other=0.0)
        slot = tl.load(slots_ptr + k, mask=is_here, other=0)
        bundle = _bundle(slab_ptr, slot, host, rows_ptr, stride, 2 * hidden) + hidden
        is_read = (h != 0)[:, None] & (column < hidden)[None, :]
        weight = tl.load(bundle[:, None] + column[None, :], mask=is_read, other=0.0).to(tl.float32)
        total += h[:, None] * weight
    place = (token * SPLITS + split) * hidden + column
    tl.store(parts_ptr + place, tl.sum(total, 0), mask=column < hidden)


@triton.jit
def _add_parts(
    parts_ptr, bias_ptr, residual_ptr, y_ptr, hidden,
    HAS_RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1)
    is_column = column < hidden
    split = tl.arange(0, SPLITS)
    place = (token * SPLITS + split)[:, None] * hidden + column[None, :]
    parts = tl.load(parts_ptr + place, mask=is_column[None, :], other=0.0)
    y = tl.sum(parts, 0) + tl.load(bias_ptr + column, mask=is_column, other=0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + token * hidden + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * hidden + column, y.to(y_ptr.dtype.element_ty), mask=is_column)


class MLPScratch:
    """Memory between the two products, for up to `n_tokens` tokens. Shared by the layers of a model."""

    def __init__(self, n_tokens: int, n_neurons: int, hidden: int, device: torch.device) -> None:
        self.h = torch.empty(n_tokens, n_neurons, device=device)
        self.parts = torch.empty(n_tokens, _SPLITS, hidden, device=device)


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
    n_neurons = scratch.h.shape[1]
    stride = stride_nbytes // slab.element_size()
    n_programs = min(_MOST_PROGRAMS, n_neurons)
    splits = min(_SPLITS, triton.next_power_of_2(triton.cdiv(n_neurons, _AT_ONCE)))
    _activate[(n_programs, n_tokens)](
        slab, host_address, rows, stride, step.ids, step.slots, step.counts[N_CANDIDATES:], fc1_bias, x, scratch.h, n_active,
        n_neurons, hidden, BLOCK=_BLOCK, N_PROGRAMS=n_programs, num_warps=4,
    )  # fmt: skip
    _sum_columns[(triton.cdiv(hidden, _COLUMNS), splits, n_tokens)](
        slab, host_address, rows, stride, step.slots, step.counts[N_CANDIDATES:], scratch.h, scratch.parts, n_neurons, hidden,
        COLUMNS=_COLUMNS, SPLITS=splits, AT_ONCE=_AT_ONCE, num_warps=4,
    )  # fmt: skip
    _add_parts[(triton.cdiv(hidden, 128), n_tokens)](
        scratch.parts, fc2_bias, y if residual is None else residual, y, hidden,
        HAS_RESIDUAL=residual is not None, COLUMNS=128, SPLITS=splits, num_warps=4,
    )  # fmt: skip


def sparse_mlp_ref(bundles: Tensor, ids: Tensor, fc1_bias: Tensor, fc2_bias: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """The same in float64. bundles: (n, 2, hidden), of the neurons `ids`. Returns y and the number of active pairs."""
    h = torch.relu(x.double() @ bundles[:, 0].double().T + fc1_bias[ids.long()].double())
    return h @ bundles[:, 1].double() + fc2_bias.double(), int(torch.count_nonzero(h))
