"""What was taken from the driver, and gives itself back."""

import logging
import os
import weakref
from collections.abc import Callable

from sparseflow.errors import BadRequest, DeviceError

_log = logging.getLogger(__name__)


class Undo:
    """Steps that give back what an object has taken: last first, each once, and only in the process that took it.

    It is armed before anything is taken, so that nothing is left when its owner is forgotten or the interpreter ends. A
    forked child has nothing to give back: what was taken is its parent's.
    """

    def __init__(self, owner: object, what: str) -> None:
        """what: how messages call it, such as `the slab`."""
        self.what = what
        self._pid = os.getpid()
        self._steps: list[Callable[[], object]] = []
        self._is_over = False
        self._finalizer = weakref.finalize(owner, _forget, self._pid, self._steps, what)

    def add(self, step: Callable[[], object]) -> None:
        """The step that gives back what is about to be taken, or was taken just now."""
        self._steps.append(step)

    def drop(self) -> None:
        """The last step: it has nothing to give back, for nothing was taken."""
        self._steps.pop()

    def require(self) -> None:
        """
        Raises:
            BadRequest: it is closed, or this is a forked child.
        """
        if os.getpid() != self._pid:
            raise BadRequest(f"{self.what} is process {self._pid}'s; a forked child cannot use it, open one there")
        if self._is_over:
            raise BadRequest(f"{self.what} is closed; open it again")

    @property
    def has_steps(self) -> bool:
        """Whether this process has anything to give back."""
        return bool(self._steps) and os.getpid() == self._pid

    def run(self) -> list[DeviceError]:
        """Give all back; returns what went wrong. May be called twice."""
        self._is_over = True
        errors = _run(self._steps) if os.getpid() == self._pid else []
        self._finalizer.detach()
        return errors


def _run(steps: list[Callable[[], object]]) -> list[DeviceError]:
    errors: list[DeviceError] = []
    while True:
        try:
            step = steps.pop()
        except IndexError:  # or another thread has taken the last
            return errors
        try:
            step()
        except DeviceError as error:
            errors.append(error)
        except BadRequest as error:  # the device was closed first, and has taken all with it
            errors.append(DeviceError(str(error)))


def _forget(pid: int, steps: list[Callable[[], object]], what: str) -> None:
    if os.getpid() == pid:
        for error in _run(steps):
            _log.warning("%s was not closed, and giving it back failed: %s", what, error)
