"""Attention of one token, and a layer up to its MLP in one call, each against its twin."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseflow.kernels.attention import attend, attend_ref
from sparseflow.kernels.attention_step import AttentionStep, AttentionWeights

all_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
UNIT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


@all_dtypes
@pytest.mark.parametrize(
    ("n_sequences", "n_heads", "length", "head_dim"), [(1, 1, 1, 1), (3, 2, 9, 7), (1, 4, 300, 64)]
)
def test_attention_agrees_with_float64(
    rng: np.random.Generator, dtype: torch.dtype, n_sequences: int, n_heads: int, length: int, head_dim: int
) -> None:
    query = normal(rng, n_sequences, n_heads, head_dim)
    room = normal(rng, 2, n_sequences, n_heads, length + 5, head_dim, dtype=dtype)
    keys, values = room[:, :, :, :length]  # as a cache with room to spare has them
    expected = attend_ref(query, keys, values)
    torch.testing.assert_close(attend(query, keys, values).double(), expected, rtol=0, atol=1e-5)


def test_large_scores_do_not_overflow(rng: np.random.Generator) -> None:
    query, keys, values = normal(rng, 1, 2, 8) * 1e4, normal(rng, 1, 2, 5, 8), normal(rng, 1, 2, 5, 8)
    torch.testing.assert_close(attend(query, keys, values).double(), attend_ref(query, keys, values))


def test_nan_spoils_its_head_and_no_other(rng: np.random.Generator) -> None:
    query, keys, values = normal(rng, 1, 3, 8), normal(rng, 1, 3, 5, 8), normal(rng, 1, 3, 5, 8)
    keys[0, 1, 4, 0] = torch.nan
    is_nan = attend(query, keys, values).isnan()
    assert is_nan[0, 1].all()
    assert is_nan.sum() == 8


def by_torch(
    weights: AttentionWeights, n_heads: int, residual: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64, rounded where a cache and the residual stream are: stream, x, and the new key and value."""
    dtype, hidden = residual.dtype, len(residual)
    wide = {name: None if weight is None else weight.double() for name, weight in weights._asdict().items()}
    x = functional.layer_norm(residual.double(), (hidden,), wide["norm_weight"], wide["norm_bias"], 1e-5)
    query, key, value = functional.linear(x, wide["qkv"], wide["qkv_bias"]).view(n_heads, 3, -1).unbind(1)
    key, value = key.to(dtype), value.to(dtype)
    all_keys, all_values = torch.cat([keys[0], key[:, None]], 1), torch.cat([values[0], value[:, None]], 1)
    attended = attend_ref(query[None] * 0.3, all_keys[None], all_values[None]).flatten()
    stream = (residual.double() + functional.linear(attended, wide["out"], wide["out_bias"])).to(dtype)
    norm = functional.layer_norm(stream.double(), (hidden,), wide["mlp_norm_weight"], wide["mlp_norm_bias"], 1e-3)
    return stream, norm, key, value


@all_dtypes
@pytest.mark.parametrize("is_biased", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize(("n_heads", "head_dim", "length"), [(1, 3, 1), (2, 17, 4), (4, 64, 100)])
def test_a_step_agrees_with_float64(
    rng: np.random.Generator, dtype: torch.dtype, is_biased: bool, n_heads: int, head_dim: int, length: int
) -> None:
    hidden = n_heads * head_dim

    def scaled(*shape: int) -> nn.Parameter:
        return nn.Parameter((normal(rng, *shape) / hidden**0.5).to(dtype), requires_grad=False)

    weights = AttentionWeights(
        norm_weight=normal(rng, hidden, dtype=dtype),
        norm_bias=normal(rng, hidden, dtype=dtype),
        qkv=scaled(3 * hidden, hidden),
        qkv_bias=scaled(3 * hidden) if is_biased else None,
        out=scaled(hidden, hidden),
        out_bias=scaled(hidden) if is_biased else None,
        mlp_norm_weight=normal(rng, hidden, dtype=dtype),
        mlp_norm_bias=normal(rng, hidden, dtype=dtype),
    )
    room = normal(rng, 2, 1, n_heads, length + 3, head_dim, dtype=dtype)
    keys, values = (part[:, :, : length + 1] for part in room)
    residual = normal(rng, hidden, dtype=dtype)
    expected = by_torch(weights, n_heads, residual, keys[:, :, :length].clone(), values[:, :, :length].clone())
    behind = room[:, :, :, length + 1 :].clone()
    stream, x = AttentionStep(weights, n_heads, 0.3, 1e-5, 1e-3)(residual, keys, values)
    found = stream[0], x[0], keys[0, :, length], values[0, :, length]
    for one, other in zip(found, expected, strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=8 * UNIT[dtype] * max(size, 1))
    assert torch.equal(room[:, :, :, length + 1 :], behind)
    assert (stream.dtype, x.dtype) == (dtype, torch.float32)
