"""Both kinds of queue on real files: the right bytes, errors as results, waits that end, and a close that waits."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparseflow.engine import read_queue
from sparseflow.engine.read_queue import (
    IOVEC,
    READ,
    READ_VECTOR,
    AioQueue,
    DirectRefused,
    Finished,
    ReadQueue,
    ThreadQueue,
    copy_from,
    read_vector,
)
from sparseflow.errors import DiskError

PAGE = 4096
N_PAGES = 64
DEPTH = 32
DEADLINE_S = 20.0

Pieces = list[tuple[int, int]]  # offset in memory, bytes


class Case:
    """A queue, a file for it, and page-aligned memory that its reads fill."""

    def __init__(self, name: str, path: Path) -> None:
        self.content = np.random.default_rng(7).integers(0, 256, N_PAGES * PAGE, dtype=np.uint8)
        with open(path, "wb") as file:
            file.write(self.content)
            os.fsync(file.fileno())  # direct reads would wait for it
        raw = np.zeros((N_PAGES + 1) * PAGE, np.uint8)
        self.memory: NDArray[np.uint8] = raw[-raw.ctypes.data % PAGE :][: N_PAGES * PAGE]
        self._kept: list[Any] = []
        self.iovecs: list[NDArray[np.void]] = []
        self.queue: ReadQueue
        if name == "direct":
            self.fd = open_direct(path)
            self.queue = new_aio_queue()
        else:
            self.fd = os.open(path, os.O_RDONLY)
            mapped = np.memmap(path, np.uint8, "r")
            self._kept.append(mapped)
            perform = copy_from({self.fd: (mapped.ctypes.data, len(mapped))}) if name == "map" else read_vector
            self.queue = ThreadQueue(name, perform, 3)

    def rows(self, *reads: tuple[int, Pieces], first_token: int = 1, fd: int | None = None) -> NDArray[np.void]:
        """READ rows of (offset in the file, pieces of memory)."""
        rows = np.zeros(len(reads), READ)
        rows["opcode"], rows["fd"] = READ_VECTOR, self.fd if fd is None else fd
        rows["token"] = np.arange(first_token, first_token + len(reads))
        for row, (offset, pieces) in zip(rows, reads, strict=True):
            iovecs = np.array([(self.memory.ctypes.data + at, nbytes) for at, nbytes in pieces], IOVEC)
            row["offset"], row["iovecs"], row["n_iovecs"] = offset, iovecs.ctypes.data, len(iovecs)
            self.iovecs.append(iovecs)
        self._kept.append(rows)
        return rows

    def page_rows(self, pages: NDArray[np.integer], first_token: int = 1) -> NDArray[np.void]:
        """One page of the file each, to its own place in memory."""
        return self.rows(*((int(n) * PAGE, [(int(n) * PAGE, PAGE)]) for n in pages), first_token=first_token)

    def results(self, rows: NDArray[np.void]) -> dict[int, int]:
        """token -> result, of reads that are submitted as fast as they are taken."""
        results: dict[int, int] = {}
        n_begun = 0
        deadline = time.monotonic() + DEADLINE_S
        while len(results) < len(rows):
            assert time.monotonic() < deadline, f"{len(results)} of {len(rows)} reads ended"
            if n_begun < len(rows):
                n_begun += self.queue.submit(rows[n_begun:])
            results |= ended(self.queue, 1, 1.0)
        return results


def ended(queue: ReadQueue, least: int, timeout_s: float) -> dict[int, int]:
    """token -> result, of reads that were waited for."""
    queue.wait(least, timeout_s)
    return as_dict(queue.take())


def as_dict(finished: Finished) -> dict[int, int]:
    assert len(set(finished.tokens.tolist())) == len(finished.tokens)
    return dict(zip(finished.tokens.tolist(), finished.results.tolist(), strict=True))


def open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"{path.parent}: opened with O_DIRECT, {error.strerror}")


def new_aio_queue(depth: int = DEPTH) -> AioQueue:
    try:
        return AioQueue(depth)
    except DirectRefused as error:
        pytest.skip(str(error))


@pytest.fixture(params=["direct", "buffered", "map"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    made = Case(request.param, tmp_path / "file")
    assert made.queue.name == request.param
    yield made
    made.queue.close()
    os.close(made.fd)


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Case]:
    made = Case("direct", tmp_path / "file")
    yield made
    made.queue.close()
    os.close(made.fd)


@pytest.fixture
def buffered(tmp_path: Path) -> Iterator[Case]:
    made = Case("buffered", tmp_path / "file")
    yield made
    made.queue.close()
    os.close(made.fd)


# --- bytes


def test_pages_in_random_order_come_with_the_right_bytes(case: Case, rng: np.random.Generator) -> None:
    pages = rng.permutation(N_PAGES)[: N_PAGES // 2]
    assert case.results(case.page_rows(pages)) == dict.fromkeys(range(1, len(pages) + 1), PAGE)
    got, expected = case.memory.reshape(-1, PAGE), case.content.reshape(-1, PAGE)
    assert np.array_equal(got[pages], expected[pages])
    assert not np.delete(got, pages, axis=0).any(), "memory that no read was for"


def test_one_read_fills_several_pieces_of_memory_in_their_order(case: Case) -> None:
    pieces = [(9 * PAGE, 512), (0, PAGE), (4 * PAGE, 2 * PAGE), (8 * PAGE, 1024)]
    assert case.results(case.rows((5 * PAGE, pieces))) == {1: 512 + PAGE + 2 * PAGE + 1024}
    at = 5 * PAGE
    for start, nbytes in pieces:
        assert np.array_equal(case.memory[start : start + nbytes], case.content[at : at + nbytes])
        at += nbytes


def test_several_pieces_may_be_one_place_as_the_scrap_is(case: Case) -> None:
    pieces = [(0, PAGE), (PAGE, PAGE), (0, PAGE), (2 * PAGE, PAGE)]
    assert case.results(case.rows((0, pieces))) == {1: 4 * PAGE}
    assert np.array_equal(case.memory[PAGE : 2 * PAGE], case.content[PAGE : 2 * PAGE])
    assert np.array_equal(case.memory[2 * PAGE : 3 * PAGE], case.content[3 * PAGE : 4 * PAGE])


@pytest.mark.parametrize("name", ["buffered", "map"])
def test_any_offset_and_length_without_direct_reads(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    case = Case(name, tmp_path / "file")
    offsets = rng.integers(0, N_PAGES * PAGE - 100, 50).tolist()
    reads: list[tuple[int, Pieces]] = [(offset, [(100 * n, 99)]) for n, offset in enumerate(offsets)]
    assert set(case.results(case.rows(*reads)).values()) == {99}
    for n, offset in enumerate(offsets):
        assert np.array_equal(case.memory[100 * n : 100 * n + 99], case.content[offset : offset + 99])
    case.queue.close()
    os.close(case.fd)


def test_tokens_of_64_bits_come_back(case: Case) -> None:
    token = (0xFFFFFFF << 32) + 0xFFFFFFFF
    assert case.results(case.rows((0, [(0, PAGE)]), first_token=token)) == {token: PAGE}


# --- what goes wrong is a result


def test_read_across_the_end_of_the_file_is_short(case: Case) -> None:
    results = case.results(case.rows(((N_PAGES - 1) * PAGE, [(0, 2 * PAGE)]), (N_PAGES * PAGE, [(8 * PAGE, PAGE)])))
    assert results == {1: PAGE, 2: 0}
    assert np.array_equal(case.memory[:PAGE], case.content[-PAGE:])


@pytest.mark.parametrize("case", ["direct", "buffered"], indirect=True)
def test_file_cut_at_a_place_that_is_not_aligned_gives_what_there_is(case: Case) -> None:
    os.truncate(f"/proc/self/fd/{case.fd}", (N_PAGES - 1) * PAGE + 100)
    assert case.results(case.rows(((N_PAGES - 1) * PAGE, [(0, PAGE)]))) == {1: 100}


def test_misaligned_direct_read_ends_with_einval(direct: Case) -> None:
    results = direct.results(direct.rows((3, [(0, PAGE)]), (0, [(0, 100)]), (0, [(PAGE, PAGE)])))
    assert results == {1: -errno.EINVAL, 2: -errno.EINVAL, 3: PAGE}


def test_read_of_a_closed_descriptor_ends_with_ebadf(buffered: Case) -> None:
    closed = os.dup(buffered.fd)
    os.close(closed)
    assert buffered.results(buffered.rows((0, [(0, PAGE)]), fd=closed)) == {1: -errno.EBADF}


def test_read_into_memory_that_is_not_ours_ends_with_efault(buffered: Case) -> None:
    rows = buffered.rows((0, [(0, PAGE)]))
    buffered.iovecs[0]["address"] = 8
    assert buffered.results(rows) == {1: -errno.EFAULT}


def test_kernel_that_refuses_to_start_a_direct_read_is_a_disk_error(direct: Case) -> None:
    closed = os.dup(direct.fd)
    os.close(closed)
    with pytest.raises(DiskError, match=r"Bad file descriptor.*io='buffered'"):
        direct.queue.submit(direct.rows((0, [(0, PAGE)]), fd=closed))


# --- submit


def test_direct_reads_before_one_that_is_refused_are_taken(direct: Case) -> None:
    rows = direct.page_rows(np.arange(5))
    rows["opcode"][3] = 99
    assert direct.queue.submit(rows) == 3
    assert ended(direct.queue, 3, DEADLINE_S) == dict.fromkeys((1, 2, 3), PAGE)
    with pytest.raises(DiskError, match="Invalid argument"):
        direct.queue.submit(rows[3:])


def test_more_reads_than_a_direct_queue_holds_are_taken_in_parts(direct: Case) -> None:
    """The kernel's queue is larger than asked for, so it takes many to fill it."""
    n = 20_000
    pages = np.arange(n) % N_PAGES
    rows = direct.rows(*((int(page) * PAGE, [(int(page) * PAGE, 512)]) for page in pages))
    n_begun = direct.queue.submit(rows)
    assert 0 < n_begun < n
    assert direct.queue.submit(rows[n_begun:]) <= n - n_begun
    direct.queue.close()
    direct.queue = new_aio_queue()
    assert direct.results(rows) == dict.fromkeys(range(1, n + 1), 512)


