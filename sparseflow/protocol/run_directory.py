"""Where a weight server's sockets live.

$SPARSEFLOW_RUNTIME_DIR, else $XDG_RUNTIME_DIR/sparseflow, else sparseflow-UID in the temporary directory
  NAME/            mode 0700
    lock           held (flock) by the server as long as it lives; holds its pid
    attach.sock    handshake, descriptors, and the session
    ctl.sock       ZeroMQ
"""

import fcntl
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sparseflow.errors import BadRequest, NotPermitted

_LONGEST_SOCKET_PATH = 107  # bytes; sockaddr_un.sun_path less its end
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def runtime_dir() -> Path:
    """The folder that holds a folder for each server. It may not exist."""
    if given := os.environ.get("SPARSEFLOW_RUNTIME_DIR"):
        return Path(given).absolute()
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(given).absolute() / "sparseflow"
    return Path(tempfile.gettempdir()).absolute() / f"sparseflow-{os.getuid()}"


def require_private(folder: Path) -> None:
    """
    Raises:
        NotPermitted: others could put sockets of theirs there.
    """
    found = os.stat(folder, follow_symlinks=False)
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or found.st_mode & 0o077:
        remedy = f"chmod 700 {folder}" if is_ours else "remove it"  # ours may hold the sockets of a living server
        raise NotPermitted(
            f"{folder}: must be a folder of user {os.getuid()} and of mode 0700, is of user {found.st_uid} and mode "
            f"{found.st_mode & 0o7777:04o}; {remedy}, or name another in SPARSEFLOW_RUNTIME_DIR"
        )


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The folder of one server."""

    name: str
    path: Path

    @classmethod
    def of(cls, name: str) -> "RunDirectory":
        """
        Raises:
            BadRequest: a name that is none, or a path too long for sockets.
        """
        if not _NAME.fullmatch(name):
            raise BadRequest(
                f"server name {name!r}: 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first"
            )
        directory = cls(name, runtime_dir() / name)
        longest = len(os.fsencode(directory.attach_socket))
        if longest > _LONGEST_SOCKET_PATH:
            raise BadRequest(
                f"{directory.attach_socket}: {longest} bytes, a socket's path has at most {_LONGEST_SOCKET_PATH}; "
                "set SPARSEFLOW_RUNTIME_DIR to a shorter one"
            )
        return directory

    @property
    def remedy(self) -> str:
        """What to do where no server of that name runs."""
        return f"start one: sparseflow-daemon STORE --name {self.name}"

    @property
    def lock(self) -> Path:
        """Held by the server."""
        return self.path / "lock"

    @property
    def attach_socket(self) -> Path:
        """Where sessions are opened."""
        return self.path / "attach.sock"

    @property
    def ctl_socket(self) -> Path:
        """Where requests go."""
        return self.path / "ctl.sock"

    @property
    def ctl_endpoint(self) -> str:
        """The same, as ZeroMQ writes it."""
        return f"ipc://{self.ctl_socket}"

    def is_alive(self) -> bool:
        """Whether a server holds the lock; it dies with its holder, however that ends."""
        try:
            fd = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def owner(self) -> int | None:
        """The pid that the lock file names, whether it lives or not."""
        try:
            return int(self.lock.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None


def server_names() -> list[str]:
    """Names of servers that run here, or left their folder behind."""
    return [name for name in folder_names() if _NAME.fullmatch(name)]


def folder_names() -> list[str]:
    """Names of all folders where servers have theirs."""
    try:
        with os.scandir(runtime_dir()) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
