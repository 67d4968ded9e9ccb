"""Help: each option of each command says what it is, in which unit, and what it is if left out."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparseflow
from sparseflow.cli.completion import actions_of
from sparseflow.cli.main import build_parser, main

Capture = pytest.CaptureFixture[str]

# What a number that is given counts or measures. N: a plain count or number. DEVICE: which GPU.
UNITS = {"N", "SHARE", "FACTOR", "SECONDS", "SIZE", "PORT", "DEVICE"}


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """It and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def options() -> list[tuple[str, argparse.Action]]:
    """Of all commands, but for --help: (command and name, action)."""
    return [
        (f"{parser.prog} {'/'.join(action.option_strings) or action.dest}", action)
        for parser in parsers(build_parser())
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]


def is_numeric(action: argparse.Action) -> bool:
    """Whether it takes a number: by what reads it, what it is called there, or what it is without."""
    name = getattr(action.type, "__name__", "")
    is_number = isinstance(action.default, int | float) and not isinstance(action.default, bool)
    return name in ("int", "float", "size") or is_number


ALL = options()
NUMERIC = [(name, action) for name, action in ALL if is_numeric(action)]


def test_the_tests_see_options_of_each_kind() -> None:
    names = {name for name, _ in ALL}
    assert {"sparseflow generate --top-p", "sparseflow trace replay --slots-ratio", "sparseflow --version"} <= names
    assert {"sparseflow bench --limit", "sparseflow chat --seed"} <= {name for name, _ in NUMERIC}
    assert "sparseflow generate --prompt" not in {name for name, _ in NUMERIC}


@pytest.mark.parametrize(("name", "action"), ALL, ids=[name for name, _ in ALL])
def test_it_has_help_and_a_word_for_what_it_takes(name: str, action: argparse.Action) -> None:
    assert action.help
    assert action.help is not argparse.SUPPRESS
    if action.option_strings and action.nargs != 0:  # it takes something
        assert action.choices or action.metavar, "is called by its own name; give a metavar"


@pytest.mark.parametrize(("name", "action"), NUMERIC, ids=[name for name, _ in NUMERIC])
def test_a_number_has_a_unit(name: str, action: argparse.Action) -> None:
    assert action.metavar in UNITS


@pytest.mark.parametrize("parser", list(parsers(build_parser())), ids=lambda parser: parser.prog)
def test_defaults_are_shown_where_there_are_some(parser: argparse.ArgumentParser) -> None:
    text = re.sub(r"\s+", " ", parser.format_help())
    for action in parser._actions:
        has_default = action.default is not None and action.default is not argparse.SUPPRESS
        if action.option_strings and action.nargs != 0 and has_default and action.default != []:
            shown = action.default if not isinstance(action.default, list) else " ".join(map(str, action.default))
            assert f"(default: {shown})" in text, action.option_strings
    for nothing in ("None", "False", "[]", "==SUPPRESS=="):
        assert nothing not in text


@pytest.mark.parametrize("command", ["generate", "chat", "convert", "bench"])
def test_examples_are_shown_as_they_are_written_and_parse(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    examples = [line for line in text.partition("examples:\n")[2].splitlines() if f"sparseflow {command} " in line]
    assert len(examples) >= 2
    for example in examples:
        written = example.partition(f"sparseflow {command} ")[2].split("#")[0]
        options_used = re.findall(r"(--[\w-]+)", written)
        known = {option for action in actions_of(build_parser()) for option in action.option_strings}
        assert set(options_used) <= known


@pytest.mark.parametrize(
    ("command", "groups"),
    [("generate", ["sampling", "memory", "device", "fidelity"]), ("chat", ["sampling", "memory", "device"])],
)
def test_options_stand_in_groups(command: str, groups: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for group in (*groups, "of every command"):
        assert f"\n{group}:\n" in text
    common = text.partition("of every command:")[2]
    assert all(option in common for option in ("--json", "--debug", "--log-format"))


def test_sparseflow_alone_shows_all_commands(capsys: Capture) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for path in (Path(sparseflow.__file__).parent / "cli").glob("*.py"):
        if "def run(arguments" in path.read_text(encoding="utf-8"):
            command = {"evaluate": "eval"}.get(path.stem, path.stem)
            assert f"    {command} " in out


def test_version_is_an_option_too(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sparseflow {sparseflow.__version__}\n"
