"""What the README shows works as it is written there, and its commands print what it shows."""

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from child_process import run_forked
from pages import blocks

from sparseflow.cli.main import build_parser, main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
DEADLINE_S = 240
OF_THE_API = "http://127.0.0.1:8000"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The repository as the current folder, our programs on PATH, and a folder for sockets that is empty at the end."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        yield tmp_path
        deadline = time.monotonic() + 20
        while any(Path(folder).iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(Path(folder).iterdir())


def in_place(code: str, place: Path) -> str:
    """What a block writes goes to a folder of the test's own."""
    return code.replace("/tmp/", f"{place}/")


def test_python_snippets_run_one_after_the_other(place: Path) -> None:
    snippets = [block.code for block in blocks(README, "python") if "127.0.0.1" not in block.code]
    assert len(snippets) > 2
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_sparseflow_commands_run_one_after_the_other(place: Path) -> None:
    assert main(["convert", "sparseflow/assets/demo_model", f"{place}/store", "--dtype", "float32"]) == 0
    lines = [line for block in blocks(README, "bash") for line in block.code.splitlines()]
    commands = [line for line in lines if line.startswith("sparseflow ")]
    assert len(commands) > 5
    for line in commands:
        assert main(shlex.split(in_place(line, place), comments=True)[1:]) == 0, line


def shown(code: str) -> tuple[str, list[str]]:
    """The commands of a console block as a script, and the lines that it prints."""
    script, printed, goes_on = [], [], False
    for line in code.splitlines():
        if line.startswith("$ ") or goes_on:
            script.append(line.removeprefix("$ "))
            goes_on = line.endswith("\\")
        else:
            printed.append(line)
    return "\n".join(script), printed


def without_figures(line: str) -> str:
    """What is another one each time: numbers, names of random digits, units of sizes, places."""
    line = re.sub(r"\b[0-9a-f]{12,24}\b", "ID", line)
    line = re.sub(r"log \S+", "log PLACE", line)
    return re.sub(r"[\d.:]+ ?(?:[KMG]iB|%|ms)?", "N", line)


def run_block(script: str, **variables: str) -> str:
    """What it prints; its commands wait for each other as they would in a terminal."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=os.environ | variables,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def consoles() -> list[str]:
    return [block.code for block in blocks(README, "console")]


@pytest.mark.parametrize(
    "code", [code for code in consoles() if OF_THE_API not in code], ids=lambda code: " ".join(code.split()[1:3])
)
def test_console_prints_what_is_shown(code: str, place: Path) -> None:
    script, expected = shown(code)
    printed = run_block(in_place(script, place)).replace(f"{place}/", "/tmp/").splitlines()
    assert list(map(without_figures, printed)) == list(map(without_figures, expected))


def test_api_server_answers_as_shown_to_curl_and_to_openai(place: Path) -> None:
    """At a port that is free, and ended as Ctrl-C would."""
    (code,) = (code for code in consoles() if OF_THE_API in code)
    (snippet,) = (block.code for block in blocks(README, "python") if OF_THE_API in block.code)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    (place / "client.py").write_text(snippet.replace("8000", port))
    script, expected = shown(code)
    script = script.replace("8000", port).replace(" &\n", " &\nserver=$!; trap 'kill -TERM $server; wait' EXIT\n", 1)
    printed = run_block(f"{script}\necho; echo\npython {place / 'client.py'}", SPARSEFLOW_LOG="WARNING")
    answers, _, text = printed.partition("\n\n")
    assert without_figures(answers.replace("}{", "}\n{")) == without_figures("\n".join(expected))
    assert len(text) > 20


def test_commands_that_do_not_run_here_have_only_options_that_exist() -> None:
    """Of `sh` blocks: they take a network, a GPU, or hours."""
    parser = build_parser()
    (subcommands,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    lines = [line for block in blocks(README, "sh") for line in block.code.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if "sparseflow " in line]
    commands = [words[words.index("sparseflow") + 1 :] for words in commands if "sparseflow" in words]
    assert len(commands) > 5
    for name, *words in commands:
        known = {option for action in subcommands[name]._actions for option in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_scripts_that_are_named_exist() -> None:
    for path in re.findall(r"(?:bash|python) (scripts/[\w/.]+)", TEXT):
        assert (ROOT / path).is_file(), path


def test_every_folder_of_the_package_has_its_line() -> None:
    tree = TEXT.partition("## Where things are")[2]
    for folder in (ROOT / "sparseflow").iterdir():
        if (folder / "__init__.py").exists() or folder.name == "assets":
            assert f"`sparseflow/{folder.name}`" in tree, folder.name


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.path[0] = script.rpartition("/")[0]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


def test_help_of_every_script_works(fork_server: None) -> None:
    """In one process, for most of the time is imports."""
    scripts = [
        script
        for script in (*ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/bench/*.py"))
        if '__name__ == "__main__"' in script.read_text(encoding="utf-8")  # else it is what other scripts import
    ]
    assert run_forked(HELP, *scripts, timeout_s=120).count("usage:") == len(scripts) > 5
