"""Every error SparseFlow raises at its users, as one tree.

    SparseFlowError                      wire code
    ├── BadRequest                       bad_request      a value that no setting of ours can serve
    │   ├── UnsupportedModel             bad_request      not a ReLU OPT, or weights we cannot read
    │   └── PromptTooLong                bad_request      more positions than the model has
    ├── NotEnoughMemory                  bad_request      the memory given or free cannot hold what is asked
    ├── ArenaBusy                        arena_busy       more arena slots at once than there are
    ├── NotEnoughDisk                    disk_error       the disk cannot hold the store
    ├── DiskError                        disk_error       a file is missing, unreadable or not ours
    ├── ShardCorrupt                     shard_corrupt    bytes differ from their checksum
    ├── FingerprintMismatch              fingerprint_mismatch   two things that must belong together do not
    │   └── ProtocolMismatch             protocol_mismatch      client and server of different versions
    ├── NoSuchModel                      no_such_model    the server has no model of that name
    ├── NotPermitted                     not_permitted    a peer that may not have what it asks for
    ├── Resync                           resync           the server does not know what a request builds on
    ├── Draining                         draining         the server is ending
    ├── DeviceError                      internal         a call of the GPU's driver failed
    │   └── NoDevice                     internal         there is no GPU here, or no driver for one
    └── ServerError                      internal         a weight server cannot be reached, or failed
        ├── ServerNotRunning             internal         nobody answers under that name
        └── NoAnswer                     internal         somebody does, but not in time

A message names the value, the limit and the remedy. `BadRequest` is also a ValueError and the disk errors are also
OSErrors, so that callers who know only the standard library catch them too.
"""

from typing import ClassVar


class SparseFlowError(Exception):
    """The root of the tree."""

    wire_code: ClassVar[str] = "internal"


class BadRequest(SparseFlowError, ValueError):
    """A value that cannot be served."""

    wire_code = "bad_request"


class UnsupportedModel(BadRequest):
    """The checkpoint is of another architecture, activation or element type."""


class PromptTooLong(BadRequest):
    """The prompt, or prompt and continuation together, exceed the model's positions."""


class NotEnoughMemory(SparseFlowError, MemoryError):
    """The memory given, or free, is less than what must be resident."""

    wire_code = "bad_request"


class DiskError(SparseFlowError, OSError):
    """A file is missing, unreadable, or not what its place says."""

    wire_code = "disk_error"


class ArenaBusy(SparseFlowError):
    """More arena slots are needed at once than there are."""

    wire_code = "arena_busy"


class NotEnoughDisk(DiskError):
    """Less free disk space than the store needs."""


class ShardCorrupt(DiskError):
    """A file's bytes differ from the checksum written with them."""

    wire_code = "shard_corrupt"


class FingerprintMismatch(SparseFlowError):
    """Two parts that must come from the same model do not."""

    wire_code = "fingerprint_mismatch"


class ProtocolMismatch(FingerprintMismatch):
    """Client and server speak different versions of the protocol."""

    wire_code = "protocol_mismatch"


class NoSuchModel(SparseFlowError, LookupError):
    """The server does not serve this model."""

    wire_code = "no_such_model"


class NotPermitted(SparseFlowError, PermissionError):
    """The peer may not have what it asks for."""

    wire_code = "not_permitted"


class Resync(SparseFlowError):
    """A request builds on a session or a set that the server does not have; its sender starts afresh."""

    wire_code = "resync"


class Draining(SparseFlowError):
    """The server is ending, and begins nothing new."""

    wire_code = "draining"


class DeviceError(SparseFlowError):
    """A call of the GPU's driver failed. `name` and `number`: CUDA's, such as CUDA_ERROR_OUT_OF_MEMORY and 2."""

    def __init__(self, text: str, *, name: str = "", number: int = 0) -> None:
        super().__init__(text)
        self.name = name
        self.number = number


class NoDevice(DeviceError):
    """This host has no GPU, or no driver for one."""


class ServerError(SparseFlowError):
    """A weight server failed, or cannot be reached."""


class ServerNotRunning(ServerError, ConnectionError):
    """No weight server of that name runs."""


class NoAnswer(ServerError, TimeoutError):
    """The weight server runs, but does not answer in time."""


_OF_WIRE_CODE: dict[str, type[SparseFlowError]] = {
    cls.wire_code: cls
    for cls in (
        *(BadRequest, ArenaBusy, DiskError, ShardCorrupt, FingerprintMismatch, ProtocolMismatch),
        *(NoSuchModel, NotPermitted, Resync, Draining, ServerError),
    )
}


def of_wire_code(code: str, text: str) -> SparseFlowError:
    """The error that a peer tells of."""
    return _OF_WIRE_CODE.get(code, ServerError)(text)
