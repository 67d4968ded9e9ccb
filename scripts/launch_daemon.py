"""Start a weight server and return when it is ready: `python scripts/launch_daemon.py STORE --name NAME --memory 6GiB`.

It runs on by itself; end it with `kill PID`. Takes what `sparseflow-daemon` takes.
"""

import sys

from sparseflow_daemon.__main__ import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--detach"]))
