"""What a forked child finds."""

import os
import warnings
from collections.abc import Callable


def holds_in_a_fork(check: Callable[[], bool]) -> bool:
    """Whether `check` is true in a forked child, which ends with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads do not come along; the child starts none
        pid = os.fork()
    if not pid:
        code = 2
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0
