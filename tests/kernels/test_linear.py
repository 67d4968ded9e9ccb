"""Products of wide and narrow weights, each against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseflow.kernels import linear as module
from sparseflow.kernels.linear import linear, linear_ref, linear_transposed

ERROR = 2.0**-21  # of float32 sums, as a share of what the absolute values of all terms add up to

all_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
# Tokens one by one, by fours, both, and by tiles; rows of less and more than a vector; more rows than a tile has.
all_shapes = pytest.mark.parametrize(
    ("n_tokens", "n_in", "n_out"), [(1, 1, 1), (1, 257, 40), (3, 64, 7), (4, 100, 33), (7, 31, 600), (33, 65, 1100)]
)


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def assert_near(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert y.dtype == torch.float32
    size = linear_ref(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert ((y.double() - linear_ref(x, weight, bias)).abs() <= ERROR * size).all()


@all_dtypes
@all_shapes
@pytest.mark.parametrize("is_biased", [True, False], ids=["bias", "no bias"])
def test_linear_agrees_with_float64(
    rng: np.random.Generator, dtype: torch.dtype, n_tokens: int, n_in: int, n_out: int, is_biased: bool
) -> None:
    x, weight = normal(rng, n_tokens, n_in), normal(rng, n_out, n_in, dtype=dtype)
    bias = normal(rng, n_out, dtype=dtype) if is_biased else None
    assert_near(linear(x, weight, bias), x, weight, bias)
    assert_near(linear_transposed(x, weight.T.contiguous(), bias), x, weight, bias)


@all_dtypes
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_rows_may_have_room_between_them(rng: np.random.Generator, dtype: torch.dtype, n_tokens: int) -> None:
    room = normal(rng, 50, 3, 70, dtype=dtype)
    x, weight, bias = normal(rng, n_tokens, 70), room[:, 1], normal(rng, 50, dtype=dtype)
    assert_near(linear(x, weight, bias), x, weight, bias)
    wide = normal(rng, n_tokens, 50)
    assert_near(linear_transposed(wide, weight), wide, weight.T, None)


@all_dtypes
@pytest.mark.parametrize("n_tokens", [1, 40])
def test_nothing_given_is_changed(rng: np.random.Generator, dtype: torch.dtype, n_tokens: int) -> None:
    given = normal(rng, n_tokens, 20, dtype=dtype), normal(rng, 20, 20, dtype=dtype), normal(rng, 20, dtype=dtype)
    before = [tensor.clone() for tensor in given]
    linear(*given)
    linear_transposed(*given)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_any_number_of_threads(rng: np.random.Generator, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: n_threads)
    x, weight = normal(rng, 2, 30), normal(rng, 3, 30)  # fewer rows than parts
    assert_near(linear(x, weight), x, weight, None)


def test_nan_spoils_its_token_and_no_other(rng: np.random.Generator) -> None:
    x, weight = normal(rng, 6, 30), normal(rng, 8, 30, dtype=torch.float16)
    x[2, 3] = torch.nan
    is_nan = linear(x, weight).isnan()
    assert is_nan[2].all()
    assert is_nan.sum() == 8
