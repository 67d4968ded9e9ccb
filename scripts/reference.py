"""The API reference, from docstrings: `python docs/reference.py OUT [MODULE ...]`, by default of both packages."""

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


if __name__ == "__main__":
    out, *named = sys.argv[1:]
    write_reference(Path(out), named or PACKAGES)
