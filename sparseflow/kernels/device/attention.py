"""One token's attention on a GPU, its key and value appended where the others lie.

How many there are, and where, is read on the device, so that one captured graph serves a growing cache, and another.
`attend_ref` is the slow twin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_POSITIONS = 64  # that a program looks at together

KEYS, VALUES, ROOM = range(3)
"""Places in a row of the table of caches: addresses, and the positions that there is room for."""


@triton.jit
def _attend(
    qkv_ptr, table_ptr, position_ptr, y_ptr, scaling, cache_dtype_ptr,
    head_dim: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    n_past = tl.load(position_ptr).to(tl.int32)
    room = tl.load(table_ptr + 2)
    keys = tl.load(table_ptr).to(cache_dtype_ptr.dtype) + head * room * head_dim
    values = tl.load(table_ptr + 1).to(cache_dtype_ptr.dtype) + head * room * head_dim
    column = tl.arange(0, WIDTH)
    is_column = column < head_dim
    qkv_ptr += head * 3 * head_dim + column
    query = tl.load(qkv_ptr, mask=is_column, other=0.0) * scaling
    key = tl.load(qkv_ptr + head_dim, mask=is_column, other=0.0).to(keys.dtype.element_ty)
    value = tl.load(qkv_ptr + 2 * head_dim, mask=is_column, other=0.0).to(values.dtype.element_ty)
    tl.store(keys + n_past * head_dim + column, key, mask=is_column)
    tl.store(values + n_past * head_dim + column, value, mask=is_column)
    largest = tl.sum(query * key.to(tl.float32), 0)  # of the scores so far: that of the token itself
    weight = 1.0
    total = value.to(tl.float32)
    for first in range(0, n_past, POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        is_past = position < n_past
        place = position[:, None] * head_dim + column[None, :]
        is_here = is_past[:, None] & is_column[None, :]
        score = tl.sum(tl.load(keys + place, mask=is_here, other=0.0).to(tl.float32) * query[None, :], 1)
        score = tl.where(is_past, score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 0))
        shrunk = tl.exp(largest - larger)
        share = tl.exp(score - larger)
        total = total * shrunk
        total += tl.sum(tl.load(values + place, mask=is_here, other=0.0).to(tl.float32) * share[:, None], 0)
        weight = weight * shrunk + tl.sum(share, 0)
        largest = larger
    tl.store(y_ptr + head * head_dim + column, total / weight, mask=is_column)


def attend(qkv: Tensor, caches: Tensor, position: Tensor, scaling: float, y: Tensor, like: Tensor) -> None:
    """
    Args:
        qkv: (n_heads, 3, head_dim) float32.
        caches: (3,) int64, the layer's row of the table: where keys and values lie, (n_heads, room, head_dim) each,
            and their room.
        position: (1,), positions there are already; the token's own is written behind them.
        y: (n_heads * head_dim,) float32, to be filled.
        like: any tensor of the cache's dtype.
    """
    n_heads, _, head_dim = qkv.shape
    _attend[(n_heads,)](
        qkv, caches, position, y, scaling, like,
        head_dim=head_dim, WIDTH=triton.next_power_of_2(head_dim), POSITIONS=_POSITIONS, num_warps=4,
    )  # fmt: skip


def attend_ref(qkv: Tensor, keys: Tensor, values: Tensor, n_past: int, scaling: float) -> Tensor:
    """The same in float64, on keys and values (n_heads, room, head_dim), which get the token's. Returns y."""
    query, keys[:, n_past], values[:, n_past] = qkv[:, 0].double() * scaling, qkv[:, 1], qkv[:, 2]
    seen, shown = keys[:, : n_past + 1].double(), values[:, : n_past + 1].double()
    return (torch.softmax(query[:, None] @ seen.mT, 2) @ shown).flatten()
