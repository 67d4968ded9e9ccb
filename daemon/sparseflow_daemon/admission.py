"""Opening sessions: who may attach, to what, and what they are given. One connection, one packet in, one packet out."""

import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass

import zmq

from sparseflow.errors import (
    ArenaBusy,
    BadRequest,
    FingerprintMismatch,
    NoSuchModel,
    NotPermitted,
    ProtocolMismatch,
)
from sparseflow.protocol.codec import brief
from sparseflow.protocol.messages import Attach, Welcome
from sparseflow.protocol.packets import send_packet
from sparseflow_daemon.served_model import ServedModel
from sparseflow_daemon.sessions import Session

_SO_PEERPIDFD = 77  # Linux 6.5 and later: without it the pid may have been given to another process meanwhile
_GREETING_TIMEOUT_S = 5.0
_MOST_NAMED = 20
_PROTOCOL_FIELDS = ("protocol", "layout")
_REGIONS = ("arena", "dense", "predictors", "files")


@dataclass(eq=False)
class Greeting:
    """A connection that is no session yet. attach: what it asked for, once it has; it may wait for a model to load."""

    sock: socket.socket
    pid: int
    attach: Attach | None = None
    deadline_s: float = 0.0

    def __post_init__(self) -> None:
        self.deadline_s = time.monotonic() + _GREETING_TIMEOUT_S


def greet(sock: socket.socket) -> Greeting:
    """
    Raises:
        NotPermitted: the peer is another user's, or its process cannot be seen from here.
    """
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    require_own(uid)
    if pid == 0:
        raise NotPermitted(
            "your process cannot be seen from the server's pid namespace, so its end would not be noticed; "
            "run both in one container, or share the namespace"
        )
    return Greeting(sock, pid)


def require_own(uid: int) -> None:
    """
    Raises:
        NotPermitted: a peer is another user's.
    """
    if uid not in (os.getuid(), 0):
        raise NotPermitted(f"user {uid} may not talk to a server of user {os.getuid()}; start one of your own")


def user_of(frame: zmq.Frame) -> int:
    """Whose process sent a frame to `ctl.sock`, as the kernel says.

    libzmq gives `localhost:UID:GID:PID` for the address.

    Raises:
        NotPermitted: this libzmq does not.
    """
    try:
        return int(str(frame.get("Peer-Address")).split(":")[-3])
    except (zmq.ZMQError, ValueError, IndexError) as error:
        raise NotPermitted("whose process this is cannot be seen; install pyzmq's own wheel") from error


def model_for(attach: Attach, models: dict[str, ServedModel]) -> ServedModel:
    """
    Raises:
        NoSuchModel: none of that name, or several and none was named.
        FingerprintMismatch, ProtocolMismatch: naming each field that differs.
    """
    model = next(iter(models.values())) if not attach.model and len(models) == 1 else models.get(attach.model)
    if model is None:
        what = f"model {brief(attach.model)} is not served here" if attach.model else "several models are served here"
        raise NoSuchModel(f"{what}; name one of: {', '.join(sorted(models))}")
    differing = [
        f"{brief(name)[1:-1]}: {brief(found)} there, {model.identity.get(name)!r} here"
        for name, found in sorted(attach.expected.items())
        if found != model.identity.get(name)
    ]
    if not differing:
        return model
    what = f"{model.name}: client and server differ in {'; '.join(differing[:_MOST_NAMED])}"
    if any(name in attach.expected and attach.expected[name] != model.identity[name] for name in _PROTOCOL_FIELDS):
        raise ProtocolMismatch(f"{what}; install the same SparseFlow on both sides")
    raise FingerprintMismatch(f"{what}; attach to a server of the same store, or do not ask for another's fields")


def open_session(greeting: Greeting, model: ServedModel, n_open: int, limit: int, epoch: int) -> Session:
    """Make the session and hand the memory over.

    Raises:
        ArenaBusy: there are as many sessions as the arena has shares for.
        SparseFlowError: what kept the model from loading.
    """
    if model.error is not None:
        raise model.error
    if n_open >= limit:
        raise ArenaBusy(
            f"{model.name}: {n_open} sessions are open, {limit} have a share of the arena; close one, or start the "
            "server with a larger --max-sessions"
        )
    pidfd = _pidfd(greeting)
    try:
        session = Session(secrets.token_bytes(16), greeting.pid, greeting.sock, pidfd, model)
    except BaseException:
        os.close(pidfd)
        raise
    engine, times = model.engine, model.engine.read_times
    welcome = Welcome(
        epoch=epoch,
        session=session.token,
        server_pid=os.getpid(),
        model=model.name,
        profile=model.describe_profile(),
        identity=model.identity,
        regions=[
            *({"name": name, "nbytes": model.regions[name].nbytes, "parts": model.parts[name]} for name in _REGIONS),
            {"name": "counters", "nbytes": session.counters_memory.nbytes, "parts": {}},
        ],
        is_resident=model.is_resident,
        n_slots=model.n_slots,
        fetch_limit=model.profile.ffn_dimension if model.is_resident else model.fetch_limit,
        layer_s=0.0 if model.is_resident else times.layer_s,
        scattered_s=0.0 if model.is_resident else times.scattered_s,
        io=engine.io,
        disk_bytes_per_s=engine.speed.bytes_per_s(model.profile.bundle_nbytes),
        strategy=model.strategy,
    )
    try:
        descriptors = [model.regions[name].fd for name in _REGIONS]
        send_packet(greeting.sock, welcome, [*descriptors, session.counters_memory.fd])
    except BaseException:
        session.close()
        raise
    return session


def _pidfd(greeting: Greeting) -> int:
    try:
        return greeting.sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass
    try:
        return os.pidfd_open(greeting.pid)
    except OSError as error:
        raise BadRequest(
            f"process {greeting.pid} cannot be watched ({error.strerror}); that takes Linux 5.3 or later, and a file "
            "descriptor of the server"
        ) from error
