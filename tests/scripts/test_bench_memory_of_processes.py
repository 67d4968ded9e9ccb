"""The benchmark of several processes: every page is counted once, what it is for adds up, nobody is left behind."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_process import run_python

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))

import memory_of_processes  # noqa: E402
from memory_child import BenchError, Child  # noqa: E402
from memory_of_processes import Bench, Memory, Moment, Rival  # noqa: E402

DEADLINE_S = 30
MIB = 1 << 20
ROLLUP = """55b6b2ed3000-7ffdeeff4000 ---p 00000000 00:00 0                          [rollup]
Rss:              339656 kB
Pss:                 100 kB
Pss_Dirty:        255756 kB
Pss_Anon:             50 kB
Pss_File:             30 kB
Pss_Shmem:            20 kB
Private_Clean:         4 kB
Private_Dirty:         3 kB
SwapPss:               0 kB
"""

# What a child does before it says that it holds still; it ends with its stdin.
PRELUDE = "import mmap, os, pathlib, sys\n"
HOLD_STILL = "\nprint('{}', flush=True); sys.stdin.read()"


def holding_still(program: str, log: Path, *arguments: object) -> Child:
    child = Child([sys.executable, "-S", "-c", PRELUDE + program + HOLD_STILL, *map(str, arguments)], {}, log)
    try:
        child.next_phase(time.monotonic() + DEADLINE_S)
    except BenchError:
        child.__exit__()
        raise
    return child


def memory(anon: int = 0, file: int = 0, shmem: int = 0, model_files: int = 0) -> Memory:
    return Memory(anon + file + shmem, anon, file, shmem, private=anon, model_files=model_files)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(argparse.Namespace(deadline_s=DEADLINE_S, memory="1GiB", threads=1), tmp_path, vocab_size=128)


def measured(**more: Any) -> dict[str, Any]:
    bare = Moment([memory(anon=10, file=2)] * 2, [memory(anon=5, shmem=7)], 0, 0)
    loaded = Moment([memory(anon=11, file=2, shmem=50)] * 2, [memory(anon=25, shmem=50)], 150, 3)
    last = memory(anon=14, file=12, shmem=50, model_files=8)
    decoded = Moment([last] * 2, [memory(anon=25, shmem=60)], 200, 1)
    names = {"rival": "sparseflow", "used": "float16", "same_ids": True, "times_weights": 1.5, "times_store": 1.25}
    return names | memory_of_processes.account(bare, loaded, decoded) | more


def test_rivals_are_read_with_a_precision() -> None:
    assert Rival.parse("transformers") == Rival("transformers", "float16")
    assert Rival.parse("ctranslate2:float32").label == "ctranslate2 float32"
    assert Rival.parse("sparseflow").label == "sparseflow"
    for wrong in ("flexgen", "sparseflow:int8", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="give one of"):
            Rival.parse(wrong)


def test_rollup_is_read_in_bytes() -> None:
    assert Memory.parse(ROLLUP, 9) == Memory(*(1024 * kib for kib in (100, 50, 30, 20, 7)), model_files=9)


def test_memories_add_up_field_by_field() -> None:
    one, other = Memory(1, 2, 3, 4, 5, 6), Memory(10, 20, 30, 40, 50, 60)
    assert Memory.sum([one, other]) == Memory(11, 22, 33, 44, 55, 66)
    assert Memory.sum([]) == Memory()


def test_parts_add_up_to_the_sum() -> None:
    result = measured()
    total = 2 * (14 + 12 + 50) + 25 + 60
    assert result["pss"]["total"] == total
    assert result["runtime"] == 2 * (10 + 2) + 5  # without the small server's shared memory
    assert result["weights"] == (2 * 11 + 25) - (2 * 10 + 5) + (2 * 50 + 60) + 2 * 8
    assert result["runtime"] + result["weights"] + result["rest"] == total
    assert result["without_runtime"] == total - result["runtime"]
    assert (result["server_pss"]["total"], result["private_per_client"], result["n_outsiders"]) == (85, 14, 3)


def test_table_has_a_line_for_the_server_and_remarks_say_what_is_missing() -> None:
    alone = measured(rival="transformers float16", n_server_processes=0)
    heading, shared, server, dense = memory_of_processes.format_table([measured(), alone]).splitlines()
    assert heading.split()[:2] == ["MiB", "used"]
    assert shared.startswith("2 sparseflow  ")
    assert " 1.50 " in shared
    assert server.startswith("  of that the server")
    assert dense.startswith("2 transformers float16  ")
    remarks = list(memory_of_processes.remarks([measured(same_ids=False, shared_memory_held=160 + 3 * MIB)]))
    assert [remark.split(": ")[1].split(" (")[0] for remark in remarks] == [
        "processes outside map the same files",
        "3MiB of shared memory is mapped by nobody, so not in the Pss",
        "its processes decoded different tokens",
    ]
    nothing = measured(n_outsiders=0, shared_memory_held=1000)
    assert not list(memory_of_processes.remarks([nothing]))


def test_page_that_two_processes_map_counts_once(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "weights"
    weights.write_bytes(os.urandom(16 * MIB))
    program = "map = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ); sum(map[::4096])"
    with holding_still(program, tmp_path / "a", weights) as one, holding_still(program, tmp_path / "b", weights) as two:
        both = Moment.read([one.pid, two.pid], [], tmp_path / "model")
        single = Moment.read([one.pid], [], tmp_path / "model")
    assert both.all.model_files == 16 * MIB
    assert both.n_outsiders == 0
    assert single.all.model_files == 8 * MIB
    assert single.n_outsiders == 1


def test_shared_memory_that_nobody_maps_is_seen(tmp_path: Path) -> None:
    program = "os.write(os.memfd_create('held'), bytes(8 << 20))"
    with holding_still(program, tmp_path / "log") as child:
        moment = Moment.read([child.pid], [], tmp_path)
    assert moment.shared_memory_held == 8 * MIB
    assert moment.all.shmem < MIB


def test_process_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"process \d+ ended: no such model"):
        holding_still("sys.exit('no such model')", tmp_path / "log")


def test_process_that_hangs_is_reported_and_killed(tmp_path: Path) -> None:
    child = Child(["sleep", "1000"], {}, tmp_path / "log")
    with child, pytest.raises(BenchError, match="raise --deadline-s"):
        child.next_phase(time.monotonic() + 0.1)
    assert not psutil.pid_exists(child.pid)


def test_server_is_ended_on_leaving_with_all_it_started(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(1000)"
    started: list[subprocess.Popen[bytes]] = []

    def run(self: Bench, *words: object) -> None:
        for program in (stubborn, "import time; print(flush=True); time.sleep(1000)"):
            command = [sys.executable, "-S", "-c", program]
            process = subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, start_new_session=True)
            started.append(process)
            assert process.stdout is not None
            assert process.stdout.readline()  # it ignores signals now

    monkeypatch.setattr(Bench, "_run", run)
    monkeypatch.setattr(memory_of_processes, "ENDING_DEADLINE_S", 0.5)
    with bench._server(Path("store"), "name") as pids:
        assert set(pids) == {process.pid for process in started}
    assert not any(psutil.pid_exists(process.pid) for process in started)
    for process in started:
        process.communicate(timeout=DEADLINE_S)


def test_server_that_does_not_start_is_reported(bench: Bench) -> None:
    with pytest.raises(BenchError, match="exit status"), bench._server(Path("/nonexistent"), "name"):
        pass
    assert not bench._marked()


def test_processes_of_transformers_share_a_small_model(
    family_checkpoint: Callable[..., Path], family_store: Callable[..., Path]
) -> None:
    output = run_python(
        BENCH / "memory_of_processes.py", "--store", family_store("base", "float16"), "--checkpoint",
        family_checkpoint("base", "float16"), "--rivals", "transformers", "--processes", 2, "--tokens", 3, "--json",
        "--deadline-s", DEADLINE_S,
    )  # fmt: skip
    report = json.loads(output)
    [result] = report["results"]
    assert (result["used"], result["n_clients"], len(result["ids"]), result["same_ids"]) == ("float16", 2, 3, True)
    assert result["pss"]["total"] == sum(client["total"] for client in result["decoded"]["clients"])
    assert 0 < result["runtime"] < result["pss"]["total"]
    assert report["model"]["neurons"] > 0
