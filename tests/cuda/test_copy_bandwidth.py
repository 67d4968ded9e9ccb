"""The bandwidth that is measured: medians by the clock, and nothing left."""

from collections.abc import Iterator

import pytest
from fake_driver import FakeDriver

from sparseflow.cuda.bandwidth import measure_bandwidth
from sparseflow.errors import BadRequest, DeviceError


def ticking(seconds: list[float]) -> Iterator[float]:
    """Readings of a clock between which so much passes; nothing passes otherwise."""
    now = 0.0
    for passed in seconds:
        yield now
        now += passed
        yield now


def test_median_of_the_copies_after_the_first(driver: FakeDriver) -> None:
    pageable, pinned = [100.0, 1.0, 9.0, 2.0], [100.0, 0.5, 0.25, 0.125]
    clock = ticking(pageable + pinned).__next__
    found = measure_bandwidth(driver, 1 << 20, n_copies=3, clock=clock)
    assert found.pageable_bytes_per_s == (1 << 20) / 2
    assert found.pinned_bytes_per_s == (1 << 20) / 0.25
    assert driver.calls.count("copy_to_device") == driver.calls.count("stream_synchronize") - 1 == 8


def test_whichever_call_fails_nothing_is_left() -> None:
    untouched = FakeDriver()
    measure_bandwidth(untouched, 4096, n_copies=2)
    for n in range(len(untouched.calls)):
        driver = FakeDriver(fail_at=n)
        with pytest.raises(DeviceError, match="719"):
            measure_bandwidth(driver, 4096, n_copies=2)
        assert driver.leaks() == {}, n


@pytest.mark.parametrize(("nbytes", "n_copies"), [(0, 5), (4096, 0)])
def test_nothing_to_measure_is_refused(driver: FakeDriver, nbytes: int, n_copies: int) -> None:
    with pytest.raises(BadRequest, match="at least one byte and one copy"):
        measure_bandwidth(driver, nbytes, n_copies)
