"""What the fuzzers share with the tests that are written by hand."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("engine", "integration", "protocol")]
