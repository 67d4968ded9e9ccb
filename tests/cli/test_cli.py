"""The command line: results on stdout, errors in one line on stderr, and the documented exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from child_process import start_forked

import sparseflow
from sparseflow.cli.main import build_parser, main
from sparseflow.core.config import OffloadStrategy
from sparseflow.engine.memory_plan import fixed_nbytes, least_nbytes
from sparseflow.store.manifest import Manifest
from sparseflow.utils.sizes import format_size

Capture = pytest.CaptureFixture[str]


def failed(arguments: list[str], code: int, capsys: Capture) -> str:
    """Run a command that must fail with this exit code and one line on stderr; return the line."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("sparseflow: error: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_version(capsys: Capture) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"{sparseflow.__version__}\n"


def test_python_m_is_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sparseflow", "version", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(result.stdout) == {"version": sparseflow.__version__}


@pytest.mark.parametrize("words", [["--model", "MODEL", "--cache-ratio", "0.5"], ["MODEL", "--gpu-cache-ratio", "0.5"]])
def test_info_describes_a_model(words: list[str], demo_model: Path, capsys: Capture) -> None:
    assert main(["info", "--json", *(str(demo_model) if word == "MODEL" else word for word in words)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_layers"] == 8
    assert facts["bundle_nbytes"] == 2 * 256 * 2
    assert facts["gpu_neurons_per_layer"] == 512
    assert facts["layer_sparsity_map"] is None


def test_info_says_what_memory_a_store_takes_in_units(demo_store: Path, capsys: Capture) -> None:
    assert main(["info", str(demo_store)]) == 0
    facts = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    manifest = Manifest.load(demo_store)
    assert facts["all_in_memory"] == format_size(fixed_nbytes(manifest) + manifest.nbytes_under("neurons/"))
    assert facts["least_memory"] == format_size(least_nbytes(manifest))
    assert facts["neurons"] == format_size(manifest.profile.neurons_nbytes)
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "None" not in facts.values()


@pytest.mark.parametrize("command", ["info", "demo"])
def test_a_model_is_named_once(command: str, demo_model: Path, capsys: Capture) -> None:
    assert "one and --model two: give one of them" in failed([command, "one", "--model", "two"], 2, capsys)


def test_demo_streams_text_and_ends_with_the_table(capsys: Capture) -> None:
    assert main(["demo", "--max-new-tokens", "20"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("And it came to pass in those days, that")
    table = dict(line.strip().split(None, 1) for line in out.splitlines()[-6:])
    assert table["ids"] == "equal dense    yes"
    assert {"fidelity", "tokens/s", "neurons", "memory"} <= table.keys()


def test_demo_gives_every_result_field_as_json(capsys: Capture) -> None:
    assert main(["demo", "--json", "--max-new-tokens", "20", "--temperature", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ids_equal_dense"] is True
    assert len(result["token_ids"]) == 20
    assert result["fidelity"] == "exact"
    assert result["dense_layer_share"] == 0
    assert 0 < result["active_share"] < result["candidate_share"] < 0.3
    assert result["decode_tokens_per_s"] > 0
    assert result["time_to_first_token_s"] > 0
    assert result["bytes_touched_per_token"] > 0
    assert result["hit_rate"] is None
    assert result["memory"]["private"] > 0


def test_convert_then_verify_then_generate(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    assert main(["convert", str(checkpoint), str(store), "--quiet", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["dtype"] == "float32"
    assert main(["verify", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == {}
    arguments = ["--prompt", "a", "--max-new-tokens", "9", "--audit", "1", "--json", "--fidelity", "certified"]
    assert main(["generate", str(store), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fidelity"] == "certified"
    assert result["recall"] == 1
    assert result["recall_samples"] > 0


def test_a_store_is_not_converted_to_another_dtype(demo_store: Path, capsys: Capture) -> None:
    line = failed(["convert", str(demo_store), "--dtype", "float16"], 2, capsys)
    assert "holds float32, float16 is asked for" in line


def test_generate_is_repeatable_under_a_seed(checkpoint: Path, capsys: Capture) -> None:
    texts = []
    for _ in range(2):
        arguments = ["--prompt", "a", "--max-new-tokens", "12", "--temperature", "1", "--seed", "5", "--json"]
        assert main(["generate", str(checkpoint), *arguments]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1]


def test_verify_names_every_damaged_file(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    assert main(["convert", str(checkpoint), str(store), "--quiet"]) == 0
    for name in ("dense.safetensors", "neurons/layer-001.safetensors"):
        content = bytearray((store / name).read_bytes())
        content[-100] ^= 1
        (store / name).write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(store), "--json"]) == 1
    assert set(json.loads(capsys.readouterr().out)["damaged"]) == {"dense.safetensors", "neurons/layer-001.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--memory", "1KiB"], 1, r"allowed are 1KiB.*allow more"),
        (["--max-new-tokens", "500"], 2, "64 positions.*lower max_new_tokens"),
        (["--activation-threshold", "inf"], 2, "activation_threshold=inf"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(
    checkpoint: Path, capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    import re

    line = failed(["generate", str(checkpoint), "--prompt", "a", *arguments], code, capsys)
    assert re.search(message, line), line


def test_what_is_not_there_or_not_ours_fails_with_its_name(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "no such folder" in failed(["generate", "./missing", "--prompt", "a"], 1, capsys)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    line = failed(["convert", str(checkpoint), str(tmp_path / "store"), "--quiet"], 1, capsys)
    assert "'gelu'" in line
    assert "exactly zero" in line
    assert not (tmp_path / "store").exists()
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "'llama'" in failed(["generate", str(checkpoint), "--prompt", "a"], 1, capsys)


def test_a_model_without_tokenizer_says_what_to_do(family_checkpoint: Callable[..., Path], capsys: Capture) -> None:
    line = failed(["generate", str(family_checkpoint("base")), "--prompt", "a"], 1, capsys)
    assert "came without a tokenizer" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["store", "--max-new-tokens", "0"], "0 is out of range: give a number at least 1"),
        (["store", "--threads", "0"], "at least 1"),
        (["store", "--top-p", "7"], "between 0 and 1"),
        (["store", "--temperature", "nan"], "nan is out of range"),
        (["store", "--audit", "often"], "'often'"),
        (
            ["store", "--cpu-cache-ratio", "1.5"],
            "--cpu-cache-ratio: 1.5 is no share: give a number above 0 and at most 1",
        ),
        (["store", "--gpu-cache-ratio", "none"], "--gpu-cache-ratio: none is no share"),
        (["store", "--io", "tape"], "--io: invalid choice: 'tape' (choose from 'auto', 'direct', 'buffered', 'map')"),
        (["store", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["store", "--fidelity", "perfect"], "'perfect': give one of exact, certified, calibrated, dense, or"),
        (["store", "--memory", "lots"], "--memory: size 'lots': write a size above 0 with its unit, such as 6GiB"),
        (["store", "--device-memory", "0"], "--device-memory: size '0': write a size above 0"),
        (["store", "--device", "tpu"], "--device: 'tpu' is no device: give cpu, cuda, or cuda:N"),
        (["store", "--activation-threshold", "-1"], "--activation-threshold: -1 is out of range"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_right(arguments: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name either a STORE or a --server"),
        (["store", "--server", "name"], 2, "name either a STORE or a --server"),
        (["--model", "name"], 2, "--model name is one of a server's; name that with --server, or give a store"),
        (["./store", "--prompt", "a"], 1, "./store: no such folder"),
        (["--server", "name", "--io", "auto"], 2, "--io auto: the server decides that"),
        (["--server", "name", "--aggressive-offload"], 2, "--aggressive-offload: the server decides that"),
        (["--server", "name", "--memory", "6GiB"], 2, "--memory 6GiB: the server decides that"),
        (["--server", "nobody-has-this-name"], 3, "no server 'nobody-has-this-name' runs here"),
    ],
)
def test_generate_takes_a_store_or_a_server_that_runs(
    arguments: list[str], code: int, message: str, capsys: Capture
) -> None:
    assert message in failed(["generate", *arguments], code, capsys)


def test_status_of_a_server_that_does_not_run_is_exit_code_3(capsys: Capture) -> None:
    assert "no server 'nobody-has-this-name' runs here" in failed(
        ["status", "--server", "nobody-has-this-name"], 3, capsys
    )


def test_an_unknown_log_level_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("SPARSEFLOW_LOG", "loud")
    assert "SPARSEFLOW_LOG=LOUD" in failed(["version"], 2, capsys)


@pytest.mark.parametrize("words", [["version"], ["version", "--json"]])
def test_a_reader_that_is_gone_at_once_is_no_crash(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code, log = run_to(words, writing)
    assert (code, log) == (1, "")


@pytest.mark.parametrize("words", [["version"], ["version", "--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(words: list[str], unbuffered: str) -> None:
    code, log = run_to(words, os.open("/dev/full", os.O_WRONLY), unbuffered)
    assert (code, log) == (1, "sparseflow: error: standard output cannot be written (No space left on device)\n")


def run_to(words: list[str], stdout: int, unbuffered: str = "") -> tuple[int, str]:
    """Run a command that writes there, which is closed; its exit code, and stderr."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sparseflow", *words],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(stdout)
    return done.returncode, done.stderr


def test_a_reader_that_stops_reading_is_no_crash(fork_server: None, tmp_path: Path) -> None:
    code = "import sys; from sparseflow.cli.main import main; sys.exit(main(['demo', '--max-new-tokens', '300']))"
    log = tmp_path / "log"
    with start_forked(code, log=log) as process:
        assert process.stdout.read(45)
        process.stdout.close()
        assert process.wait(120) == 1
    assert "Traceback" not in log.read_text(encoding="utf-8")


def test_defaults_shown_are_those_written_in_the_strategy() -> None:
    arguments = build_parser().parse_args(["generate", "store"])
    assert arguments.cpu_cache_ratio == OffloadStrategy().cpu_cache_ratio
    assert arguments.activation_threshold == OffloadStrategy().activation_threshold


def test_the_example_program_runs(capsys: Capture) -> None:
    from sparseflow.examples import demo_generation

    model, tokenizer, config = demo_generation.setup_model()
    text = demo_generation.generate_text(model, tokenizer, "In the beginning", max_tokens=10, temperature=0)
    assert text.startswith("In the beginning")
    demo_generation.print_performance_stats(model, config)
    assert "neurons active" in capsys.readouterr().out


def test_only_a_server_lends_weights(capsys: pytest.CaptureFixture[str], demo_model: Path) -> None:
    assert main(["generate", str(demo_model), "--prompt", "x", "--borrow-dense"]) == 2
    assert "--server" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], demo_model: Path) -> None:
    assert main(["generate", str(demo_model), "--prompt", "x", "--device", "cuda"]) == 2
    assert "sees 0 GPUs" in capsys.readouterr().err
