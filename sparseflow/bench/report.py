"""What a benchmark found: medians by case, beside the machine's limits; as a table and CSV, and the files of them."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseflow.bench.figure import draw
from sparseflow.bench.runs import Run
from sparseflow.errors import DiskError
from sparseflow.utils.sizes import format_size

Row = dict[str, Any]

_MEDIANS = (
    "decode_tokens_per_s", "time_to_first_token_s", "first_step_s", "load_s", "bytes_from_disk_per_token",
    "bytes_from_disk_per_s", "bytes_touched_per_token", "cpu_s_per_token", "major_faults_per_token",
    "anonymous_nbytes", "mapped_nbytes", "shared_nbytes", "peak_rss_nbytes", "same_as_dense", "active_share",
    "candidate_share", "found_share",
)  # fmt: skip


def note_agreement(runs: Sequence[Run]) -> None:
    """Add to each finished run the share of positions where its likeliest token is transformers' dense model's.

    accelerate's offloads compute what that does, and stand for it where it did not run.
    """
    finished = [run for run in runs if run["status"] == "ok"]
    by_peer = {run["peer"]: run["likeliest"] for run in reversed(finished)}
    dense = next((by_peer[peer] for peer in ("transformers", "device_map", "disk_offload") if peer in by_peer), None)
    for run in finished:
        if dense is not None:
            run["same_as_dense"] = statistics.mean(a == b for a, b in zip(run["likeliest"], dense, strict=True))


def summarise(runs: Sequence[Run], memory_bytes_per_s: float, random_bytes_per_s: float | None) -> dict[str, Row]:
    """Label -> medians over its finished runs, spread, limits, ratios to the others, and how each other run ended.

    A limit is what would be if nothing but reading took time: the bytes touched from memory, those that missed from
    disk. A ratio to another case is the median over rounds, in each of which both ran.
    """
    table: dict[str, Row] = {}
    rates = _rates_by_round(runs)
    for label in dict.fromkeys(run["label"] for run in runs):
        own = [run for run in runs if run["label"] == label]
        finished = [run for run in own if run["status"] == "ok"]
        row: Row = {"n_runs": len(own), "n_finished": len(finished)}
        row["failures"] = [run["status"] for run in own if run["status"] != "ok"]
        groups = [run["group"] for run in own if run.get("group")]
        if groups:
            row["peak_nbytes"] = max(group["peak_nbytes"] or 0 for group in groups)
            row["limit_hits"] = statistics.median(group["limit_hits"] for group in groups)
        for name in _MEDIANS:
            values = [run[name] for run in finished if run.get(name) is not None]
            if values:
                row[name] = statistics.median(values)
        if finished:
            found = [run["decode_tokens_per_s"] for run in finished]
            row |= {"lowest_tokens_per_s": min(found), "highest_tokens_per_s": max(found)}
            row |= _limits(row, memory_bytes_per_s, random_bytes_per_s)
            row["times"] = {
                other: statistics.median(rates[label][n] / rates[other][n] for n in rates[label].keys() & by_round)
                for other, by_round in rates.items()
                if rates[label].keys() & by_round
            }
        table[label] = row
    return table


def _rates_by_round(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    rates: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["status"] == "ok":
            rates.setdefault(run["label"], {})[run.get("round", 0)] = run["decode_tokens_per_s"]
    return rates


def _limits(row: Row, memory_bytes_per_s: float, random_bytes_per_s: float | None) -> Row:
    limits: Row = {"memory_limit_tokens_per_s": memory_bytes_per_s / row["bytes_touched_per_token"]}
    limits["share_of_memory_limit"] = row["decode_tokens_per_s"] / limits["memory_limit_tokens_per_s"]
    if random_bytes_per_s is not None:
        limits["share_of_random_reads"] = row["bytes_from_disk_per_s"] / random_bytes_per_s
        if row["bytes_from_disk_per_token"]:
            limits["disk_limit_tokens_per_s"] = random_bytes_per_s / row["bytes_from_disk_per_token"]
    return limits


COLUMNS = (  # heading, key, unit, digits
    ("prompt s", "time_to_first_token_s", 1, 2),
    ("load s", "load_s", 1, 1),
    ("active %", "active_share", 0.01, 1),
    ("computed %", "candidate_share", 0.01, 1),
    ("found %", "found_share", 0.01, 1),
    ("read MB/token", "bytes_touched_per_token", 1e6, 0),
    ("memory's limit", "memory_limit_tokens_per_s", 1, 1),
    ("disk MB/token", "bytes_from_disk_per_token", 1e6, 1),
    ("disk's limit", "disk_limit_tokens_per_s", 1, 1),
    ("private MiB", "anonymous_nbytes", 1 << 20, 0),
    ("mapped MiB", "mapped_nbytes", 1 << 20, 0),
    ("group's peak MiB", "peak_nbytes", 1 << 20, 0),
    ("as dense", "same_as_dense", 1, 3),
)


def format_table(summary: dict[str, Row]) -> str:
    """For people: a line a case, with its rate against the first case's; and a line for each run that failed."""
    first = next(iter(summary))
    lines = [["", "runs", "tokens/s (lowest-highest)", "times", *(heading for heading, *_ in COLUMNS)]]
    for label, row in summary.items():
        lines.append([label, f"{row['n_finished']}/{row['n_runs']}", *rate_cells(row, first), *_cells(row)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text += [f"{label}: {failure}" for label, row in summary.items() for failure in row["failures"]]
    return "\n".join(text)


def rate_cells(row: Row, first: str) -> tuple[str, str]:
    """Tokens/s with their spread, and how many times the first case's."""
    if not row["n_finished"]:
        return "-", "-"
    rate, lowest, highest = (row[f"{name}_tokens_per_s"] for name in ("decode", "lowest", "highest"))
    times = row["times"].get(first)
    return f"{rate:.2f} ({lowest:.2f}-{highest:.2f})", "-" if times is None else f"{times:.2f}"


def _cells(row: Row) -> list[str]:
    return [f"{row[key] / unit:.{n}f}" if row.get(key) is not None else "-" for _, key, unit, n in COLUMNS]


def format_conditions(result: dict[str, Any]) -> str:
    """Under what conditions, for people."""
    asked, machine = result["conditions"], result["machine"]
    text = [
        f"{asked['checkpoint']}: {asked['tokens']} tokens after a prompt of {asked['prompt_tokens']}, "
        f"{asked['threads']} threads, {'cold' if result['is_cold'] else 'warm'}, {result['limit']}",
        "memory reads " + _rates(machine["memory_bytes_per_s"], 1e9, "GB/s"),
    ]
    if machine["random_bytes_per_s"]:
        text[1] += (
            f"; the disk {_rates(machine['random_bytes_per_s'], 1e6, 'MB/s')} in {machine['random_block_nbytes']} "
            f"bytes from random places ({machine['disk']}), "
            f"{_rates(machine['large_bytes_per_s'], 1e6, 'MB/s')} in 1 MiB"
        )
    if result["base_nbytes"]:
        taken = ", ".join(f"{format_size(nbytes)} with {peer}" for peer, nbytes in result["base_nbytes"].items())
        text.append(f"libraries alone take {taken}; SparseFlow's --memory {_memory(asked['memory'])}")
    return "\n".join(text)


def _rates(values: Sequence[float], unit: float, name: str) -> str:
    return f"{min(values) / unit:.0f}-{max(values) / unit:.0f} {name}"


def _memory(memory: int | str | None) -> str:
    return format_size(memory) if isinstance(memory, int) else str(memory)


def format_csv(summary: dict[str, Row]) -> str:
    """A row a case; ratios and failures are in the JSON alone."""
    names = list(dict.fromkeys(name for row in summary.values() for name in row if name not in ("times", "failures")))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *names])
    for label, row in summary.items():
        writer.writerow([label, *(row.get(name, "") for name in names)])
    return text.getvalue()


def write_files(result: dict[str, Any], csv_path: Path | None, plot_path: Path | None) -> list[Path]:
    """The CSV file, and the figure as PATH.png and PATH.svg.

    Raises:
        DiskError: one cannot be written.
    """
    written = []
    try:
        if csv_path is not None:
            csv_path.write_text(format_csv(result["summary"]), encoding="utf-8")
            written.append(csv_path)
        if plot_path is not None:
            figure = draw(result)
            for ending in ("png", "svg"):
                written.append(plot_path.with_name(f"{plot_path.name}.{ending}"))
                figure.savefig(written[-1], dpi=150, metadata={"Date": None} if ending == "svg" else None)
    except OSError as error:
        raise DiskError(f"{error}; give a path in a folder that is there and can be written") from error
    return written