def test_submit_of_nothing_takes_nothing(case: Case) -> None:
    assert case.queue.submit(case.rows()) == 0


# --- wait


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_wait_with_nothing_under_way_ends_at_its_deadline(case: Case, timeout_s: float) -> None:
    begin = time.monotonic()
    assert ended(case.queue, 1, timeout_s) == {}
    assert timeout_s <= time.monotonic() - begin < timeout_s + 2


def test_wait_for_more_than_come_gives_what_came(case: Case) -> None:
    case.queue.submit(case.page_rows(np.arange(3)))
    assert ended(case.queue, 5, 0.5) == dict.fromkeys((1, 2, 3), PAGE)


def test_wait_for_one_returns_before_those_that_are_slow(tmp_path: Path) -> None:
    gate = threading.Event()

    def perform(read: Any) -> int:
        return 1 if int(read["token"]) > 1 else int(gate.wait(DEADLINE_S))

    queue = ThreadQueue("buffered", perform, 2)
    rows = np.zeros(3, READ)
    rows["token"] = 1, 2, 3
    queue.submit(rows)
    assert ended(queue, 2, DEADLINE_S) == {2: 1, 3: 1}
    assert ended(queue, 1, 0.05) == {}
    gate.set()
    assert ended(queue, 1, DEADLINE_S) == {1: 1}
    queue.close()


