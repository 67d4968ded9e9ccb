"""What goes wrong is one line with a remedy; a traceback only comes where it is asked for."""

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
from child_process import run_python

from sparseflow.cli import info
from sparseflow.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` fails as nobody has foreseen."""

    def fail(arguments: object) -> dict[str, object]:
        raise TypeError("a number\nis no text")

    monkeypatch.setattr(info, "run", fail)


def test_the_unexpected_is_one_line_that_says_how_to_learn_more(broken: None, capsys: Capture) -> None:
    assert main(["info"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "sparseflow: error: unexpected: TypeError: a number is no text "
        "(run again with --debug for the traceback, and report it)\n"
    )


def test_debug_shows_the_traceback_before_the_line(broken: None, capsys: Capture) -> None:
    assert main(["info", "--debug"]) == 1
    *before, last = capsys.readouterr().err.splitlines()
    assert before[0] == "Traceback (most recent call last):"
    assert any("in fail" in line for line in before)
    assert last.startswith("sparseflow: error: unexpected: TypeError: a number is no text (report it")


def test_debug_shows_the_traceback_of_errors_of_ours_too(tmp_path: Path, capsys: Capture) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    assert main(["verify", str(tmp_path), "--debug"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith(line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "s", "--top-p", "2"], "generate: argument --top-p: 2 is out of range: give a number between 0"),
        (["generate", "s", "--nonsense", "2"], "unknown arguments: --nonsense 2; `sparseflow generate --help`"),
        (["bench", "--limit", "lots"], "bench: argument --limit: memory 'lots': write a size above 0"),
        (["trace", "replay"], "trace replay: the following arguments are required: TRACE; `sparseflow trace replay"),
        (["jump"], "argument COMMAND: invalid choice: 'jump'"),
    ],
)
def test_wrong_usage_is_one_line_that_says_where_to_read(words: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("sparseflow: error: ")
    assert message in line
    assert "--help`" in line


# What is wrong on the command line, or not there, is said before the imports that take seconds.
_AT_ONCE = """
import contextlib, io, sys
from sparseflow.cli.main import main

for words, part in {cases!r}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
    assert code and part in said.getvalue(), (words, code, said.getvalue())
assert not {{"torch", "transformers", "numba"}} & set(sys.modules)
"""


def test_what_is_wrong_is_told_before_torch_is_loaded(demo_model: Path) -> None:
    model, text = str(demo_model), str(demo_model / "heldout.txt")
    options = (("--io", "foo"), ("--memory", "lots"), ("--fidelity", "bogus"), ("--dtype", "int3"), ("--device", "foo"))
    cases = [(["generate", model, "--prompt", "a", *option], f"argument {option[0]}: ") for option in options]
    for words in (["generate"], ["chat"], ["convert"], ["info"], ["demo"], ["bench"]):
        cases.append(([*words, "./missing"], "./missing: no such folder"))
    cases += [
        (["generate", model, "--prompt-file", "missing"], "missing: cannot be read"),
        (["trace", "record", model, "--out", "/nowhere/x"], "/nowhere/x: its folder does not exist"),
        (["eval", model, "--text", "missing"], "missing: cannot be read"),
        (["eval", "./missing", "--text", text], "./missing: no such folder"),
        (["calibrate", model, "--text", "missing"], "missing: cannot be read"),
        (["calibrate", "./missing", "--text", text], "./missing: no such folder"),
    ]
    run_python(_AT_ONCE.format(cases=cases))


def test_ctrl_c_leaves_the_line_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stop(arguments: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", stop)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\n"


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` logs, and warns."""

    def talk(arguments: object) -> dict[str, object]:
        logging.getLogger("sparseflow.test").warning("a word of %s", "warning")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a thing to know", stacklevel=1)
        return {}

    monkeypatch.setattr(info, "run", talk)


def test_logs_are_lines_or_json_as_asked_for(talkative: None, capsys: Capture) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sparseflow: warning: a word of warning", "sparseflow: warning: a thing to know"]
    assert main(["info", "--log-format", "json"]) == 0
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("WARNING", "sparseflow.test", "a word of warning")
    assert second["message"].startswith("a thing to know")


def test_details_that_are_asked_for_have_time_and_logger(
    monkeypatch: pytest.MonkeyPatch, talkative: None, capsys: Capture
) -> None:
    monkeypatch.setattr(info, "check", lambda arguments: logging.getLogger("sparseflow.test").info("a detail"))
    monkeypatch.setenv("SPARSEFLOW_LOG", "INFO")
    assert main(["info"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("INFO sparseflow.test: a detail")
    assert lines[1] == "sparseflow: warning: a word of warning"


def test_who_calls_main_finds_his_logging_as_it_was(talkative: None) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, warnings.formatwarning
    assert main(["info", "--log-format", "json"]) == 0
    assert (root.handlers, root.level, warnings.formatwarning) == before
    with pytest.warns(UserWarning, match="still seen"):
        warnings.warn("still seen", stacklevel=1)
