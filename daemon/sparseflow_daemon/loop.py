"""One thread that waits for many descriptors, and calls who watches the ready ones. No handler may wait."""

import select
from collections.abc import Callable
from contextlib import suppress

Handler = Callable[[], None]


class Loop:
    """Handlers by descriptor."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._unfinished: set[int] = set()

    def watch(self, fd: int, handler: Handler) -> None:
        """Call a handler whenever a descriptor is readable, instead of the one before it."""
        self._handlers[fd] = handler
        with suppress(FileExistsError):  # it is watched already
            self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """No more. May be called twice, and for a descriptor that is closed."""
        if self._handlers.pop(fd, None) is not None:
            with suppress(OSError):  # closed: then it is not watched any more
                self._epoll.unregister(fd)

    def call_again(self, fd: int) -> None:
        """In the next turn, readable or not: its handler stopped early, to let others have their turn."""
        self._unfinished.add(fd)

    def turn(self, timeout_s: float) -> None:
        """Wait until something is readable, or for `timeout_s`, and call what watches it."""
        ready = {fd for fd, _ in self._epoll.poll(0 if self._unfinished else timeout_s)} | self._unfinished
        self._unfinished.clear()
        for fd, handler in [(fd, self._handlers.get(fd)) for fd in ready]:
            if handler is not None and self._handlers.get(fd) is handler:  # not closed by one before it
                handler()

    def close(self) -> None:
        """Watch nothing any more."""
        self._handlers.clear()
        self._epoll.close()
