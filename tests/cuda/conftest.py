"""Memory to page-lock, two processes on a GPU that is none, and the check that nothing is left."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fake_driver import FakeDriver, World
from mapped_memory import Mapped, map_shared

from sparseflow.engine.shared_memory import SharedMemory


@pytest.fixture
def mapped() -> Iterator[Callable[..., Mapped]]:
    """(nbytes, writable=False) -> a mapping of a sealed memfd."""
    made: list[SharedMemory] = []

    def make(nbytes: int, *, writable: bool = False) -> Mapped:
        memory = SharedMemory("test", nbytes, others_may_write=writable)
        made.append(memory)
        return map_shared(memory, writable=writable)

    yield make
    for memory in made:
        memory.close()


@pytest.fixture
def turn_path(tmp_path: Path) -> Path:
    return tmp_path / "turn"


@pytest.fixture
def world() -> Iterator[World]:
    """One GPU; at the end nobody has misused it."""
    made = World()
    yield made
    assert made.violations == []


@pytest.fixture
def driver(world: World) -> Iterator[FakeDriver]:
    """One process; at the end it has given all back."""
    made = FakeDriver(world)
    yield made
    assert made.leaks() == {}


@pytest.fixture
def other(world: World) -> Iterator[FakeDriver]:
    """Another process on the same GPU; at the end it has given all back."""
    made = FakeDriver(world)
    yield made
    assert made.leaks() == {}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a file descriptor or a child behind."""
    n_fds, children = psutil.Process().num_fds(), set(psutil.Process().children())
    yield
    assert psutil.Process().num_fds() <= n_fds
    assert set(psutil.Process().children()) <= children
