"""The figures of results: which bars there are, and what stands beside them."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparseflow.bench.figure import Bar, draw, draw_bars, draw_gpu, name_of
from sparseflow.bench.gpu.cases import SMALL_CAP

RESULTS = Path(__file__).parents[2] / "scripts" / "bench" / "results"


def committed(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def test_bar_is_as_long_as_its_rate_and_says_it() -> None:
    bars = [Bar("accelerate", 2.0, 1.5, 2.5, None), Bar("**SparseFlow `exact`**", 41.6, 40.0, 43.0, 50.0)]
    axes = draw_bars(bars, "a title").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [2.0, 41.6]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["accelerate", "SparseFlow exact"]
    assert [text.get_text() for text in axes.texts] == ["2", "41.6"]
    (marks,) = [line for line in axes.lines if line.get_marker() == "|"]
    assert marks.get_xdata().tolist() == [50.0]
    assert marks.get_ydata().tolist() == [1]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()


@pytest.mark.parametrize("name", ["demo", "opt-1.3b", "opt-1.3b-limited", "opt-6.7b"])
def test_committed_result_has_a_bar_for_each_case_that_finished(name: str) -> None:
    result = committed(name)
    axes = draw(result).axes[0]
    finished = {label: row for label, row in result["summary"].items() if row["n_finished"]}
    assert [bar.get_width() for bar in axes.patches] == [row["decode_tokens_per_s"] for row in finished.values()]
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names == [name_of(label).replace("*", "").replace("`", "") for label in finished]
    marks = next(line for line in axes.lines if line.get_marker() == "|").get_xdata()
    for mark, row in zip(marks, finished.values(), strict=True):
        assert mark <= row["memory_limit_tokens_per_s"]


def test_case_that_failed_has_none() -> None:
    result = committed("opt-1.3b-limited")
    result["summary"]["disk_offload"] = {"n_runs": 1, "n_finished": 0, "failures": ["out of memory"]}
    assert len(draw(result).axes[0].patches) == len(result["summary"]) - 1


def test_figure_of_a_gpu_has_what_keeps_to_the_limit() -> None:
    result = committed("gpu-h200")
    axes = draw_gpu(result, "opt-6.7b", SMALL_CAP).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "SparseFlow exact",
        "SparseFlow calibrated:0.99:coarse",
        "SparseFlow dense: sparsity off",
        "accelerate device_map",
        "accelerate cpu_offload",
    ]
    assert [text.get_text() for text in axes.texts][:2] == ["136", "158"]


def test_same_result_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw(committed("demo")).savefig(tmp_path / f"{name}.svg", metadata={"Date": None})
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