def test_reads_are_submitted_while_another_thread_waits(case: Case) -> None:
    got: dict[int, int] = {}

    def collect() -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(got) < N_PAGES and time.monotonic() < deadline:
            got.update(ended(case.queue, 1, 0.5))

    thread = threading.Thread(target=collect)
    thread.start()
    for page in range(N_PAGES):
        rows = case.page_rows(np.array([page]), first_token=page + 1)
        while not case.queue.submit(rows):
            time.sleep(0.001)
    thread.join(DEADLINE_S + 5)
    assert got == dict.fromkeys(range(1, N_PAGES + 1), PAGE)
    assert np.array_equal(case.memory, case.content)


class Interrupted(KeyboardInterrupt):
    """As Ctrl-C comes, and to be told from it."""


def test_wait_that_a_signal_interrupts_keeps_what_has_come_for_the_next(case: Case) -> None:
    def on_alarm(_number: int, _frame: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        for _ in range(3):
            assert case.queue.submit(case.page_rows(np.arange(4))) == 4
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                case.queue.wait(5, DEADLINE_S)
            assert ended(case.queue, 4, DEADLINE_S) == dict.fromkeys((1, 2, 3, 4), PAGE)
            assert ended(case.queue, 1, 0) == {}
    finally:
        signal.signal(signal.SIGALRM, before)


# --- close


def test_close_waits_for_what_is_under_way(case: Case) -> None:
    """Afterwards the memory is the caller's alone: it is filled already, and stays as it is put then."""
    case.queue.submit(case.page_rows(np.arange(DEPTH)))
    case.queue.close()
    seen = case.memory.copy()
    case.memory[:] = 1
    time.sleep(0.05)
    assert (case.memory == 1).all()
    if case.queue.name != "direct":  # what has not begun yet, the kernel may cancel
        assert np.array_equal(seen[: DEPTH * PAGE], case.content[: DEPTH * PAGE])


def test_close_waits_for_a_slow_thread() -> None:
    ended = threading.Event()

    def perform(read: Any) -> int:
        time.sleep(0.2)
        ended.set()
        return 0

    queue = ThreadQueue("buffered", perform, 1)
    queue.submit(np.ones(1, READ))
    queue.close()
    assert ended.is_set()


def test_close_may_be_called_twice_and_leaves_no_thread(nothing_left: None, tmp_path: Path) -> None:
    for name in ("direct", "buffered", "map"):
        case = Case(name, tmp_path / name)
        case.queue.close()
        case.queue.close()
        os.close(case.fd)


def test_queues_come_and_go_without_using_up_the_kernels() -> None:
    """All queues of a machine together may hold fs.aio-max-nr reads, 65536 as a rule."""
    depth = int(Path("/proc/sys/fs/aio-max-nr").read_text()) // 16
    for _ in range(20):
        new_aio_queue(depth).close()


# --- where there is none


def test_unknown_machine_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_queue.platform, "machine", lambda: "riscv64")
    with pytest.raises(DirectRefused, match=r"riscv64.*io='buffered'"):
        AioQueue(4)


def test_kernel_that_has_no_queue_left_is_refused_with_the_remedy() -> None:
    with pytest.raises(DirectRefused, match=r"fs.aio-max-nr.*io='buffered'"):
        AioQueue(int(Path("/proc/sys/fs/aio-max-nr").read_text()) + 1)
