"""Random numbers of the engine's tests, stores for them, and the check that nothing is left behind."""

import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from shards import Shards

MakeShards = Callable[..., Shards]


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator; pytest shows the seed beside a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """A store of its own, to be damaged at will: the arguments of `Shards`."""

    def make(**sizes: Any) -> Shards:
        return Shards(tmp_path / "store", **sizes)

    return make


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a thread or a file descriptor behind."""
    threads, n_fds = set(threading.enumerate()), psutil.Process().num_fds()
    yield
    assert set(threading.enumerate()) <= threads
    assert psutil.Process().num_fds() <= n_fds
