"""Whether a file of a store is one: a regular file in the store's own folder, of the bytes that it claims to have.

All that opens files of a store looks here first, so that nothing elsewhere on the host is read or mapped, and nothing
is opened that would wait (a FIFO) or do something (a device). The folder of the store may itself be reached by links.
What this module does not promise: anything of a store that somebody changes while it is open.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sparseflow.errors import DiskError, ShardCorrupt

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
}

# A file this much larger than what it takes on disk was not written, but made of nothing. Disks that compress do not
# come near that with weights, and small files may lie elsewhere than in blocks.
_HOLES_SHARE = 16
_HOLES_FROM_NBYTES = 16 << 20
_BLOCK_NBYTES = 512  # of st_blocks, everywhere


def stat_inside(store: Path, name: str) -> os.stat_result:
    """What the system says of a file of a store.

    Args:
        name: its path inside the store.

    Raises:
        DiskError: it is no file, or lies elsewhere: it or a folder on its way is a link.
        OSError: there is none.
    """
    path = store
    *folders, last = PurePosixPath(name).parts
    for folder in folders:
        path /= folder
        _require(path, stat.S_ISDIR, "folder")
    return _require(path / last, stat.S_ISREG, "file")


def _require(path: Path, is_right: Callable[[int], bool], what: str) -> os.stat_result:
    found = os.lstat(path)
    if not is_right(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise DiskError(
            f"{path}: is {kind}, not a {what} in the store itself; copy the store by `cp -rL`, if you trust what it "
            "links to, or remove it and convert the model again"
        )
    return found


def require_written(path: Path, found: os.stat_result) -> None:
    """
    Raises:
        ShardCorrupt: nearly all of a large file are holes, which take no disk but time and memory to read.
        DiskError: it cannot be opened.
    """
    on_disk = found.st_blocks * _BLOCK_NBYTES
    if found.st_size < _HOLES_FROM_NBYTES or on_disk >= found.st_size // _HOLES_SHARE:
        return
    try:
        with open(path, "rb", buffering=0) as file:
            has_holes = file.seek(0, os.SEEK_HOLE) < found.st_size
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from error
    if has_holes:
        raise ShardCorrupt(
            f"{path}: {found.st_size} bytes, of which {on_disk} were ever written; "
            "remove the store and convert the model again"
        )
