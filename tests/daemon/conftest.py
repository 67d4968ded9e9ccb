"""Random numbers of the server's tests, a run directory for them, and the stores of the engine's tests."""

import gc
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("engine", "cuda")]  # shards, a driver that is none


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator; pytest shows the seed beside a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty runtime directory with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture
def no_descriptor_left() -> Iterator[None]:
    """Fails a test that leaves a file descriptor open."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
