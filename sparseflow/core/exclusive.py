"""A folder that one process at a time works in."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseflow.errors import DiskError


@contextmanager
def exclusive(folder: Path, doing: str) -> Iterator[Path]:
    """Make the folder and hold it. doing: what errors say that another process is doing, such as `converting`.

    Raises:
        DiskError: the folder cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DiskError(f"{folder}: another process is {doing} it; wait for it to end") from error
        yield folder
    finally:
        os.close(descriptor)
