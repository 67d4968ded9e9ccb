"""Each kernel of a token's dense part computes what PyTorch does in float64."""

import pytest
import torch
from torch.nn import functional

from sparseflow.kernels.device.attention import attend, attend_ref
from sparseflow.kernels.device.linear import multiply
from sparseflow.kernels.device.norm import embed, normalise

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / (expected.norm() + 1e-9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (7, 33), (100, 700)])
def test_products(dtype: torch.dtype, n_out: int, n_in: int, device: torch.device) -> None:
    weight, bias = torch.randn(n_out, n_in, device=device).to(dtype), torch.randn(n_out, device=device).to(dtype)
    x, residual = torch.randn(n_in, device=device), torch.randn(n_out, device=device).to(dtype)
    y = torch.full((n_out,), float("nan"), device=device)
    product, rest = weight.double() @ x.double(), bias.double() + residual.double()
    summands = weight.double().abs() @ x.double().abs() + bias.double().abs() + residual.double().abs()
    multiply(x, weight, bias, y, residual)
    assert ((y.double() - product - rest).norm() / summands.norm()) < 1e-5  # of what is summed: it may cancel out
    multiply(x, weight, None, y)
    assert ((y.double() - product).norm() / summands.norm()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [5, 64, 700])
def test_norms(dtype: torch.dtype, hidden: int, device: torch.device) -> None:
    stream, weight, bias = (torch.randn(hidden, device=device).to(dtype) for _ in range(3))
    x = torch.full((hidden,), float("nan"), device=device)
    normalise(stream, weight, bias, 1e-5, x)
    assert distance(x, functional.layer_norm(stream.double(), (hidden,), weight.double(), bias.double())) < 1e-5


def test_embeddings(device: torch.device) -> None:
    tokens, positions = torch.randn(50, 1100, device=device).half(), torch.randn(9, 1100, device=device).half()
    stream = torch.full((1100,), float("nan"), device=device).half()
    embed(torch.tensor([31], device=device), torch.tensor([4], device=device), tokens, positions, 2, stream)
    assert torch.equal(stream, tokens[31] + positions[6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_heads", "head_dim", "n_past"), [(1, 8, 0), (3, 20, 1), (2, 64, 64), (2, 40, 150)])
def test_attention(dtype: torch.dtype, n_heads: int, head_dim: int, n_past: int, device: torch.device) -> None:
    room = n_past + 3
    keys, values = (torch.randn(n_heads, room, head_dim, device=device).to(dtype) for _ in range(2))
    twins = keys.clone(), values.clone()
    table = torch.tensor([keys.data_ptr(), values.data_ptr(), room], device=device)
    qkv = torch.randn(n_heads, 3, head_dim, device=device)
    y = torch.full((n_heads * head_dim,), float("nan"), device=device)
    attend(qkv, table, torch.tensor([n_past], device=device), 0.3, y, keys)
    # interpreted, a bfloat16 is cut off where it should be rounded
    tolerance = 2.0**-7 if dtype == torch.bfloat16 and device.type == "cpu" else 1e-5
    assert distance(y, attend_ref(qkv, *twins, n_past, 0.3)) < tolerance
    assert distance(keys, twins[0].double()) <= tolerance
    assert distance(values, twins[1].double()) <= tolerance
