"""Messages on `attach.sock`: one a packet, with file descriptors beside it."""

import os
import socket
from collections.abc import Sequence

from sparseflow.errors import BadRequest, NoAnswer, ServerNotRunning
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import Message

PACKET_NBYTES = 160 << 10  # what the kernel takes at once, as it is set up everywhere; 40,000 neuron ids
_MOST_DESCRIPTORS = 16


def send_packet(sock: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        BadRequest: it does not fit into a packet.
        OSError: the peer is gone, or takes nothing.
    """
    content = encode(message)
    if len(content) > PACKET_NBYTES:
        raise BadRequest(f"{type(message).__name__} of {len(content)} bytes: a packet holds {PACKET_NBYTES}")
    socket.send_fds(sock, [content], list(descriptors))


def receive_packet(sock: socket.socket) -> tuple[Message, list[int]]:
    """The next message and its descriptors, which are the caller's to close.

    Raises:
        ServerNotRunning: the peer has closed. NoAnswer: the socket's timeout has passed.
        BadRequest, ProtocolMismatch: not a message.
    """
    try:
        content, descriptors, flags, _ = socket.recv_fds(sock, PACKET_NBYTES, _MOST_DESCRIPTORS)
    except TimeoutError as error:
        raise NoAnswer(f"no answer within {sock.gettimeout():g} s; is the other side stopped?") from error
    except BlockingIOError as error:
        raise NoAnswer("nothing has come") from error
    except ConnectionError as error:
        raise ServerNotRunning(f"the connection broke ({error.strerror})") from error
    try:
        for fd in descriptors:
            os.set_inheritable(fd, False)
        if not content:
            raise ServerNotRunning("the connection was closed by the other side")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise BadRequest(f"packet of more than {PACKET_NBYTES} bytes or {_MOST_DESCRIPTORS} descriptors")
        return decode(content), descriptors
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise
