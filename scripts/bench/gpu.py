#!/usr/bin/env python3
"""Decode speed on a GPU of models larger than the memory allowed there, beside accelerate and dense models.

    python scripts/bench/gpu.py --out scripts/bench/results/gpu-h100.json

makes synthetic stores of OPT-6.7B's and OPT-13B's shapes in memory (20 and 35 seconds, 15 and 29 GB of /dev/shm), runs
each case in a process of its own, and writes the result after every one. All is over after --total-s; what did not come
to its turn, or was killed at its deadline, says so. `--keep` goes on where an earlier call ended.

Exit code 0: every case was finished, and none took more of the GPU than it was allowed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import sparseflow
from sparseflow.bench.gpu.cases import GPUCase, all_cases, matching, quick_cases
from sparseflow.bench.gpu.device import find_device
from sparseflow.bench.gpu.report import markdown, rows_of, targets
from sparseflow.bench.gpu.runs import GPUBench, GPUConditions, without_paths

MAKE = Path(__file__).parents[1] / "make_synthetic_opt.py"
MAKING_S = 150.0  # a store
QUICK = {"new_tokens": 24, "warm_up_tokens": 8, "generations": 2, "measure_s": 5.0}


class Stores:
    """Synthetic stores in a folder, made when they are asked for; those made here are removed at the end."""

    def __init__(self, folder: Path, seed: int, device: str, *, are_kept: bool) -> None:
        self._folder, self._seed, self._device, self._are_kept = folder, seed, device, are_kept
        self._made: list[Path] = []
        self.seconds: dict[str, float] = {}

    def path(self, model: str) -> Path:
        """Where a model's store is, or will be."""
        return self._folder / model

    def make(self, model: str, timeout_s: float) -> str:
        """Returns nothing where the store is there, else why it is not."""
        path = self.path(model)
        if (path / "profile.json").exists():
            return ""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, MAKE, "--preset", model, "--out", path, "--store", "--calibrate"]
        command += ["--device", self._device, "--seed", self._seed, "--json"]
        start = time.monotonic()
        self._made.append(path)
        try:
            finished = subprocess.run(
                [*map(str, command)], capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return f"making the store took more than {timeout_s:.0f} s"
        self.seconds[model] = time.monotonic() - start
        if finished.returncode:
            lines = finished.stderr.strip().splitlines() or ["no message"]
            return f"making the store failed with {finished.returncode}: {without_paths(lines[-1])}"
        return ""

    def remove(self) -> None:
        """Those that were made here."""
        for path in [] if self._are_kept else self._made:
            for left in self._folder.glob(f"{path.name}*"):
                shutil.rmtree(left, ignore_errors=True)
        self._made.clear()


class Result:
    """What is written, again after every case."""

    def __init__(self, path: Path, conditions: GPUConditions, cases: Sequence[GPUCase], *, is_kept: bool) -> None:
        """is_kept: finished cases of an earlier result with the same conditions stay."""
        self.path = path
        before = json.loads(path.read_bytes()) if is_kept and path.exists() else {}
        asked = asdict(conditions)
        runs = before.get("runs", []) if before.get("conditions") == asked else []
        self._runs: dict[str, dict[str, Any]] = {run["label"]: run for run in runs if run["status"] == "ok"}
        self._asked = [case.label for case in cases]
        self.content: dict[str, Any] = {"sparseflow": sparseflow.__version__, "conditions": asked, "driver": None}
        for name in ("machine", "driver"):
            if self._runs and before.get(name) is not None:
                self.content[name] = before[name]

    def has(self, case: GPUCase) -> bool:
        """Whether it was finished before."""
        return case.label in self._runs

    def add(self, run: dict[str, Any]) -> None:
        """A run, and write all."""
        self._runs[run["label"]] = run
        self.write()

    def write(self) -> None:
        """The file is whole at any time."""
        runs = list(self._runs.values())
        machine = self.content.get("machine")
        rows = rows_of(runs, machine["device"] if machine else None)
        done = {row["label"] for row in rows if row["status"] == "ok" and row.get("is_within_cap") is not False}
        self.content |= {"rows": rows, "targets": targets(rows), "runs": runs, "ok": set(self._asked) <= done}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".partial")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


