"""What a session takes: nothing of the store, nothing that it does not give back, and nothing from anybody else."""

import ctypes
import fcntl
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from dense_reference import DenseIds
from processes import Host, ServerProcess, until
from served_shards import ServedShards

from sparseflow.cli.status import page
from sparseflow.client.attachment import Attachment
from sparseflow.client.weight_client import WeightClient
from sparseflow.protocol.measured_recall import MeasuredRecall
from sparseflow.protocol.session_counters import COUNTERS_NBYTES

PROMPT = [5, 6, 7, 8]
N_TOKENS = 20
READ_ONLY = ("arena", "dense", "predictors", "files")

OPEN_AND_CLOSE = """
import gc
import torch
from sparseflow import SparseOPTForCausalLM
from telling import generate, given, hear, open_model, tell

gc.freeze()  # so that only what follows is gone through
tell("imported")
for _ in range(given["n_times"]):
    hear()
    model = open_model()
    ids = generate(model, given["prompt"], given["n_tokens"])
    tell(ids)
    hear()
    model.close()
    tell("closed")
    hear()
    del model
    gc.collect()
    tell("deleted")
hear()
"""


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    return ServedShards(tmp_path / "store")


@pytest.fixture
def server(host: Host, shards: ServedShards) -> ServerProcess:
    """A small arena of self-describing bundles."""
    return host.serve(shards.folder, cpu_cache_ratio=shards.ratio(80), max_sessions=3)


@pytest.mark.parametrize("ratio", [0.2, 1.0], ids=["arena", "whole model"])
def test_model_is_given_back_whole_and_can_be_opened_again(
    host: Host, demo_store: Path, dense_ids: DenseIds, ratio: float
) -> None:
    server = host.serve(demo_store, cpu_cache_ratio=ratio)
    client = host.client(OPEN_AND_CLOSE, name="s", prompt=PROMPT, n_tokens=N_TOKENS, n_times=2)
    assert client.hear() == "imported"
    before = client.count()
    for _ in range(2):
        client.say()
        assert client.hear() == dense_ids(PROMPT, N_TOKENS)
        assert_nothing_of(demo_store, client.pid)
        assert server.session(client.pid) is not None
        client.say()
        assert client.hear() == "closed"
        assert server.status()["sessions"] == []
        client.say()
        assert client.hear() == "deleted"
        assert client.count() == before
    assert before["shared maps"] == 0
    client.say()
    client.finish()


def assert_nothing_of(store: Path, pid: int) -> None:
    """A process has no file of the store open, and maps none."""
    opened = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    mapped = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    assert any("memfd:sparseflow" in line for line in mapped.splitlines())
    assert str(store) not in mapped
    assert [path for path in opened if path.startswith(str(store))] == []


def test_close_leaves_no_descriptor_even_if_the_model_is_kept(host: Host, shards: ServedShards) -> None:
    host.serve(shards.folder, cpu_cache_ratio=shards.ratio(80), max_sessions=3)
    before = os.listdir("/proc/self/fd")
    client = WeightClient("s")
    with client.fetch(2, np.arange(5, dtype=np.uint32)) as fetch:
        fetch.wait(30)
    client.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_thirty_sessions_leave_nothing_behind(host: Host, family_store: Callable[[str], Path]) -> None:
    """In neither process; the first ones load what stays loaded."""
    server = host.serve(family_store("base"), cpu_cache_ratio=0.3)
    client = host.client(OPEN_AND_CLOSE, name="s", prompt=PROMPT, n_tokens=3, n_times=33)
    assert client.hear() == "imported"
    counts = []
    for n in range(1, 34):
        for _step in ("generated", "closed", "deleted"):
            client.say()
            client.hear()
        until(lambda: server.status()["sessions"] == [])
        if n % 10 == 3:
            counts.append((client.count(), server.settled_count(), n_maps(client.pid), n_maps(server.pid)))
    for ours, theirs, _, _ in counts[1:]:
        for count, first in ((ours, counts[0][0]), (theirs, counts[0][1])):
            assert all(count[name] <= first[name] + 2 for name in first)  # one that only now goes away may be counted
    for place in (2, 3):  # the allocator maps and unmaps a few as it likes
        assert counts[-1][place] <= counts[0][place] + 8
    client.say()
    client.finish()


def n_maps(pid: int) -> int:
    return len(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines())


# --- threads


IDS = np.arange(5, dtype=np.uint32)


def test_threads_of_a_process_may_hint_at_the_same_time(server: ServerProcess) -> None:
    with WeightClient("s") as client:
        in_threads(4, lambda: [client.hint(1, IDS) for _ in range(2000)])


def test_threads_of_a_process_may_fetch_at_the_same_time_from_a_whole_model(host: Host, shards: ServedShards) -> None:
    """Its server has ended: each fetch from the first layer looks for the next one."""
    server = host.serve(shards.folder)
    with WeightClient("s") as client:
        in_threads(4, lambda: [client.fetch(0, IDS).release() for _ in range(2000)])
        server.kill()
        in_threads(4, lambda: [client.fetch(0, IDS).release() for _ in range(2000)])


