"""The encoder of `store.codes` in torch: codes a layer where its weights are, on a GPU too.

Codes, scales and dither are those of `store.codes.code_rows` to the bit: each step of it is one float64 operation that
IEEE 754 defines, on every device. Norms are sums, and may differ in their last digits; they are upper bounds as there.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sparseflow.store.codes import CODES_PER_WORD, FINE_STEPS, GROUP, ROW_GROUP_WORDS, STEP_LIMIT

_ELEMENTS_AT_ONCE = 1 << 22  # a dozen float64 temporaries of a block stay small beside a layer
_UPWARD = 1 + 2.0**-30  # as in store.codes: over the rounding of float64 sums in any order
_SHORTEST = STEP_LIMIT - FINE_STEPS // 2


class TensorCodes(NamedTuple):
    """The fields, shapes and dtypes of `store.codes.Codes`, on the device of the weights."""

    coarse: Tensor
    fine: Tensor
    scales: Tensor
    norms: Tensor
    coarse_error_norms: Tensor
    fine_error_norms: Tensor


def code_layer(weight: Tensor, dither: Tensor) -> TensorCodes:
    """Code a layer's fc1.

    weight: (ffn_dim, hidden), any float type. dither: (n_groups * GROUP,) float32, the layer's, on the same device.
    """
    blocks = [code_rows(rows.double(), dither) for rows in weight.split(max(1, _ELEMENTS_AT_ONCE // len(dither)))]
    return TensorCodes(*map(torch.cat, zip(*blocks, strict=True)))


def code_rows(weight: Tensor, dither: Tensor) -> TensorCodes:
    """As `store.codes.code_rows`. weight: (n, hidden) float64, finite. dither: (n_groups * GROUP,) float32."""
    hidden = weight.shape[1]
    grouped = functional.pad(weight, (0, len(dither) - hidden)).unflatten(1, (-1, GROUP))  # (n, n_groups, GROUP)
    scales = _float32_above(grouped.abs().amax(2) / STEP_LIMIT)
    steps = scales.double()[:, :, None]
    offset = dither.double().view(-1, GROUP)
    codes = torch.floor(torch.where(steps > 0, grouped / steps, 0.0) + offset)
    coarse = torch.floor(codes / FINE_STEPS)
    inside = (torch.arange(len(dither), device=weight.device) < hidden).view(-1, GROUP)
    coarse_rows = steps * (FINE_STEPS * coarse + FINE_STEPS / 2 - offset) * inside
    fine_rows = steps * (codes + 0.5 - offset) * inside
    lengths = torch.maximum(_squares(coarse_rows), _squares(fine_rows))
    return TensorCodes(
        _pack(coarse + FINE_STEPS / 2),
        _pack(codes - FINE_STEPS * coarse),
        scales,
        _norm_above(torch.maximum(lengths, (_SHORTEST * steps[:, :, 0]).square())),
        _norm_above(_squares(grouped - coarse_rows)),
        _norm_above(_squares(grouped - fine_rows)),
    )


def _pack(codes: Tensor) -> Tensor:
    """(n, n_groups, GROUP) whole numbers from 0 to 15 -> (n, n_groups * ROW_GROUP_WORDS) int16."""
    quarters = codes.int().unflatten(2, (CODES_PER_WORD, ROW_GROUP_WORDS)).unbind(2)
    words: Tensor = quarters[0] | quarters[1] << 4 | quarters[2] << 8 | quarters[3] << 12
    words = words - ((words & 0x8000) << 1)  # as int16 the upper half of uint16 lies below 0
    return words.to(torch.int16).flatten(1)


def _squares(rows: Tensor) -> Tensor:
    squares: Tensor = rows.square().sum(2)
    return squares


def _norm_above(squares: Tensor) -> Tensor:
    return _float32_above(squares.sum(1).sqrt() * _UPWARD)


def _float32_above(values: Tensor) -> Tensor:
    """The next float32 at or above each value of float64."""
    rounded = values.float()
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() < values, above, rounded)
