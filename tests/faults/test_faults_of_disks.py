"""Files that are damaged, cut, replaced, or do not fit: no wrong byte is delivered, and the error says what and why."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from processes import DEADLINE_S, Host, ServerProcess, until
from served_shards import ServedShards
from still_serving import assert_degraded

from sparseflow.cli.status import page
from sparseflow.client.weight_client import WeightClient
from sparseflow.engine.faulty_reads import VARIABLE
from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.manifest import MANIFEST_NAME

IDS = np.arange(5, dtype=np.uint32)
EXIT_OK, EXIT_FAILED = 0, 1


@pytest.fixture
def serve(host: Host, shards: ServedShards) -> Callable[..., ServerProcess]:
    """Start a server of a small arena of those bundles; it is ready."""
    return lambda **options: host.serve(shards.folder, cpu_cache_ratio=shards.ratio(60), max_sessions=3, **options)


def fetched(client: WeightClient, layer: int, ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """(n, bundle_nbytes) uint8: a copy of what a fetch gives."""
    with client.fetch(layer, ids, keep=False) as fetch:
        bundles = fetch.wait(20)
        raw = bundles.base.view(len(bundles.base), -1).numpy().view(np.uint8)
        return raw[bundles.slots].copy()


# --- damaged


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("region", ["header", "checksums"])
def test_08_damaged_shard_is_not_served_and_another_model_is(
    host: Host, shards: ServedShards, family_store: Callable[[str], Path], region: str
) -> None:
    path = shards.path(1)
    flip(path, 12 if region == "header" else path.stat().st_size - 3)
    server = host.begin(shards.folder, family_store("base"), cpu_cache_ratio=0.3)
    status = server.wait_for("degraded")
    assert [model["state"] for model in status["models"]] == ["failed", "ready"]
    with WeightClient("s", "base") as client, client.fetch(0, IDS) as fetch:
        fetch.wait(10)
    assert_degraded(server, "layer-001", "remove the store and convert the model again")


def test_08_damaged_bundle_is_refused_and_others_are_served(
    serve: Callable[..., ServerProcess], shards: ServedShards
) -> None:
    shards.flip(1, 7)
    server = serve()
    with WeightClient("s") as client:
        with pytest.raises(ShardCorrupt, match=r"layer-001.*neuron 7 differs from its checksum"):
            fetched(client, 1, IDS + 4)
        assert np.array_equal(fetched(client, 1, IDS), shards.content(1, IDS))
        status = server.status()
        assert status["state"] == "degraded"
        assert "1 requests failed at the disk" in status["reasons"][0]
        assert "layer-001" in status["sessions"][0]["last_error"]
        shards.flip(1, 7)
        assert np.array_equal(fetched(client, 1, IDS + 4), shards.content(1, IDS + 4))
    assert server.end() == EXIT_OK


def test_08_damaged_bundle_of_a_whole_model_is_found_before_it_is_served(host: Host, shards: ServedShards) -> None:
    shards.flip(1, 7)
    assert_degraded(host.begin(shards.folder), "layer-001", "neuron 7")


# --- cut, replaced


def test_09_cut_shard_is_refused_at_the_start_with_both_sizes(host: Host, shards: ServedShards) -> None:
    path = shards.path(1)
    nbytes = path.stat().st_size
    os.truncate(path, nbytes - 100)
    assert_degraded(host.begin(shards.folder), f"{path}: {nbytes - 100} bytes, the manifest says {nbytes}")


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_09_shard_that_is_cut_while_it_is_read_is_an_error_and_the_server_lives(
    serve: Callable[..., ServerProcess], shards: ServedShards, io: str
) -> None:
    server = serve(io=io)
    early, late = IDS, IDS + 40
    with WeightClient("s") as client:
        with shards.cut(1, 20):
            for _ in range(5):
                assert np.array_equal(fetched(client, 1, early), shards.content(1, early))
                with pytest.raises(ShardCorrupt, match=r"neuron \d+ is missing, the file ends early"):
                    fetched(client, 1, late)
                assert np.array_equal(fetched(client, 2, late), shards.content(2, late))
        assert np.array_equal(fetched(client, 1, late), shards.content(1, late))
    assert server.status()["state"] == "degraded"
    assert server.end() == EXIT_OK


def test_10_shard_that_is_replaced_while_it_is_read_mixes_nothing(
    host: Host, serve: Callable[..., ServerProcess], shards: ServedShards, tmp_path: Path
) -> None:
    """The server reads on from the file that it opened; the next one refuses the other."""
    server = serve()
    other = tmp_path / "other"
    shutil.copy(shards.path(0), other)  # layer 0 in the place of layer 1
    with WeightClient("s") as client:
        fetched(client, 1, IDS)
        os.replace(other, shards.path(1))
        for first in range(0, 55, 5):
            ids = IDS + np.uint32(first)
            assert np.array_equal(fetched(client, 1, ids), shards.content(1, ids))
    assert server.end() == EXIT_OK
    assert_degraded(host.begin(shards.folder), "layer-001", "convert the model again")


# --- full

CONVERT = """
import resource, sys
from sparseflow.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(["convert", *sys.argv[2:], "--quiet"]))
"""


def convert(nbytes: int, *words: object) -> "subprocess.CompletedProcess[str]":
    """As the command does, where no file can be larger than that."""
    command = [sys.executable, "-c", CONVERT, str(nbytes), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_11_disk_that_takes_no_more_leaves_no_store_and_a_rerun_makes_it(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    result = convert(100_000, family_checkpoint("base"), store)
    assert result.returncode == EXIT_FAILED
    (line,) = result.stderr.splitlines()
    assert "File too large" in line
    assert "Traceback" not in line
    assert not store.exists()
    assert [path for path in tmp_path.rglob("*") if path.name == MANIFEST_NAME or path.suffix == ".tmp"] == []
    assert convert(1 << 30, family_checkpoint("base"), store).returncode == EXIT_OK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


# --- little memory


def test_12_memory_that_does_not_hold_a_model_is_refused_with_both_sizes(host: Host, shards: ServedShards) -> None:
    server = host.begin(shards.folder, memory="1KiB")
    assert server.wait() == EXIT_FAILED
    (line,) = server.log().splitlines()
    for part in ("must be resident", "allowed are", "allow more"):
        assert part in line


SMALL_MACHINE = """
import os, sys
from sparseflow_daemon import served_model
from sparseflow_daemon.__main__ import main
served_model.free_memory = lambda: 50_000
served_model.total_memory = lambda: int(os.environ["TOTAL"])
sys.exit(main())
"""


def test_12_more_memory_than_the_machine_has_is_refused_before_any_is_taken(host: Host, shards: ServedShards) -> None:
    server = host.begin(shards.folder, program=["-c", SMALL_MACHINE], memory="1GiB", variables={"TOTAL": "60000"})
    assert server.wait() == EXIT_FAILED
    (line,) = server.log().splitlines()
    assert "of shared memory are asked for, there are 58.59KiB here; give less (--memory)" in line


def test_12_more_memory_than_is_free_now_is_warned_of(host: Host, shards: ServedShards) -> None:
    """What a dead server's clients hold gets free when they come over."""
    server = host.begin(shards.folder, program=["-c", SMALL_MACHINE], memory="1GiB", variables={"TOTAL": "600000"})
    server.wait_for("ready")
    assert "of shared memory are asked for, 48.83KiB are free now" in server.log()


