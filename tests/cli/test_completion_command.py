"""`sparseflow completion`: a real bash completes what a person begins to type."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseflow.cli.completion import SHELLS
from sparseflow.cli.main import main

Capture = pytest.CaptureFixture[str]
Complete = Callable[..., list[str]]

# As bash does when somebody presses the tabulator behind the last word.
_ASK = """
set -euo pipefail
source "$1"; shift
set +eu  # as in the shell of a person
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9; COMP_KEY=9
how=$(complete -p sparseflow); how=${how##*-F }; how=${how%% *}
"$how" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def complete(tmp_path: Path, capsys: Capture) -> Complete:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    (work / "store").mkdir()
    (work / "story.txt").touch()

    def ask(*words: str) -> list[str]:
        command = ["bash", "--norc", "-c", _ASK, "ask", str(script), "sparseflow", *words]
        result = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=60, check=True)
        assert result.stderr == ""
        return sorted(result.stdout.split())

    return ask


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ge"], ["generate"]),
        (["c"], ["calibrate", "chat", "completion", "convert"]),
        (["generate", "--temp"], ["--temperature"]),
        (["generate", "--cpu"], ["--cpu-cache-ratio"]),
        (["generate", "store", "--eviction", ""], ["fifo", "lfu", "lru"]),
        (["generate", "store", "--io", "b"], ["buffered"]),
        (["convert", "store", "--dtype", ""], ["bfloat16", "float16", "float32"]),
        (["chat", "store", "--log-format", "j"], ["json"]),
        (["completion", ""], ["bash", "tcsh", "zsh"]),
        (["trace", "rec"], ["record"]),
        (["trace", "replay", "--slots"], ["--slots-ratio"]),
    ],
)
def test_commands_options_and_choices_are_completed(complete: Complete, words: list[str], expected: list[str]) -> None:
    assert complete(*words) == expected


def test_paths_are_completed_where_paths_belong(complete: Complete) -> None:
    assert complete("generate", "sto") == ["store"]  # a model is a folder
    assert complete("generate", "store", "--prompt-file", "sto") == ["store", "story.txt"]
    assert complete("verify", "sto") == ["store", "story.txt"]
    assert complete("demo", "--model", "sto") == complete("info", "sto") == ["store"]
    assert complete("generate", "store", "--prompt", "sto") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_there_is_a_script_for_each_shell(shell: str, capsys: Capture) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "sparseflow" in script
    assert "generate" in script
    assert "repetition" in script
