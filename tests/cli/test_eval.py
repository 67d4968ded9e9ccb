"""`sparseflow eval`: one object or a table on stdout, a figure where it is asked for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM

from sparseflow.cli.main import main
from sparseflow.evaluation import plot

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def text(demo_model: Path) -> str:
    return str(demo_model / "heldout.txt")


def test_eval_gives_every_result_field_as_json(demo_model: Path, text: str, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["eval", str(demo_model), "--text", text, "--tokens", "512", "--window", "128", "--dtype", "float32"]
    fidelities = ["--fidelity", "exact", "certified"]
    assert main([*arguments, *fidelities, "--plot", str(tmp_path / "figure"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tokens"], result["window"]) == (512, 128)
    assert [found["fidelity"] for found in result["fidelities"]] == ["exact", "certified"]
    assert [found["predictor"] for found in result["fidelities"]] == ["exact", "certified"]
    for found in result["fidelities"]:
        assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
        assert found["perplexity_ratio_error"] == pytest.approx(0, abs=1e-5)
        assert found["kl_divergence"] == pytest.approx(0, abs=1e-6)
        assert found["top1_agreement"] == 1
        assert found["recall"] == 1
        assert 0 < found["active_share"] < found["candidate_share"] < 0.1
        assert found["bytes_per_token"]["predictor"] > found["bytes_per_token"]["memory"] > 0
        assert found["bytes_per_token"]["disk"] is None
        assert found["share_of_dense_mlp_bytes"] < 0.6
        assert len(found["layers"]) == 8
    exact, certified = result["fidelities"]
    assert exact["candidate_share"] < certified["candidate_share"]
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "figure.svg"}
    assert result["dense"]["perplexity"] == pytest.approx(dense_perplexity(demo_model, 4, 128), rel=1e-4)


def dense_perplexity(folder: Path, n_windows: int, window: int) -> float:
    """As transformers' dense model has it, of the start of the held-out text."""
    ids = AutoTokenizer.from_pretrained(folder)((folder / "heldout.txt").read_text(), verbose=False).input_ids
    windows = torch.tensor(ids[: n_windows * window]).view(n_windows, window)
    with torch.inference_mode():
        model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return float(model(windows, labels=windows).loss.exp())


def test_neurons_left_out_are_seen_in_the_table(demo_model: Path, text: str, capsys: Capture) -> None:
    arguments = ["--text", text, "--tokens", "256", "--fidelity", "exact", "--activation-threshold", "0", "--layers"]
    assert main(["eval", str(demo_model), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("256 tokens in windows of 256. Dense: perplexity ")
    assert lines[1].startswith("Recall: share of the active neurons that was chosen")
    assert len(lines) == 4 + 3 + 8
    ratio, recall = float(lines[3].split()[1]), float(lines[3].split()[4])
    assert ratio != 1
    assert 0.9 < recall < 1


def test_a_calibrated_store_keeps_the_recall_asked_for(calibrated_demo_store: Path, text: str, capsys: Capture) -> None:
    arguments = ["--text", text, "--tokens", "512", "--cpu-cache-ratio", "0.1", "0.5", "--json"]
    fidelities = ["calibrated:0.99", "calibrated:0.9:svd"]
    assert main(["eval", str(calibrated_demo_store), *arguments, "--fidelity", *fidelities]) == 0
    high, low = json.loads(capsys.readouterr().out)["fidelities"]
    assert [high["predictor"], low["predictor"]] == fidelities
    assert {layer["kind"] for layer in low["layers"]} == {"svd"}
    assert high["recall"] == pytest.approx(0.99, abs=0.008)
    assert low["recall"] == pytest.approx(0.9, abs=0.04)
    assert 0 < high["kl_divergence"] < low["kl_divergence"]
    for found in (high, low):
        assert 0 < found["recall_error"] < 0.01
        nbytes = found["bytes_per_token"]
        assert nbytes["predictor"] > 0
        assert 0 < nbytes["disk"]["0.5"] < nbytes["disk"]["0.1"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--window", "100000"], 2, "window 100000: give 2 to 512"),
        (["--text", "missing.txt"], 1, "missing.txt: cannot be read as text (no such file)"),
        (["--text", "/dev"], 1, "/dev: cannot be read as text (is a folder)"),
        (["--plot", "nowhere/figure"], 2, "nowhere/figure: its folder does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    demo_model: Path, text: str, arguments: list[str], code: int, message: str, capsys: Capture
) -> None:
    assert main(["eval", str(demo_model), "--text", text, *arguments]) == code
    assert message in capsys.readouterr().err


def test_no_more_tokens_are_measured_than_asked_for(demo_model: Path, text: str, capsys: Capture) -> None:
    assert main(["eval", str(demo_model), "--text", text, "--tokens", "5", "--fidelity", "exact", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tokens"], result["window"]) == (5, 5)


def test_a_fidelity_that_is_none_is_wrong_usage(text: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "model", "--text", text, "--fidelity", "exact", "perfect"])
    assert stopped.value.code == 2
    assert "'perfect'" in capsys.readouterr().err


def test_a_figure_that_cannot_be_drawn_is_refused_before_anything_runs(
    sparseflow_home: Path, demo_model: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert main(["eval", str(demo_model), "--text", text, "--plot", "figure"]) == 2
    assert "matplotlib" in capsys.readouterr().err
    assert not list(sparseflow_home.iterdir())
