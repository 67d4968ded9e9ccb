"""What the pages beside the README show works as it is written there, and what they name exists."""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import OPERATING, PAGES, PROTOCOL, ROOT, TUNING, Block, blocks, column, names, prose_of, rows, slugs, text_of
from sparseflow_daemon import __main__ as daemon

from sparseflow.cli.main import build_parser, main
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.errors import ServerNotRunning
from sparseflow.protocol.inquiry import ask_status

LANGUAGES = {"python", "bash", "console", "sh", "ini", "json", "text"}
WITH_PROSE = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
OF_OTHERS = {"--pid", "--ulimit"}  # options of Docker


@pytest.fixture
def place(tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages' commands and snippets name."""
    convert(Checkpoint(demo_model), tmp_path / "store", quiet=True)
    (tmp_path / "demo_model").symlink_to(demo_model)
    shutil.copyfile(demo_model / "heldout.txt", tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for servers, which are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        yield Path(folder)
        deadline = time.monotonic() + 10
        while any(Path(folder).iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(Path(folder).iterdir())


@pytest.fixture
def server(place: Path, runtime: Path) -> Iterator[str]:
    """A server of the store, called as the pages call it."""
    command = [sys.executable, "-m", "sparseflow_daemon", "store", "--name", "demo"]
    with open(place / "log", "wb") as log, subprocess.Popen(command, stderr=log) as process:
        deadline = time.monotonic() + 30
        while not is_ready("demo") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        yield "demo"
        process.terminate()
        assert process.wait(30) == 0, (place / "log").read_text(encoding="utf-8")


def is_ready(name: str) -> bool:
    try:
        return bool(ask_status(name)["state"] == "ready")
    except ServerNotRunning:
        return False


@pytest.mark.parametrize("page", [page for page in PAGES if page != PROTOCOL], ids=lambda page: page.parent.name)
def test_python_snippets_of_a_page_run_one_after_the_other(page: Path, place: Path) -> None:
    run_snippets(page)


@pytest.mark.usefixtures("server")
def test_python_snippets_of_the_protocol_speak_with_a_server(capfd: pytest.CaptureFixture[str]) -> None:
    found = run_snippets(PROTOCOL)
    assert capfd.readouterr().out.startswith("ready {'total': 8388608")
    assert set(found["identity"]) == set(column(PROTOCOL, "| field of `identity`"))
    assert [region["name"] for region in found["regions"]] == column(PROTOCOL, "| region |")
    session = found["session"]
    session.close()
    for fd in found["fds"]:
        os.close(fd)
    found["sock"].context.destroy()


def run_snippets(page: Path) -> dict[str, Any]:
    """What the snippets have left."""
    found: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block.code, str(page), "exec"), found)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=lambda page: page.parent.name)
def test_sparseflow_commands_of_a_page_run(page: Path, place: Path, runtime: Path) -> None:
    for line in commands(blocks(page, "bash")):
        assert line[0] == "sparseflow"
        assert main(line[1:]) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.parent.name)
