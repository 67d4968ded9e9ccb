"""Attaching to a server that comes to its end meanwhile."""

import socket
import tempfile
from pathlib import Path

import pytest

from sparseflow.client.attachment import Attachment
from sparseflow.errors import ServerNotRunning
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
