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
    └── FingerprintMismatch              fingerprint_mismatch   two things that must belong together do not

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
