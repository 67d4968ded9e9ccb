"""A client that fetches, hints, gives up and releases at random, from several threads, and compares every byte.

python fetching_client.py '{"name": ..., "n_threads": ..., "seconds": ..., "seed": ..., "most": ...}'
"""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from shards import content_of, some_ids
from telling import given, tell

from sparseflow.client.weight_client import WeightClient
from sparseflow.core.weight_source import HostBundles

FETCH_TIMEOUT_S = 60.0


class Soak:
    def __init__(self, client: WeightClient) -> None:
        self.client = client
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def work(self, rng: np.random.Generator, end: float) -> None:
        n_layers, ffn_dim = self.client.profile.num_layers, self.client.profile.ffn_dimension
        most = min(given["most"], self.client.fetch_limit)
        while time.monotonic() < end or self.seen["fetches"] < 50:
            layer = int(rng.integers(n_layers))
            liked = most if rng.random() < 0.5 else ffn_dim  # some bundles are found again
            ids = some_ids(rng, liked, int(rng.integers(1, most + 1)))
            if rng.random() < 0.4:
                self.client.hint(int(rng.integers(n_layers)), some_ids(rng, ffn_dim, int(rng.integers(1, 2 * most))))
            if rng.random() < 0.05:  # asks, and thinks better of it
                self.client.fetch(layer, ids).release()
                continue
            self._fetch(rng, layer, ids)
        # a lease of another than the last layer is given back by the thread's next request
        with self.client.fetch(n_layers - 1, np.zeros(1, np.uint32)) as fetch:
            fetch.wait(FETCH_TIMEOUT_S)

    def _fetch(self, rng: np.random.Generator, layer: int, ids: NDArray[np.uint32]) -> None:
        expected = content_of(layer, ids, self.client.profile.bundle_nbytes)
        with self.client.fetch(layer, ids) as fetch:
            early = fetch.early()
            seen_early = self._read(early.bundles)
            bundles = fetch.wait(FETCH_TIMEOUT_S)
            positions = early.positions
            check(seen_early, expected[positions], layer, ids[positions], "when some were there")
            check(self._read(bundles), expected, layer, ids, "when all were there")
            if rng.random() < 0.3:
                time.sleep(float(rng.uniform(0, 0.01)))
            check(self._read(bundles), expected, layer, ids, "before they were released")
        with self._lock:
            self.seen.update(fetches=1, bundles=len(ids), early=len(positions), late=len(ids) - len(positions))

    def _read(self, bundles: HostBundles) -> NDArray[np.uint8]:
        """(n, bundle_nbytes): as they are now."""
        raw = bundles.base.view(-1).numpy().view(np.uint8).reshape(-1, self.client.profile.bundle_nbytes)
        return raw[bundles.slots]


def check(read: NDArray[np.uint8], expected: NDArray[np.uint8], layer: int, ids: NDArray[np.uint32], when: str) -> None:
    assert len(read) == len(expected)
    wrong = (read != expected).any(axis=1)
    assert not wrong.any(), f"layer {layer}, neurons {ids[wrong].tolist()} are not theirs {when}"


with WeightClient(given["name"]) as client, ThreadPoolExecutor(given["n_threads"]) as pool:
    soak = Soak(client)
    tell("attached")
    end = time.monotonic() + given["seconds"]
    rngs = np.random.default_rng(given["seed"]).spawn(given["n_threads"])
    for worker in [pool.submit(soak.work, rng, end) for rng in rngs]:
        worker.result(given["seconds"] + 2 * FETCH_TIMEOUT_S)
    tell(soak.seen)