MEMORY_IS_REFUSED = """
import resource, sys
from sparseflow_daemon.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # of shared memory too
sys.exit(main())
"""


def test_12_shared_memory_that_the_system_refuses_is_named_and_the_server_lives(
    host: Host, shards: ServedShards
) -> None:
    server = host.begin(shards.folder, program=["-c", MEMORY_IS_REFUSED])
    status = server.wait_for("degraded")
    assert "bytes of shared memory: File too large; give less memory, or raise the limits" in status["reasons"][0]
    assert server.end() == EXIT_OK


# --- hints that come to nothing


@pytest.mark.parametrize("point", ["read-error", "read-short", "read-corrupt"])
def test_25_hint_that_fails_is_read_again_by_whoever_asks_and_gives_right_bytes_or_an_error(
    host: Host, shards: ServedShards, point: str
) -> None:
    server = host.serve(
        shards.folder, cpu_cache_ratio=shards.ratio(60), max_sessions=3, variables={VARIABLE: f"{point}:0.2:5"}
    )
    seen = {"right": 0, "refused": 0}
    with WeightClient("s") as client:
        for n in range(300):
            layer, ids = n % 3, IDS + np.uint32(7 * n % 56)
            client.hint(layer, ids)
            if n % 2:
                time.sleep(0.001)  # it has come, or failed, by then
            try:
                assert np.array_equal(fetched(client, layer, ids), shards.content(layer, ids))
                seen["right"] += 1
            except DiskError:
                seen["refused"] += 1
        until(lambda: server.status()["arena"]["leased"] == 0)
    status = server.status()
    assert status["disk"]["faults"][point] > 10
    assert status["prefetch"]["hinted"] > 100
    assert min(seen.values()) > 5, seen
    assert server.end() == EXIT_OK


def test_25_server_whose_reads_fail_on_purpose_says_so(host: Host, shards: ServedShards) -> None:
    server = host.serve(shards.folder, cpu_cache_ratio=shards.ratio(60), variables={VARIABLE: "read-error:0:1"})
    text = f"reads go wrong on purpose: {VARIABLE}=read-error:0:1"
    status = server.status()
    assert status["disk"]["reasons"][-1] == text
    assert f"    {text}\n" in page(status)
