"""Medians, limits and ratios: arithmetic that can be done by hand."""

import csv
import io
import re
from typing import Any

from sparseflow.bench.report import format_csv, format_table, note_agreement, summarise


def run_of(label: str, rate: float, n_round: int = 0, **more: Any) -> dict[str, Any]:
    measured = {
        "decode_tokens_per_s": rate,
        "bytes_touched_per_token": 50,
        "bytes_from_disk_per_token": 100,
        "bytes_from_disk_per_s": 100 * rate,
        "likeliest": [1, 2],
        "group": {"peak_nbytes": 5, "limit_hits": 2, "oom_kills": 0},
    }
    peer = label.partition(":")[0]
    return {"peer": peer, "label": label, "status": "ok", "round": n_round} | measured | more


def failed_run(label: str) -> dict[str, Any]:
    group = {"peak_nbytes": 9, "limit_hits": 4, "oom_kills": 1}
    return {"peer": label, "label": label, "status": "killed: out of memory", "group": group}


def test_summary_keeps_every_run() -> None:
    runs = [run_of("device_map", 2), run_of("sparseflow", 4, likeliest=[1, 3]), failed_run("sparseflow")]
    note_agreement(runs)
    summary = summarise(runs, memory_bytes_per_s=500, random_bytes_per_s=1000)
    sparse = summary["sparseflow"]
    assert (sparse["n_runs"], sparse["n_finished"], sparse["failures"]) == (2, 1, ["killed: out of memory"])
    assert (sparse["same_as_dense"], sparse["peak_nbytes"]) == (0.5, 9)
    text = format_table(summary)
    assert "sparseflow: killed: out of memory" in text
    assert "1/2 " in text
    assert re.search(r"4\.00 \(4\.00-4\.00\) +2\.00", text)


def test_limits_are_bandwidth_over_bytes() -> None:
    row = summarise([run_of("sparseflow", 4)], memory_bytes_per_s=500, random_bytes_per_s=1000)["sparseflow"]
    assert (row["memory_limit_tokens_per_s"], row["share_of_memory_limit"]) == (10, 0.4)
    assert (row["disk_limit_tokens_per_s"], row["share_of_random_reads"]) == (10, 0.4)
    resident = run_of("sparseflow", 4, bytes_from_disk_per_token=0, bytes_from_disk_per_s=0)
    row = summarise([resident], memory_bytes_per_s=500, random_bytes_per_s=None)["sparseflow"]
    assert "disk_limit_tokens_per_s" not in row


def test_spread_and_ratios_are_over_rounds() -> None:
    """A slow minute of the machine slows both, and the ratio is of what ran in the same minute."""
    rates = {"transformers": (10, 4, 6), "sparseflow": (20, 12, 18)}
    runs = [run_of(label, rate, n) for label, found in rates.items() for n, rate in enumerate(found)]
    row = summarise(runs, 500, 1000)["sparseflow"]
    assert (row["decode_tokens_per_s"], row["lowest_tokens_per_s"], row["highest_tokens_per_s"]) == (18, 12, 20)
    assert row["times"] == {"transformers": 3, "sparseflow": 1}


def test_dense_is_transformers_where_that_ran() -> None:
    runs = [run_of("device_map", 1, likeliest=[7, 8]), run_of("transformers", 1), run_of("ctranslate2", 1)]
    note_agreement(runs)
    assert [run["same_as_dense"] for run in runs] == [0, 1, 1]
    alone = [run_of("ctranslate2", 1)]
    note_agreement(alone)
    assert "same_as_dense" not in alone[0]


def test_csv_has_a_row_a_case() -> None:
    summary = summarise([run_of("transformers", 2), run_of("sparseflow", 4), failed_run("airllm")], 500, 1000)
    rows = list(csv.DictReader(io.StringIO(format_csv(summary))))
    assert [row["case"] for row in rows] == ["transformers", "sparseflow", "airllm"]
    assert [row["decode_tokens_per_s"] for row in rows] == ["2", "4", ""]
    assert [row["n_finished"] for row in rows] == ["1", "1", "0"]
