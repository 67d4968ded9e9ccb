"""A whole benchmark: its cases in turn, the machine's limits beside them, and one object that says all."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sparseflow.bench.cases import Case
from sparseflow.bench.machine import Machine
from sparseflow.bench.report import note_agreement, summarise
from sparseflow.bench.runs import Bench, Conditions, could_swap, run_rounds
from sparseflow.utils.sizes import format_size


def run_benchmark(bench: Bench, cases: Sequence[Case], n_rounds: int, partial_layers: Sequence[int]) -> dict[str, Any]:
    """Make what peers read, run all cases in turn, and sum them up.

    Args:
        partial_layers: of partial offloads to try; else about as many as fit.

    Returns:
        What `--json` writes: JSON types only, and no path of this machine.
    """
    for peer in dict.fromkeys(case.peer for case in cases if case.needs_conversion):
        bench.convert(peer)
    machine = Machine(bench)
    runs, searched, base_nbytes = run_rounds(bench, cases, n_rounds, partial_layers, machine.measure)
    note_agreement(runs)
    limits = machine.memory_bytes_per_s, machine.random_bytes_per_s
    is_limited = bench.conditions.limit_nbytes is not None
    finished = {run["label"] for run in runs if run["status"] == "ok"}
    return {
        "conditions": _shown(bench.conditions),
        "environment": machine.environment(),
        "limit": _described_limit(bench),
        "is_cold": bench.conditions.is_cold or is_limited,
        "could_swap": is_limited and could_swap(bench),
        "base_nbytes": base_nbytes,
        "machine": machine.report(),
        "summary": summarise(runs, *limits),
        "search": summarise(searched, *limits),
        "runs": [{name: value for name, value in run.items() if name != "mapped_files"} for run in runs],
        "ok": finished == {run["label"] for run in runs},
    }


def _shown(conditions: Conditions) -> dict[str, Any]:
    """What a reader elsewhere can make use of: names instead of paths."""
    shown = asdict(conditions) | {"checkpoint": conditions.model, "store": conditions.store.name}
    return shown | {name: list(shown[name]) for name in ("pythons", "converted")}


def _described_limit(bench: Bench) -> str:
    limit = bench.conditions.limit_nbytes
    if limit is None:
        return "no limit of memory"
    if bench.parent is None:
        return f"no cgroup can be made here: weights evicted before every token, for a limit of {format_size(limit)}"
    return f"{format_size(limit)} of memory with page cache (cgroup v{bench.parent.interface.version})"
