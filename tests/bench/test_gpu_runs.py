"""Cases of the GPU benchmark are processes of their own: those here run on the CPU, or do what a case must not do."""

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_process import run_python

from sparseflow.bench.gpu.cases import CPU_OFFLOAD, SPARSEFLOW, TRANSFORMERS, GPUCase
from sparseflow.bench.gpu.device import Sampler
from sparseflow.bench.gpu.report import rows_of
from sparseflow.bench.gpu.runs import GPUBench, GPUConditions
from sparseflow.errors import BadRequest

ROOT = Path(__file__).parents[2]
QUICKLY = GPUConditions(
    prompt_tokens=4, new_tokens=6, warm_up_tokens=4, generations=2, measure_s=20.0, deadline_s=120.0, device="cpu"
)
CASE = GPUCase(SPARSEFLOW, "tiny", "exact")


class FakeDevice:
    """Fills while it is looked at."""

    def __init__(self) -> None:
        self.n_looks = 0

    def used_nbytes(self) -> int:
        self.n_looks += 1
        return 100 + 10 * min(self.n_looks, 5)

    def busy_percent(self) -> int | None:
        return 50

    def driver(self) -> str:
        return "1.2.3"


@contextmanager
def bench(
    tmp_path_factory: pytest.TempPathFactory, total_s: float = 300.0, program: str = "", **conditions: Any
) -> Any:
    """A bench whose children run a program given, or cases. Nothing of it is left."""
    command = [sys.executable, "-c", program] if program else [sys.executable, "-m", "sparseflow.bench.gpu.child"]
    others = psutil.Process().children()
    end = time.monotonic() + total_s
    scratch = tmp_path_factory.mktemp("s")
    with GPUBench(replace(QUICKLY, **conditions), None, scratch, end, lambda _: None, command) as made:
        yield made
    assert [child for child in psutil.Process().children() if child not in others] == []


@pytest.mark.slow
def test_all_programs_find_the_same_ids_likeliest(tmp_path_factory: pytest.TempPathFactory, family_store: Any) -> None:
    store = family_store("base", "float32")
    cases = [GPUCase(TRANSFORMERS, "tiny"), CASE, replace(CASE, fidelity="dense"), GPUCase(CPU_OFFLOAD, "tiny")]
    with bench(tmp_path_factory) as running:
        runs = [running.run(case, store) for case in cases]
    assert [run["status"] for run in runs] == ["ok"] * len(cases), runs
    rows = rows_of(runs, None)
    for row, run in zip(rows, runs, strict=True):
        assert [len(one["ids"]) for one in run["processes"][0]["generations"]] == [6, 6]
        assert row["decode_tokens_per_s"] > 0
        assert all(found["is_equal"] and found["n_compared"] == 12 for found in row["agreement"].values())
        assert all(found["is_equal"] for found in row["greedy_agreement"].values())
    assert rows[1]["active_share"] <= rows[1]["candidate_share"] < 1


@pytest.mark.slow
def test_two_at_one_server_begin_together(tmp_path_factory: pytest.TempPathFactory, family_store: Any) -> None:
    store = family_store("base", "float32")
    with bench(tmp_path_factory, text="greedy") as running:
        runs = [running.run(replace(CASE, n_served=n), store, 2) for n in (1, 2)]
        running.end_server()
    assert [run["status"] for run in runs] == ["ok", "ok"], runs
    begun = [process["generations"][0]["start"] for process in runs[1]["processes"]]
    ended = [process["generations"][-1]["end"] for process in runs[1]["processes"]]
    assert max(begun) < min(ended)
    ids = [[one["ids"] for one in process["generations"]] for run in runs for process in run["processes"]]
    assert ids[0] == ids[1] == ids[2]


HANGS = """
import json, sys, time
json.loads(sys.stdin.readline())
print(json.dumps({"state": "loaded", "load_s": 1.5}), flush=True)
time.sleep(600)
"""


def test_a_hanging_case_is_killed_at_its_deadline_and_keeps_what_it_told(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    with bench(tmp_path_factory, program=HANGS, deadline_s=1.0) as running:
        run = running.run(CASE, tmp_path)
    assert run["status"] == "killed after 1 s, while warming up"
    assert run["processes"][0]["load_s"] == 1.5


def test_a_case_that_dies_says_how(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    program = "import sys; sys.stdin.readline(); sys.exit('/a/b/c: no such thing')"
    with bench(tmp_path_factory, program=program) as running:
        run = running.run(CASE, tmp_path)
    assert run["status"] == "while loading: exit status 1: c: no such thing"


def test_a_case_that_is_killed_says_so(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    program = "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"
    with bench(tmp_path_factory, program=program) as running:
        run = running.run(CASE, tmp_path)
    assert run["status"].startswith("while loading: signal SIGKILL")


def test_without_time_no_case_begins(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    with bench(tmp_path_factory, total_s=2.0, program="raise SystemExit") as running:
        run = running.run(CASE, tmp_path)
    assert run["status"].startswith("not begun")


def test_a_store_that_is_none_is_told_by_the_server(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    with bench(tmp_path_factory, program="raise SystemExit") as running:
        run = running.run(replace(CASE, n_served=1), tmp_path / "nothing")
    assert run["status"].startswith("no server: exit status")
    assert str(tmp_path) not in run["status"]


def test_a_sampler_sees_the_most_beyond_what_was_taken_before() -> None:
    device = FakeDevice()
    with Sampler(device, every_s=0.001) as sampler:
        sampler.measure(True)
        deadline = time.monotonic() + 30
        while device.n_looks < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
    use = sampler.use()
    assert (use.peak_nbytes, use.busy_share) == (40, 0.5)
    with Sampler(None) as sampler:
        pass
    assert sampler.use() == (None, None, 0)


def test_another_text_is_refused() -> None:
    with pytest.raises(BadRequest, match="random, greedy"):
        GPUConditions(text="other")


@pytest.mark.slow
def test_the_program_writes_a_result_and_goes_on_from_it(tmp_path: Path) -> None:
    """On the CPU, where the machine cannot be measured and no case of the plan has time."""
    script, out = ROOT / "scripts" / "bench" / "gpu.py", tmp_path / "result.json"
    out.write_text("{}")
    code = f"""
import sys
sys.argv[1:] = ["--device", "cpu", "--out", {str(out)!r}, "--only", "nothing has this", "--total-s", "30"]
sys.path.insert(0, {str(script.parent)!r})
import gpu
sys.exit(gpu.main())
"""
    run_python(code, timeout_s=120)
    result = json.loads(out.read_bytes())
    assert result["ok"]  # of no cases
    assert result["runs"] == []
    assert result["machine_failed"]
    assert str(tmp_path) not in out.read_text()
