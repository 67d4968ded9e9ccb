"""`/metrics` over HTTP, by a thread that asks the server as anybody does: it shares nothing with the loop.

One connection at a time, each with a deadline: whoever is slow holds up who reads metrics, and takes no descriptor that
a session needs.
"""

import errno
import io
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from sparseflow.errors import BadRequest, ServerError
from sparseflow.protocol.metrics import status_registry

_log = logging.getLogger(__name__)
_CONNECTION_S = 5.0
_TURN_S = 0.5
_END_S = 5.0
_PAUSE_S = 0.1
_MOST_HEAD_NBYTES = 16384


class MetricsEndpoint:
    """Has its port from the start, answers from `begin` on, and gives both back in `close`."""

    def __init__(self, host: str, port: int, server: str, ask: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            port: 0 for any that is free.
            server: the weight server's name.
            ask: gives its status, or raises, within a deadline.

        Raises:
            BadRequest: no such host, or not this one. ServerError: the port cannot be had.
        """
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise BadRequest(f"--metrics-host {host}: {error.strerror}; give an address of this machine") from error
        try:
            self._http = _Server(family, (str(address[0]), int(address[1])))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise BadRequest(
                    f"--metrics-host {host}: this machine has no such address; give an address of this machine"
                ) from error
            raise ServerError(
                f"--metrics-port {port} of {host} cannot be had ({error.strerror}); choose another, or 0 for any that "
                "is free"
            ) from error
        self._http.set_app(make_wsgi_app(status_registry(ask, server)))
        name = self._http.server_name
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{self._http.server_port}/metrics"
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def begin(self) -> None:
        """Answer from now on; who has connected before is answered too."""
        self._thread.start()
        _log.info("metrics at %s", self.url, extra={"url": self.url})

    def _run(self) -> None:
        while not self._http.is_over:
            self._http.handle_request()

    def close(self) -> None:
        """End the thread, and with it any connection. May be called twice."""
        self._http.end()
        if self._thread.is_alive():
            self._thread.join(_END_S)
        self._http.server_close()


class _Server(WSGIServer):
    """`handle_request` serves one connection, or returns after a while."""

    timeout = _TURN_S

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int]) -> None:
        self.address_family = family
        self.is_over = False
        self._current: socket.socket | None = None
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As the base does, which asks the name service who we are besides: that can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection. Where none can be taken, it is tried again later: not at once, for as long as there is one."""
        try:
            return super().get_request()
        except OSError as error:
            if not self.is_over:
                _log.warning("a connection for metrics could not be taken: %s", error)
                time.sleep(_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer, unless it is over: whichever of this and `end` comes later sees the other."""
        self._current = request
        try:
            if self.is_over:
                self.shutdown_request(request)
            else:
                super().process_request(request, client_address)
        finally:
            self._current = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked went away, or was too slow; that is no news."""
        _log.debug("a connection for metrics ended", exc_info=True)

    def end(self) -> None:
        """Take no connection any more and cut the one that there is. From another thread."""
        self.is_over = True
        for sock in (self.socket, self._current):
            with suppress(OSError):  # not connected any more, or closed
                if sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    """Has so much time for all of a request and its answer."""

    def setup(self) -> None:
        """Take the whole head of the request; nothing is read of what follows."""
        super().setup()
        self.rfile = io.BytesIO(_head(self.request, time.monotonic() + _CONNECTION_S))
        self.request.settimeout(_CONNECTION_S)  # of all that is sent

    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes are many."""


def _head(sock: socket.socket, deadline_s: float) -> bytes:
    """
    Raises:
        TimeoutError: it was not there in time.
    """
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MOST_HEAD_NBYTES:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("a request for metrics took too long")
        sock.settimeout(left_s)
        received = sock.recv(4096)
        if not received:
            break
        head += received
    return head
