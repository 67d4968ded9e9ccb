"""The API reference, from docstrings: `python scripts/reference.py OUT [MODULE ...]`, by default of both packages."""

import argparse
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pdoc

import sparseflow

PACKAGES = ("sparseflow", "sparseflow_daemon")


def write_reference(folder: Path, modules: Sequence[str] = PACKAGES) -> None:
    """Write HTML pages of modules and all that is in them; a pattern with `!` in front leaves some out (see pdoc).

    pdoc looks for names where they are defined or imported, and for sub-packages in `__all__`; the package resolves its
    names when they are first used, and lists no sub-packages. So for a moment it has both.
    """
    names = {name: getattr(sparseflow, name) for name in sparseflow.__all__}
    parts = [part.name for part in pkgutil.iter_modules(sparseflow.__path__) if not part.name.startswith("_")]
    pdoc.render.configure(docformat="google", show_source=False)
    with patch.dict(vars(sparseflow), names), patch.object(sparseflow, "__all__", [*names, *parts]):
        pdoc.pdoc(*modules, output_directory=folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for the pages")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="what to document; both packages if none is named")
    arguments = parser.parse_args(argv)
    write_reference(arguments.out, arguments.modules or PACKAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
