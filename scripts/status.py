"""Show how a weight server is: `python scripts/status.py --server NAME`. Takes what `sparseflow status` takes."""

import sys

from sparseflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["status", *sys.argv[1:]]))
