"""`sparseflow bench --quick`: real processes, and every derived figure is what its parts give."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from child_process import run_python
from safetensors.torch import load_file

from sparseflow.cli.main import main

MAIN = "import sys; from sparseflow.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def hub_home(demo_model: Path, tmp_path: Path) -> Path:
    """`HF_HOME` with somebody/small-opt, as the hub has OPT: weights in a `.bin` file."""
    repository = tmp_path / "hf" / "hub" / "models--somebody--small-opt"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    shutil.copytree(demo_model, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(demo_model / "model.safetensors"), snapshot / "pytorch_model.bin")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "cases",
    [
        ("transformers", "sparseflow"),
        pytest.param(("transformers", "sparseflow:fidelity=dense", "sparseflow"), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_quick_mode_adds_up_for_a_published_model(hub_home: Path, tmp_path: Path, cases: tuple[str, ...]) -> None:
    table, figure = tmp_path / "table.csv", tmp_path / "figure"
    words = ("--csv", table, "--plot", figure, "--cases", *cases)
    of_the_hub = {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    output = run_python(MAIN, "bench", "somebody/small-opt", "--quick", "--json", *words, timeout_s=300, **of_the_hub)
    result = json.loads(output)
    assert result["ok"]
    assert result["conditions"]["checkpoint"] == "small-opt"
    assert list(result["summary"]) == list(cases)
    [memory], [random] = (result["machine"][name] for name in ("memory_bytes_per_s", "random_bytes_per_s"))
    for run in result["runs"]:
        row = result["summary"][run["label"]]
        assert len(run["step_s"]) == 4
        assert math.isclose(run["decode_tokens_per_s"], 3 / sum(run["step_s"][1:]))
        assert row["decode_tokens_per_s"] == run["decode_tokens_per_s"]
        assert math.isclose(row["memory_limit_tokens_per_s"], memory / run["bytes_touched_per_token"])
        assert math.isclose(row["share_of_memory_limit"] * row["memory_limit_tokens_per_s"], row["decode_tokens_per_s"])
        assert math.isclose(row["share_of_random_reads"], run["bytes_from_disk_per_s"] / random)
        dense_rate = result["summary"]["transformers"]["decode_tokens_per_s"]
        assert math.isclose(row["times"]["transformers"], run["decode_tokens_per_s"] / dense_rate)
        assert row["same_as_dense"] == 1
    *dense, sparse = (result["summary"][label] for label in cases)
    assert [row.get("candidate_share") for row in dense] == [None, 1][: len(dense)]
    assert sparse["active_share"] <= sparse["candidate_share"] < 0.5
    for row in dense:
        assert sparse["bytes_touched_per_token"] < 0.7 * row["bytes_touched_per_token"]
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [row["case"] for row in rows] == list(cases)
    assert figure.with_name("figure.svg").exists()


def test_a_store_is_no_checkpoint_to_measure(
    family_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(family_store("base"))]) == 2
    assert "is a store; give the checkpoint that it was made from, and this as --store" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_converted_is_one_error(
    family_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(family_checkpoint("base"), tmp_path / "tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    assert main(["bench", str(folder), "--quick", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.count("sparseflow: error:") == 1
    assert "cannot be converted: " in err
    assert "'gelu'" in err


@pytest.mark.slow
def test_peers_agree_under_a_limit(group_parent: object, tmp_path: Path) -> None:
    cases = ("device_map", "disk_offload", "partial_offload", "sparseflow:fidelity=dense", "sparseflow")
    output = run_python(
        MAIN, "bench", "--json", "--limit", "1GiB", "--tokens", 3, "--rounds", 1, "--partial-layers", 4,
        "--cases", *cases, timeout_s=600,
    )  # fmt: skip
    result = json.loads(output)
    assert result["ok"]
    assert all(row["same_as_dense"] == 1 for row in result["summary"].values())
    assert all(run["cached_before_nbytes"]["weights"] == 0 for run in result["runs"])


@pytest.mark.slow
def test_without_cgroups_weights_are_evicted_before_every_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparseflow.bench.memory_cgroup import NoMemoryGroupError
    from sparseflow.cli import bench
    from sparseflow.cli.main import main

    def refuse() -> None:
        raise NoMemoryGroupError("none here")

    monkeypatch.setattr(bench, "find_group_parent", refuse)
    assert main(["bench", "--quick", "--json", "--limit", "1GiB", "--cases", "transformers", "sparseflow"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "evicted before every token" in result["limit"]
    transformers = result["summary"]["transformers"]
    assert transformers["bytes_from_disk_per_token"] > 0.9 * transformers["bytes_touched_per_token"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "flexgen"], "give one of"),
        (["--python", "flexgen=/usr/bin/python"], "PEER one of"),
        (["--limit", "much"], "much"),
        ([str(Path(__file__).parent)], "give a transformers checkpoint folder"),
    ],
)
def test_wrong_usage_says_what_is_right(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseflow.cli.main import main

    try:
        code = main(["bench", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


def test_partial_offloads_are_refused_where_layers_cannot_be_told_apart(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / "pytorch_model.bin").touch()
    assert main(["bench", str(tmp_path / "model"), "--limit", "1GiB"]) == 2
    assert "no config.json and *.safetensors" in capsys.readouterr().err
