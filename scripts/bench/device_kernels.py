#!/usr/bin/env python3
"""Time each GPU kernel of a layer step on random weights of one layer, beside what its bytes alone would take.

    python scripts/bench/device_kernels.py [--hidden 4096] [--ffn 16384] [--active 0.045] [--slots 0.12] [--all-shapes]
        [--out FILE]

Prints JSON. With --all-shapes the kernels that can be cut in more than one way are timed in each. Times are medians of
graph replays over several copies of the weights, so that no cache serves them.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from sparseflow.kernels.bounds import CodedRows, Margin
from sparseflow.kernels.device import placement, scoring, sparse_mlp, token_codes
from sparseflow.kernels.device.gather import gather
from sparseflow.kernels.device.norm import normalise
from sparseflow.kernels.device.placement import N_CANDIDATES, N_MISSES, N_PLACED, PlacedStep, Placement
from sparseflow.kernels.device.scoring import DeviceScorer
from sparseflow.kernels.device.sparse_mlp import MLPScratch
from sparseflow.kernels.device.token_codes import TokenSums
from sparseflow.store.codes import GROUP, ROW_GROUP_WORDS, group_count

COPIES = 8  # of what a kernel reads
SHAPES: dict[ModuleType, tuple[Any, ...]] = {
    scoring: (
        scoring.Shape(16, 8, 128, 8),
        scoring.Shape(16, 4, 128, 8),
        scoring.Shape(32, 8, 128, 8, registers=80),
        scoring.Shape(64, 8, 128, 16),
        scoring.Shape(64, 8, 128, 8),
        scoring.Shape(16, 4, 64, 4),
    ),
    placement: (
        placement.Shape(warps=8),
        placement.Shape(warps=32),
        placement.Shape(block=8192, warps=32),
    ),
    sparse_mlp: (
        sparse_mlp.Shape(264, 2**15, 8),
        sparse_mlp.Shape(132, 2**15, 16),
        sparse_mlp.Shape(132, 2**16, 8),
        sparse_mlp.Shape(columns=16),
        sparse_mlp.Shape(columns=64),
    ),
}
"""Beside the one that each module has."""


@contextmanager
def shaped(module: ModuleType, shape: object) -> Iterator[None]:
    """Cuts a module's kernels so for a while."""
    before, module.SHAPE = module.SHAPE, shape  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.SHAPE = before  # type: ignore[attr-defined]


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


def measure(hidden: int, ffn: int, active: float, slots: float, *, all_shapes: bool) -> Mapping[str, object]:
    """Kernel -> microseconds and bytes over time."""
    found: dict[str, object] = {}

    def note(name: str, us: float, nbytes: float) -> None:
        found[name] = {"us": round(us, 2), "gb_per_s": round(nbytes / us / 1e3, 1)}

    def note_shapes(name: str, module: ModuleType, run: Callable[[int], None], nbytes: float) -> None:
        note(name, microseconds(run), nbytes)
        for shape in SHAPES[module] if all_shapes else ():
            with shaped(module, shape):
                try:
                    note(f"{name} {shape}", microseconds(run), nbytes)
                except Exception as error:  # one that does not fit the device says so and leaves the others
                    found[f"{name} {shape}"] = repr(error)

    device = torch.device("cuda")
    n_slots, n_candidates = int(ffn * slots), int(ffn * active)
    x = torch.randn(1, hidden, device=device)
    coded = [random_codes(ffn, hidden, active) for _ in range(COPIES)]
    scorers = [DeviceScorer(rows, Margin.EXACT, 1e-12) for rows in coded]
    sums, n_fine = TokenSums(1, scorers[0].n_groups, device), torch.zeros(1, dtype=torch.int64, device=device)
    mask = torch.zeros(1, ffn, dtype=torch.int8, device=device)
    note("sum_tokens", microseconds(lambda _: scorers[0].sum_tokens(x, sums)), 4 * hidden)
    codes_nbytes = coded[0].nbytes_read(1, n_candidates)
    ones = torch.ones(hidden, device=device)
    note("normalise", microseconds(lambda _: normalise(x[0], ones, ones, 1e-5, x[0])), 16 * hidden)

    def normalise_and_sum(_: int) -> None:
        token_codes.normalise_and_sum(x[0], ones, ones, 1e-5, coded[0].dither, x[0], sums)

    note("normalise_and_sum", microseconds(normalise_and_sum), 20 * hidden)
    note_shapes("score", scoring, lambda copy: scorers[copy].select(x, sums, mask, n_fine), codes_nbytes)

    placements = [Placement(ffn, n_slots, device) for _ in range(COPIES)]
    step = PlacedStep.empty(ffn, device)
    masks = [(torch.rand(1, ffn, device=device) < active).to(torch.int8) for _ in range(COPIES)]
    note_shapes("place", placement, lambda copy: placements[0].place(masks[copy], step), ffn)
    counts = step.counts
    found["placed"] = {"candidates": int(counts[N_CANDIDATES]), "missing": int(counts[N_MISSES])}

    host = torch.randn(ffn, 2, hidden).to(torch.float16).pin_memory()
    slabs = [torch.randn(n_slots, 2, hidden, device=device).to(torch.float16) for _ in range(COPIES)]
    for n in (64, 256, 1024):
        counts[N_PLACED] = n
        rows = [torch.randperm(ffn, device=device)[:n].int() for _ in range(COPIES)]
        if n <= n_slots:
            places = torch.randperm(n_slots, device=device)[:n].int()

            def fetch(copy: int, rows: list[torch.Tensor] = rows, places: torch.Tensor = places) -> None:
                gather(host.data_ptr(), 4 * hidden, rows[copy], places, counts, slabs[copy])

            note(f"gather {n}", microseconds(fetch), n * 4 * hidden)

    counts[N_CANDIDATES] = n_candidates
    step.slots[:n_candidates] = torch.randint(n_slots, (n_candidates,), device=device).int()
    scratch, n_active = MLPScratch(1, ffn, hidden, device), torch.zeros(1, dtype=torch.int64, device=device)
    biases = torch.full((ffn,), 100.0, device=device), torch.zeros(hidden, device=device)
    y = torch.empty(1, hidden, device=device)

    def compute(copy: int) -> None:
        sparse_mlp.sparse_mlp(
            slabs[copy], host.data_ptr(), 4 * hidden, step.missing, step, *biases, x, scratch, n_active, y
        )

    note_shapes("sparse_mlp", sparse_mlp, compute, n_candidates * 4 * hidden)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=16384)
    parser.add_argument("--active", type=float, default=0.045)
    parser.add_argument("--slots", type=float, default=0.12)
    parser.add_argument("--all-shapes", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.hidden, arguments.ffn, arguments.active, arguments.slots, all_shapes=arguments.all_shapes)
    text = json.dumps({"device": torch.cuda.get_device_name(), "triton": triton.__version__} | dict(found), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
