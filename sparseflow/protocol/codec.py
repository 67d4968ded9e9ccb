"""Messages to bytes and back: msgpack arrays `[protocol version, kind, field, ...]`.

Nothing is trusted: sizes are capped before decoding, and every field is checked for its type.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn, get_args, get_type_hints

import msgpack

from sparseflow.errors import BadRequest, ProtocolMismatch
from sparseflow.protocol.messages import PROTOCOL_VERSION, Message

MOST_NBYTES = 1 << 20  # of one message; the largest request names all neurons of a layer, 4 bytes each
_MOST_ITEMS = 1 << 16
_MOST_INT = 2**64 - 1


class Undecodable(BadRequest):
    """Bytes that are not a message of ours. `request_id`: of the request they may have been, else 0."""

    def __init__(self, text: str, request_id: int = 0) -> None:
        super().__init__(text)
        self.request_id = request_id


def encode(message: Message) -> bytes:
    """One message."""
    values = [getattr(message, name) for name in _NAMES[type(message)]]
    # Names of files need not be UTF-8: what Python has in place of their bytes is written out.
    packed: bytes = msgpack.packb([PROTOCOL_VERSION, message.KIND, *values], unicode_errors="backslashreplace")
    return packed


def decode(content: bytes) -> Message:
    """
    Raises:
        ProtocolMismatch: of another version.
        Undecodable: not a message.
    """
    if len(content) > MOST_NBYTES:
        raise Undecodable(f"message of {len(content)} bytes: at most {MOST_NBYTES} are taken; ask for fewer neurons")
    try:
        parts = msgpack.unpackb(
            content,
            strict_map_key=True,
            max_str_len=MOST_NBYTES,
            max_bin_len=MOST_NBYTES,
            max_array_len=min(_MOST_ITEMS, len(content)),  # memory for it is taken before its items are seen
            max_map_len=_MOST_ITEMS,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise Undecodable(
            f"not a message ({error or type(error).__name__}); speak protocol {PROTOCOL_VERSION}"
        ) from error
    if not isinstance(parts, list) or len(parts) < 2:
        raise Undecodable(f"not a message (an array of version, kind and fields); speak protocol {PROTOCOL_VERSION}")
    if type(parts[0]) is not int or parts[0] != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"protocol version: {brief(parts[0])} there, {PROTOCOL_VERSION} here; "
            "install the same SparseFlow on both sides"
        )
    return _build(parts[1], parts[2:])


def _build(kind: object, values: list[Any]) -> Message:
    cls = _CLASSES.get(kind) if type(kind) is int else None
    if cls is None:
        raise Undecodable(f"message of kind {brief(kind)}: not known to protocol {PROTOCOL_VERSION}")
    names = _NAMES[cls]
    first = values[0] if values and names[:1] == ("request_id",) and _is_int(values[0]) else 0
    if len(values) != len(names):
        raise Undecodable(f"{cls.__name__} of {len(values)} fields, not {len(names)}", first)
    for value, is_right, name, expected in zip(values, _CHECKS[cls], names, _TYPES[cls], strict=True):
        if not is_right(value):
            raise Undecodable(f"{cls.__name__}.{name} is {brief(value)}, not {expected}", first)
    message: Message = cls(*values)
    return message


def _is_int(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_INT


def _check_of(expected: Any) -> Callable[[Any], bool]:
    """Whether a value is of a field's type."""
    checks: list[tuple[Any, Callable[[Any], bool]]] = [
        (int, _is_int),
        (float, lambda value: type(value) is float and math.isfinite(value)),
        (str, lambda value: type(value) is str),
        (bytes, lambda value: type(value) is bytes),
        (bool, lambda value: type(value) is bool),
        (list[int], lambda value: type(value) is list and all(map(_is_int, value))),
        (list[dict[str, Any]], lambda value: type(value) is list and all(type(item) is dict for item in value)),
        (dict[str, Any], lambda value: type(value) is dict and all(type(key) is str for key in value)),
    ]
    return next(check for kind, check in checks if kind == expected)


def brief(value: object) -> str:
    """What a peer sent, as an error may show it: never longer than a line, whatever it is."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__}"
    return text if len(text) < 40 else text[:40] + "..."


def _refuse_extension(code: int, content: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


_ALL: tuple[type[Any], ...] = get_args(Message)
_CLASSES: dict[int, type[Any]] = {cls.KIND: cls for cls in _ALL}
_NAMES = {cls: tuple(field.name for field in fields(cls)) for cls in _ALL}
_TYPES = {cls: tuple(get_type_hints(cls)[name] for name in _NAMES[cls]) for cls in _ALL}
_CHECKS = {cls: tuple(_check_of(expected) for expected in _TYPES[cls]) for cls in _ALL}
assert len(_CLASSES) == len(_ALL), "two messages of one kind"
