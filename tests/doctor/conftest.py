"""A host of the test's own, a store that can be damaged, and the check that nothing is left."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from own_host import host, pytest_runtest_makereport
from served_shards import ServedShards

__all__ = ["host", "pytest_runtest_makereport"]


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    """A store of bundles that say which they are."""
    return ServedShards(tmp_path / "store")


@pytest.fixture(autouse=True)
def nothing_left(fork_server: None) -> Iterator[None]:
    """Fails a test that leaves a descriptor, a child or a thread behind."""
    process = psutil.Process()
    n_fds, children, threads = process.num_fds(), set(process.children()), set(threading.enumerate())
    yield
    assert process.num_fds() <= n_fds
    assert set(process.children()) <= children
    assert {thread for thread in threading.enumerate() if "tqdm" not in thread.name} <= threads
