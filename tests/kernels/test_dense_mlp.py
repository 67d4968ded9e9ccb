"""The dense MLP over bundles, against float64 and against the sparse kernel."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparseflow.kernels.dense_mlp import dense_mlp
from sparseflow.kernels.sparse_mlp import sparse_mlp

# Largest error, as a share of what the absolute values of all terms add up to: a few units of the dtype.
TOLERANCE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-21}

all_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


@all_dtypes
@pytest.mark.parametrize("biased", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize(("n_tokens", "ffn_dim", "hidden"), [(1, 1, 1), (1, 33, 7), (5, 64, 100), (3, 200, 257)])
def test_agrees_with_float64(
    rng: np.random.Generator, dtype: torch.dtype, biased: bool, n_tokens: int, ffn_dim: int, hidden: int
) -> None:
    bundles = normal(rng, ffn_dim, 2, hidden, dtype=dtype)
    fc1_bias, fc2_bias = normal(rng, ffn_dim, dtype=dtype), normal(rng, hidden, dtype=dtype)
    x = normal(rng, n_tokens, hidden, dtype=dtype)
    y, _ = dense_mlp(bundles, fc1_bias if biased else None, fc2_bias if biased else None, x)
    w1, w2 = bundles.double().unbind(1)
    b1, b2 = fc1_bias.double() * biased, fc2_bias.double() * biased
    expected = torch.relu(x.double() @ w1.T + b1) @ w2 + b2
    size = (x.double().abs() @ w1.abs().T + b1.abs()) @ w2.abs() + b2.abs()
    assert y.dtype == torch.float32
    assert y.shape == (n_tokens, hidden)
    assert ((y.double() - expected).abs() <= TOLERANCE[torch.float32] * size).all()


@all_dtypes
def test_agrees_with_two_linear_layers_and_a_relu(rng: np.random.Generator, dtype: torch.dtype) -> None:
    """What transformers' OPT computes, in the same dtype."""
    ffn_dim, hidden = 64, 48
    bundles, x = normal(rng, ffn_dim, 2, hidden, dtype=dtype), normal(rng, 4, hidden, dtype=dtype)
    fc1, fc2 = nn.Linear(hidden, ffn_dim, dtype=dtype), nn.Linear(ffn_dim, hidden, dtype=dtype)
    with torch.no_grad():
        fc1.weight.copy_(bundles[:, 0])
        fc2.weight.copy_(bundles[:, 1].T)
        expected = fc2(torch.relu(fc1(x)))
        y, _ = dense_mlp(bundles, fc1.bias, fc2.bias, x)
    size = float(expected.abs().max())
    torch.testing.assert_close(y, expected.float(), rtol=0, atol=4 * TOLERANCE[dtype] * size)


def test_agrees_with_the_sparse_kernel_given_all_neurons(rng: np.random.Generator) -> None:
    ffn_dim, hidden = 100, 65
    bundles, x = (normal(rng, *shape, dtype=torch.float32) for shape in ((ffn_dim, 2, hidden), (3, hidden)))
    fc1_bias, fc2_bias = (normal(rng, n, dtype=torch.float32) for n in (ffn_dim, hidden))
    ids = np.arange(ffn_dim, dtype=np.uint32)
    y, _ = dense_mlp(bundles, fc1_bias, fc2_bias, x)
    sparse = sparse_mlp(bundles, ids, ids, fc1_bias, fc2_bias, x)
    torch.testing.assert_close(y, sparse.y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@all_dtypes
def test_active_pairs_of_token_and_neuron_are_counted(dtype: torch.dtype) -> None:
    """Pre-activations of 2 tokens: x - 1, x and x + 1 at x = 0 and at x = 1."""
    bundles = torch.ones(3, 2, 1, dtype=dtype)
    fc1_bias = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    y, n_active = dense_mlp(bundles, fc1_bias, None, torch.tensor([[0.0], [1.0]], dtype=dtype))
    assert n_active == 1 + 2
    assert y.flatten().tolist() == [1.0, 3.0]


@all_dtypes
def test_bundles_are_used_where_they_lie_and_left_alone(rng: np.random.Generator, dtype: torch.dtype) -> None:
    """A view with room between the bundles gives what a copy gives."""
    room = normal(rng, 40, 3, 65, dtype=dtype)
    bundles, x = room[:, :2], normal(rng, 2, 65, dtype=dtype)
    fc1_bias, fc2_bias = normal(rng, 40, dtype=dtype), normal(rng, 65, dtype=dtype)
    arguments = (room, fc1_bias, fc2_bias, x)
    before = [tensor.clone() for tensor in arguments]
    y, n_active = dense_mlp(bundles, fc1_bias, fc2_bias, x)
    expected, expected_active = dense_mlp(bundles.contiguous(), fc1_bias, fc2_bias, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=8 * TOLERANCE[dtype] * float(expected.abs().max()))
    assert n_active == expected_active
    assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True))


def test_nan_in_x_spoils_its_token_and_no_other(rng: np.random.Generator) -> None:
    x = normal(rng, 3, 65, dtype=torch.float32)
    x[1, 7] = np.nan
    y, _ = dense_mlp(normal(rng, 40, 2, 65, dtype=torch.float32), None, None, x)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
