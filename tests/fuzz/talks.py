"""A server in this process, peers that say anything to its attach socket, and what it owes each of them.

A talk is *settled* if the server takes its turns after every event: then what it must answer is known exactly. Else
events pile up, and may be taken in any order: then it is known only what it may never answer.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from choices import Choices
from made_messages import some_message
from served_shards import ServedShards
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.served_model import open_models
from sparseflow_daemon.server import Server

from sparseflow.errors import BadRequest, SparseFlowError
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import (
    Attach,
    Detach,
    Detached,
    ErrorReply,
    HintNeurons,
    Join,
    Message,
    ReleaseLeases,
    Welcome,
)
from sparseflow.protocol.packets import PACKET_NBYTES
from sparseflow.protocol.run_directory import RunDirectory

NAME = "self-describing"
MOST_SESSIONS = 2
N_PEERS = 4
MOST_DESCRIPTORS = 16
LONG_AFTER_S = 60.0
TOO_LARGE = bytes(PACKET_NBYTES + 1)


@dataclass(frozen=True)
class Host:
    """Of a server."""

    server: Server
    identity: dict[str, Any]
    """Its model's."""
    address: str


@contextmanager
def serving(folder: Path) -> Iterator[Host]:
    """A server of a tiny store, ready, whose turns the caller takes."""
    ServedShards(folder / "store", n_layers=1, ffn_dim=8)
    config = ServerConfig((folder / "store",), memory=64 << 20, io="buffered", max_sessions=MOST_SESSIONS)
    server = Server(config, RunDirectory("s", folder), open_models(config))
    try:
        server._load()
        server.loop.turn(0)
        assert server.state in ("ready", "degraded")
        yield Host(server, server.models[NAME].identity, str(server.directory.attach_socket))
    finally:
        server.close()


@dataclass(eq=False)
class Peer:
    """One connection. state: what it is to the server: `new`, `waiting` for its model, `session`, `line` or `over`."""

    sock: socket.socket
    state: str = "new"
    said: list[Message | SparseFlowError | None] = field(default_factory=list)
    """As they are read, errors too. None: a packet of nothing."""
    owed: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    token: bytes = b""
    """Of its session."""
    is_deaf: bool = False
    has_ended: bool = False
    is_closed: bool = False

    def say(self, content: bytes, descriptors: list[int]) -> bool:
        """Whether it could be sent."""
        try:
            socket.send_fds(self.sock, [content], descriptors)
        except (BlockingIOError, ConnectionError):
            return False
        return True

    def listen(self) -> Iterator[Message]:
        """What has come. Descriptors are closed."""
        while not (self.has_ended or self.is_deaf or self.is_closed):
            try:
                content, descriptors, _, _ = socket.recv_fds(self.sock, PACKET_NBYTES, MOST_DESCRIPTORS)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it has not read all that was said; what it answered is still there
                continue
            for fd in descriptors:
                os.close(fd)
            if not content:
                self.has_ended = True
                return
            message = decode(content)
            if isinstance(message, Welcome):
                assert len(descriptors) == len(message.regions)
            else:
                assert not descriptors
            yield message


