"""Page-locking memory that was mapped, so that the GPU can read it by itself.

Failure is normal (a limit of the user or container, a device that cannot lock what it may not write, another process in
the way): it leaves nothing locked and no error behind, and says why. Who needs it then copies instead.
"""

import fcntl
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from sparseflow.cuda.driver import (
    HOST_REGISTER_SUPPORTED,
    READ_ONLY_HOST_REGISTER_SUPPORTED,
    REGISTER_DEVICEMAP,
    REGISTER_PORTABLE,
    REGISTER_READ_ONLY,
    USES_HOST_PAGE_TABLES,
    Driver,
)
from sparseflow.cuda.undo import Undo
from sparseflow.errors import BadRequest, DeviceError
from sparseflow.utils.sizes import format_size

CHUNK_NBYTES = 1 << 30  # locked by one call: drivers fail at some hundred GiB
_POLL_S = 0.01


def whole_pages(nbytes: int) -> int:
    """The bytes of the pages that a mapping of `nbytes` covers."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def memlock_limit() -> int | None:
    """RLIMIT_MEMLOCK of this process, in bytes; None: there is none."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


class PageLock:
    """Whole pages of a mapping, page-locked or not: `is_locked`, and else `reason`.

    Close it before the memory is unmapped. Where nobody does, it ends with the object, or with the interpreter. A copy
    may not reach from one chunk into the next, though the GPU's own reads may, where `device_base` is not None.
    """

    def __init__(
        self,
        driver: Driver,
        address: int,
        nbytes: int,
        *,
        read_only: bool,
        turn_path: Path,
        timeout_s: float = 60.0,
        chunk_nbytes: int = CHUNK_NBYTES,
    ) -> None:
        """Lock at once.

        Args:
            address, nbytes: whole pages (`whole_pages`), mapped.
            read_only: whether the mapping is; the device must be able to lock such.
            turn_path: a file, made where it is missing. One process at a time locks under the same file: the kernel
                refuses pages that it is just moving for another.
            timeout_s: how long to wait for one's turn.
            chunk_nbytes: locked by one call; whole pages.

        Raises:
            BadRequest: these are not whole pages. What else goes wrong is a `reason`.
        """
        for name, value in (("address", address), ("nbytes", nbytes), ("chunk_nbytes", chunk_nbytes)):
            if value <= 0 or value % mmap.PAGESIZE:
                raise BadRequest(
                    f"{name}={value}: page-locking takes whole pages of {mmap.PAGESIZE} bytes; give what is mapped"
                )
        self.address, self.nbytes, self.chunk_nbytes = address, nbytes, chunk_nbytes
        self.is_locked = False
        self.reason = ""
        """Why it is not locked; after `close`, what went wrong in unlocking."""
        self._device_addresses: list[int] = []
        self._undo = Undo(self, "the page-locked memory")
        try:
            flags = _flags(driver, read_only)
            with _turn(turn_path, timeout_s):
                self._lock(driver, flags)
            self.is_locked = True
        except (DeviceError, OSError) as error:
            reached = len(self._device_addresses) * chunk_nbytes
            self._unlock(f"{reached} of {nbytes} bytes page-locked, then: {error}{_advice(error, read_only)}")
        except BaseException:
            self._undo.run()
            raise

    def device_address(self, host_address: int, nbytes: int = 1) -> int:
        """Where the device sees bytes of it.

        Raises:
            BadRequest: not locked, not all inside, or not in one piece there (chunks may lie apart).
        """
        self._require_locked()
        first = host_address - self.address
        if first < 0 or nbytes < 1 or first + nbytes > self.nbytes:
            raise BadRequest(
                f"{nbytes} bytes at {host_address:#x}: outside the {self.nbytes} bytes page-locked at {self.address:#x}"
            )
        found = self._device_address_of(first)
        if self._device_address_of(first + nbytes - 1) - found != nbytes - 1:
            raise BadRequest(f"{nbytes} bytes at {host_address:#x}: not in one piece on the device; ask for each chunk")
        return found

    @property
    def device_base(self) -> int | None:
        """Where the device sees all of it, if in one piece; None: ask for each address.

        Raises:
            BadRequest: not locked.
        """
        self._require_locked()
        base = self._device_addresses[0]
        places = range(base, base + self.nbytes, self.chunk_nbytes)
        return base if self._device_addresses == list(places) else None

    def close(self) -> None:
        """Unlock, last chunk first. May be called twice. What goes wrong is in `reason`."""
        if self.is_locked:
            self._unlock("")

    def __enter__(self) -> "PageLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self, driver: Driver, flags: int) -> None:
        for place in range(0, self.nbytes, self.chunk_nbytes):
            address = self.address + place
            self._undo.add(partial(driver.host_unregister, address))
            try:
                driver.host_register(address, min(self.chunk_nbytes, self.nbytes - place), flags)
            except DeviceError:
                self._undo.drop()
                raise
            self._device_addresses.append(driver.host_device_pointer(address))

    def _unlock(self, reason: str) -> None:
        self.is_locked = False
        errors = self._undo.run()
        self.reason = "; ".join(filter(None, [reason, *(f"unlocking failed: {error}" for error in errors)]))

    def _require_locked(self) -> None:
        if not self.is_locked:
            raise BadRequest(f"the memory is not page-locked ({self.reason or 'closed'}); copy from it instead")
        self._undo.require()

    def _device_address_of(self, place: int) -> int:
        chunk, offset = divmod(place, self.chunk_nbytes)
        return self._device_addresses[chunk] + offset


def _flags(driver: Driver, read_only: bool) -> int:
    """
    Raises:
        DeviceError: the device has no way to lock such memory.
    """
    flags = REGISTER_PORTABLE | REGISTER_DEVICEMAP
    if not driver.attribute(HOST_REGISTER_SUPPORTED):
        raise DeviceError("the device cannot page-lock memory that it has not allocated")
    if not read_only or driver.attribute(USES_HOST_PAGE_TABLES):
        return flags
    if not driver.attribute(READ_ONLY_HOST_REGISTER_SUPPORTED):
        raise DeviceError("the device cannot page-lock a read-only mapping")
    return flags | REGISTER_READ_ONLY


def _advice(error: Exception, read_only: bool) -> str:
    if not isinstance(error, DeviceError):
        return ""
    limit = memlock_limit()
    advice = []
    if error.number and limit is not None:
        advice.append(
            f"locked memory is limited to {format_size(limit)}: raise it (ulimit -l unlimited; for a container "
            "--ulimit memlock=-1)"
        )
    if read_only:
        advice.append("else the server has to push")
    return "; " + ", ".join(advice) if advice else ""


@contextmanager
def _turn(path: Path, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """
    Raises:
        OSError: the file cannot be made, or others hold it for too long.
    """
    deadline = clock() + timeout_s
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock() > deadline:
                    raise TimeoutError(
                        f"another process is page-locking, for {timeout_s:g} s now ({path}); try again when it ends"
                    ) from None
                time.sleep(_POLL_S)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may still have the descriptor
        os.close(fd)
