"""What a process tells another so that it can open device memory or an event: plain values, none of them trusted."""

from dataclasses import dataclass
from typing import Any, Self

from sparseflow.cuda.driver import HANDLE_NBYTES, UUID_NBYTES
from sparseflow.errors import BadRequest

_MOST_NBYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class EventTicket:
    """What another process needs to open an event."""

    handle: bytes
    device_uuid: bytes

    def __post_init__(self) -> None:
        _require_bytes("handle", self.handle, HANDLE_NBYTES)
        _require_bytes("device_uuid", self.device_uuid, UUID_NBYTES)

    def to_dict(self) -> dict[str, bytes]:
        """Values that msgpack takes."""
        return {"handle": self.handle, "device_uuid": self.device_uuid}

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """
        Raises:
            BadRequest: it is not what `to_dict` makes.
        """
        return cls(**_fields(content, ("handle", "device_uuid")))


@dataclass(frozen=True, slots=True)
class SlabTicket:
    """What another process needs to open a slab: `nbytes` at `offset` of the allocation that the handle is for."""

    handle: bytes
    offset: int
    nbytes: int
    device_uuid: bytes

    def __post_init__(self) -> None:
        _require_bytes("handle", self.handle, HANDLE_NBYTES)
        _require_bytes("device_uuid", self.device_uuid, UUID_NBYTES)
        for name, value, least in (("offset", self.offset, 0), ("nbytes", self.nbytes, 1)):
            if type(value) is not int or not least <= value <= _MOST_NBYTES:
                raise BadRequest(f"slab: {name}={value!r}; it is a number of bytes from {least} to {_MOST_NBYTES}")

    def to_dict(self) -> dict[str, bytes | int]:
        """Values that msgpack takes."""
        return {
            "handle": self.handle,
            "offset": self.offset,
            "nbytes": self.nbytes,
            "device_uuid": self.device_uuid,
        }

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """
        Raises:
            BadRequest: it is not what `to_dict` makes.
        """
        return cls(**_fields(content, ("handle", "offset", "nbytes", "device_uuid")))


def format_uuid(uuid: bytes) -> str:
    """As nvidia-smi writes it."""
    text = uuid.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _require_bytes(name: str, value: object, nbytes: int) -> None:
    if type(value) is not bytes or len(value) != nbytes:
        found = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise BadRequest(f"ticket: {name} is {found}; it must be {nbytes} bytes")


def _fields(content: object, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(content, dict) or set(content) != set(names):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise BadRequest(f"ticket: has {found}; it must have {', '.join(names)} and nothing else")
    return content