class Talk:
    """Some peers, from the first to the last word."""

    def __init__(self, host: Host, *, is_settled: bool) -> None:
        self.server, self.identity, self.address = host.server, host.identity, host.address
        self.is_settled = is_settled
        self.model = host.server.models[NAME]
        self.peers: list[Peer | None] = [None] * N_PEERS
        self.gone: list[Peer] = []
        self.tokens: list[bytes] = []
        """Of all sessions there were."""
        self.quarantined: list[bytes] = []
        self.n_to_take = 0

    # events

    def peer(self, n: int) -> Peer:
        """The n-th, who connects if it is not there."""
        peer = self.peers[n]
        if peer is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            sock.connect(self.address)
            peer = self.peers[n] = Peer(sock)
            self.taken()
        return peer

    def say(self, peer: Peer, content: bytes, descriptors: list[int]) -> None:
        """Send a packet, and owe the peer what it asks for."""
        is_listened_to = not peer.has_ended and peer.state != "over"
        if not peer.say(content, descriptors):
            assert not (self.is_settled and is_listened_to), "the server does not listen"
            return
        said: Message | SparseFlowError | None = None
        if content:
            try:
                said = decode(content)
            except SparseFlowError as error:
                said = error
        is_whole = not content or (len(content) <= PACKET_NBYTES and len(descriptors) <= MOST_DESCRIPTORS)
        peer.said.append(said if is_whole else BadRequest("more than is taken"))
        if self.is_settled:
            self.owe(peer, said, is_whole=is_whole)
        self.taken()

    def owe(self, peer: Peer, said: Message | SparseFlowError | None, *, is_whole: bool) -> None:
        """What follows from a packet. is_whole: the server sees all of it."""
        code = said.wire_code if isinstance(said, SparseFlowError) else "bad_request"
        match peer.state, said:
            case (("new" | "waiting"), None):
                peer.state = "over"
            case "new", Attach() if is_whole:
                self.owe_session(peer, said)
            case "new", Join() if is_whole:
                if said.epoch == self.server.epoch and said.session in self.open_sessions():
                    peer.state, peer.token = "line", said.session
                else:
                    self.refuse(peer, "resync")
            case (("new" | "waiting"), _):
                self.refuse(peer, code if is_whole else "bad_request")
            case "session", Detach() if is_whole:
                peer.owed.append("detached")
                self.end(peer)
            case "session", _:
                self.quarantine(peer)
            case "line", None:
                peer.state = "over"
            case "line", HintNeurons() | ReleaseLeases():
                pass
            case "line", _:
                is_of_another_run = getattr(said, "epoch", self.server.epoch) != self.server.epoch
                peer.owed.append("resync" if is_of_another_run else code)
                if peer.is_deaf:
                    peer.state = "over"

    def owe_session(self, peer: Peer, attach: Attach) -> None:
        wrong = {name for name, value in attach.expected.items() if self.identity.get(name) != value}
        if self.server.is_draining:
            self.refuse(peer, "draining")
        elif attach.model not in ("", NAME):
            self.refuse(peer, "no_such_model")
        elif wrong:
            self.refuse(peer, "protocol_mismatch" if wrong & {"protocol", "layout"} else "fingerprint_mismatch")
        elif self.model.state == "loading":
            peer.state = "waiting"
        elif self.n_open() >= MOST_SESSIONS:
            self.refuse(peer, "arena_busy")
        elif peer.is_deaf:
            peer.state = "over"
        else:
            peer.state = "session"
            peer.owed.append("welcome")

    def refuse(self, peer: Peer, code: str) -> None:
        peer.owed.append(code)
        peer.state = "over"

    def quarantine(self, peer: Peer) -> None:
        self.quarantined.append(peer.token)
        self.end(peer)

    def end(self, peer: Peer) -> None:
        """A session is closed, and its lines."""
        peer.state = "over"
        for line in self.all_peers():
            if line.state == "line" and line.token == peer.token:
                line.state = "over"

    def hang_up(self, n: int) -> None:
        """Close a connection, wherever it stands."""
        peer = self.peer(n)
        self.go(peer)
        peer.sock.close()
        peer.is_closed = True
        self.peers[n] = None
        self.gone.append(peer)
        self.taken()

    def fall_silent(self, peer: Peer) -> None:
        """Say that nothing more will be said."""
        with suppress(OSError):  # the server has hung up
            peer.sock.shutdown(socket.SHUT_WR)
        self.go(peer)
        self.taken()

    def go(self, peer: Peer) -> None:
        if self.is_settled and peer.state == "session":
            self.quarantine(peer)
        elif self.is_settled:
            peer.state = "over"

    def fall_deaf(self, peer: Peer) -> None:
        """Say that nothing more will be read."""
        with suppress(OSError):
            peer.sock.shutdown(socket.SHUT_RD)
        peer.is_deaf = True
        self.taken()

    def much_later(self) -> None:
        """Those who have said nothing are dismissed."""
        self.server._tick(time.monotonic() + LONG_AFTER_S)
        if self.is_settled:
            for peer in self.all_peers():
                if peer.state == "new":
                    peer.state = "over"
            if self.model.state == "ready" or self.server.is_draining:
                self.owe_those_who_wait()
        self.taken()

    def load(self) -> None:
        """The model is loading again, or is loaded."""
        if self.model.state == "ready":
            self.model.state = "loading"
            return
        self.model.state = "ready"
        os.eventfd_write(self.server._loaded_fd, 1)
        self.taken(is_checked=False)
        if self.is_settled:
            self.owe_those_who_wait()
            self.check()

    def owe_those_who_wait(self) -> None:
        """Who comes first among them is not said."""
        waiting = [peer for peer in self.all_peers() if peer.state == "waiting"]
        n_free = MOST_SESSIONS - self.n_open()
        for peer in waiting:
            self.hear(peer)
            peer.state = "session" if peer.heard == ["welcome"] else "over"
            if not peer.is_deaf:
                peer.owed.append("draining" if self.server.is_draining else "arena_busy")
            if peer.state == "session":
                peer.owed[-1] = "welcome"
        n_welcome = sum(peer.state == "session" for peer in waiting)
        n_hearing = sum(not peer.is_deaf for peer in waiting)
        assert n_welcome == (0 if self.server.is_draining else min(n_free, n_hearing))

    # what must hold

    def all_peers(self) -> list[Peer]:
        return [peer for peer in self.peers if peer is not None]

    def open_sessions(self) -> set[bytes]:
        return {peer.token for peer in self.all_peers() if peer.state == "session"}

    def n_open(self) -> int:
        return len(self.open_sessions()) + len(self.quarantined)

    def taken(self, *, is_checked: bool = True) -> None:
        """Something has happened; where the talk is settled, the server has its turns."""
        self.n_to_take += 1
        if self.is_settled:
            self.take_turns()
            if is_checked:
                self.check()

    def take_turns(self) -> None:
        for _ in range(self.n_to_take + 2):
            self.server.loop.turn(0)
        self.n_to_take = 0
        assert self.server.n_errors == 0

    def hear(self, peer: Peer) -> None:
        for message in peer.listen():
            match message:
                case Welcome():
                    peer.token = message.session
                    assert message.epoch == self.server.epoch
                    assert message.session not in self.tokens
                    self.tokens.append(message.session)
                    peer.heard.append("welcome")
                case Detached():
                    peer.heard.append("detached")
                case ErrorReply():
                    assert message.text
                    peer.heard.append(message.code)
                case _:
                    raise AssertionError(f"the server says {message}")

    def check(self) -> None:
        for peer in self.all_peers():
            self.hear(peer)
            if self.is_settled and not peer.is_deaf:
                assert peer.heard == peer.owed, peer
                assert peer.has_ended == (peer.state == "over"), peer
            self.check_answers(peer)
        if self.is_settled:
            self.check_server()
        n_right = sum(self.is_right_attach(peer) for peer in [*self.all_peers(), *self.gone])
        assert len(self.server.sessions) <= min(n_right, MOST_SESSIONS), "a session that nobody has asked for"

    def check_server(self) -> None:
        """It knows of whom it must, as what they are, and of nobody else."""
        states = [peer.state for peer in self.all_peers()]
        assert len(self.server._greetings) == states.count("new") + states.count("waiting")
        assert set(self.server.sessions) == self.open_sessions() | set(self.quarantined)
        for token, session in self.server.sessions.items():
            lines = [peer for peer in self.all_peers() if peer.state == "line" and peer.token == token]
            assert len(session.lines) == len(lines)
            assert session.is_quarantined == (token in self.quarantined)

    def check_answers(self, peer: Peer) -> None:
        """What holds in any order: one answer to the greeting, and the right one's only to who has asked rightly."""
        first = peer.said[0] if peer.said else None
        if peer.heard[:1] == ["welcome"]:
            assert self.is_right_attach(peer)
            assert peer.heard[1:] in ([], ["detached"])
            assert len(peer.heard) == 1 or any(isinstance(said, Detach) for said in peer.said)
        elif isinstance(first, Join) and first.epoch == self.server.epoch and first.session in self.tokens:
            assert not {"welcome", "detached"} & set(peer.heard)
            assert len(peer.heard) <= len(peer.said), "more than an answer to each"
        else:
            assert len(peer.heard) <= 1
            assert not {"welcome", "detached"} & set(peer.heard)
            if isinstance(first, Join):
                assert peer.heard in ([], ["resync"])

    def is_right_attach(self, peer: Peer) -> bool:
        first = peer.said[0] if peer.said else None
        return (
            isinstance(first, Attach)
            and first.model in ("", NAME)
            and all(self.identity.get(name) == value for name, value in first.expected.items())
        )

    # the end

    def close(self) -> None:
        """Leave the server as it was, however the talk has gone."""
        for peer in self.all_peers():
            peer.sock.close()
        self.model.state = "ready"
        self.server._lines.is_draining = False
        for greeting in list(self.server._greetings):
            self.server._dismiss(greeting)
        for session in list(self.server.sessions.values()):
            self.server._end(session)
        for _ in range(2 * N_PEERS):  # who has not been taken yet
            self.server.loop.turn(0)

    def wind_down(self, choices: Choices) -> None:
        """All go, with goodbye or without; then their processes end. Nothing may be left."""
        self.take_turns()
        self.check()
        for n, peer in enumerate(self.peers):
            if peer is not None:
                if choices.one_in(2):
                    self.say(peer, encode(Detach()), [])
                self.hang_up(n)
        if self.model.state == "loading":
            self.load()
        self.take_turns()
        assert not self.server._greetings
        for session in list(self.server.sessions.values()):
            assert session.is_quarantined
            assert not session.lines
            self.server._end(session)
        assert not self.server.sessions
        assert self.server.n_errors == 0


