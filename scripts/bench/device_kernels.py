#!/usr/bin/env python3
"""Time each GPU kernel of a layer step on random weights of one layer, beside what its bytes alone would take.

    python scripts/bench/device_kernels.py [--hidden 4096] [--ffn 16384] [--active 0.045] [--slots 0.12] [--out FILE]

Prints JSON. Times are medians of graph replays over several copies of the weights, so that no cache serves them.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton

from sparseflow.kernels.bounds import CodedRows, Margin
from sparseflow.kernels.device.gather import gather
from sparseflow.kernels.device.placement import N_CANDIDATES, N_MISSES, N_PLACED, PlacedStep, Placement
from sparseflow.kernels.device.scoring import DeviceScorer, TokenSums
from sparseflow.kernels.device.sparse_mlp import MLPScratch, sparse_mlp
from sparseflow.store.codes import GROUP, ROW_GROUP_WORDS, group_count

COPIES = 8  # of what a kernel reads


def microseconds(run: Callable[[int], None]) -> float:
    """Of `run(copy)`, one copy after the other."""
    for copy in range(COPIES):
        run(copy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(COPIES):
            run(copy)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / COPIES)
    return float(torch.tensor(times).median())


def random_codes(ffn: int, hidden: int, active: float) -> CodedRows:
    """Codes of no matrix in particular: bits are bits. The bias settles how many are active."""
    n_groups = group_count(hidden)
    words = torch.randint(-(2**15), 2**15, (2, ffn, n_groups * ROW_GROUP_WORDS), dtype=torch.int16, device="cuda")
    scales = torch.full((ffn, n_groups), 1 / 120 / hidden**0.5, device="cuda")
    ones = torch.ones(ffn, device="cuda")
    bias = torch.where(torch.rand(ffn, device="cuda") < active, 1e3, -1e3)
    return CodedRows(torch.zeros(n_groups * GROUP, device="cuda"), words[0], words[1], scales, bias, ones, ones, ones)


def measure(hidden: int, ffn: int, active: float, slots: float) -> Mapping[str, object]:
    """Kernel -> microseconds and bytes over time."""
    found: dict[str, object] = {}

    def note(name: str, us: float, nbytes: float) -> None:
        found[name] = {"us": round(us, 2), "gb_per_s": round(nbytes / us / 1e3, 1)}

    device = torch.device("cuda")
    n_slots, n_candidates = int(ffn * slots), int(ffn * active)
    x = torch.randn(1, hidden, device=device)
    coded = [random_codes(ffn, hidden, active) for _ in range(COPIES)]
    scorers = [DeviceScorer(rows, Margin.EXACT, 1e-12) for rows in coded]
    sums, n_fine = TokenSums(1, scorers[0].n_groups, device), torch.zeros(1, dtype=torch.int64, device=device)
    mask = torch.zeros(1, ffn, dtype=torch.int8, device=device)
    note("sum_tokens", microseconds(lambda _: scorers[0].sum_tokens(x, sums)), 4 * hidden)
    codes_nbytes = coded[0].nbytes_read(1, n_candidates)
    note("score", microseconds(lambda copy: scorers[copy].select(x, sums, mask, n_fine)), codes_nbytes)

    placements = [Placement(ffn, n_slots, device) for _ in range(COPIES)]
    step = PlacedStep.empty(ffn, device)
    masks = [(torch.rand(1, ffn, device=device) < active).to(torch.int8) for _ in range(COPIES)]
    us = microseconds(lambda copy: placements[0].place(masks[copy], step))
    note("place", us, ffn)
    counts = step.counts
    found["placed"] = {"candidates": int(counts[N_CANDIDATES]), "missing": int(counts[N_MISSES])}

    host = torch.randn(ffn, 2, hidden).to(torch.float16).pin_memory()
    slabs = [torch.randn(n_slots, 2, hidden, device=device).to(torch.float16) for _ in range(COPIES)]
    for n in (64, 256, 1024):
        counts[N_PLACED] = n
        rows = [torch.randperm(ffn, device=device)[:n].int() for _ in range(COPIES)]
        places = torch.randperm(n_slots, device=device)[:n].int() if n <= n_slots else None
        if places is not None:
            padded = torch.zeros(ffn, dtype=torch.int32, device=device)

            def run(copy: int) -> None:
                gather(host.data_ptr(), 4 * hidden, rows[copy], places, counts, slabs[copy])

            note(f"gather {n}", microseconds(run), n * 4 * hidden)

    counts[N_CANDIDATES] = n_candidates
    step.slots[:n_candidates] = torch.randint(n_slots, (n_candidates,), device=device).int()
    scratch, n_active = MLPScratch(1, ffn, hidden, device), torch.zeros(1, dtype=torch.int64, device=device)
    biases = torch.full((ffn,), 100.0, device=device), torch.zeros(hidden, device=device)
    y = torch.empty(1, hidden, device=device)

    def compute(copy: int) -> None:
        sparse_mlp(slabs[copy], host.data_ptr(), 4 * hidden, step.missing, step, *biases, x, scratch, n_active, y)

    note("sparse_mlp", microseconds(compute), n_candidates * 4 * hidden)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=16384)
    parser.add_argument("--active", type=float, default=0.045)
    parser.add_argument("--slots", type=float, default=0.12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.hidden, arguments.ffn, arguments.active, arguments.slots)
    text = json.dumps({"device": torch.cuda.get_device_name(), "triton": triton.__version__} | dict(found), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
