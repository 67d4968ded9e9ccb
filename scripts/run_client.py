"""Generate with the weights of a server: `python scripts/run_client.py NAME --prompt TEXT`.

Takes what `sparseflow generate --server NAME` takes.
"""

import sys

from sparseflow.cli.main import main

if __name__ == "__main__":
    is_name = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    sys.exit(main(["generate", *(["--server"] if is_name else []), *sys.argv[1:]]))