# --- what they say


def some_attach(choices: Choices, identity: dict[str, Any]) -> Attach:
    """As a client says it, but for one thing sometimes."""
    expected = {name: value for name, value in identity.items() if choices.one_in(2)}
    attach = Attach(choices.number(2), choices.of(["", NAME]), expected)
    match choices.below(16):
        case 0:
            return Attach(attach.pid, choices.of(["another", NAME + " ", "x" * 1000]), expected)
        case 1:
            return Attach(attach.pid, attach.model, expected | {choices.of([*identity, "colour"]): choices.number(3)})
    return attach


def some_join(choices: Choices, talk: Talk) -> Join:
    """Of a session that is open or was, but for one thing sometimes."""
    epoch = talk.server.epoch
    token = talk.tokens[-1 - choices.below(len(talk.tokens))] if talk.tokens else b"\0" * 16
    match choices.below(8):
        case 0:
            return Join(choices.of([0, epoch ^ 1, epoch - 1]), token)
        case 1:
            return Join(epoch, choices.of([b"", token[:15], token + b"\0", bytes(16), token[::-1]]))
    return Join(epoch, token)


def some_packet(choices: Choices, talk: Talk) -> bytes:
    match choices.below(16):
        case 0 | 1 | 2 | 3 | 4 | 5:
            return encode(some_attach(choices, talk.identity))
        case 6 | 7 | 8:
            return encode(some_join(choices, talk))
        case 9 | 10:
            return encode(Detach())
        case 11:
            return encode(some_message(choices))
        case 12:
            content = bytearray(encode(choices.of([Detach(), some_join(choices, talk), Attach(1, "", {})])))
            content[choices.below(len(content))] ^= choices.number(1)
            return bytes(content)
        case 13:
            return choices.take(choices.below(12))
        case 14:
            return TOO_LARGE if choices.one_in(4) else b""
    return encode(HintNeurons(talk.server.epoch, choices.below(3), b"\0" * choices.below(6)))