def in_threads(n: int, work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(n) as pool:
        for worker in [pool.submit(work) for _ in range(n)]:
            worker.result(60)


def test_threads_that_end_leave_nothing_open(server: ServerProcess) -> None:
    with WeightClient("s") as client:

        def work() -> None:
            with client.fetch(2, IDS) as fetch:
                fetch.wait(30)

        n_fds = []
        for n in range(12):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(60)
            if n in (1, 11):
                n_fds.append((len(os.listdir("/proc/self/fd")), server.settled_count()["fds"]))
        assert all(last <= second + 2 for second, last in zip(*n_fds, strict=True))


def test_any_number_of_threads_one_after_the_other_uses_one_session(server: ServerProcess) -> None:
    """More than may have a line at the same time."""
    with WeightClient("s") as client:

        def work() -> None:
            with client.fetch(2, IDS) as fetch:
                fetch.wait(30)

        for _ in range(80):
            in_threads(1, work)
        assert len(server.status()["sessions"]) == 1


# --- memory


@pytest.fixture
def attachment(server: ServerProcess) -> Iterator[Attachment]:
    """A session whose descriptors are still open."""
    attachment = Attachment("s", "", {}, 10)
    assert set(READ_ONLY) < set(attachment.descriptors)
    yield attachment
    attachment.close()


def regions_for_reading(attachment: Attachment) -> list[str]:
    return [name for name in attachment.descriptors if name != "counters"]


def test_nobody_can_resize_memory_of_the_server(attachment: Attachment) -> None:
    for name, fd in attachment.descriptors.items():
        for nbytes in (0, 1, attachment.regions[name]["nbytes"] + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, nbytes)
        with pytest.raises(PermissionError):
            os.posix_fallocate(fd, 0, attachment.regions[name]["nbytes"] + (1 << 20))
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_nobody_can_write_to_memory_of_the_server(attachment: Attachment) -> None:
    for name in regions_for_reading(attachment):
        fd, nbytes = attachment.descriptors[name], attachment.regions[name]["nbytes"]
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            for each in (fd, again):
                with pytest.raises(PermissionError):
                    mmap.mmap(each, nbytes)
                with pytest.raises(PermissionError):
                    os.pwrite(each, b"x", 0)
                assert punch_hole(each, nbytes) < 0
        finally:
            os.close(again)


def test_a_map_for_reading_cannot_be_made_one_for_writing(attachment: Attachment) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for name in regions_for_reading(attachment):
        readable = mmap.mmap(attachment.descriptors[name], attachment.regions[name]["nbytes"], prot=mmap.PROT_READ)
        address = np.frombuffer(readable, np.uint8).ctypes.data
        assert libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) < 0


def punch_hole(fd: int, nbytes: int) -> int:
    """fallocate(2), which would make the memory zeros."""
    keep_size, punch = 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    return int(libc.fallocate(fd, punch | keep_size, 0, max(nbytes, mmap.PAGESIZE)))


def test_what_a_client_writes_into_its_map_of_dense_weights_nobody_else_sees(server: ServerProcess) -> None:
    with WeightClient("s") as one, WeightClient("s") as other:
        for region in ("dense", "predictors"):
            own, others = (np.frombuffer(client._maps[region].content, np.uint8) for client in (one, other))
            before = others.copy()
            own[:] = 0xFF
            assert np.array_equal(others, before)
            del own, others


MEASURE_RECALL = """
from sparseflow.orchestration.density import FixedCrossover
from telling import generate, given, hear, open_model, tell

model = open_model(activation_threshold=0.0)
model.coordinator.crossover = FixedCrossover(1.0)
model.coordinator.live_recall.every_step = True
generate(model, given["prompt"], given["n_tokens"])
stats, source = model.stats, model.source
tell([stats.recall, stats.recall_error, stats.recall_samples, stats.decode.fetches and stats.decode.fetches.hit_rate])
hear()
model.close()
"""


@pytest.mark.parametrize("ratio", [0.2, 1.0], ids=["arena", "whole model"])
def test_recall_that_a_session_measures_is_in_the_servers_status(host: Host, demo_store: Path, ratio: float) -> None:
    server = host.serve(demo_store, cpu_cache_ratio=ratio)
    client = host.client(MEASURE_RECALL, name="s", prompt=PROMPT, n_tokens=40)
    recall, error, n_samples, hit_rate = client.hear()
    assert 0.9 < recall < 1
    assert 0 < error < 0.05
    session = server.session(client.pid)
    assert session is not None
    assert [session[name] for name in ("recall", "recall_error", "recall_samples")] == [recall, error, n_samples]
    if ratio < 1:  # what was looked at counts neither here nor there, but in prompts
        assert session["hit_rate"] == pytest.approx(hit_rate, abs=0.1)
    assert f"{recall:.2%} ±{100 * error:.2f}" in page(server.status())
    client.say()
    client.finish()


def test_session_that_has_measured_nothing_has_no_recall(server: ServerProcess, attachment: Attachment) -> None:
    (session,) = server.status()["sessions"]
    assert [session[name] for name in ("recall", "recall_error", "recall_samples")] == [None, None, None]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e308, 5e-324])
def test_nonsense_on_its_page_harms_neither_status_nor_server(
    server: ServerProcess, attachment: Attachment, value: float
) -> None:
    for measured in (MeasuredRecall(*[value] * 4), MeasuredRecall(9.0, 1.0, value, value), MeasuredRecall(value)):
        attachment.counters.set_recall(measured)
        status = server.status()
        json.dumps(status, allow_nan=False)
        page(status)
        recall = status["sessions"][0]["recall"]
        assert recall is None or 0 <= recall <= 1


def test_counters_are_the_sessions_own(server: ServerProcess, attachment: Attachment) -> None:
    other = Attachment("s", "", {}, 10)
    try:
        assert attachment.regions["counters"]["nbytes"] == COUNTERS_NBYTES
        attachment.counters.add_tokens(7)
        assert other.counters.tokens == 0
        assert sorted(session["tokens"] for session in server.status()["sessions"]) == [0, 7]
    finally:
        other.close()
