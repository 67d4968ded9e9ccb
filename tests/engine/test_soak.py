"""Everything at once: threads that fetch, hint and give up, an arena far too small, and a disk that lies.

A round begins with nothing under way and a choice of bundles that may go bad. Some of those are bad from its beginning
to its end and not in the arena: who asks for one must be refused. Some are flipped to and fro, or cut off, while reads
go on: who asks for one may get it, intact, or a refusal. Everybody else must get their bundles. Every byte that is
handed out is compared when it comes and again before it is released.
"""

import secrets
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from shards import Shards, some_ids

from sparseflow.engine.engine import Engine
from sparseflow.errors import DiskError, ShardCorrupt

N_LAYERS, FFN_DIM = 4, 150
N_THREADS = 4
ROUND_S = 0.3
DEADLINE_S = 30.0

Bundle = tuple[int, int]  # layer, neuron


@dataclass
class Faults:
    """What may be bad in one round."""

    lasting: set[Bundle] = field(default_factory=set)
    """Flipped all the time."""
    fleeting: set[Bundle] = field(default_factory=set)
    """Flipped, or cut off with the end of their file, now and then. Or lasting, but in the arena already."""
    cut: Bundle | None = None
    """From where on a file is cut, now and then."""

    def is_concerned(self, layer: int, ids: NDArray[np.uint32]) -> bool:
        return any((layer, id_) in self.lasting or (layer, id_) in self.fleeting for id_ in ids.tolist())

    def must_refuse(self, layer: int, ids: NDArray[np.uint32]) -> bool:
        return any((layer, id_) in self.lasting for id_ in ids.tolist())


