"""The benchmark below memory: the limit holds, cold is cold, bytes are counted, no run is lost."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child_process import run_python

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))

import below_memory  # noqa: E402
import below_memory_child  # noqa: E402
import memory_cgroup  # noqa: E402
from below_memory import Bench, Rival  # noqa: E402
from memory_cgroup import GroupParent, MemoryGroup  # noqa: E402

DEADLINE_S = 120
MIB = 1 << 20


@pytest.fixture
def group_parent() -> GroupParent:
    try:
        return memory_cgroup.find_group_parent()
    except memory_cgroup.NoMemoryGroupError as error:
        pytest.skip(str(error))


@pytest.fixture
def file_on_disk(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{tmp_path} has no O_DIRECT, so it is no disk")
    return path


@pytest.fixture
def bench(group_parent: GroupParent, demo_model: Path, tmp_path: Path) -> Bench:
    arguments = argparse.Namespace(
        checkpoint=demo_model, store=demo_model, memory="auto", tokens=2, prompt_tokens=2, seed=0, deadline_s=DEADLINE_S
    )
    return Bench(group_parent, tmp_path, arguments, cold_files=[], libraries=[])


def run_in(group: MemoryGroup, program: str, *arguments: object) -> int:
    command = group.command([sys.executable, "-S", "-c", program, *map(str, arguments)])
    return subprocess.run(command, timeout=DEADLINE_S, check=False).returncode


def groups_in(parent: GroupParent) -> list[Path]:
    return list(parent.folder.glob(f"{memory_cgroup.NAME_PREFIX}{os.getpid()}-*"))


def finished_run(label: str, rate: float, **more: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(
        (
            "time_to_first_token_s",
            "first_step_s",
            "load_s",
            "cpu_s_per_token",
            "major_faults_per_token",
            "anonymous_nbytes",
        ),
        1,
    )
    group = {"peak_nbytes": 5, "limit_hits": 2, "oom_kills": 0}
    disk = {"bytes_from_disk_per_token": 100, "bytes_from_disk_per_s": 100 * rate}
    run = {
        "rival": label,
        "label": label,
        "status": "ok",
        "decode_tokens_per_s": rate,
        "likeliest": [1, 2],
        "group": group,
    }
    return {**run, **numbers, **disk, **more}


def test_program_over_the_limit_is_killed_and_counted(group_parent: GroupParent) -> None:
    with MemoryGroup(group_parent, 32 * MIB) as group:
        assert run_in(group, "bytearray(64 << 20)") == -9
        assert group.usage().oom_kills == 1
    assert not groups_in(group_parent)


def test_page_cache_counts_and_is_taken_back(group_parent: GroupParent, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(64 * MIB))
    assert memory_cgroup.drop_page_cache([path]) == 0
    with MemoryGroup(group_parent, 32 * MIB) as group:
        assert run_in(group, "import sys; f = open(sys.argv[1], 'rb')\nwhile f.read(1 << 20): pass", path) == 0
        usage = group.usage()
    assert usage.limit_hits > 0
    assert usage.peak_nbytes is None or 16 * MIB < usage.peak_nbytes <= 32 * MIB
    assert memory_cgroup.cached_nbytes(path) < 32 * MIB


def test_leaving_the_group_kills_what_is_inside(group_parent: GroupParent) -> None:
    with MemoryGroup(group_parent, 64 * MIB) as group:
        process = subprocess.Popen(group.command(["sleep", "1000"]))
        while str(process.pid) not in (group.folder / "cgroup.procs").read_text().split():
            assert process.poll() is None
    assert process.wait(DEADLINE_S) == -9
    assert not group.folder.exists()
    group.close()  # may be called twice


def test_version_2_files_are_read(tmp_path: Path) -> None:
    group = MemoryGroup.__new__(MemoryGroup)
    group.folder, group._interface = tmp_path, memory_cgroup.V2
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n")
    assert group.usage() == memory_cgroup.GroupUsage(None, 7, 1)  # before Linux 5.19
    (tmp_path / "memory.peak").write_text("4096\n")
    assert group.usage() == memory_cgroup.GroupUsage(4096, 7, 1)


def test_without_any_group_the_error_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_cgroup, "_candidates", lambda: iter(()))
    with pytest.raises(memory_cgroup.NoMemoryGroupError, match=r"no memory controller is mounted.*run as root"):
        memory_cgroup.find_group_parent()


def test_dropped_file_is_cold(file_on_disk: Path) -> None:
    file_on_disk.read_bytes()
    assert memory_cgroup.cached_nbytes(file_on_disk) == 8 * MIB
    assert memory_cgroup.drop_page_cache([file_on_disk]) == 0
    before = below_memory_child.read_nbytes()
    file_on_disk.read_bytes()
    assert below_memory_child.read_nbytes() - before == 8 * MIB


@pytest.mark.parametrize("read", [memory_cgroup.read_queued, memory_cgroup.read_threaded])
def test_direct_reads_are_counted_and_leave_no_cache(read: Callable[..., float], file_on_disk: Path) -> None:
    memory_cgroup.drop_page_cache([file_on_disk])
    fd, before = os.open(file_on_disk, os.O_RDONLY | os.O_DIRECT), below_memory_child.read_nbytes()
    try:
        assert read([(fd, offset) for offset in range(0, 8 * MIB, 8192)], 8192) > 0
    except OSError as error:
        if read is memory_cgroup.read_threaded:
            raise
        pytest.skip(f"{error}: read_threaded takes its place")
    finally:
        os.close(fd)
    assert below_memory_child.read_nbytes() - before == 8 * MIB
    assert memory_cgroup.cached_nbytes(file_on_disk) == 0


def test_parent_maps_no_library_that_children_load() -> None:
    heavy = {"torch", "numpy", "transformers", "numba"}
    run_python(f"import below_memory, sys; assert not {heavy} & sys.modules.keys()", PYTHONPATH=str(BENCH))


def test_child_out_of_memory_is_reported(bench: Bench) -> None:
    report = bench.run(Rival("disk_offload"), 48 * MIB)
    assert report["status"] == "killed: out of memory"
    assert report["group"]["oom_kills"] > 0
    assert not groups_in(bench.parent)


def test_child_past_its_deadline_is_killed_and_reported(bench: Bench) -> None:
    bench.arguments.deadline_s = 0.3
    report = bench.run(Rival("sparseflow"), 2048 * MIB)
    assert report["status"] == "killed after its deadline of 0.3 s"
    assert not groups_in(bench.parent)


def test_child_that_fails_is_reported_with_its_last_words(bench: Bench) -> None:
    report = bench.run(Rival("sparseflow"), 2048 * MIB, store="/nonexistent")
    assert report["status"].startswith("exit status 1: ")
    assert "/nonexistent" in report["status"]


def test_layers_are_measured_from_headers(demo_model: Path) -> None:
    sizes = below_memory.layer_nbytes(demo_model)
    attention, mlp, norms = 4 * (256 + 1) * 256, 2 * 256 * 1024 + 1024 + 256, 4 * 256
    assert sizes[:-1] == [2 * (attention + mlp + norms)] * 8
    assert sizes[-1] == 2 * ((4096 + 514) * 256 + 2 * 256)


def test_partial_offload_is_tried_around_what_fits() -> None:
    tried = below_memory.partial_candidates((), [10] * 24 + [20], room_nbytes=100)
    assert [(rival.n_resident, rival.copied) for rival in tried] == [
        (6, True), (7, True), (8, True), (9, True), (7, False), (24, False),
    ]  # fmt: skip
    given = below_memory.partial_candidates([3], [10] * 24 + [20], room_nbytes=100)
    assert [rival.label for rival in given] == ["partial_offload 3 copied", "partial_offload 3 mapped"]
    with pytest.raises(below_memory.UsageError, match="25: the model has 24 layers"):
        below_memory.partial_candidates([25], [10] * 24 + [20], room_nbytes=100)


def test_summary_keeps_every_run() -> None:
    died = {"label": "sparseflow", "rival": "sparseflow", "status": "killed: out of memory"}
    died["group"] = {"peak_nbytes": 9, "limit_hits": 4, "oom_kills": 1}
    runs = [finished_run("disk_offload", 2), finished_run("sparseflow", 4, likeliest=[1, 3]), died]
    below_memory.note_agreement(runs)
    summary = below_memory.summarise(runs, bandwidth=1000)
    sparse = summary["sparseflow"]
    assert (sparse["n_runs"], sparse["n_finished"], sparse["failures"]) == (2, 1, ["killed: out of memory"])
    assert (sparse["same_as_dense"], sparse["peak_nbytes"]) == (0.5, 9)
    assert (sparse["share_of_random_reads"], sparse["disk_limit_tokens_per_s"]) == (0.4, 10)
    text = below_memory.format_table(summary)
    assert "sparseflow: killed: out of memory" in text
    assert "1/2 " in text
    assert "4.000 (4.000-4.000)" in text


@pytest.mark.slow
def test_all_rivals_run_and_agree(
    group_parent: GroupParent, family_checkpoint: Callable[..., Path], demo_model: Path, tmp_path: Path
) -> None:
    run_python("import sys; from sparseflow.cli.main import main; sys.exit(main(sys.argv[1:]))",
               "convert", demo_model, tmp_path / "store")  # fmt: skip
    report = tmp_path / "report.json"
    run_python(
        BENCH / "below_memory.py", "--checkpoint", demo_model, "--store", tmp_path / "store", "--limit", "1GiB",
        "--tokens", 3, "--rounds", 1, "--partial-layers", 4, "--json", report, timeout_s=600,
    )  # fmt: skip
    result = json.loads(report.read_text(encoding="utf-8"))
    assert len(result["summary"]) == 3
    assert all(row["n_finished"] == 1 and row["same_as_dense"] == 1 for row in result["summary"].values())
    assert all(run["cached_before_nbytes"]["weights"] == 0 for run in result["runs"])


def test_rivals_are_read_with_options_of_sparseflow_only() -> None:
    rival = Rival.parse("sparseflow:io=map,lookahead=off")
    assert (rival.name, rival.options, rival.label) == (
        "sparseflow",
        ("io=map", "lookahead=off"),
        "sparseflow io=map lookahead=off",
    )
    for wrong in ("flexgen", "sparseflow:io=tape", "sparseflow:speed=high", "disk_offload:io=map"):
        with pytest.raises(argparse.ArgumentTypeError, match="give one of"):
            Rival.parse(wrong)
