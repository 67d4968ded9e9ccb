"""What goes wrong goes wrong on a host of the test's own, where nothing may be left of it at the end."""

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from own_host import demo_store, dense_ids, host, line, pytest_runtest_makereport, session
from served_shards import ServedShards

__all__ = ["demo_store", "dense_ids", "host", "line", "pytest_runtest_makereport", "session"]


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    """A store of bundles that say which they are."""
    return ServedShards(tmp_path / "store")


def held() -> dict[str, int]:
    """What this process has of what a fault could leave behind."""
    gc.collect()  # errors that were caught hold what they came through
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": sum("tqdm" not in thread.name for thread in threading.enumerate()),
        "shared maps": sum("/memfd:sparseflow" in line for line in maps),
        "named shared memory": len([*Path("/dev/shm").glob("*sparseflow*")]),  # others have theirs
        "children": len(psutil.Process().children()),
    }


@pytest.fixture(autouse=True)
def nothing_is_left(fork_server: None) -> Iterator[None]:
    """Beside what `host` looks for: servers that are well, leases, processes, runtime directories."""
    before = held()
    yield
    deadline = time.monotonic() + 5
    while (left := {what: now for what, now in held().items() if now > before[what]}) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"{left} now, {before} before"
