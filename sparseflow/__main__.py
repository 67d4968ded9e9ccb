"""`python -m sparseflow` is the `sparseflow` command."""

import sys

from sparseflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
