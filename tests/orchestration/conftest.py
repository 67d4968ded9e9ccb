"""Random numbers of these tests, and a driver that is none."""

import secrets
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "cuda"))


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator; pytest shows the seed beside a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)
