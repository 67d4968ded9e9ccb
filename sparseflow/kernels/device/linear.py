"""y = W x + b for one token at the device memory's speed: each row of W is read once, sums are float32.

`torch.nn.functional.linear` is the twin, and what computes many tokens.
"""

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 512  # multiplied at a time
_FEW_ROWS, _MANY_ROWS = 4, 8  # of a program
_ENOUGH_PROGRAMS = 4 * 132  # a matrix with more rows than these programs' few takes more rows a program


@triton.jit
def _multiply(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, n_out, n_in,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_out
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_in, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_here = is_row[:, None] & (column < n_in)[None, :]
        weight = tl.load(weight_ptr + row.to(tl.int64)[:, None] * n_in + column[None, :], mask=is_here, other=0.0)
        total += weight.to(tl.float32) * tl.load(x_ptr + column, mask=column < n_in, other=0.0)[None, :]
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=is_row)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, residual: Tensor | None = None) -> None:
    """Fill y with W x + b, and what `residual` holds.

    Args:
        x: (n_in,) float32.
        weight: (n_out, n_in), float16, bfloat16 or float32, contiguous. bias: (n_out,).
        y: (n_out,), in its own dtype.
        residual: (n_out,); may be y itself.
    """
    n_out, n_in = weight.shape
    rows = _FEW_ROWS if n_out <= _FEW_ROWS * _ENOUGH_PROGRAMS * 2 else _MANY_ROWS
    _multiply[(triton.cdiv(n_out, rows),)](
        x, weight, y if bias is None else bias, y if residual is None else residual, y, n_out, n_in,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ROWS=rows,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(n_in)), num_warps=4,
    )  # fmt: skip
