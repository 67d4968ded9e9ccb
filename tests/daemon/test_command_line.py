"""The words of `sparseflow-daemon`, how errors end it, and that what it has started ends with it."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
from sparseflow_daemon import __main__ as daemon
from sparseflow_daemon.command_line import build_parser, config_of, words_of
from sparseflow_daemon.config import ServerConfig

import sparseflow
from sparseflow.errors import BadRequest, DiskError, SparseFlowError, UnsupportedModel

Capture = pytest.CaptureFixture[str]
DEADLINE_S = 30.0
ALL_OPTIONS = shlex.split(
    "one two --name n --memory 2GiB --cpu-cache-ratio 0.5 --io buffered --eviction lru --max-sessions 3 "
    "--drain-timeout 1.5 --gpu-timeout 2 --share-dense-gpu 1 --metrics-port 0 --metrics-host ::1 --log-format json "
    "--debug --end-with-parent 1 --detach"
)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The command takes TERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# --- words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["store", "--det"], "unrecognized arguments: --det"),
        (["store", "--max-sessions", "0"], "give a number at least 1"),
        (["store", "--metrics-port", "70000"], "between 0 and 65535"),
        ([], "required: STORE"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], told: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        daemon.main(words)
    assert ended.value.code == daemon.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparseflow-daemon: error: ")
    assert told in line


def test_version_and_help_are_printed(capsys: Capture) -> None:
    for word in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            daemon.main([word])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"sparseflow-daemon {sparseflow.__version__}\n")
    assert "(default: auto)" in out
    assert "(default: None)" not in out
    assert "(default: False)" not in out


def test_shell_is_given_a_script_that_completes_the_words(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        daemon.main(["--completion", "bash"])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert script.rstrip().endswith("-F _shtab_sparseflow_daemon sparseflow-daemon")
    assert "--cpu-cache-ratio" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=DEADLINE_S)


def test_server_that_is_left_running_is_given_all_words_but_the_one_that_says_so() -> None:
    arguments = build_parser().parse_args(ALL_OPTIONS)
    stores = [Path("/made/one"), Path("/made/two")]
    words = words_of(arguments, stores)
    assert "--detach" not in words
    again = build_parser().parse_args(words)
    assert vars(again) == vars(arguments) | {"stores": ["/made/one", "/made/two"], "detach": False}
    given, default = config_of(again), ServerConfig(stores=(Path(),))
    same = [field.name for field in fields(default) if getattr(given, field.name) == getattr(default, field.name)]
    assert same == [], "every setting has been tried"


# --- errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("no"), 2),
        (UnsupportedModel("no"), 1),
        (DiskError("no"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("two\nlines"), 1),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(daemon, "_serve", fail)
    assert daemon.main(["store"]) == code
    lines = capsys.readouterr().err.splitlines()
    if isinstance(error, KeyboardInterrupt):
        assert lines == []
    elif isinstance(error, SparseFlowError):
        assert lines == ["sparseflow-daemon: error: no"]
    else:
        (line,) = lines
        assert line.startswith("sparseflow-daemon: error: unexpected: RuntimeError: two lines (--debug shows")


def test_log_that_cannot_be_written_is_said_with_its_remedy(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("SPARSEFLOW_HOME", "/proc/nope")
    monkeypatch.setattr(daemon, "_store", Path)
    assert daemon.main(["store", "--detach"]) == daemon.EXIT_FAILED
    assert "set SPARSEFLOW_HOME to a folder of your own" in capsys.readouterr().err


# --- making a store


@pytest.mark.parametrize("wrong", [["--memory", "lots"], ["--name", "a/b"], ["--metrics-host", "192.0.2.1"]])
def test_what_is_wrong_is_told_before_a_store_is_made(
    wrong: list[str], runtime: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    made: list[str] = []
    monkeypatch.setattr(daemon, "_store", made.append)
    words = ["model", "--detach", "--metrics-port", "0", *wrong]
    assert daemon.main(words) == daemon.EXIT_USAGE
    assert wrong[1] in capsys.readouterr().err
    assert made == []


def test_store_is_made_by_who_is_asked_and_the_server_is_given_its_folder(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    launched: list[list[str]] = []

    def launch(words: list[str], name: str) -> dict[str, object]:
        launched.append(words)
        return {"pid": 7, "models": [{"name": "m"}], "metrics": None}

    monkeypatch.setattr(daemon, "_store", lambda name: Path("/made") / name)
    monkeypatch.setattr(daemon, "launch", launch)
    assert daemon.main(["facebook/opt", "--detach", "--name", "n"]) == 0
    assert launched == [["/made/facebook/opt", "--name=n"]]
    assert capsys.readouterr().out.startswith("server n is ready: pid 7, m; log ")


CONVERTING = """
import sys
from sparseflow_daemon import __main__ as daemon

class Own:
    executable = sys.argv.pop(1)
    def __getattr__(self, name):
        return getattr(sys, name)

daemon.sys = Own()
sys.exit(daemon.main())
"""


def test_server_whose_parent_has_ended_before_it_began_ends(runtime: Path) -> None:
    """What it is told is not who started it."""
    command = [sys.executable, "-m", "sparseflow_daemon", "store", "--end-with-parent", str(os.getppid())]
    finished = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
    assert finished.returncode in (143, -signal.SIGTERM)


@pytest.mark.parametrize(
    "words", [[], ["--detach"], ["--end-with-parent", str(os.getpid())]], ids=["foreground", "detach", "child"]
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_conversion_ends_with_who_waits_for_it(
    words: list[str], number: signal.Signals, code: int, runtime: Path, tmp_path: Path
) -> None:
    program, said = tmp_path / "converts", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ >{said}.new; mv {said}.new {said}\nexec sleep 100\n", encoding="utf-8")
    program.chmod(0o700)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SPARSEFLOW_HOME": str(tmp_path)}
    command = [sys.executable, "-c", CONVERTING, str(program), "model", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not said.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            converter = psutil.Process(json.loads(said.read_text(encoding="utf-8")))
            process.send_signal(number)
            assert process.wait(DEADLINE_S) == code
            assert not converter.is_running()
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()
