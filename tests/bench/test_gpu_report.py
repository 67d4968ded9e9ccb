"""Every derived figure of the GPU benchmark is what its parts give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparseflow.bench.gpu.cases import GPUCase, all_cases, matching, quick_cases
from sparseflow.bench.gpu.child import LEAST_TOKENS, Times, generation, plan_generations, prompt_of
from sparseflow.bench.gpu.report import agreement, limits, markdown, rows_of, targets
from sparseflow.bench.gpu.runs import without_paths

MACHINE = {"name": "GPU", "memory_bytes_per_s": 2e12, "pinned_bytes_per_s": 5e10, "pageable_bytes_per_s": 1e10}
CAP = 8_700_000_000


def made(rate: float, start: float = 0.0, ids: tuple[int, ...] = (7, 8, 9, 10, 11)) -> dict[str, Any]:
    """A generation whose first token takes 0.1 s and each other 1 / rate."""
    times = [start + 0.1 + n / rate for n in range(len(ids))]
    return generation(list(ids), start, times)


def run(case: GPUCase, *rates: float, **process: Any) -> dict[str, Any]:
    """A finished run; each of its processes makes a generation of each rate."""
    told = {
        "generations": [made(rate) for rate in rates],
        "greedy": made(1.0, ids=(1, 2)),
        "load_s": 3.0,
        "device_bytes_per_token": 4e9,
        "pcie_bytes_per_token": 5e7,
    }
    report = {"label": case.label, "status": "ok", "device_peak_nbytes": 8 * 10**9, "busy_share": 0.5, "wall_s": 9.0}
    fields = {name: getattr(case, name) for name in case.__slots__}
    return fields | report | {"processes": [told | process] * case.n_processes}


def by_label(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in rows_of(runs, MACHINE)}


def test_a_generation_is_timed_from_its_first_token_on() -> None:
    found = made(20.0, start=5.0)
    assert math.isclose(found["time_to_first_token_s"], 0.1)
    assert math.isclose(found["decode_tokens_per_s"], 20.0)
    assert math.isclose(found["end"], 5.0 + 0.1 + 4 / 20)
    assert generation([3], 0.0, [0.5])["decode_tokens_per_s"] is None


def test_the_prompt_that_a_streamer_is_handed_is_no_token() -> None:
    times = Times()
    for _ in range(3):
        times.put(None)
    assert len(times.of_tokens) == 2


@pytest.mark.parametrize(
    ("budget_s", "step_s", "expected"),
    [
        (12.0, 0.01, (3, 96)),  # there is time for all
        (12.0, 0.1, (3, 40)),  # for fewer tokens
        (12.0, 1.0, (3, LEAST_TOKENS)),
        (12.0, 2.0, (1, 6)),  # for one generation
        (12.0, 60.0, (1, LEAST_TOKENS)),  # not even for that
    ],
)
def test_generations_are_planned_to_end_in_time(budget_s: float, step_s: float, expected: tuple[int, int]) -> None:
    assert plan_generations(budget_s, step_s, 3, 96) == expected


def test_prompts_depend_on_seed_and_number_only() -> None:
    settings = {"seed": 1, "vocab_size": 50, "prompt_tokens": 32}
    assert prompt_of(settings, 0) == prompt_of(settings | {"program": "other"}, 0)
    assert prompt_of(settings, 0) != prompt_of(settings, 1)
    assert all(4 <= token < 50 for token in prompt_of(settings, 2))


def test_limits_are_what_the_bytes_take() -> None:
    found = limits(4e9, 1e8, MACHINE)  # 2 ms each
    assert math.isclose(found["overlapped_tokens_per_s"], 500)
    assert math.isclose(found["in_turn_tokens_per_s"], 250)


def test_ids_are_compared_as_far_as_both_go() -> None:
    assert agreement([[1, 2, 3], [4]], [[1, 2], [4, 5]]) == {
        "is_equal": True,
        "first_differences": [None, None],
        "n_same": 3,
        "n_compared": 3,
    }
    found = agreement([[1, 2, 3, 4]], [[1, 9, 3, 4]])
    assert (found["is_equal"], found["first_differences"], found["n_same"]) == (False, [1], 3)
    assert not agreement([], [])["is_equal"]


def test_rates_are_medians_with_their_spread_beside_limits_and_others() -> None:
    exact, dense = GPUCase("sparseflow", "opt-6.7b", "exact", CAP), GPUCase("sparseflow", "opt-6.7b", "dense", CAP)
    whole = GPUCase("transformers")
    rows = by_label([run(exact, 90.0, 120.0, 100.0), run(dense, 10.0), run(whole, 50.0)])
    row = rows[exact.label]
    assert math.isclose(row["decode_tokens_per_s"], 100)
    assert math.isclose(row["lowest_tokens_per_s"], 90)
    assert math.isclose(row["highest_tokens_per_s"], 120)
    assert math.isclose(row["times"][dense.label], 10)
    assert math.isclose(row["times"][whole.label], 2)
    assert math.isclose(row["limits"]["overlapped_tokens_per_s"], 500)
    assert math.isclose(row["share_of_overlapped_limit"], 0.2)
    assert row["nearest_limit"] == "GPU memory"
    assert row["is_within_cap"]
    assert row["agreement"]["transformers"]["n_compared"] == 5
    assert row["greedy_agreement"]["own dense"]["n_compared"] == 2
    assert "transformers" not in rows[whole.label]["agreement"]


def test_other_caps_and_other_models_are_no_baseline() -> None:
    small, large = (GPUCase("sparseflow", "opt-6.7b", "exact", cap) for cap in (CAP, 2 * CAP))
    other = GPUCase("sparseflow", "opt-13b", "exact", CAP)
    rows = by_label([run(small, 10.0), run(large, 20.0), run(other, 5.0)])
    assert [row["times"] for row in rows.values()] == [{}, {}, {}]


def test_too_much_memory_is_told() -> None:
    case = GPUCase("sparseflow", "opt-6.7b", "exact", CAP)
    [row] = rows_of([run(case, 10.0) | {"device_peak_nbytes": CAP + 1}], MACHINE)
    assert row["is_within_cap"] is False


def test_two_at_one_server_count_together() -> None:
    one, two = (GPUCase("sparseflow", "opt-6.7b", "exact", CAP, n) for n in (1, 2))
    rows = by_label([run(one, 100.0), run(two, 80.0)])
    alone, both = rows[one.label], rows[two.label]
    assert math.isclose(alone["together_tokens_per_s"], 5 / (0.1 + 4 / 100))
    assert math.isclose(both["together_tokens_per_s"], 10 / (0.1 + 4 / 80))
    assert math.isclose(both["times"][one.label], both["together_tokens_per_s"] / alone["together_tokens_per_s"])
    assert math.isclose(both["shares"]["PCIe"], 160 * 5e7 / 5e10)
    found = {target["what"]: target for target in targets(list(rows.values()))}
    assert found["times one process, by two at one server"]["is_met"]
    assert found["tokens/s"]["found"] is None


def test_what_a_killed_case_told_before_is_shown() -> None:
    case = GPUCase("cpu_offload", "opt-6.7b", "", CAP)
    killed = run(case, 0.5) | {"status": "killed after 60 s, while measuring"}
    never = {name: getattr(case, name) for name in case.__slots__}
    never |= {"label": case.label, "status": "not begun: 3 s were left"}
    rows = rows_of([killed, never], MACHINE)
    assert math.isclose(rows[0]["decode_tokens_per_s"], 0.5)
    assert "times" not in rows[0]
    assert "decode_tokens_per_s" not in rows[1]
    text = markdown({"rows": rows, "conditions": CONDITIONS, "driver": None})
    assert "killed after 60 s" in text
    assert f"Not measured, for want of time: `{case.label}`." in text


CONDITIONS = {"new_tokens": 96, "prompt_tokens": 32, "text": "random"}


def test_a_table_has_a_row_a_case_of_as_many_cells() -> None:
    cases = all_cases()
    machine = {"device": MACHINE, "versions": {"torch": "2", "triton": "3", "accelerate": "1"}}
    rows = rows_of([run(case, 10.0) for case in cases], MACHINE)
    result = {"rows": rows, "conditions": CONDITIONS, "driver": "580", "machine": machine}
    result = json.loads(json.dumps(result))  # as it comes from a file
    lines = markdown(result).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(cases)
    assert len({line.count("|") for line in table}) == 1
    assert any(line.startswith("Two processes at one server") for line in lines)
    assert "driver 580" in lines[-1]


def test_labels_tell_cases_apart_and_patterns_find_them() -> None:
    labels = [case.label for case in all_cases()]
    assert len(set(labels)) == len(labels)
    assert [case.label for case in matching(all_cases(), "served")] == [name for name in labels if "served" in name]
    assert {case.label for case in quick_cases()} <= set(labels)


def test_messages_lose_this_machines_paths() -> None:
    text = without_paths("DiskError: /dev/shm/a-b/store/manifest.json: not a store ('/tmp/x/y'); 3/4 of 1/2")
    assert text == "DiskError: manifest.json: not a store ('y'); 3/4 of 1/2"


def test_tables_of_gpus_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "bench"))
    import tables

    result = {"rows": rows_of([run(GPUCase("transformers"), 10.0)], MACHINE), "conditions": CONDITIONS, "driver": None}
    for name in ("gpu-a", "gpu-b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.all_tables() == {"gpu": f"{markdown(result)}\n\n{markdown(result)}"}
