"""The benchmark of a weight server: both models see the same, its counts are those of the server, no server stays."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_process import run_forked, start_forked

from sparseflow.engine.counts import ReadTimes
from sparseflow.orchestration.lookahead import Lookahead

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))

import served  # noqa: E402
from memory_child import BenchError  # noqa: E402

DEADLINE_S = 30

pytestmark = [
    pytest.mark.usefixtures("fork_server"),
    # `launch` leaves its server running, and the benchmark ends it by its process id.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the benchmark's folders are made, under a path that is short enough for sockets. Nothing may be left."""
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", f"{folder}/servers")
        yield Path(folder)
        try:
            assert not servers_below(folder)
            assert [path.name for path in Path(folder).iterdir() if path.name.startswith("sf-")] == []
        finally:
            for process in servers_below(folder):
                process.kill()
                process.wait(DEADLINE_S)


def servers_below(folder: Path | str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_there = process.environ().get("SPARSEFLOW_RUNTIME_DIR", "").startswith(str(folder))
            if is_there and "sparseflow_daemon" in process.cmdline():
                found.append(process)
    return found


@pytest.fixture
def arguments(family_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    line = ["served.py", "--store", str(family_store("base", "float32")), "--rounds", "1", "--tokens", "4"]
    monkeypatch.setattr(sys, "argv", [*line, "--warm-up", "2", "--memory", "1GiB"])
    return served.parse_arguments()


def counted(label: str, s_per_token: float, **more: Any) -> dict[str, Any]:
    keys = {key for _, key, *_ in served.COLUMNS + served.HINT_COLUMNS} | {"misses_per_token", "evictions_per_token"}
    row = dict.fromkeys(keys, 2.0) | {"s_per_token_median": s_per_token, "io": "direct", "auto_lookahead": "off"}
    return {label: row | {"disk_bytes_per_s": 1e9, "bytes_touched_per_token": 10**6} | more}


def a_round(ratio: float, **more: Any) -> dict[str, Any]:
    rivals = counted("in-process", 0.01 * ratio) | counted("served", 0.01, **more)
    return {"throughput_ratio": ratio, "n_same_token": 4, "memory_bytes_per_s": 2e10, "rivals": rivals}


def test_served_and_in_process_are_compared_at_each_size_of_the_arena(
    scratch: Path, family_store: Callable[..., Path], tmp_path: Path
) -> None:
    output = run_forked(
        BENCH / "served.py", "--store", family_store("base", "float32"), "--cpu-cache-ratio", 1.0, 0.2,
        "--rounds", 1, "--tokens", 4, "--warm-up", 2, "--memory", "1GiB", "--json", tmp_path / "result.json",
    )  # fmt: skip
    assert output.count("same token 4 of 4") == 2
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert [each["cpu_cache_ratio"] for each in result["comparisons"]] == [1.0, 0.2]
    for each in result["comparisons"]:
        in_process, served_row = each["rivals"]["in-process"], each["rivals"]["served"]
        expected = in_process["s_per_token_median"] / served_row["s_per_token_median"]
        assert each["throughput_ratio"] == pytest.approx(expected) == each["throughput_ratio_smallest"] > 0
        assert in_process["messages_per_token"] == 0
        assert served_row["memory_limit_s_per_token"] > 0
        assert len(each["rounds"]) == 1
    mapped, capped = (each["rivals"]["served"] for each in result["comparisons"])
    assert (mapped["messages_per_token"], mapped["hit_rate"], mapped["resident_share"]) == (0, None, 1)
    assert capped["messages_per_token"] > 0
    assert 0 <= capped["hit_rate"] < 1
    assert capped["resident_share"] < 0.3
    assert capped["bytes_from_disk_per_token"] > 0
    assert capped["disk_limit_s_per_token"] > 0


def test_prefetch_on_hints_more_than_off(scratch: Path, arguments: argparse.Namespace) -> None:
    arguments.prefetch = "input"
    result = served.compare(arguments, 0.2)
    off, on = result["rivals"]["off"], result["rivals"]["input"]
    assert result["n_same_token"] == result["n_compared"] == arguments.tokens
    assert on["hinted_per_token"] > off["hinted_per_token"]
    assert {off["auto_lookahead"], on["auto_lookahead"]} <= {"off", "before"}
    text = served.format_table([result], served.COLUMNS + served.HINT_COLUMNS)
    assert "wasted" in text.splitlines()[0]


def test_prefetch_with_all_in_memory_is_refused(scratch: Path, arguments: argparse.Namespace) -> None:
    arguments.prefetch = "before"
    with pytest.raises(BenchError, match="--cpu-cache-ratio 1: all bundles are in memory"):
        served.compare(arguments, 1.0)


def test_server_is_ended_when_a_round_fails(
    scratch: Path, arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = []

    def fail(*_: object) -> None:
        running.extend(servers_below(scratch))
        raise BenchError("in the middle")

    monkeypatch.setattr(served, "decode_in_turn", fail)
    with pytest.raises(BenchError, match="in the middle"):
        served.compare(arguments, 0.2)
    assert len(running) == 1
    assert not running[0].is_running()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_server_that_is_not_ready_yet_is_ended_on_a_signal(
    scratch: Path, arguments: argparse.Namespace, how: signal.Signals, tmp_path: Path
) -> None:
    words = ("--store", arguments.store, "--tokens", 100_000)
    with start_forked(BENCH / "served.py", *words, log=tmp_path / "errors") as bench:
        deadline = time.monotonic() + DEADLINE_S
        while not servers_below(scratch) and bench.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert servers_below(scratch), (tmp_path / "errors").read_text()
        bench.send_signal(how)
        assert bench.wait(DEADLINE_S) in (1, -signal.SIGINT)


def test_summary_is_of_medians_and_keeps_the_spread() -> None:
    rounds = [a_round(0.9), a_round(0.5, hit_rate=None), a_round(0.8, io="buffered")]
    summary = served.summarise(rounds, n_tokens=5)
    spread = [summary[f"throughput_ratio{end}"] for end in ("", "_smallest", "_largest")]
    assert spread == [0.8, 0.5, 0.9]
    assert (summary["n_same_token"], summary["n_compared"]) == (12, 15)
    assert summary["rivals"]["in-process"]["s_per_token_median"] == 0.008
    assert summary["rivals"]["served"]["hit_rate"] is None
    assert summary["rivals"]["served"]["io"] == "buffered/direct"


def test_table_rates_the_second_and_remarks_name_an_arena_that_is_not_full() -> None:
    comparison = {"cpu_cache_ratio": 0.3} | served.summarise([a_round(0.75, evictions_per_token=0)], n_tokens=4)
    heading, base, rated = served.format_table([comparison], served.COLUMNS).splitlines()
    assert heading.endswith("throughput (smallest-largest)")
    assert base.split()[:3] == ["0.3", "in-process", "7.50"]
    assert rated.endswith("0.750 (0.750-0.750)")
    remarks = list(served.remarks(comparison))
    assert remarks[:2] == ["same token 4 of 4", "memory is read at 20.0 GB/s, 1.0 MB a token"]
    assert remarks[2] == "disk (direct) gives bundles at random at 1000 MB/s"
    assert remarks[3] == "auto lookahead: off (in-process), off (served)"
    assert remarks[4:] == ["served: nothing was evicted, so its arena was not full yet; raise --warm-up"]


def test_choice_of_auto_is_told_whatever_is_forced() -> None:
    lookahead = Lookahead(ReadTimes(1.0, 2.0), ffn_dim=256)
    lookahead.mode = "input"
    assert served.auto_choice(lookahead) == "off"
    lookahead.note(scoring_s=1e-4, n_read=256)
    assert served.auto_choice(lookahead) == "before"
    assert lookahead.mode == "input"
