"""Random numbers of the client's tests, and the check that nothing is left behind."""

import gc
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from server_by_hand import ServerByHand


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator; pytest shows the seed beside a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a thread or a file descriptor behind."""
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) <= descriptors


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerByHand]:
    """A server of a test's own, in a runtime directory of its own."""
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        made = ServerByHand()
        yield made
        made.close()
