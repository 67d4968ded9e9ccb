"""One server a name: the run directory, claimed by a lock that dies with its holder."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from sparseflow.errors import DiskError, ServerError, SparseFlowError
from sparseflow.protocol.run_directory import RunDirectory, require_private, runtime_dir

_ATTEMPTS = 1000  # the folder can vanish under us each time another server ends
_PATIENCE_S = 0.2  # whoever asks whether a server lives holds the lock for an instant
_PAUSE_S = 0.01


class Claim:
    """A run directory that is ours until `release`."""

    def __init__(self, directory: RunDirectory) -> None:
        """Take the directory; what a dead server left in it is removed.

        Raises:
            ServerError: a living server has it. NotPermitted: others can write there. DiskError: it cannot be made.
        """
        self.directory = directory
        self._refused_from_s = time.monotonic() + _PATIENCE_S
        for _ in range(_ATTEMPTS):
            fd = self._lock()
            if fd is not None:
                break
        else:
            raise ServerError(f"{directory.path}: servers come and go there all the time; try again")
        self._fd = fd
        for stale in (directory.attach_socket, directory.ctl_socket):
            stale.unlink(missing_ok=True)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)

    def _lock(self) -> int | None:
        """The locked file's descriptor; None where the file was removed meanwhile."""
        _make_runtime_dir()
        path = self.directory.path
        try:
            with suppress(FileExistsError):  # not Path.mkdir's exist_ok: it fails if the folder vanishes meanwhile
                os.mkdir(path, 0o700)
            require_private(path)
            fd = os.open(self.directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return None
        except SparseFlowError:
            raise
        except OSError as error:
            raise _cannot_make(path, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(self.directory.lock)):
                return fd
        except BlockingIOError:
            if time.monotonic() > self._refused_from_s:
                os.close(fd)
                self._refuse()
            time.sleep(_PAUSE_S)
        except FileNotFoundError:
            pass
        os.close(fd)
        return None

    def _refuse(self) -> NoReturn:
        owner = self.directory.owner()
        who = f"pid {owner}" if owner else "another process"
        raise ServerError(
            f"server {self.directory.name!r} is already running ({who}); choose another --name, or end it first"
        )

    def release(self) -> None:
        """Remove the directory and let go. May be called twice."""
        if self._fd >= 0:
            directory = self.directory
            for path in (directory.attach_socket, directory.ctl_socket, directory.lock):  # the lock last
                path.unlink(missing_ok=True)
            with suppress(OSError):  # somebody has locked a file of theirs there already
                directory.path.rmdir()
            os.close(self._fd)
            self._fd = -1


def _make_runtime_dir() -> None:
    folder = runtime_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_make(folder, error) from error
    require_private(folder)


def _cannot_make(path: Path, error: OSError) -> DiskError:
    return DiskError(f"{path}: cannot be made ({error.strerror}); set SPARSEFLOW_RUNTIME_DIR to a folder of your own")
