"""Attaching to a server that comes to its end meanwhile, or refuses."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseflow.client.attachment import Attachment
from sparseflow.errors import NotPermitted, ServerNotRunning
from sparseflow.protocol.messages import ErrorReply
from sparseflow.protocol.packets import send_packet
from sparseflow.protocol.run_directory import RunDirectory

REFUSAL = ErrorReply(0, 1, NotPermitted.wire_code, "not you")


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where a server named `s` would take connections."""
    with (
        tempfile.TemporaryDirectory(prefix="sf-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
    ):
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        path = Path(RunDirectory.of("s").attach_socket)
        path.parent.mkdir(parents=True, exist_ok=True)
        sock.bind(str(path))
        sock.listen()
        yield sock


def test_a_server_that_ends_between_connection_and_request_is_named(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Attachment._connect

    def connect_and_end(attachment: Attachment, timeout_s: float) -> None:
        connect(attachment, timeout_s)
        listening.close()

    monkeypatch.setattr(Attachment, "_connect", connect_and_end)
    with pytest.raises(ServerNotRunning, match="'s' ended before it was asked"):
        Attachment("s", "", {}, 5.0)


@pytest.mark.parametrize("after", ["_connect", "_ask"])
def test_a_refusal_is_told_though_the_connection_is_closed_and_the_request_unread(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    step = getattr(Attachment, after)

    def step_and_be_refused(attachment: Attachment, *values: Any) -> None:
        step(attachment, *values)
        with listening.accept()[0] as peer:
            send_packet(peer, REFUSAL)

    monkeypatch.setattr(Attachment, after, step_and_be_refused)
    with pytest.raises(NotPermitted, match="not you"):
        Attachment("s", "", {}, 5.0)
