"""Asking a server how it is: one request, no session."""

import time
from typing import Any

import zmq

from sparseflow.errors import NoAnswer, ServerNotRunning, of_wire_code
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import ErrorReply, StatusReply, StatusRequest
from sparseflow.protocol.run_directory import RunDirectory


def ask_status(name: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """What a server says of itself, as `sparseflow status --json` prints it.

    Raises:
        ServerNotRunning: no server of that name. NoAnswer: it says nothing within `timeout_s`.
    """
    directory = RunDirectory.of(name)
    if not directory.is_alive():
        raise ServerNotRunning(f"no server {name!r} runs here ({directory.path}); {directory.remedy}")
    context = zmq.Context()
    try:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(directory.ctl_endpoint)
        sock.send(encode(StatusRequest(1)))
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if not sock.poll(min(int(1000 * left_s) + 1, 200)):
                if not directory.is_alive():
                    raise ServerNotRunning(f"server {name!r} has just ended; {directory.remedy}")
                continue
            match decode(sock.recv()):
                case StatusReply(content=content):
                    return content
                case ErrorReply(code=code, text=text):
                    raise of_wire_code(code, text)
        pid = directory.owner()
        raise NoAnswer(
            f"server {name!r} (pid {pid}) said nothing within {timeout_s:g} s; if it was stopped, kill -CONT {pid}; "
            f"else see its log, and end it: kill -9 {pid}"
        )
    finally:
        context.destroy(linger=0)
