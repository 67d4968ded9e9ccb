"""Memory of a weight server, mapped here."""

from typing import Any

from sparseflow.engine.mapping import Mapping
from sparseflow.errors import NotEnoughMemory


class SharedMap:
    """A map that stays at its address while another server's memory takes the place of what is behind it.

    It is unmapped once neither this object nor anything made of `content` is left.
    """

    def __init__(self, fd: int, nbytes: int, *, changes: bool) -> None:
        """
        Args:
            changes: the server writes to it while we read: then a write of ours is a fault (SIGSEGV). Else it is
                copy-on-write, as a mapped file of a store is: nobody else sees what is written.

        Raises:
            NotEnoughMemory: the system refuses.
        """
        self.nbytes = nbytes
        try:
            self._mapping = Mapping(fd, nbytes, writable=not changes, private=not changes)
        except OSError as error:
            raise self._refusal(error) from error

    @property
    def content(self) -> Any:
        """A buffer, as torch and numpy take it."""
        return self._mapping.content

    def replace(self, fd: int) -> None:
        """Put other memory of the same size and content in place, under whatever reads it now.

        Raises:
            NotEnoughMemory: the system refuses.
        """
        try:
            self._mapping.replace(fd)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> NotEnoughMemory:
        return NotEnoughMemory(
            f"{self.nbytes} bytes of the server's memory cannot be mapped ({error.strerror}); "
            "raise the limits of this process (ulimit -v)"
        )
