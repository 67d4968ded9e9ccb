"""The server's children on GPUs: started when first needed, watched by its loop, ended if they take too long."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sparseflow.cuda.tickets import format_uuid
from sparseflow.errors import NoAnswer, ServerError, ServerNotRunning, SparseFlowError
from sparseflow.protocol.codec import encode
from sparseflow.protocol.packets import receive_packet
from sparseflow_daemon.gpu.desk import Ask, GpuDesk, Told
from sparseflow_daemon.loop import Loop

_log = logging.getLogger(__name__)
_MOST_AT_ONCE = 64  # messages between two looks at everything else
_MOST_CHILDREN = 64
_KILL_TIMEOUT_S = 5.0  # a process that the driver does not let go is not waited for any longer
_CLOSE_TIMEOUT_S = 3.0
_IDLE_S = 30.0  # without a client it gives its memory on the GPU back
_START_FACTOR = 3  # to start takes longer than anything else


@dataclass
class GpuRecord:
    """What status tells of one GPU. Outlives its child."""

    uuid: bytes
    starts: int = 0
    pushes: int = 0
    nbytes_pushed: int = 0
    errors: int = 0
    last_error: str | None = None


@dataclass(eq=False)
class GpuChild:
    """A process, its socket, and what it was asked."""

    record: GpuRecord
    desk: GpuDesk
    process: "subprocess.Popen[bytes]"
    sock: socket.socket
    pidfd: int
    slabs: set[int] = field(default_factory=set)
    """Numbers of those that are open, or may be."""
    idle_since_s: float = field(default_factory=time.monotonic)
    must_be_dead_by_s: float = float("inf")
    """Set when it was told to end, and again when it was killed."""
    is_killed: bool = False
    is_lender: bool = False
    """It stays, whether it is asked anything or not."""

    @property
    def uuid(self) -> bytes:
        """Of its GPU."""
        return self.record.uuid


class GpuChildren:
    """One a GPU, by its uuid; beside it maybe one that is just ending."""

    def __init__(self, loop: Loop, timeout_s: float, log_format: str = "text") -> None:
        """
        Args:
            timeout_s: how long a child may take for anything.
            log_format: of what children log.
        """
        self.on_told: list[Callable[[Told], None]] = []
        """Called with each answer, whoever has asked."""
        self.on_gone: list[Callable[[GpuChild, list[object]], None]] = []
        """Called when a child is dead, with whose questions it has left unanswered."""
        self.records: dict[bytes, GpuRecord] = {}
        self._loop, self._timeout_s, self._log_format = loop, timeout_s, log_format
        self._children: list[GpuChild] = []

    def of(self, uuid: bytes) -> GpuChild:
        """The child on a GPU; where there is none, a new one that is starting.

        Raises:
            ServerError: none can be started.
        """
        for child in self._children:
            if child.uuid == uuid and child.desk.is_usable and not child.is_lender:
                return child
        return self._start(self.records.setdefault(uuid, GpuRecord(uuid)), ["--uuid", uuid.hex()])

    def start_lender(self, device: int) -> GpuChild:
        """A new child on the GPU of a number, that does nothing but keep what others read there.

        Raises:
            ServerError: none can be started.
        """
        child = self._start(GpuRecord(b""), ["--device", str(device)])
        child.is_lender = True
        return child

    def _start(self, record: GpuRecord, arguments: list[str]) -> GpuChild:
        if len(self._children) >= _MOST_CHILDREN:
            raise ServerError(f"{len(self._children)} GPU children run; a host has no more GPUs than that")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "sparseflow_daemon.gpu.child", *arguments]
        try:
            with theirs:
                process = subprocess.Popen(
                    [*command, "--socket", str(theirs.fileno()), "--log-format", self._log_format],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            pidfd = os.pidfd_open(process.pid)
        except OSError as error:
            ours.close()
            raise ServerError(
                f"a child for the GPU cannot be started ({error}); see the limits of this user"
            ) from error
        ours.setblocking(False)
        record.starts += 1
        start_timeout_s = _START_FACTOR * self._timeout_s
        desk = GpuDesk(time.monotonic(), start_timeout_s=start_timeout_s, answer_timeout_s=self._timeout_s)
        child = GpuChild(record, desk, process, ours, pidfd)
        self._children.append(child)
        self._loop.watch(ours.fileno(), lambda: self._on_packets(child))
        self._loop.watch(pidfd, lambda: self._on_death(child))
        _log.info("GPU child of pid %d: %s", process.pid, " ".join(arguments), extra={"pid": process.pid})
        return child

    @property
    def is_waiting(self) -> bool:
        """Whether some child has something to do, or to end."""
        return any(child.desk.is_waiting or not child.desk.is_usable for child in self._children)

    def ask(self, child: GpuChild, ask: Ask) -> None:
        """Ask a child that is usable; the answer comes by `on_told`."""
        child.desk.ask(ask)
        self._send(child)

    def _send(self, child: GpuChild) -> None:
        while (ask := child.desk.to_send()) is not None:
            try:
                socket.send_fds(child.sock, [encode(ask.message)], list(ask.descriptors))
            except BlockingIOError:
                return  # it has read nothing for a while; when it answers, or at the next look
            except OSError as error:
                self._end(child, f"its socket is broken ({error.strerror})")
                return
            child.desk.sent(time.monotonic())

    def _on_packets(self, child: GpuChild) -> None:
        for _ in range(_MOST_AT_ONCE):
            if not child.desk.is_usable:
                break
            try:
                message, descriptors = receive_packet(child.sock)
                for fd in descriptors:
                    os.close(fd)
                told = child.desk.hear(message, time.monotonic())
            except NoAnswer:
                break
            except ServerNotRunning:
                self._end(child, "it ended")
                return
            except SparseFlowError as error:  # of what it may not say
                self._end(child, str(error))
                return
            for each in told:
                for listener in self.on_told:
                    listener(each)
            if child.desk.is_usable:
                self._send(child)
        else:
            self._loop.call_again(child.sock.fileno())
        if child.desk.state == "ending":  # it has said so
            self._end(child, child.desk.why)

    def look(self, now: float) -> None:
        """What has deadlines, or nothing to do any more. Called often while `is_waiting`, and now and then."""
        for child in list(self._children):
            if now >= child.must_be_dead_by_s:
                if child.is_killed:
                    self._give_up(child, "and the driver does not let it die")
                else:
                    self._kill(child)
            elif why := child.desk.overdue(now):
                self._end(child, why)
            elif child.slabs or child.is_lender or child.desk.is_waiting:
                child.idle_since_s = now
                self._send(child)
            elif child.desk.is_usable and now >= child.idle_since_s + _IDLE_S:
                self._retire(child)

    def _retire(self, child: GpuChild) -> None:
        """Let it end: so it does where its socket ends."""
        child.desk.end("")
        child.must_be_dead_by_s = time.monotonic() + _KILL_TIMEOUT_S
        self._loop.unwatch(child.sock.fileno())
        child.sock.close()

    def _end(self, child: GpuChild, why: str) -> None:
        self._retire(child)
        child.desk.why = child.desk.why or why
        self._kill(child)

    def _kill(self, child: GpuChild) -> None:
        child.is_killed = True
        child.must_be_dead_by_s = time.monotonic() + _KILL_TIMEOUT_S
        child.process.kill()

    def _on_death(self, child: GpuChild) -> None:
        """Its process is dead: nothing of it writes anywhere any more."""
        code = child.process.wait(_KILL_TIMEOUT_S)  # its pidfd says that it is dead
        if child.desk.is_usable:
            self._on_packets(child)  # its last words
        self._give_up(child, f"exit code {code}")

    def _give_up(self, child: GpuChild, how: str) -> None:
        if child.desk.is_usable:
            self._retire(child)
            child.desk.why = "it ended"
        self._loop.unwatch(child.pidfd)
        os.close(child.pidfd)
        self._children.remove(child)
        if child.desk.why:
            child.desk.why += f" ({how})"
            child.record.errors += 1
            child.record.last_error = child.desk.why
            _log.error("GPU child of pid %d: %s", child.process.pid, child.desk.why, extra={"pid": child.process.pid})
        unanswered = child.desk.gone()
        for listener in self.on_gone:
            listener(child, unanswered)

    def status(self) -> list[dict[str, Any]]:
        """Of each GPU that was used."""
        found = []
        for uuid, record in self.records.items():
            child = next((child for child in reversed(self._children) if child.uuid == uuid), None)
            found.append(
                {
                    "uuid": format_uuid(uuid),
                    "name": child.desk.device_name or None if child else None,
                    "state": child.desk.state if child else "gone",
                    "pid": child.process.pid if child else None,
                    "slabs": len(child.slabs) if child else 0,
                    "starts": record.starts,
                    "pushes": record.pushes,
                    "bytes_pushed": record.nbytes_pushed,
                    "errors": record.errors,
                    "last_error": record.last_error,
                }
            )
        return found

    def close(self) -> None:
        """End all: orderly, and after a while in any case. May be called twice."""
        children, self._children = self._children, []
        for child in children:
            self._retire(child)
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline_s - time.monotonic()))
            if child.process.returncode is None:
                child.process.kill()
                with suppress(subprocess.TimeoutExpired):  # then the driver does not let it die
                    child.process.wait(_KILL_TIMEOUT_S)
            self._loop.unwatch(child.pidfd)
            os.close(child.pidfd)
