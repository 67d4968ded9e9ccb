"""`sparseflow calibrate`, and what the other commands make of its store."""

import json
from pathlib import Path

import pytest

from sparseflow.cli.main import EXIT_FAILED, EXIT_OK, EXIT_USAGE, main


def test_calibrate_shows_what_it_chose_and_generate_uses_it(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    text = str(demo_model / "calibration.txt")
    assert main(["convert", str(demo_model), store, "--quiet"]) == EXIT_OK
    assert main(["calibrate", store, "--text", text, "--tokens", "512", "--epochs", "0", "--json"]) == EXIT_OK
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == 512
    for layer in result["layers"]:
        assert layer["chosen"] == min(layer["bytes_per_token"], key=layer["bytes_per_token"].get)
    generate = ["generate", store, "--prompt", "In the beginning", "--max-new-tokens", "4", "--json", "--fidelity"]
    assert main([*generate, "calibrated:0.95"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["fidelity"] == "calibrated:0.95"
    assert main(["verify", store]) == EXIT_OK


def test_a_table_marks_the_predictor_chosen_for_each_layer(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", str(demo_model / "calibration.txt"), "--tokens", "512", "--epochs", "0"]
    assert main(["calibrate", str(demo_model), *arguments]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.strip()[:1].isdigit() and "%" in line]
    assert len(rows) == 8
    assert all(row.count("*") == 1 for row in rows)


def test_a_recall_that_cannot_be_is_wrong_usage(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(demo_model / "heldout.txt")
    assert main(["calibrate", str(demo_model), "--text", text, "--recall", "0.5"]) == EXIT_USAGE
    assert "between 0.8 and 0.999" in capsys.readouterr().err
    assert main(["calibrate", str(demo_model), "--text", "/nowhere", "--recall", "0.9"]) == EXIT_FAILED
    assert "/nowhere: cannot be read as text" in capsys.readouterr().err
