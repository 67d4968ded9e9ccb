"""Print the version."""

import argparse

import sparseflow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """The version alone on a line."""
    if not arguments.json:
        print(sparseflow.__version__)
    return {"version": sparseflow.__version__}
