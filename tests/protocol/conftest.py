"""Random numbers of the protocol's tests, and the check that no descriptor is left behind."""

import os
import secrets
from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator; pytest shows the seed beside a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def no_descriptor_left() -> Iterator[None]:
    """Fails a test that leaves a file descriptor open."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before