class Soak:
    def __init__(self, shards: Shards, io: str, seed: int) -> None:
        self.shards = shards
        self.rng = np.random.default_rng(seed)
        self.n_slots = int(shards.n_bundles * self.rng.uniform(0.05, 0.5))
        eviction = str(self.rng.choice(["lfu", "lru", "fifo"]))
        self.what = f"seed {seed}, io {io}, {self.n_slots} of {shards.n_bundles} slots, {eviction}"
        self.engine = Engine(shards.folder, shards.manifest, self.n_slots, io=io, eviction=eviction)
        self.may_cut = io != "map"  # a map that ends early is a signal, not an error
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(N_THREADS + 1) as pool:
            while (now := time.monotonic()) < end or (self.seen["delivered"] <= 20 and now < end + DEADLINE_S):
                faults = self._choose_faults()
                with ExitStack() as flipped:
                    for layer, neuron in faults.lasting:
                        flipped.enter_context(self.shards.flipped(layer, neuron, byte=int(self.rng.integers(96))))
                    self._keep_only_absent(faults)
                    self._round(pool, faults)
                self.engine.settle(DEADLINE_S)
                self.seen["rounds"] += 1

    def _choose_faults(self) -> Faults:
        faults = Faults()
        for _ in range(int(self.rng.integers(0, 6))):
            faults.lasting.add((int(self.rng.integers(N_LAYERS)), int(self.rng.integers(FFN_DIM))))
        for _ in range(int(self.rng.integers(0, 6))):
            faults.fleeting.add((int(self.rng.integers(N_LAYERS)), int(self.rng.integers(FFN_DIM))))
        if self.may_cut and self.rng.random() < 0.4:
            layer, first = int(self.rng.integers(N_LAYERS)), int(self.rng.integers(FFN_DIM // 2, FFN_DIM))
            faults.cut = (layer, first)
            gone = {(layer, id_) for id_ in range(first, FFN_DIM)}
            faults.fleeting |= gone - faults.lasting
        faults.fleeting -= faults.lasting
        return faults

    def _keep_only_absent(self, faults: Faults) -> None:
        """A bundle in the arena is what it was when it was read."""
        for layer, neuron in sorted(faults.lasting):
            try:
                self._fetch(
                    np.random.default_rng(0), layer, np.array([neuron], np.uint32), Faults(fleeting={(layer, neuron)})
                )
            except DiskError:
                continue
            faults.lasting.remove((layer, neuron))
            faults.fleeting.add((layer, neuron))

    def _round(self, pool: ThreadPoolExecutor, faults: Faults) -> None:
        end = time.monotonic() + ROUND_S
        workers = [pool.submit(self._work, own, faults, end) for own in self.rng.spawn(N_THREADS)]
        disk = pool.submit(self._go_bad, self.rng.spawn(1)[0], faults, end)
        try:
            for each in (*workers, disk):
                each.result(ROUND_S + 2 * DEADLINE_S)
        except BaseException:
            self.engine.close()  # so that the others end, too
            raise

    def _go_bad(self, rng: np.random.Generator, faults: Faults, end: float) -> None:
        """Flip and restore, cut and restore, and leave the files whole."""
        flippable = sorted(faults.fleeting)
        while flippable and time.monotonic() < end:
            with ExitStack() as bad:
                if faults.cut and rng.random() < 0.5:
                    bad.enter_context(self.shards.cut(*faults.cut, int(rng.integers(0, 96))))
                else:
                    layer, neuron = flippable[rng.integers(len(flippable))]
                    bad.enter_context(self.shards.flipped(layer, neuron, byte=int(rng.integers(96))))
                time.sleep(float(rng.uniform(0, 0.01)))
            self.seen["faults"] += 1

    def _work(self, rng: np.random.Generator, faults: Faults, end: float) -> None:
        while time.monotonic() < end:
            if rng.random() < 0.4:
                self.engine.hint(int(rng.integers(N_LAYERS)), self._ids(rng))
            layer, ids = int(rng.integers(N_LAYERS)), self._ids(rng)
            if faults.lasting and rng.random() < 0.1:
                layer, neuron = sorted(faults.lasting)[rng.integers(len(faults.lasting))]
                ids = np.union1d(ids[1:], np.array([neuron], np.uint32))
            if rng.random() < 0.05:  # asks, and thinks better of it
                self.engine.release(self.engine.fetch(layer, ids))
                continue
            with suppress(DiskError):
                self._fetch(rng, layer, ids, faults)

    def _ids(self, rng: np.random.Generator) -> NDArray[np.uint32]:
        most = min(self.n_slots, FFN_DIM)
        n = int(rng.integers(1, most + 1)) if rng.random() < 0.2 else int(rng.integers(1, max(2, most // 4)))
        return some_ids(rng, FFN_DIM, n)

    def _fetch(self, rng: np.random.Generator, layer: int, ids: NDArray[np.uint32], faults: Faults) -> None:
        expected = self.shards.content(layer, ids)
        fetch = self.engine.fetch(layer, ids)
        try:
            try:
                slots = self.engine.wait(fetch, DEADLINE_S)
            except ShardCorrupt as error:
                if not faults.is_concerned(layer, ids) or str(self.shards.path(layer)) not in str(error):
                    pytest.fail(f"layer {layer}, {ids.tolist()} are intact: {error}")
                self._count(refused=1)
                raise
            assert not faults.must_refuse(layer, ids), f"layer {layer}, {ids.tolist()}: one differs on disk"
            assert len(slots) == len(ids)
            self._compare(slots, expected, layer, ids, "when they came")
            if rng.random() < 0.3:
                time.sleep(float(rng.uniform(0, 0.005)))
            self._compare(slots, expected, layer, ids, "before they were released")
            self._count(delivered=1, bundles=len(ids))
        finally:
            self.engine.release(fetch)

    def _compare(
        self, slots: NDArray[np.int64], expected: NDArray[np.uint8], layer: int, ids: NDArray[np.uint32], when: str
    ) -> None:
        wrong = (self.engine.slots[slots] != expected).any(axis=1)
        assert not wrong.any(), f"layer {layer}, neurons {ids[wrong].tolist()} are not theirs {when}"

    def _count(self, **events: int) -> None:
        with self._lock:
            self.seen.update(events)


def soak(folder: Path, io: str, bundle_nbytes: int, seconds: float) -> None:
    seed = secrets.randbits(32)
    shards = Shards(folder / "store", n_layers=N_LAYERS, ffn_dim=FFN_DIM, bundle_nbytes=bundle_nbytes)
    threads, n_fds = set(threading.enumerate()), psutil.Process().num_fds()
    run = Soak(shards, io, seed)
    print(run.what)
    assert run.engine.io == io
    try:
        run.run(seconds)
        counts = run.engine.counts()
    finally:
        run.engine.close()
        print(dict(run.seen))
    assert run.seen["delivered"] > 20
    assert counts.evictions > 0
    assert counts.hinted > 0
    assert set(threading.enumerate()) <= threads
    assert psutil.Process().num_fds() <= n_fds


@pytest.fixture(params=["direct", "buffered", "map"])
def io(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "direct":
        shards = Shards(tmp_path / "probe")
        try:
            Engine(shards.folder, shards.manifest, 4, io="direct").close()
        except DiskError as error:
            pytest.skip(str(error))
    return str(request.param)


sizes = pytest.mark.parametrize("bundle_nbytes", [512, 96], ids=["aligned", "misaligned"])


@sizes
def test_every_byte_is_right_and_every_fault_is_told(tmp_path: Path, io: str, bundle_nbytes: int) -> None:
    soak(tmp_path, io, bundle_nbytes, 0.9)


@pytest.mark.slow
@sizes
def test_every_byte_is_right_for_two_minutes(tmp_path: Path, io: str, bundle_nbytes: int) -> None:
    """Over all ways to read together."""
    soak(tmp_path, io, bundle_nbytes, 20)
