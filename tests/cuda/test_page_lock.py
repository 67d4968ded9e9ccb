"""Page-locking: all or nothing, why not, and nothing left behind whatever fails and whoever forgets."""

import fcntl
import gc
import mmap
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_driver import FakeDriver
from forking import holds_in_a_fork
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mapped_memory import Mapped

from sparseflow.cuda import driver as cuda
from sparseflow.cuda.page_lock import PageLock, whole_pages
from sparseflow.errors import BadRequest

PAGE = mmap.PAGESIZE
CHUNK = 2 * PAGE
Map = Callable[..., Mapped]


def lock_all(
    driver: FakeDriver, memory: Mapped, turn_path: Path, *, read_only: bool = True, timeout_s: float = 5.0
) -> PageLock:
    return PageLock(
        driver,
        memory.address,
        memory.nbytes,
        read_only=read_only,
        turn_path=turn_path,
        timeout_s=timeout_s,
        chunk_nbytes=CHUNK,
    )


# --- what is locked


def test_whole_range_is_locked_in_chunks_of_which_none_is_longer(
    driver: FakeDriver, mapped: Map, turn_path: Path
) -> None:
    memory = mapped(5 * PAGE)
    with lock_all(driver, memory, turn_path) as lock:
        assert lock.is_locked
        assert lock.reason == ""
        places = {at - memory.address: nbytes for at, (nbytes, _) in driver.registered.items()}
        assert places == {0: 2 * PAGE, 2 * PAGE: 2 * PAGE, 4 * PAGE: PAGE}
    assert not lock.is_locked


def test_read_only_mapping_is_locked_as_such(driver: FakeDriver, mapped: Map, turn_path: Path) -> None:
    always = cuda.REGISTER_PORTABLE | cuda.REGISTER_DEVICEMAP
    with lock_all(driver, mapped(PAGE), turn_path):
        assert [flags for _, flags in driver.registered.values()] == [always | cuda.REGISTER_READ_ONLY]
    with lock_all(driver, mapped(PAGE, writable=True), turn_path, read_only=False):
        assert [flags for _, flags in driver.registered.values()] == [always]


def test_device_with_the_hosts_page_tables_needs_no_flag_for_read_only(mapped: Map, turn_path: Path) -> None:
    driver = FakeDriver(attributes={cuda.USES_HOST_PAGE_TABLES: 1, cuda.READ_ONLY_HOST_REGISTER_SUPPORTED: 0})
    with lock_all(driver, mapped(PAGE), turn_path) as lock:
        assert lock.is_locked
        assert not any(flags & cuda.REGISTER_READ_ONLY for _, flags in driver.registered.values())


@pytest.mark.parametrize(("address", "nbytes"), [(1, PAGE), (PAGE, PAGE + 1), (PAGE, 0), (0, PAGE)])
def test_anything_but_whole_pages_is_refused(driver: FakeDriver, turn_path: Path, address: int, nbytes: int) -> None:
    with pytest.raises(BadRequest, match=f"whole pages of {PAGE}"):
        PageLock(driver, address, nbytes, read_only=True, turn_path=turn_path)
    assert driver.calls == []


def test_whole_pages_are_those_that_a_mapping_covers() -> None:
    assert [whole_pages(n) for n in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]


# --- where the device sees it


def test_each_byte_has_its_address_on_the_device(mapped: Map, turn_path: Path) -> None:
    driver, memory = FakeDriver(gap_nbytes=7 * PAGE), mapped(5 * PAGE)
    with lock_all(driver, memory, turn_path) as lock:
        first = driver.host_device_pointer(memory.address)
        for place in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + PAGE - 1):
            chunk = place // CHUNK
            assert lock.device_address(memory.address + place) == first + place + chunk * 7 * PAGE
        assert lock.device_base is None
        assert lock.device_address(memory.address + CHUNK, CHUNK) == first + CHUNK + 7 * PAGE
        with pytest.raises(BadRequest, match="not in one piece"):
            lock.device_address(memory.address + CHUNK - 1, 2)


def test_what_is_in_one_piece_on_the_device_has_one_base(driver: FakeDriver, mapped: Map, turn_path: Path) -> None:
    memory = mapped(5 * PAGE)
    with lock_all(driver, memory, turn_path) as lock:
        assert lock.device_base == lock.device_address(memory.address, memory.nbytes)


