"""Commands that take long show so in a terminal, each step of them, and only there."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from child_process import run_forked
from terminal import Terminal

# What takes 1 ms counts as long here.
PROGRAM = """
import os, sys
from sparseflow.cli.main import main
from sparseflow.utils import progress

progress.DELAY_S = progress._TICK_S = 0.001
checkpoint, store, text = {paths!r}
commands = (
    ["convert", checkpoint, store],
    ["verify", store],
    ["generate", store, "--prompt", "To be, or " * 50, "--max-new-tokens", "2"],
    ["calibrate", store, "--text", text, "--tokens", "512", "--epochs", "1"],
    ["eval", store, "--text", text, "--tokens", "256"],
    ["trace", "record", store, "--tokens", "16", "--out", store + ".trace"],
    ["trace", "replay", store + ".trace"],
)

def run(words):
    print("begin", words[:2])
    assert main(words) == 0

"""
BARS = {
    "convert": ["loading torch:", "convert:"],
    "verify": ["checksums:"],
    "generate": ["opening ", "reading the prompt:"],
    "calibrate": ["opening ", "calibrate:", "layer 0: run:", "train:"],
    "eval": ["opening ", "evaluate:"],
    "trace', 'record": ["opening ", "record:"],
    "trace', 'replay": ["replay:"],
}
WITHOUT_PAUSES = {"TQDM_MININTERVAL": "0"}


def program(demo_model: Path, tmp_path: Path, lines: Sequence[str]) -> str:
    paths = tuple(map(str, (demo_model, tmp_path / "store", demo_model / "heldout.txt")))
    return PROGRAM.format(paths=paths) + "\n".join(lines)


@pytest.fixture(scope="module")
def shown(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """By all commands, by some with --quiet, by some with the variable: one process, which loads torch once."""
    lines = [
        "for words in commands: run(words)",
        "print('PART')",
        "store += '-2'",
        "some = (['convert', checkpoint, store], ['verify', store], ['generate', store, '--prompt', 'To be'])",
        "for words in some: run(words + ['--quiet'])",
        "print('PART')",
        "os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'",
        "for words in some[1:]: run(words)",
    ]
    with Terminal(program(demo_model, tmp_path_factory.mktemp("bars"), lines), WITHOUT_PAUSES) as terminal:
        exit_code, text = terminal.read_to_end(240)
    assert exit_code == 0, text
    return text.split("PART")


@pytest.mark.slow
def test_each_long_step_has_a_bar(shown: list[str]) -> None:
    parts = shown[0].split("begin ['")[1:]
    assert len(parts) == len(BARS)
    for part in parts:
        (bars,) = (bars for command, bars in BARS.items() if part.startswith(command))
        for bar in bars:
            assert bar in part, part


@pytest.mark.parametrize(("part", "n_commands"), [(1, 3), (2, 2)], ids=["quiet", "variable"])
def test_there_is_none_where_they_are_not_wanted(shown: list[str], part: int, n_commands: int) -> None:
    assert shown[part].count("begin") == n_commands
    assert not [bar for bars in BARS.values() for bar in bars if bar in shown[part]]


@pytest.mark.slow
def test_there_is_none_where_nobody_looks(fork_server: None, demo_model: Path, tmp_path: Path) -> None:
    lines = ["sys.stderr = sys.stdout", "for words in commands[:3]: run(words)"]
    said = run_forked(program(demo_model, tmp_path, lines), timeout_s=240, **WITHOUT_PAUSES)
    assert "weights:  " in said
    assert "\r" not in said
    assert not [bar for bars in BARS.values() for bar in bars if bar in said]
