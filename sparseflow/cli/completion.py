"""Print a script by which a shell completes commands, options, choices and paths."""

import argparse
from pathlib import Path

from sparseflow.cli.arguments import model_path
from sparseflow.utils.parsing import actions_of

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = """\
examples:
  source <(sparseflow completion bash)
  source <(sparseflow-daemon --completion bash)
  sparseflow completion bash > ~/.local/share/bash-completion/completions/sparseflow
  sparseflow completion zsh > "${fpath[1]}/_sparseflow"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SHELL"""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}; fish has none")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """The script on stdout."""
    import shtab

    parser: argparse.ArgumentParser = arguments.parser  # of the whole program
    for action in actions_of(parser):
        if action.type is model_path:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, arguments.shell)
    if not arguments.json:
        print(script)
    return {"shell": arguments.shell, "script": script}
