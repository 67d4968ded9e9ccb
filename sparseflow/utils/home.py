"""Where SparseFlow keeps what it makes: converted stores, and logs of servers that were left running."""

import os
from pathlib import Path


def sparseflow_home() -> Path:
    """`$SPARSEFLOW_HOME`, else `sparseflow` in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SPARSEFLOW_HOME") or f"{cache}/sparseflow").expanduser()
