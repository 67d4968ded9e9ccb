"""Every message, grouped by who receives it and on which socket.

Two sockets. `ctl.sock` (ZeroMQ) is for whoever asks how the server is. Connections to `attach.sock` (SEQPACKET) are of
two kinds: a *session*, which carries descriptors once and lives as long as it is open, and *lines*, one for each thread
of a session that fetches, which carry who wants which neurons. (ZeroMQ would add a thread on either side to every
message; where all cores compute, each costs a wait for a core.)

A *request* gets exactly one reply, which has its `request_id`; a *notice* gets none. Everything from the server names
its epoch, a random number of this run of it.

    inference process                           weight server
    session   Attach                      ->    Welcome (with descriptors) or ErrorReply
              Detach                      ->    Detached
    line      Join                        ->    nothing; ErrorReply if there is no such session
              AcquireNeurons              ->    NeuronsReady, once all are in the arena; or ErrorReply
              HintNeurons, ReleaseLeases  ->    nothing
              those of `device_messages`, where the inference process has a GPU
    ctl       StatusRequest               ->    StatusReply

Neuron ids and slots travel as little-endian uint32, ids ascending without repeats.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from sparseflow.protocol.device_messages import DeviceMessage

PROTOCOL_VERSION = 2

# How memory that is handed over is laid out: bundles of (2, hidden), one a slot; whole safetensors files otherwise.
LAYOUT_VERSION = 1

# Fields of `FetchCounts` in the order in which NeuronsReady tells them.
TOLD_COUNTS = (
    *("hits", "misses", "evictions", "hinted", "hints_useful", "hints_late", "hints_wasted"),
    *("reads", "bytes_from_disk"),
)


# --- to the weight server, on attach.sock


@dataclass(frozen=True, slots=True)
class Attach:
    """Open a session. Answered by Welcome or ErrorReply.

    model: which one; empty where there is only one. expected: what the client relies on, such as `layout`, `dtype`,
    `weights`, compared field by field with the server's.
    """

    KIND: ClassVar[int] = 1
    pid: int
    model: str
    expected: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Detach:
    """Close the session and return its leases. Answered by Detached."""

    KIND: ClassVar[int] = 2


# --- to the inference process, on attach.sock


@dataclass(frozen=True, slots=True)
class Welcome:
    """A session is open. Comes with one descriptor of shared memory for each of `regions`, in their order.

    session: 16 random bytes, for Join. profile: fields of the
    model's `ModelProfile`. identity: what `Attach.expected` is compared with. regions: each `name`, `nbytes` and, where
    the memory holds files, `parts`: name -> [offset, nbytes]. is_resident: every bundle is in the arena for good, in
    slot `layer * ffn_dim + id`. fetch_limit: neurons that the leases of this session may cover together. layer_s,
    scattered_s: the engine's `ReadTimes`. strategy: as the server was started.
    """

    KIND: ClassVar[int] = 17
    epoch: int
    session: bytes
    server_pid: int
    model: str
    profile: dict[str, Any]
    identity: dict[str, Any]
    regions: list[dict[str, Any]]
    is_resident: bool
    n_slots: int
    fetch_limit: int
    layer_s: float
    scattered_s: float
    io: str
    disk_bytes_per_s: float
    strategy: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Detached:
    """The session is closed."""

    KIND: ClassVar[int] = 18
    epoch: int


# --- to the weight server, on a line


@dataclass(frozen=True, slots=True)
class Join:
    """The first packet of a connection that is a line. A notice."""

    KIND: ClassVar[int] = 7
    epoch: int
    session: bytes


@dataclass(frozen=True, slots=True)
class AcquireNeurons:
    """Lease the bundles of one layer for one step. Answered by NeuronsReady or ErrorReply, maybe after NeuronsLeased.

    released: requests whose leases are over. timeout_s: how long to wait for slots. keep: False: what had to be read
    for this leaves the arena with its lease, and nothing is counted as hit, missed or used.
    """

    KIND: ClassVar[int] = 3
    request_id: int
    epoch: int
    layer: int
    ids: bytes
    released: list[int]
    timeout_s: float
    keep: bool


@dataclass(frozen=True, slots=True)
class HintNeurons:
    """Neurons that may be asked for. A notice."""

    KIND: ClassVar[int] = 4
    epoch: int
    layer: int
    ids: bytes


@dataclass(frozen=True, slots=True)
class ReleaseLeases:
    """Requests whose leases are over. A notice."""

    KIND: ClassVar[int] = 5
    epoch: int
    released: list[int]


# --- to the weight server, on ctl.sock


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Answered by StatusReply. Needs no session."""

    KIND: ClassVar[int] = 6
    request_id: int


# --- to the inference process, on a line


@dataclass(frozen=True, slots=True)
class NeuronsLeased:
    """Before NeuronsReady, where something has to be read: slots are leased, and all but some hold their bundles.

    slots: in the order of the ids, 4 bytes each. missing: positions among them, 4 bytes each, ascending.
    counts: of this session, TOLD_COUNTS.
    """

    KIND: ClassVar[int] = 22
    request_id: int
    epoch: int
    slots: bytes
    missing: bytes
    counts: list[int]


@dataclass(frozen=True, slots=True)
class NeuronsReady:
    """Bundles lie in the arena, and stay until the request is released.

    slots, counts: as of NeuronsLeased; both empty where that has told them.
    """

    KIND: ClassVar[int] = 19
    request_id: int
    epoch: int
    slots: bytes
    counts: list[int]


# --- to whoever asks, on ctl.sock


@dataclass(frozen=True, slots=True)
class StatusReply:
    """content: the fields that `sparseflow status --json` prints."""

    KIND: ClassVar[int] = 20
    request_id: int
    epoch: int
    content: dict[str, Any]


# --- to anybody


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A request cannot be served. request_id: 0 where it could not be read. code: the wire code of an error's class."""

    KIND: ClassVar[int] = 21
    request_id: int
    epoch: int
    code: str
    text: str


Message = (
    Attach
    | Detach
    | Welcome
    | Detached
    | Join
    | AcquireNeurons
    | HintNeurons
    | ReleaseLeases
    | StatusRequest
    | NeuronsLeased
    | NeuronsReady
    | StatusReply
    | ErrorReply
    | DeviceMessage
)
