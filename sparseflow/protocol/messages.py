"""Every message, grouped by who receives it and on which socket.

Two sockets. `attach.sock` (SEQPACKET) carries the handshake, file descriptors, and by staying open the session.
`ctl.sock` (ZeroMQ, ROUTER and DEALER) carries who wants which neurons. A *request* gets exactly one reply, which has
its `request_id`; a *notice* gets none. Everything from the server names its epoch, a random number of this run of it.

    inference process                     weight server
    Attach                    ->          Welcome (with descriptors) or ErrorReply
    AcquireNeurons            ->          NeuronsGranted, as soon as slots are leased; or ErrorReply
                              <-          BundlesArrived or BundlesFailed (notices), if some were still on their way
    HintNeurons, ReleaseLeases ->         nothing
    StatusRequest             ->          StatusReply
    Detach                    ->          Detached

Neuron ids and slots travel as little-endian uint32, ids ascending without repeats.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

PROTOCOL_VERSION = 1

# How memory that is handed over is laid out: bundles of (2, hidden), one a slot; whole safetensors files otherwise.
LAYOUT_VERSION = 1

# Fields of `FetchCounts` in the order in which NeuronsGranted tells them.
TOLD_COUNTS = (
    *("hits", "misses", "evictions", "hinted", "hints_useful", "hints_late", "hints_wasted"),
    *("reads", "bytes_from_disk"),
)

FULL_SET = 0
"""The base version of a request that names all its neurons."""


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

    session: 16 random bytes; the routing ids of the client's ctl sockets begin with them. profile: fields of the
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


# --- to the weight server, on ctl.sock


@dataclass(frozen=True, slots=True)
class AcquireNeurons:
    """Lease the bundles of one layer for one step. Answered by NeuronsGranted or ErrorReply.

    The set asked for is that of the last request for this layer on this socket, without `dropped`, with `added`; with
    base version FULL_SET it is `added`. released: requests whose leases are over. timeout_s: how long to wait for
    slots.
    """

    KIND: ClassVar[int] = 3
    request_id: int
    epoch: int
    layer: int
    base_version: int
    added: bytes
    dropped: bytes
    released: list[int]
    timeout_s: float


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


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Answered by StatusReply. Needs no session."""

    KIND: ClassVar[int] = 6
    request_id: int


# --- to the inference process, on ctl.sock


@dataclass(frozen=True, slots=True)
class NeuronsGranted:
    """Slots are leased until the request is released. Those not in `loading` can be read now.

    version: of the set, base of the next difference. slots: of `added`, in its order. moved, moved_slots: positions in
    the whole set of neurons that were kept and lie elsewhere now, and where. loading: positions in the whole set of
    bundles that are on their way; if there are any, BundlesArrived or BundlesFailed follows. counts: fields of
    `FetchCounts` of this session.
    """

    KIND: ClassVar[int] = 19
    request_id: int
    epoch: int
    version: int
    slots: bytes
    moved: bytes
    moved_slots: bytes
    loading: bytes
    counts: list[int]


@dataclass(frozen=True, slots=True)
class BundlesArrived:
    """All bundles of a granted request can be read. A notice."""

    KIND: ClassVar[int] = 20
    request_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class BundlesFailed:
    """Bundles of a granted request cannot be had; its lease is over. A notice. code, text: as ErrorReply's."""

    KIND: ClassVar[int] = 21
    request_id: int
    epoch: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class StatusReply:
    """content: the fields that `sparseflow status --json` prints."""

    KIND: ClassVar[int] = 22
    request_id: int
    epoch: int
    content: dict[str, Any]


# --- to the inference process, on both


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A request cannot be served. request_id: 0 where it could not be read. code: the wire code of an error's class."""

    KIND: ClassVar[int] = 23
    request_id: int
    epoch: int
    code: str
    text: str


Message = (
    Attach
    | Detach
    | Welcome
    | Detached
    | AcquireNeurons
    | HintNeurons
    | ReleaseLeases
    | StatusRequest
    | NeuronsGranted
    | BundlesArrived
    | BundlesFailed
    | StatusReply
    | ErrorReply
)
