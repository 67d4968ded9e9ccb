"""Everything at once, served: processes of several threads in an arena far too small, and some of them are killed.

Every bundle says which it is, so that a byte of another bundle, or of a read that has not ended, is seen. Each is
compared when it comes and again before it is released.
"""

import random
import secrets
import time
from pathlib import Path

import pytest
from processes import DEADLINE_S, ClientProcess, Host
from served_shards import ServedShards

N_THREADS = 2
SOAK = (Path(__file__).parents[1] / "integration" / "fetching_client.py").read_text(encoding="utf-8")


def soak(host: Host, folder: Path, seconds: float, *, n_clients: int, kill_every_s: float, bundle_nbytes: int) -> None:
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    shards = ServedShards(folder / "store", n_layers=5, ffn_dim=150, bundle_nbytes=bundle_nbytes)
    n_slots = rng.randint(8, 24) * (n_clients + 1)
    eviction = rng.choice(["lfu", "lru", "fifo"])
    print(f"seed {seed}, {n_slots} of {shards.n_bundles} slots, {eviction}")
    server = host.serve(shards.folder, cpu_cache_ratio=shards.ratio(n_slots), max_sessions=n_clients, eviction=eviction)
    assert server.status()["models"][0]["n_slots"] == n_slots

    def start(left_s: float) -> ClientProcess:
        values = {"n_threads": N_THREADS, "seconds": left_s, "seed": rng.randrange(1 << 32), "most": 24}
        return host.client(SOAK, name="s", **values)

    running = [start(seconds) for _ in range(n_clients)]
    for client in running:
        assert client.hear() == "attached"
    end = time.monotonic() + seconds  # however long they took to begin
    n_killed = 0
    while (left_s := end - time.monotonic()) > kill_every_s:
        time.sleep(min(left_s, rng.uniform(0.5, 1.5) * kill_every_s))
        for client in running:
            assert client.exit_code in (None, 0), client.log()
        victim = running.pop(rng.randrange(n_clients))
        victim.kill()
        n_killed += 1
        running.append(start(max(1.0, end - time.monotonic())))
        assert running[-1].hear() == "attached"
    for client in running:
        told = client.hear(max(0.0, end - time.monotonic()) + DEADLINE_S)
        print(told)
        assert told["fetches"] > 0
        assert told["early"] > 0
        assert told["late"] > 0
        client.finish()
    status = server.status()
    assert n_killed > 0
    assert status["evictions"] > 0
    assert status["prefetch"]["hinted"] > 0


@pytest.mark.parametrize("bundle_nbytes", [512, 96], ids=["aligned", "misaligned"])
def test_29_every_byte_is_right_while_clients_are_killed(host: Host, tmp_path: Path, bundle_nbytes: int) -> None:
    soak(host, tmp_path, 2.5, n_clients=3, kill_every_s=1, bundle_nbytes=bundle_nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("bundle_nbytes", [4096, 512, 96])
def test_29_every_byte_is_right_for_minutes(host: Host, tmp_path: Path, bundle_nbytes: int) -> None:
    soak(host, tmp_path, 60, n_clients=6, kill_every_s=3, bundle_nbytes=bundle_nbytes)
