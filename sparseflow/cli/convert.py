"""Make a store from a transformers OPT checkpoint.

A conversion that was stopped goes on where it was when the same command is run again.
"""

import argparse
from pathlib import Path

from sparseflow.cli.arguments import add_dtype, add_quiet, model_path, require_model_path

LOADS = "sparseflow.core.converter"
EXAMPLES = """\
examples:
  sparseflow convert facebook/opt-1.3b /data/opt-1.3b
  sparseflow convert ./checkpoint ./store --dtype float16
  sparseflow convert facebook/opt-1.3b  # into $SPARSEFLOW_HOME, where its name finds it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL STORE --dtype --quiet"""
    parser.add_argument("model", type=model_path, metavar="MODEL", help="a transformers checkpoint folder, or a hub id")
    parser.add_argument(
        "store",
        type=Path,
        nargs="?",
        metavar="STORE",
        help="the store to make; must not exist. Without it: found or made in $SPARSEFLOW_HOME",
    )
    add_dtype(parser)
    add_quiet(parser)


def check(arguments: argparse.Namespace) -> None:
    """Refuse a model that cannot be."""
    require_model_path(arguments.model)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Convert, and say what was made."""
    from sparseflow.core.checkpoint import Checkpoint, locate, model_name
    from sparseflow.core.converter import convert
    from sparseflow.core.store_home import find_or_convert
    from sparseflow.store.manifest import Manifest
    from sparseflow.utils.sizes import format_size

    how = {"dtype": arguments.dtype, "quiet": arguments.quiet}
    if arguments.store is None:
        store = find_or_convert(arguments.model, **how)
    else:
        store = convert(Checkpoint(locate(arguments.model), model_name(arguments.model)), arguments.store, **how)
    manifest = Manifest.load(store)
    result = {
        "store": str(store),
        "dtype": manifest.profile.dtype,
        "nbytes": manifest.nbytes_under(""),
        "fingerprint": manifest.weights_fingerprint,
    }
    if not arguments.json:
        print(f"{store}: {format_size(manifest.nbytes_under(''))}, {manifest.profile.dtype}")
    return result
