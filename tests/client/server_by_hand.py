"""A server whose every word is the test's own."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from sparseflow.client.attachment import Attachment
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.protocol.messages import TOLD_COUNTS, Attach, Join, Message, NeuronsLeased, NeuronsReady, Welcome
from sparseflow.protocol.packets import receive_packet, send_packet
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow.protocol.session_counters import COUNTERS_NBYTES
from sparseflow.store.profile import ModelProfile

EPOCH = 2**62 + 1
N_SLOTS = 12
DEADLINE_S = 10.0
PROFILE = ModelProfile("by-hand", 64, 16, 2, 1, 8, 8, dtype="float16")


class ServerByHand:
    """Sockets of a server. What it says is said by the test, in its own thread: nothing here waits without end."""

    def __init__(self, epoch: int = EPOCH, n_slots: int = N_SLOTS) -> None:
        directory = RunDirectory.of("by-hand")
        directory.path.mkdir(mode=0o700, exist_ok=True)
        directory.attach_socket.unlink(missing_ok=True)  # of one that has ended
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(DEADLINE_S)
        self._listener.bind(str(directory.attach_socket))
        self._listener.listen(8)
        self.epoch, self.n_slots, self.token = epoch, n_slots, os.urandom(16)
        arena = SharedMemory("arena", n_slots * PROFILE.bundle_nbytes)
        self.slots: NDArray[np.uint16] = arena.bytes.view(np.uint16).reshape(n_slots, -1)
        """(n_slots, elements of a bundle), bit by bit."""
        self._memories = {
            "arena": arena,
            **{name: SharedMemory(name, 0) for name in ("dense", "predictors", "files")},
            "counters": SharedMemory("counters", COUNTERS_NBYTES, others_may_write=True),
        }
        self._open: list[socket.socket] = []
        self.session: socket.socket | None = None

    def attach(self) -> Attachment:
        """A session of this process."""
        with self.welcoming():
            return Attachment("by-hand", "", {}, DEADLINE_S)

    @contextmanager
    def welcoming(self) -> Iterator[None]:
        """While somebody attaches."""
        welcoming = threading.Thread(target=self.welcome)
        welcoming.start()
        yield
        welcoming.join(DEADLINE_S)

    def welcome(self) -> None:
        """Open a session with whoever comes next."""
        self.session = self.take_connection()
        message, _ = receive_packet(self.session)
        assert isinstance(message, Attach)
        welcome = Welcome(
            epoch=self.epoch,
            session=self.token,
            server_pid=os.getpid(),
            model="by-hand",
            profile=asdict(PROFILE),
            identity={},
            regions=[{"name": name, "nbytes": memory.nbytes, "parts": {}} for name, memory in self._memories.items()],
            is_resident=False,
            n_slots=self.n_slots,
            fetch_limit=self.n_slots,
            layer_s=0.0,
            scattered_s=0.0,
            io="buffered",
            disk_bytes_per_s=1.0,
            strategy={},
        )
        send_packet(self.session, welcome, [memory.fd for memory in self._memories.values()])

    def take_connection(self) -> socket.socket:
        """The server's end of a connection that has just been made."""
        sock, _ = self._listener.accept()
        sock.settimeout(DEADLINE_S)
        self._open.append(sock)
        return sock

    def take_line(self) -> socket.socket:
        """The server's end of a line that has just been opened."""
        sock = self.take_connection()
        assert read(sock) == Join(self.epoch, self.token)
        return sock

    def stop_listening(self) -> None:
        """Take no connection any more."""
        self._listener.close()

    def stop(self) -> None:
        """As when it ends: nothing is there any more."""
        for sock in (*self._open, self._listener):
            sock.close()

    def close(self) -> None:
        """Stop, and give the memory back."""
        self.stop()
        for memory in self._memories.values():
            memory.close()


def read(sock: socket.socket) -> Message:
    """The next message, which brings no descriptors."""
    message, descriptors = receive_packet(sock)
    assert descriptors == []
    return message


def says_nothing(sock: socket.socket) -> bool:
    """Whether nothing comes for a moment."""
    sock.settimeout(0.05)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(DEADLINE_S)


def ready(request_id: int, *slots: int, epoch: int = EPOCH, counts: list[int] | None = None) -> NeuronsReady:
    """All bundles are there, in these slots."""
    return NeuronsReady(request_id, epoch, packed(*slots), counts or [0] * len(TOLD_COUNTS))


def leased(
    request_id: int, slots: list[int], missing: list[int], *, epoch: int = EPOCH, counts: list[int] | None = None
) -> NeuronsLeased:
    """Slots are leased, and bundles at some positions are still to come."""
    return NeuronsLeased(request_id, epoch, packed(*slots), packed(*missing), counts or [0] * len(TOLD_COUNTS))


def came(request_id: int, epoch: int = EPOCH) -> NeuronsReady:
    """The rest is there too."""
    return NeuronsReady(request_id, epoch, b"", [])


def packed(*numbers: int) -> bytes:
    """As they travel."""
    return np.array(numbers, "<u4").tobytes()


def ids(*numbers: int) -> NDArray[np.uint32]:
    """As a client has them."""
    return np.array(numbers, np.uint32)


def soon(seconds: float = DEADLINE_S) -> float:
    """A deadline."""
    return time.monotonic() + seconds
