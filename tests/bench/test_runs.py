"""No run is lost, however it ends; and its conditions are what the report says."""

import os
from pathlib import Path
from typing import Any

import pytest
from child_process import run_python

from sparseflow.bench import runs
from sparseflow.bench.cases import Case
from sparseflow.bench.child import Meter, dense_nbytes_per_token, evict, given_tokens, read_nbytes
from sparseflow.bench.memory_cgroup import NAME_PREFIX, GroupParent
from sparseflow.bench.runs import DEMO_MODEL, Bench, Conditions, run_rounds

DEADLINE_S = 120
MIB = 1 << 20


def bench_of(tmp_path: Path, parent: GroupParent | None = None, **conditions: Any) -> Bench:
    common = {"tokens": 2, "prompt_tokens": 2, "threads": 1, "deadline_s": DEADLINE_S}
    return Bench(Conditions(DEMO_MODEL, DEMO_MODEL, **common | conditions), parent, tmp_path, lambda text: None)


def groups_in(parent: GroupParent) -> list[Path]:
    return list(parent.folder.glob(f"{NAME_PREFIX}{os.getpid()}-*"))


def test_parent_maps_no_library_that_children_load() -> None:
    heavy = {"torch", "numpy", "transformers", "numba"}
    run_python(f"import sparseflow.bench.runs, sys; assert not {heavy} & sys.modules.keys()")


def test_child_out_of_memory_is_reported(group_parent: GroupParent, tmp_path: Path) -> None:
    report = bench_of(tmp_path, group_parent).run(Case("device_map"), 48 * MIB)
    assert report["status"] == "killed: out of memory"
    assert report["group"]["oom_kills"] > 0
    assert not groups_in(group_parent)


def test_child_past_its_deadline_is_killed_and_reported(group_parent: GroupParent, tmp_path: Path) -> None:
    for parent in (group_parent, None):
        report = bench_of(tmp_path, parent, deadline_s=0.3).run(Case("sparseflow"))
        assert report["status"] == "killed after its deadline of 0.3 s"
    assert not groups_in(group_parent)


def test_child_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    report = bench_of(tmp_path).run(Case("sparseflow"), store="/nonexistent")
    assert report["status"].startswith("exit status 1: ")
    assert "/nonexistent" in report["status"]


def test_each_round_begins_with_another_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path)
    monkeypatch.setattr(bench, "run", lambda case, limit: {"label": case.label})
    runs, searched, base_nbytes = run_rounds(bench, [Case("a"), Case("b"), Case("c")], 3, (), lambda: None)
    assert [(run["round"], run["label"]) for run in runs] == [
        (0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b"),
    ]  # fmt: skip
    assert (searched, base_nbytes) == ([], {})


def test_rates_leave_out_the_prompt_and_the_first_step() -> None:
    meter = Meter(())
    meter.steps = [
        {"s": s, "cpu_s": 2 * s, "bytes_from_disk": nbytes, "major_faults": 3, "likeliest": n}
        for n, (s, nbytes) in enumerate([(9.0, 900), (5.0, 500), (1.0, 100), (3.0, 60)])
    ]
    report = meter.report()
    assert (report["time_to_first_token_s"], report["first_step_s"]) == (9, 5)
    assert (report["decode_tokens_per_s"], report["bytes_from_disk_per_token"]) == (2 / 4, 80)
    assert (report["bytes_from_disk_per_s"], report["cpu_s_per_token"]) == (40, 4)
    assert report["likeliest"] == [0, 1, 2, 3]


def test_every_case_is_given_the_same_tokens() -> None:
    settings = {"seed": 3, "vocab_size": 50, "prompt_tokens": 20, "tokens": 30}
    prompt, tokens = given_tokens(settings)
    assert (len(prompt), len(tokens)) == (20, 30)
    assert set(prompt + tokens) <= set(range(4, 50))
    assert given_tokens(settings) == (prompt, tokens) != given_tokens(settings | {"seed": 4})


def test_a_dense_model_reads_all_matrices_and_one_embedding() -> None:
    config = {"hidden_size": 10, "ffn_dim": 40, "num_hidden_layers": 3, "vocab_size": 100}
    of_layer = 4 * 10 * 10 + 2 * 10 * 40
    assert dense_nbytes_per_token(config, 2) == 2 * (3 * of_layer + 100 * 10)
    projected = config | {"word_embed_proj_dim": 5}
    assert dense_nbytes_per_token(projected, 1) == 3 * of_layer + 100 * 5 + 2 * 5 * 10


def test_evicted_files_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 * MIB))
    os.sync()
    evict([str(path)])
    before = read_nbytes()
    path.read_bytes()
    if read_nbytes() == before:
        pytest.skip(f"{tmp_path} is no disk")
    before = read_nbytes()
    path.read_bytes()
    assert read_nbytes() == before
    evict([str(path)])
    path.read_bytes()
    assert read_nbytes() - before == 4 * MIB


def test_search_goes_on_while_more_layers_are_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path, reserve_nbytes=0, limit_nbytes=1 << 30)
    rates = {2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 6.0, 7: 5.0, 8: 9.0}

    def run(case: Case, limit: int, **replaced: Any) -> dict[str, Any]:
        layers, copied = (option.partition("=")[2] for option in case.options)
        return {"label": case.label, "decode_tokens_per_s": rates[int(layers)] if copied == "yes" else 0.5}

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(runs, "layer_nbytes", lambda checkpoint: [100 << 20] * 8 + [0])
    tried, best = runs.search_partial(bench, (), {"device_map": 600 << 20})
    copied = [run["label"].removesuffix(",copied=yes") for run in tried if run["label"].endswith("yes")]
    assert copied == [f"device_map:layers={n}" for n in (2, 3, 4, 5, 6, 7)]
    assert best.label == "device_map:layers=6,copied=yes"