def test_console_blocks_run_as_shown(page: Path, place: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole block, by the shell, with the environment of the tests; each command's output is there."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for block in blocks(page, "console"):
        script = "\n".join(line.removeprefix("$ ") for line in block.code.splitlines())
        command = ["bash", "-euo", "pipefail", "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert result.returncode == 0, result.stderr
        assert "server demo is ready" in result.stdout
        assert "demo_model: ready" in result.stdout
        missing = [name for name in column(OPERATING, "| metric |") if f"\n{name}{{" not in result.stdout]
        assert not missing


def commands(found: list[Block]) -> list[list[str]]:
    """Words of the lines that call a program of ours; in unit files, what stands behind `ExecStart=`."""
    lines = [line.removeprefix("ExecStart=") for block in found for line in block.code.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if not line.startswith("[")]
    return [line for line in words if line and Path(line[0]).name in ("sparseflow", "sparseflow-daemon")]


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_that_cannot_run_here_have_only_options_that_exist(page: Path) -> None:
    for name, *words in commands(blocks(page, "sh", "ini")):
        known = options(daemon.build_parser()) if name.endswith("daemon") else options(subcommands()[words[0]])
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


def lenient(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same words, whatever their values are, and none that must be there: prose leaves out what it is not about."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                lenient(below)
            continue
        if action.nargs in (None, "+"):
            action.nargs = "?" if action.nargs is None else "*"
        action.type, action.choices, action.required = None, None, False
    for group in parser._mutually_exclusive_groups:
        group.required = False
    return parser


def wrong_words(command: str) -> str:
    """What is wrong with a command that prose names; empty where nothing is."""
    name, *words = shlex.split(command)
    parser = lenient(daemon.build_parser() if name == "sparseflow-daemon" else build_parser())
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            unknown = parser.parse_known_args([word for word in words if word != "..."])[1]
        except SystemExit:
            return said.getvalue()
    return " ".join(unknown)


@pytest.mark.parametrize("page", WITH_PROSE, ids=lambda page: str(page)[-24:])
def test_commands_that_prose_names_have_the_options_that_they_are_given(page: Path) -> None:
    found = [" ".join(code.split()) for code in re.findall(r"`(sparseflow(?:-daemon)? [^`]+)`", prose_of(page))]
    assert {command: wrong for command in found if (wrong := wrong_words(command))} == {}


@pytest.mark.parametrize(
    ("command", "is_right"),
    [
        ("sparseflow verify", True),
        ("sparseflow bench CHECKPOINT --store store --limit 2GiB --cases sparseflow sparseflow:io=buffered", True),
        ("sparseflow generate STORE ... --device cuda --device-memory SIZE", True),
        ("sparseflow trace replay TRACE --budgets", True),
        ("sparseflow-daemon STORE STORE ... --name NAME", True),
        ("sparseflow verify STORE --full", False),
        ("sparseflow verify STORE STORE", False),
        ("sparseflow verity STORE", False),
        ("sparseflow trace replay TRACE --detach", False),
        ("sparseflow-daemon STORE --server NAME", False),
    ],
)
def test_words_that_a_command_does_not_have_are_found(command: str, is_right: bool) -> None:
    assert (wrong_words(command) == "") is is_right


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_options_that_are_named_exist(page: Path) -> None:
    known = options(daemon.build_parser()).union(*map(options, subcommands().values()), OF_OTHERS)
    assert set(re.findall(r"`(--[a-z][a-z-]*)", prose_of(page))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_block_says_how_it_is_tried(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language == "json":
            json.loads(block.code)


@pytest.mark.parametrize("page", WITH_PROSE, ids=lambda page: str(page)[-24:])
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in slugs(found), target
    for path in re.findall(r"`((?:sparseflow|daemon|scripts|tests|docs)/[\w./@-]+)`", prose_of(page)):
        assert (ROOT / path).exists() or (ROOT / "daemon" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_variables_that_are_named_are_read_somewhere(page: Path) -> None:
    sources = [*ROOT.glob("sparseflow/**/*.py"), *ROOT.glob("daemon/**/*.py"), *ROOT.glob("daemon/systemd/*")]
    read = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert {name for name in re.findall(r"SPARSEFLOW_[A-Z_]+", text_of(page)) if name not in read} == set()


# --- running a server


def test_options_of_the_server_are_listed_with_their_defaults() -> None:
    actions = [a for a in daemon.build_parser()._actions if a.dest not in ("help", "stores", "name")]
    defaults = {a.option_strings[0]: "" if a.nargs == 0 else str(a.default).replace("None", "none") for a in actions}
    shown = {names(row[0])[0]: row[1].strip("`") for row in rows(OPERATING, "| | default |")}
    assert shown == defaults


def test_reasons_for_being_degraded_are_those_of_the_code() -> None:
    sources = [*ROOT.glob("sparseflow/**/*.py"), *ROOT.glob("daemon/**/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for row in rows(OPERATING, "| reason |"):
        phrases = [part.strip() for quoted in re.findall(r'"([^"]+)"', row[0]) for part in quoted.split("...")]
        assert phrases
        assert [phrase for phrase in phrases if phrase not in code] == []


# --- tuning


def test_figures_that_are_explained_are_those_of_results(
    place: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "store", "--prompt", "In", "--max-new-tokens", "2", "--json"]) == 0
    result, told = json.loads(capsys.readouterr().out), ask_status(server)
    shown = rows(TUNING, "| field | unit |")
    of_status = [name for row in shown if row[0].endswith("(status)") for name in names(row[0])]
    of_results = [name for row in shown if not row[0].endswith("(status)") for name in names(row[0])]
    assert set(of_status) == {"arena", "disk", "prefetch"}
    texts = {"text", "token_ids", "prompt_tokens", "fidelity"}
    assert set(of_results) <= set(result)
    assert {name for name in set(result) - set(of_results) - texts if isinstance(result[name], int | float)} <= {"ok"}
    for row in (row for row in shown if row[0].endswith("(status)")):
        assert set(names(row[2])) <= set(told[names(row[0])[0]])
