"""Random numbers and thread counts of the kernels' tests."""

import secrets
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator; pytest shows the seed beside a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads, on which the kernels run, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def n_threads(request: pytest.FixtureRequest, set_threads: Callable[[int], None]) -> int:
    """The test runs once with each of these numbers of threads."""
    set_threads(request.param)
    return request.param
