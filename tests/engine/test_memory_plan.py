"""How memory is divided, what limits count, and that an open store keeps to what it was given."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import opt_family
import psutil
import pytest
import torch
from child_process import run_python
from transformers import OPTConfig

from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.engine import memory_plan
from sparseflow.engine.memory_plan import (
    AUTO_SHARE,
    DENSE_PART_NBYTES,
    LEAST_SHARE,
    free_memory,
    least_nbytes,
    plan_memory,
    total_memory,
)
from sparseflow.errors import BadRequest, NotEnoughMemory
from sparseflow.store.manifest import DENSE_NAME, Manifest, predictor_name, shard_name
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import FileEntry

MIB = 1 << 20
STORE = Path("/stores/model")
PROFILE = ModelProfile("model", 2048, 8192, 24, 32, 2048, 50272)  # OPT-1.3B: bundles of 8 KiB, 1.5 GiB of them
N_BUNDLES = 24 * 8192
DENSE_NBYTES, CODES_NBYTES, BUNDLES_NBYTES = 1000 * MIB, 18 * MIB, 65 * MIB  # the last two a layer
FIXED_NBYTES = DENSE_NBYTES + 24 * CODES_NBYTES
WIDENED_NBYTES = 24 * (8192 + 2048) * 8
ALL_NBYTES = FIXED_NBYTES + WIDENED_NBYTES + 24 * BUNDLES_NBYTES


def entry(nbytes: int) -> FileEntry:
    return FileEntry(nbytes, "0" * 16)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Of a model that nobody has to have: a plan is made from sizes."""
    files = {DENSE_NAME: entry(DENSE_NBYTES)}
    for layer in range(PROFILE.num_layers):
        files[shard_name(layer)] = entry(BUNDLES_NBYTES)
        files[predictor_name(layer)] = entry(CODES_NBYTES)
    return Manifest(PROFILE, files, {})


