"""What begins and ends a token's pass on a GPU: its embedding, and layer norms that are not rounded.

`torch.nn.functional.layer_norm` and `embedding` are the twins.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normalise(stream_ptr, weight_ptr, bias_ptr, x_ptr, hidden, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    is_here = column < hidden
    stream = tl.load(stream_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    mean = tl.sum(stream, 0) / hidden
    centred = tl.where(is_here, stream - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_here, other=0.0).to(tl.float32)
    tl.store(x_ptr + column, centred * scale * weight + bias, mask=is_here)


def normalise(stream: Tensor, weight: Tensor, bias: Tensor, eps: float, x: Tensor) -> None:
    """Fill x with the layer norm of one token. stream: (hidden,), any dtype; x: (hidden,) float32."""
    hidden = len(weight)
    _normalise[(1,)](stream, weight, bias, x, hidden, eps, BLOCK=triton.next_power_of_2(hidden), num_warps=8)


@triton.jit
def _embed(token_ptr, position_ptr, tokens_ptr, positions_ptr, stream_ptr, hidden, offset, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_here = column < hidden
    token, position = tl.load(token_ptr).to(tl.int64), tl.load(position_ptr).to(tl.int64) + offset
    of_token = tl.load(tokens_ptr + token * hidden + column, mask=is_here, other=0.0).to(tl.float32)
    of_position = tl.load(positions_ptr + position * hidden + column, mask=is_here, other=0.0).to(tl.float32)
    tl.store(stream_ptr + column, (of_token + of_position).to(stream_ptr.dtype.element_ty), mask=is_here)


def embed(token: Tensor, position: Tensor, tokens: Tensor, positions: Tensor, offset: int, stream: Tensor) -> None:
    """Fill stream with the sum of two embeddings.

    Args:
        token, position: (1,) integers, on the device.
        tokens, positions: (n, hidden) tables; a position's row is `offset` further on.
        stream: (hidden,), in its own dtype.
    """
    hidden = tokens.shape[1]
    _embed[(triton.cdiv(hidden, 1024),)](
        token, position, tokens, positions, stream, hidden, offset, BLOCK=1024, num_warps=4
    )