def run_all(bench: GPUBench, stores: Stores, result: Result, cases: Sequence[GPUCase]) -> None:
    """Measure the machine, then make stores and run cases as they come."""
    waiting = [case for case in cases if not result.has(case)]
    if result.content.get("machine") is None:
        found = bench.machine()
        if found["status"] == "ok":
            result.content["machine"] = found["processes"][0]
        else:
            result.content["machine_failed"] = found["status"]
            say(f"the machine was not measured: {found['status']}")
    for n, case in enumerate(waiting):
        problem = stores.make(case.model, max(1.0, min(MAKING_S, bench.left_s)))
        if problem:
            result.add(asdict(case) | {"label": case.label, "status": problem})
            say(f"{case.label}: {problem}")
            continue
        n_next = waiting[n + 1].n_processes if n + 1 < len(waiting) else 0
        result.add(bench.run(case, stores.path(case.model), n_next))
    result.content["stores_made_s"] = stores.seconds
    result.write()


def say(text: str) -> None:
    """To people, at once."""
    print(text, file=sys.stderr, flush=True)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    default = GPUConditions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, JSON")
    parser.add_argument("--stores", type=Path, default=Path("/dev/shm/sparseflow-bench"), help="where stores are made")
    parser.add_argument("--keep-stores", action="store_true", help="leave them there")
    parser.add_argument("--keep", action="store_true", help="do not run again what FILE has finished")
    parser.add_argument("--quick", action="store_true", help="two cases with few tokens: to see that it works")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose label has it")
    parser.add_argument("--list", action="store_true", help="print the labels and end")
    parser.add_argument("--total-s", type=float, default=300.0, help="of all, stores included (default: %(default)s)")
    for field in fields(default):
        name = f"--{field.name.replace('_', '-')}"
        value = getattr(default, field.name)
        parser.add_argument(name, type=type(value), help=f"default: {value}")
    return parser.parse_args(words)


def conditions_of(arguments: argparse.Namespace) -> GPUConditions:
    """As asked for; else those of a quick run, where it is one; else the usual ones."""
    quick = QUICK if arguments.quick else {}
    given = {field.name: getattr(arguments, field.name) for field in fields(GPUConditions)}
    return GPUConditions(**(quick | {name: value for name, value in given.items() if value is not None}))


def main(words: Sequence[str] | None = None) -> int:
    """Run and write. Returns the exit code."""
    arguments = parsed(words)
    cases = matching(quick_cases() if arguments.quick else all_cases(), arguments.only)
    if arguments.list:
        print("\n".join(case.label for case in cases))
        return 0
    end = time.monotonic() + arguments.total_s
    conditions = conditions_of(arguments)
    device = find_device() if conditions.device != "cpu" else None
    if device is None and conditions.device != "cpu":
        say("gpu.py: no GPU is seen here: neither NVIDIA's management library nor nvidia-smi finds one")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    result = Result(arguments.out, conditions, cases, is_kept=arguments.keep)
    result.content["driver"] = device.driver() if device is not None else None
    making_on = "cpu" if conditions.device == "cpu" else "cuda"
    stores = Stores(arguments.stores, conditions.seed, making_on, are_kept=arguments.keep_stores)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="sf-") as scratch,
            GPUBench(conditions, device, Path(scratch), end, say) as bench,
        ):
            bench.prepare(1)
            run_all(bench, stores, result, cases)
    finally:
        stores.remove()
    print(markdown(result.content))
    for target in result.content["targets"]:
        print("{what}: {found}, target {target:g}".format(**target))
    return 0 if result.content["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
