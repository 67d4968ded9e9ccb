"""Attaching to a server that comes to its end meanwhile."""

import socket
import tempfile
from pathlib import Path

import pytest

from sparseflow.client.attachment import Attachment
from sparseflow.errors import NotPermitted, ServerNotRunning
from sparseflow.protocol.messages import ErrorReply
from sparseflow.protocol.packets import send_packet
from sparseflow.protocol.run_directory import RunDirectory


def test_a_server_that_ends_between_connection_and_request_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="sf-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening,
    ):
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        path = Path(RunDirectory.of("s").attach_socket)
        path.parent.mkdir(parents=True, exist_ok=True)
        listening.bind(str(path))
        listening.listen()
        connect = Attachment._connect

        def connect_and_end(attachment: Attachment, timeout_s: float) -> None:
            connect(attachment, timeout_s)
            listening.close()

        monkeypatch.setattr(Attachment, "_connect", connect_and_end)
        with pytest.raises(ServerNotRunning, match="'s' ended before it was asked"):
            Attachment("s", "", {}, 5.0)


def test_a_refusal_is_told_though_the_connection_is_closed_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = ErrorReply(0, 1, NotPermitted.wire_code, "not you")
    with (
        tempfile.TemporaryDirectory(prefix="sf-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening,
    ):
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        path = Path(RunDirectory.of("s").attach_socket)
        path.parent.mkdir(parents=True, exist_ok=True)
        listening.bind(str(path))
        listening.listen()
        connect = Attachment._connect

        def connect_and_be_refused(attachment: Attachment, timeout_s: float) -> None:
            connect(attachment, timeout_s)
            with listening.accept()[0] as peer:
                send_packet(peer, refusal)

        monkeypatch.setattr(Attachment, "_connect", connect_and_be_refused)
        with pytest.raises(NotPermitted, match="not you"):
            Attachment("s", "", {}, 5.0)