@pytest.mark.parametrize(("place", "nbytes"), [(-1, 1), (0, 0), (5 * PAGE, 1), (5 * PAGE - 1, 2)])
def test_no_address_outside_is_given(driver: FakeDriver, mapped: Map, turn_path: Path, place: int, nbytes: int) -> None:
    memory = mapped(5 * PAGE)
    with lock_all(driver, memory, turn_path) as lock, pytest.raises(BadRequest, match=r"outside|not in one piece"):
        lock.device_address(memory.address + place, nbytes)


def test_after_close_no_address_is_given(driver: FakeDriver, mapped: Map, turn_path: Path) -> None:
    memory = mapped(PAGE)
    lock = lock_all(driver, memory, turn_path)
    lock.close()
    lock.close()
    with pytest.raises(BadRequest, match="not page-locked"):
        lock.device_address(memory.address)
    with pytest.raises(BadRequest, match="not page-locked"):
        _ = lock.device_base


# --- what goes wrong


def test_whichever_call_fails_nothing_stays_locked_and_the_reason_says_what(mapped: Map, turn_path: Path) -> None:
    memory = mapped(7 * PAGE)
    for n in range(100):
        driver = FakeDriver(fail_at=n)
        lock = lock_all(driver, memory, turn_path)
        was_locked = lock.is_locked
        assert was_locked == (lock.reason == "")
        lock.close()
        assert driver.leaks() == {}, n
        if len(driver.calls) <= n:
            break
        failed = driver.calls[n]
        assert lock.reason.count("CUDA_ERROR_LAUNCH_FAILED") == 1, n
        assert f"{failed}: CUDA_ERROR_LAUNCH_FAILED (719)" in lock.reason
        assert was_locked == (failed == "host_unregister")
        assert driver.calls.count("host_register") <= 4
    assert n > 10


