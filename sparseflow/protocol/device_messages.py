"""Messages about GPUs: of inference processes to their server, and of the server to its child on a GPU.

*push*: the child copies bundles to a slab that an inference process has on that GPU.

    inference process, on a line    weight server                                        GPU child
    RegisterDevice              ->                  OpenSlab (with the arena)      ->
                                <-  DeviceRegistered                               <-    SlabOpened
    PushNeurons                 ->  the bundles come into the arena, CopyBundles   ->
                                <-  NeuronsPushed                                  <-    BundlesRecorded
                                    the lease ends                                 <-    BundlesCopied
    UnregisterDevice            ->                  CloseSlab                      ->
                                <-  DeviceUnregistered                             <-    SlabClosed

*lending*: a child of its own has dense weights and predictors on a GPU, for all sessions to read there.

    BorrowDense                 ->  once it has them                               <-    RegionsLoaded
                                <-  DenseLent
    ReturnDense                 ->
                                <-  DenseReturned

Where something cannot be done ErrorReply comes instead, on either way. The child's with request_id 0 says that it ends.
Places are slots of a slab, 4 bytes each, in the order of the ids. Tickets are those of `sparseflow.cuda.tickets`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

# --- to the weight server, on a line


@dataclass(frozen=True, slots=True)
class RegisterDevice:
    """Have bundles pushed to a slab. Answered by DeviceRegistered or ErrorReply.

    slab: a SlabTicket; whole bundles, one a slot. A session has one slab at a time.
    """

    KIND: ClassVar[int] = 8
    request_id: int
    epoch: int
    slab: dict[str, Any]


@dataclass(frozen=True, slots=True)
class UnregisterDevice:
    """No more. Answered by DeviceUnregistered, once nothing writes to the slab any more and it is closed."""

    KIND: ClassVar[int] = 9
    request_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class PushNeurons:
    """Copy bundles of one layer to places of the slab. Answered by NeuronsPushed or ErrorReply.

    released, timeout_s: as in AcquireNeurons. What is pushed has no lease that the inference process could release.
    """

    KIND: ClassVar[int] = 10
    request_id: int
    epoch: int
    layer: int
    ids: bytes
    places: bytes
    released: list[int]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class BorrowDense:
    """Read dense weights and predictors where the server has them on a GPU. Answered by DenseLent or ErrorReply."""

    KIND: ClassVar[int] = 11
    request_id: int
    epoch: int
    device_uuid: bytes


@dataclass(frozen=True, slots=True)
class ReturnDense:
    """They are not mapped any more. Answered by DenseReturned."""

    KIND: ClassVar[int] = 12
    request_id: int
    epoch: int


# --- to the inference process, on a line


@dataclass(frozen=True, slots=True)
class DeviceRegistered:
    """The slab is open. event: an EventTicket; it was recorded, and is recorded anew after the copies of each push."""

    KIND: ClassVar[int] = 23
    request_id: int
    epoch: int
    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeviceUnregistered:
    """No slab is open."""

    KIND: ClassVar[int] = 24
    request_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class NeuronsPushed:
    """The copies have begun, and the event is recorded behind them. counts: of this session, TOLD_COUNTS."""

    KIND: ClassVar[int] = 25
    request_id: int
    epoch: int
    counts: list[int]


@dataclass(frozen=True, slots=True)
class DenseLent:
    """Comes with a descriptor of the process that has them: where that ends, they are not to be touched any more.

    slab: a SlabTicket of all. offsets: where in it the regions `dense` and `predictors` begin.
    """

    KIND: ClassVar[int] = 26
    request_id: int
    epoch: int
    slab: dict[str, Any]
    offsets: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DenseReturned:
    """Nothing is lent to this session."""

    KIND: ClassVar[int] = 27
    request_id: int
    epoch: int


# --- to the inference process, on its session


@dataclass(frozen=True, slots=True)
class ServerEnds:
    """A notice to whom something is lent: return it soon, for the server is about to end."""

    KIND: ClassVar[int] = 28
    epoch: int


# --- to a GPU child


@dataclass(frozen=True, slots=True)
class LoadRegions:
    """Comes with a descriptor for each region: `name`, `nbytes`. Answered by RegionsLoaded or ErrorReply."""

    KIND: ClassVar[int] = 35
    request_id: int
    model: str
    regions: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class OpenSlab:
    """Comes with the descriptor of the arena. slab: its number from now on. Answered by SlabOpened or ErrorReply."""

    KIND: ClassVar[int] = 32
    request_id: int
    slab: int
    ticket: dict[str, Any]
    model: str
    n_slots: int
    slot_nbytes: int


@dataclass(frozen=True, slots=True)
class CopyBundles:
    """From arena slots to places, 4 bytes each. Answered by BundlesRecorded, then BundlesCopied; or ErrorReply.

    After an ErrorReply the slab is closed.
    """

    KIND: ClassVar[int] = 33
    request_id: int
    slab: int
    slots: bytes
    places: bytes


@dataclass(frozen=True, slots=True)
class CloseSlab:
    """Answered by SlabClosed, also where it is closed already."""

    KIND: ClassVar[int] = 34
    request_id: int
    slab: int


# --- from a GPU child


@dataclass(frozen=True, slots=True)
class ChildReady:
    """The first that it says: it has the GPU."""

    KIND: ClassVar[int] = 48
    device_name: str
    device_uuid: bytes


@dataclass(frozen=True, slots=True)
class SlabOpened:
    """event: an EventTicket."""

    KIND: ClassVar[int] = 49
    request_id: int
    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BundlesRecorded:
    """The copies have begun, and the event is recorded behind them."""

    KIND: ClassVar[int] = 50
    request_id: int


@dataclass(frozen=True, slots=True)
class BundlesCopied:
    """The copies are done."""

    KIND: ClassVar[int] = 51
    request_id: int


@dataclass(frozen=True, slots=True)
class SlabClosed:
    """Nothing writes to it any more, and it is not mapped."""

    KIND: ClassVar[int] = 52
    request_id: int


@dataclass(frozen=True, slots=True)
class RegionsLoaded:
    """They lie on the GPU for good. slab, offsets: as in DenseLent."""

    KIND: ClassVar[int] = 53
    request_id: int
    slab: dict[str, Any]
    offsets: dict[str, Any]


DeviceMessage = (
    RegisterDevice
    | UnregisterDevice
    | PushNeurons
    | DeviceRegistered
    | DeviceUnregistered
    | NeuronsPushed
    | OpenSlab
    | CopyBundles
    | CloseSlab
    | ChildReady
    | SlabOpened
    | BundlesRecorded
    | BundlesCopied
    | SlabClosed
    | BorrowDense
    | ReturnDense
    | DenseLent
    | DenseReturned
    | ServerEnds
    | LoadRegions
    | RegionsLoaded
)
