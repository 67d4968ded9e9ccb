"""Which depth of queue is taken, and that a slow disk is not measured for long."""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from sparseflow.engine import disk_speed
from sparseflow.engine.read_queue import Finished

READ_NBYTES = 8192


class SlowQueue:
    """Takes a given time for each read."""

    name = "slow"
    threads: list[object] = []  # noqa: RUF012  there are none

    def __init__(self, read_s: float) -> None:
        self._read_s = read_s
        self._begun: list[int] = []
        self.n_reads = 0

    def submit(self, reads: NDArray[np.void]) -> int:
        self._begun += reads["token"].tolist()
        self.n_reads += len(reads)
        return len(reads)

    def wait(self, least: int, timeout_s: float) -> None:
        time.sleep(min(timeout_s, least * self._read_s))

    def take(self) -> Finished:
        ended, self._begun = self._begun, []
        return Finished(np.array(ended, np.uint64), np.full(len(ended), READ_NBYTES))

    def close(self) -> None:
        pass


def measured(queue: SlowQueue) -> disk_speed.DiskSpeed:
    return disk_speed.measure(queue, [3], 0, 1 << 20, READ_NBYTES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("us_a_read", "depth"),
    [
        ({16: 20, 32: 11, 64: 10, 128: 10.8, 256: 13}, 128),  # within a tenth of the fastest, and the deepest of these
        ({16: 10, 32: 10, 64: 10, 128: 10, 256: 10}, 256),
        ({16: 10, 32: 12, 64: 12, 128: 12, 256: 12}, 16),
        ({16: 40, 32: 30, 64: 20, 128: 15, 256: 10}, 256),
    ],
)
def test_of_depths_that_are_equally_fast_the_deepest_is_taken(
    us_a_read: dict[int, float], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparseflow.engine.disk_speed._Probe.seconds_a_read",
        lambda probe, nbytes, depth: us_a_read[depth] * 1e-6 * (1 if nbytes == READ_NBYTES else 4),
    )
    speed = measured(SlowQueue(0))
    assert speed.depth == depth
    assert speed.seconds(READ_NBYTES) == pytest.approx(us_a_read[depth] * 1e-6)


def test_a_disk_that_takes_long_for_a_read_is_asked_for_few() -> None:
    queue = SlowQueue(0.005)
    speed = measured(queue)
    assert speed.depth == 16
    assert queue.n_reads == 2 * 16  # of one bundle, and long ones
    assert speed.seconds(READ_NBYTES) > 0.004