def test_unlocking_goes_from_the_last_chunk_to_the_first(mapped: Map, turn_path: Path) -> None:
    memory, order = mapped(6 * PAGE), []

    class Noting(FakeDriver):
        def host_unregister(self, address: int) -> None:
            order.append((address - memory.address) // CHUNK)
            super().host_unregister(address)

    lock_all(Noting(), memory, turn_path).close()
    assert order == [2, 1, 0]


def test_reason_names_error_bytes_reached_limit_and_remedy(
    driver: FakeDriver, mapped: Map, turn_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseflow.cuda.page_lock.memlock_limit", lambda: 8 << 20)
    driver.host_limit = 2 * CHUNK
    lock = lock_all(driver, mapped(5 * PAGE), turn_path)
    assert not lock.is_locked
    assert f"{2 * CHUNK} of {5 * PAGE} bytes page-locked" in lock.reason
    assert "CUDA_ERROR_OUT_OF_MEMORY (2)" in lock.reason
    assert re.search(r"8MiB.*ulimit -l.*--ulimit memlock=-1.*server has to push", lock.reason)


def test_device_that_cannot_lock_read_only_is_not_asked_to(mapped: Map, turn_path: Path) -> None:
    driver = FakeDriver(attributes={cuda.READ_ONLY_HOST_REGISTER_SUPPORTED: 0})
    lock = lock_all(driver, mapped(PAGE), turn_path)
    assert not lock.is_locked
    assert "read-only" in lock.reason
    assert "server has to push" in lock.reason
    assert "host_register" not in driver.calls


def test_read_only_mapping_said_to_be_writable_is_a_reason(driver: FakeDriver, mapped: Map, turn_path: Path) -> None:
    lock = lock_all(driver, mapped(PAGE), turn_path, read_only=False)
    assert "CUDA_ERROR_INVALID_VALUE" in lock.reason


def test_memory_that_is_locked_already_is_a_reason_and_stays_so(
    driver: FakeDriver, mapped: Map, turn_path: Path
) -> None:
    memory = mapped(4 * PAGE)
    with lock_all(driver, memory, turn_path) as lock:
        assert "ALREADY_REGISTERED" in lock_all(driver, memory, turn_path).reason
        assert lock.is_locked
        assert len(driver.registered) == 2


def test_a_turn_file_that_cannot_be_made_is_a_reason(driver: FakeDriver, mapped: Map, tmp_path: Path) -> None:
    lock = lock_all(driver, mapped(PAGE), tmp_path / "missing" / "turn")
    assert "missing" in lock.reason
    assert "host_register" not in driver.calls


def test_an_interrupt_passes_and_leaves_nothing_locked(mapped: Map, turn_path: Path) -> None:
    class Interrupted(FakeDriver):
        def host_register(self, address: int, nbytes: int, flags: int) -> None:
            super().host_register(address, nbytes, flags)
            if len(self.registered) == 3:
                raise KeyboardInterrupt

    driver = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        lock_all(driver, mapped(8 * PAGE), turn_path)
    assert driver.leaks() == {}


def test_a_lock_that_is_forgotten_ends_with_its_object(driver: FakeDriver, mapped: Map, turn_path: Path) -> None:
    lock = lock_all(driver, mapped(4 * PAGE), turn_path)
    assert driver.registered
    del lock
    gc.collect()
    assert driver.registered == {}


# --- turns


def test_one_process_at_a_time_locks(mapped: Map, turn_path: Path, driver: FakeDriver) -> None:
    memory = mapped(PAGE)
    with open(turn_path, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begin = time.monotonic()
        lock = lock_all(driver, memory, turn_path, timeout_s=0.1)
        assert 0.1 <= time.monotonic() - begin < 5
        assert "another process" in lock.reason
        assert str(turn_path) in lock.reason
        assert driver.registered == {}
        timer = threading.Timer(0.1, fcntl.flock, (held, fcntl.LOCK_UN))
        timer.start()
        with lock_all(driver, memory, turn_path, timeout_s=20) as lock:
            assert lock.is_locked
        timer.join(5)


def test_the_turn_is_over_when_all_is_locked(driver: FakeDriver, mapped: Map, turn_path: Path) -> None:
    with lock_all(driver, mapped(PAGE), turn_path), open(turn_path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert turn_path.stat().st_mode & 0o777 == 0o600


# --- forks


def test_a_forked_child_neither_uses_nor_ends_it(driver: FakeDriver, mapped: Map, turn_path: Path) -> None:
    memory = mapped(4 * PAGE)
    with lock_all(driver, memory, turn_path) as lock:

        def is_refused_and_left_alone() -> bool:
            n_calls = len(driver.calls)
            with pytest.raises(BadRequest, match="forked child"):
                lock.device_address(memory.address)
            lock.close()
            return len(driver.calls) == n_calls and len(driver.registered) == 2

        assert holds_in_a_fork(is_refused_and_left_alone)
        assert lock.is_locked


# --- any order

_MEMORY_PAGES = 6
_SPANS = st.tuples(st.integers(0, _MEMORY_PAGES - 1), st.integers(1, _MEMORY_PAGES))
_STEPS = st.lists(st.tuples(st.sampled_from(["lock", "close"]), _SPANS, st.integers(0, 30) | st.none()), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS)
def test_in_any_order_what_is_locked_is_what_open_locks_say(
    steps: list[tuple[str, tuple[int, int], int | None]], mapped: Map, turn_path: Path
) -> None:
    memory, driver, opened = mapped(_MEMORY_PAGES * PAGE), FakeDriver(), []
    for step, (first, n_pages), fail_in in steps:
        driver.fail_at = None if fail_in is None else len(driver.calls) + fail_in
        if step == "lock":
            place = memory.address + first * PAGE
            nbytes = min(n_pages, _MEMORY_PAGES - first) * PAGE
            taken = {page for lock in opened if lock.is_locked for page in pages_of(lock)}
            lock = PageLock(driver, place, nbytes, read_only=True, turn_path=turn_path, chunk_nbytes=CHUNK)
            opened.append(lock)
            assert lock.is_locked == (not lock.reason)
            if lock.is_locked:
                assert not taken & set(pages_of(lock))
        elif opened:
            opened[first % len(opened)].close()
        expected = {page for lock in opened if lock.is_locked for page in pages_of(lock)}
        found = {at + n for at, (nbytes, _) in driver.registered.items() for n in range(0, nbytes, PAGE)}
        assert found == expected
    driver.fail_at = None
    for lock in opened:
        lock.close()
    assert driver.leaks() == {}


def pages_of(lock: PageLock) -> range:
    return range(lock.address, lock.address + lock.nbytes, PAGE)