def test_the_least_memory_is_what_a_plan_can_just_be_made_in(manifest: Manifest) -> None:
    least = least_nbytes(manifest)
    assert plan_memory(STORE, manifest, least).n_slots == -(-N_BUNDLES // 100)
    with pytest.raises(NotEnoughMemory):
        plan_memory(STORE, manifest, least - 1)


def n_slots_of(manifest: Manifest, memory: str | int, **strategy: Any) -> int | None:
    return plan_memory(STORE, manifest, memory, **strategy).n_slots


# --- the division


def test_all_bundles_are_mapped_where_all_fit_to_the_byte(manifest: Manifest) -> None:
    assert n_slots_of(manifest, ALL_NBYTES) is None
    assert plan_memory(STORE, manifest, ALL_NBYTES).buffers_nbytes == 0
    assert n_slots_of(manifest, ALL_NBYTES - 1) is not None
    assert n_slots_of(manifest, "64GiB") is None


def test_the_arena_gets_what_is_left_of_the_memory_allowed(manifest: Manifest) -> None:
    n_slots = []
    for memory in (1600 * MIB, 1800 * MIB, 2400 * MIB):
        plan = plan_memory(STORE, manifest, memory)
        assert plan.n_slots is not None
        n_slots.append(plan.n_slots)
        taken = FIXED_NBYTES + WIDENED_NBYTES + plan.buffers_nbytes + plan.n_slots * PROFILE.bundle_nbytes
        assert taken <= memory
        assert taken > memory - 0.01 * memory - plan.n_slots * 64, "memory is left lying about"
    assert n_slots == sorted(n_slots)
    assert (n_slots[1] - n_slots[0]) * PROFILE.bundle_nbytes == pytest.approx(200 * MIB, rel=0.01)


def test_buffers_leave_room_for_what_a_dense_step_copies(manifest: Manifest) -> None:
    assert plan_memory(STORE, manifest, 1800 * MIB).buffers_nbytes > DENSE_PART_NBYTES


def test_cpu_cache_ratio_is_an_upper_limit(manifest: Manifest) -> None:
    assert n_slots_of(manifest, "64GiB", cpu_cache_ratio=0.25) == N_BUNDLES // 4
    assert n_slots_of(manifest, "64GiB", cpu_cache_ratio=0.999999) == N_BUNDLES
    assert n_slots_of(manifest, 1600 * MIB, cpu_cache_ratio=0.5) == n_slots_of(manifest, 1600 * MIB)
    assert n_slots_of(manifest, "64GiB", cpu_cache_ratio=1e-9) == 2, "one is computed while the next is read"


def test_aggressive_offload_keeps_the_slots_of_one_layer(manifest: Manifest) -> None:
    assert n_slots_of(manifest, "64GiB", aggressive_offload=True) == PROFILE.ffn_dimension
    assert n_slots_of(manifest, "64GiB", aggressive_offload=True, cpu_cache_ratio=0.01) == -(-N_BUNDLES // 100)


# --- too little


def sizes_in(text: str) -> list[float]:
    """Bytes of each size that a message names."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    words = text.replace(",", " ").replace(";", " ").split()
    return [float(word[:-3]) * units[word[-3:]] for word in words if word[-3:] in units]


def test_too_little_memory_is_refused_with_the_numbers_and_the_remedy(manifest: Manifest) -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        n_slots_of(manifest, "1GiB")
    text = str(caught.value)
    resident, least, allowed = sizes_in(text)
    assert str(STORE) in text
    assert resident == pytest.approx(FIXED_NBYTES + WIDENED_NBYTES, rel=0.05)
    assert least == pytest.approx(LEAST_SHARE * N_BUNDLES * PROFILE.bundle_nbytes, rel=0.05)
    assert allowed == 2**30
    assert "allow more" in text


def test_what_the_refusal_asks_for_is_enough(manifest: Manifest) -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        n_slots_of(manifest, "1GiB")
    resident, least, _ = sizes_in(str(caught.value))
    enough = int((resident + least) * 1.01)  # they are rounded
    assert n_slots_of(manifest, enough) is not None
    with pytest.raises(NotEnoughMemory):
        n_slots_of(manifest, int((resident + least) * 0.99))


def test_fewer_bundles_wanted_than_the_least_share_are_no_reason_to_refuse(manifest: Manifest) -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        n_slots_of(manifest, "1GiB")
    resident, least, _ = sizes_in(str(caught.value))
    memory = int(resident * 1.005)
    assert memory < resident + least
    assert n_slots_of(manifest, memory, cpu_cache_ratio=1e-9) == 2


@pytest.mark.parametrize("memory", ["lots", "6 gigabytes", "-1GiB", "0MiB", 0, -5, "nanGiB", "infGiB", ""])
def test_what_is_no_size_is_refused(manifest: Manifest, memory: str | int) -> None:
    with pytest.raises(BadRequest, match="6GiB or 6G"):
        n_slots_of(manifest, memory)


# --- what is free


def test_auto_is_nine_tenths_of_what_is_free(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert AUTO_SHARE == 0.9
    monkeypatch.setattr(memory_plan, "free_memory", lambda: int(ALL_NBYTES / 0.9) + 2)
    assert n_slots_of(manifest, "auto") is None
    monkeypatch.setattr(memory_plan, "free_memory", lambda: int(ALL_NBYTES / 0.9) - 2)
    assert n_slots_of(manifest, "auto") is not None
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 2000 * MIB)
    assert n_slots_of(manifest, "auto") == n_slots_of(manifest, 1800 * MIB)


def test_auto_says_that_memory_must_be_freed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 1000 * MIB)
    with pytest.raises(NotEnoughMemory, match="free are 900MiB; free some"):
        n_slots_of(manifest, "auto")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """(file, content) -> writes it into the /proc and /sys that the plan reads instead of the machine's."""
    monkeypatch.setattr(memory_plan, "Path", lambda path: tmp_path / str(path).lstrip("/"))

    def write(file: str, content: str) -> None:
        path = tmp_path / file.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


def write_v2(system: Callable[[str, str], None], group: str, limit: str, current: int, inactive_file: int) -> None:
    folder = f"/sys/fs/cgroup{group}"
    system(f"{folder}/memory.max", limit + "\n")
    system(f"{folder}/memory.current", f"{current}\n")
    system(f"{folder}/memory.stat", f"anon {current // 2}\nfile 12345\ninactive_file {inactive_file}\nactive_file 99\n")


def write_v1(system: Callable[[str, str], None], group: str, limit: int, usage: int, inactive_file: int) -> None:
    folder = f"/sys/fs/cgroup/memory{group}"
    system(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    system(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
    system(f"{folder}/memory.stat", f"cache 1\ninactive_file 77\ntotal_inactive_file {inactive_file}\n")


V1_LINES = "4:memory:{}\n3:cpuset:/\n1:name=systemd:/\n0::/\n"
V1_UNLIMITED = 9223372036854771712


def machine_free() -> Any:
    """What the machine has free moves by some MiB from one look to the next."""
    return pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_without_cgroups_all_that_the_machine_has_available_is_free(system: Callable[[str, str], None]) -> None:
    assert free_memory() == machine_free()
    assert total_memory() == psutil.virtual_memory().total
    system("/proc/self/cgroup", "0::/\n")
    assert free_memory() == machine_free()


def test_limit_of_the_own_group_counts_and_page_cache_is_free(system: Callable[[str, str], None]) -> None:
    system("/proc/self/cgroup", "0::/box\n")
    write_v2(system, "/box", str(300 * MIB), 120 * MIB, 50 * MIB)
    assert free_memory() == (300 - 120 + 50) * MIB
    assert total_memory() == 300 * MIB


def test_limits_of_groups_above_count_too_and_the_tightest_wins(system: Callable[[str, str], None]) -> None:
    system("/proc/self/cgroup", "0::/pod/box/session\n")
    write_v2(system, "/pod/box/session", "max", 10 * MIB, 0)
    write_v2(system, "/pod/box", str(200 * MIB), 20 * MIB, 0)
    write_v2(system, "/pod", str(500 * MIB), 400 * MIB, 30 * MIB)
    assert free_memory() == 130 * MIB


def test_group_without_limit_does_not_count(system: Callable[[str, str], None]) -> None:
    system("/proc/self/cgroup", "0::/box\n")
    write_v2(system, "/box", "max", 120 * MIB, 0)
    assert free_memory() == machine_free()


def test_old_cgroups_count(system: Callable[[str, str], None]) -> None:
    system("/proc/self/cgroup", V1_LINES.format("/docker/abc"))
    write_v1(system, "/docker/abc", 300 * MIB, 100 * MIB, 20 * MIB)
    write_v1(system, "/docker", V1_UNLIMITED, 0, 0)
    write_v1(system, "", V1_UNLIMITED, 0, 0)
    assert free_memory() == 220 * MIB


def test_container_that_sees_only_its_own_part_of_the_tree_finds_its_limit_at_the_root(
    system: Callable[[str, str], None],
) -> None:
    system("/proc/self/cgroup", V1_LINES.format("/docker/abc"))
    write_v1(system, "", 300 * MIB, 100 * MIB, 0)
    assert free_memory() == 200 * MIB


def test_group_that_is_over_its_limit_leaves_nothing(system: Callable[[str, str], None], manifest: Manifest) -> None:
    system("/proc/self/cgroup", "0::/box\n")
    write_v2(system, "/box", str(100 * MIB), 110 * MIB, 0)
    assert free_memory() <= 0
    with pytest.raises(NotEnoughMemory, match="free some"):
        n_slots_of(manifest, "auto")


def test_files_that_hold_no_numbers_are_no_limit(system: Callable[[str, str], None]) -> None:
    system("/proc/self/cgroup", "0::/box\n")
    write_v2(system, "/box", "", 0, 0)
    assert free_memory() == machine_free()
    write_v2(system, "/box", str(MIB), 0, 0)
    system("/sys/fs/cgroup/box/memory.stat", "what is this\n")
    assert free_memory() == machine_free()


def test_name_of_a_group_may_be_any(system: Callable[[str, str], None]) -> None:
    system("/proc/self/cgroup", "0::/kästchen:1\n")
    write_v2(system, "/kästchen:1", str(300 * MIB), 100 * MIB, 0)
    assert free_memory() == 200 * MIB


def memory_group() -> Path:
    """A folder of cgroups in which a memory group can be made: this process's own, or the topmost."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        root = Path("/sys/fs/cgroup/memory" if "memory" in controllers.split(",") else "/sys/fs/cgroup")
        if controllers and "memory" not in controllers.split(","):
            continue
        for folder in (root / path.lstrip("/"), root):
            if (folder / "memory.stat").exists():
                return folder
    pytest.skip("no memory cgroup is mounted here")


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A memory cgroup with a limit of 200 MiB."""
    folder = memory_group() / f"sparseflow-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        limit = next((name for name in ("memory.max", "memory.limit_in_bytes") if (folder / name).exists()), None)
        if limit is None:
            pytest.skip(f"{folder}: has no memory controller")
        (folder / limit).write_text(str(200 * MIB))
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def test_limit_of_a_real_group_counts(limited_group: Path) -> None:
    code = "from sparseflow.engine.memory_plan import free_memory; print(free_memory())"
    enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(limited_group)]
    path = os.pathsep.join(sys.path)
    result = subprocess.run(
        [*enter, sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "cgroup.procs" in result.stderr:
        pytest.skip(f"no process can enter a cgroup here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    free = int(result.stdout)
    print(f"{free / MIB:.0f} MiB of 200 MiB are free to a process that has imported the plan")
    assert 20 * MIB < free < 200 * MIB


# --- the cap holds

FETCH_AT_RANDOM = """
import json, sys, time
from pathlib import Path
import numpy as np
import torch
from sparseflow import DiskWeightStore, OffloadStrategy

def status(*fields):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[field].split()[0]) * 1024 for field in fields)

def use(folder, n_times, **options):
    # Fetch until as many bundles as fit were evicted `n_times`.
    seen = 0
    with DiskWeightStore(folder).initialize_from_pretrained(**options) as source:
        held = [*source.dense().values(), *source.predictor_tensors().values()]
        for tensor in held:
            int(tensor.reshape(-1).view(torch.uint8).numpy().max())
        profile, deadline, n = source.profile, time.monotonic() + 60, 0
        while (so_far := source.status()).counts.evictions <= n_times * so_far.n_resident:
            assert time.monotonic() < deadline, so_far
            n += 1
            layer = n % profile.num_layers
            ids = np.sort(rng.choice(profile.ffn_dimension, rng.integers(1, source.fetch_limit + 1), replace=False))
            source.hint((layer + 1) % profile.num_layers, ids[: len(ids) // 2].astype(np.uint32))
            with source.fetch(layer, ids.astype(np.uint32)) as fetch:
                fetch.wait(20).base[0].sum()
            seen = max(seen, status("RssAnon", "RssFile"))
        return source.status(), seen

small, store, memory, io = sys.argv[1:]
rng = np.random.default_rng()
use(small, 1, memory="64MiB", io=io, strategy=OffloadStrategy(cpu_cache_ratio=0.5))
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before = status("RssAnon", "RssFile")
end, seen = use(store, 2, memory=int(memory), io=io)
print(json.dumps({
    "io": end.io, "resident": end.n_resident, "bundles": end.n_bundles, "evictions": end.counts.evictions,
    "seen": seen - before, "peak": status("VmHWM") - before, "said": sum(end.memory.values()),
}))
"""

WIDE = {"hidden_size": 504, "ffn_dim": 8192, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 512,
        "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """126 MiB of bundles of 2016 bytes: direct reads go through cells, which take the most memory."""
    folder = tmp_path_factory.mktemp("wide")
    opt_family.write_wide(folder / "checkpoint", OPTConfig(**WIDE), torch.float16)
    return convert(Checkpoint(folder / "checkpoint"), folder / "store", quiet=True)


@pytest.mark.parametrize("io", ["direct", "buffered", "map"])
def test_open_store_stays_under_the_memory_it_was_given(
    wide_store: Path, family_store: Callable[..., Path], io: str
) -> None:
    """Resident memory of the process, its own and of files, from just before opening."""
    manifest = Manifest.load(wide_store)
    neurons = manifest.nbytes_under("neurons/")
    memory = manifest.nbytes_under("") - neurons + 60 * MIB
    try:
        said = run_python(FETCH_AT_RANDOM, family_store("base", "float16"), wide_store, memory, io)
    except AssertionError as error:
        if "io='buffered'" in str(error):
            pytest.skip(f"no direct reads here: {error}")
        raise
    measured = json.loads(said)
    print({name: n / MIB if name in ("seen", "peak", "said") else n for name, n in measured.items()}, memory / MIB)
    assert measured["io"] == io
    assert measured["evictions"] > 2 * measured["resident"], "the arena was not used up"
    assert neurons > 2 * measured["resident"] * 2016, "a store that holds all of it would hardly be told apart"
    assert measured["said"] <= memory
    assert measured["seen"] < memory
    assert measured["peak"] < memory
    assert 0.5 * measured["said"] < measured["seen"] < 1.05 * measured["said"], "status says something else"
