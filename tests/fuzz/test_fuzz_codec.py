"""Whatever bytes come: the message that stands there, or an error for its sender. Nothing else, and little memory."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
from choices import Choices
from hypothesis import strategies as st
from made_messages import FIELDS, MOST_INT, OF_HINT, some_message, some_value
from many import a_million, on_a_share, on_some
from message_fields import ALL, OF_OTHER_TYPE, fields_of

from sparseflow.errors import ProtocolMismatch
from sparseflow.protocol.codec import Undecodable, decode, encode
from sparseflow.protocol.messages import PROTOCOL_VERSION, Message

N_BYTES = 96
DECISIONS = st.binary(min_size=N_BYTES, max_size=N_BYTES)
CLASSES = {cls.KIND: cls for cls in ALL}
LONGEST_TEXT = 200
FRAGMENTS = [
    *(b"\x92\x02", b"\x93\x02\x06", b"\x96\x02\x15\x01\x02", b"\x9a\x02\x03"),  # beginnings of messages
    *(b"\x90", b"\x91", b"\x9f", b"\xdc\xff\xff", b"\xdc\x00\x02", b"\xdd\xff\xff\xff\xff", b"\xdd\x00\x01\x00\x00"),
    *(b"\x80", b"\x81", b"\x81\xa1a", b"\x82\xa1a\x01\xa1a", b"\xde\xff\xff", b"\xdf\xff\xff\xff\xff"),
    *(b"\x81\xc4\x01a", b"\x81\x01", b"\x81\xc0", b"\x81\x90"),  # keys that are no text
    *(b"\xa0", b"\xa1a", b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\xd9\x01a", b"\xda\xff\xff", b"\xdb\xff\xff\xff\xff"),
    *(b"\xc4\x00", b"\xc4\x01\xff", b"\xc5\xff\xff", b"\xc6\xff\xff\xff\xff"),
    *(b"\xc0", b"\xc1", b"\xc2", b"\xc3", b"\x02", b"\xff", b"\xcc\x02", b"\xcd\x00\x02", b"\xd0\x80"),
    *(b"\xcf" + b"\xff" * 8, b"\xd3" + b"\xff" * 8, b"\xcb\x7f\xf8" + b"\0" * 6, b"\xca\x40\x00\x00\x00"),
    *(b"\xd4\x01\x00", b"\xd6\xff" + b"\0" * 4, b"\xc7\x00\x05", b"\xc7\x0c\xff" + b"\0" * 12, b"\xc9" + b"\xff" * 5),
]
EXTENSIONS = [msgpack.Timestamp(1), msgpack.ExtType(5, b"abc"), msgpack.ExtType(5, b"")]


# --- what stands there, read once more without care for time, memory or what an error says


def is_int(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_INT


IS_OF: dict[Any, Callable[[Any], bool]] = {
    int: is_int,
    float: lambda value: type(value) is float and math.isfinite(value),
    bool: lambda value: value is True or value is False,
    str: lambda value: type(value) is str,
    bytes: lambda value: type(value) is bytes,
    list[int]: lambda value: type(value) is list and all(is_int(item) for item in value),
    dict[str, Any]: lambda value: type(value) is dict and all(type(key) is str for key in value),
    list[dict[str, Any]]: lambda value: type(value) is list and all(type(item) is dict for item in value),
}


def plainly_read(content: bytes) -> list[Any] | None:
    """The array that bytes are, or None where they are something else or hold what no message may hold."""

    def refuse_extension(*_: Any) -> None:
        raise ValueError

    def looked_at(items: list[Any]) -> list[Any]:
        if any(isinstance(item, msgpack.Timestamp) for item in items):
            raise ValueError
        return items

    def looked_through(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        looked_at([value for _, value in pairs])
        if any(type(key) not in (str, bytes) for key, _ in pairs):
            raise ValueError
        return dict(pairs)

    try:
        read = msgpack.unpackb(
            content,
            strict_map_key=False,
            ext_hook=refuse_extension,
            list_hook=looked_at,
            object_pairs_hook=looked_through,
        )
    except Exception:
        return None
    return read if type(read) is list else None


def is_message(parts: list[Any] | None) -> bool:
    if parts is None or len(parts) < 2 or not is_int(parts[0]) or parts[0] != PROTOCOL_VERSION or not is_int(parts[1]):
        return False
    cls = CLASSES.get(parts[1])
    if cls is None or len(parts) != 2 + len(FIELDS[cls]):
        return False
    return all(IS_OF[hint](value) for hint, value in zip(FIELDS[cls], parts[2:], strict=True))


def is_of_another_version(parts: list[Any] | None) -> bool:
    return parts is not None and len(parts) >= 2 and not (is_int(parts[0]) and parts[0] == PROTOCOL_VERSION)


# --- the checks


def most_memory(content: bytes) -> int:
    """Bytes. Headers in headers may each promise as many items as the whole has bytes."""
    return (32 << 10) + 128 * len(content) + 8 * len(content) ** 2


def decoded(content: bytes) -> tuple[Message | None, Undecodable | ProtocolMismatch | None, int]:
    """The message or the refusal, and the most memory that was taken meanwhile."""
    tracemalloc.start()
    try:
        return decode(content), None, tracemalloc.get_traced_memory()[1]
    except (Undecodable, ProtocolMismatch) as error:
        return None, error, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_message_or_refused(content: bytes) -> None:
    message, refusal, peak = decoded(content)
    if peak >= most_memory(content):  # the interpreter's own table of names may have grown just then
        peak = decoded(content)[2]
    assert peak < most_memory(content), f"{peak} bytes for {len(content)}"
    parts = plainly_read(content)
    assert is_message(parts) == (refusal is None)
    if refusal is None:
        assert parts is not None
        assert type(message) is CLASSES[parts[1]]
        values = [getattr(message, name) for name in fields_of(type(message))]
        assert msgpack.packb([PROTOCOL_VERSION, parts[1], *values]) == msgpack.packb(parts) == encode(message)
        assert encode(decode(encode(message))) == encode(message)
        return
    assert type(refusal) is (ProtocolMismatch if is_of_another_version(parts) else Undecodable)
    assert len(str(refusal)) < LONGEST_TEXT
    if isinstance(refusal, Undecodable) and refusal.request_id:
        assert parts is not None
        assert refusal.request_id == parts[2]
        assert next(iter(fields_of(CLASSES[parts[1]]))) == "request_id"


def other(choices: Choices, right: Any, hint: Any) -> Any:
    """Something instead of what is right: what it might be taken for, what holds an extension, or anything."""
    match choices.below(8):
        case 0:
            return {"a": choices.of(EXTENSIONS)} if hint == dict[str, Any] else [choices.of(EXTENSIONS)]
        case 1 if hint is int:
            return choices.of([float(right), str(right), -(right >> 1), right > 0])
        case 2 | 3:
            return some_value(choices)
        case _:
            return choices.of(OF_OTHER_TYPE[hint])


def some_parts(choices: Choices) -> list[Any]:
    """Version, kind and fields, of which one is something else, too many, or missing."""
    cls = choices.of(ALL)
    hints = [int, int, *FIELDS[cls]]
    parts = [PROTOCOL_VERSION, cls.KIND, *(OF_HINT[hint](choices) for hint in FIELDS[cls])]
    match choices.below(8):
        case 0:
            return parts[: choices.below(len(parts) + 1)]
        case 1:
            return [*parts, some_value(choices)]
        case _:
            place = choices.below(len(parts))
            parts[place] = other(choices, parts[place], hints[place])
            return parts


def spoiled(choices: Choices, content: bytes) -> bytes:
    """Up to four changes anywhere."""
    for _ in range(1 + choices.below(4)):
        begin = choices.number(2) % (len(content) + 1)
        end = min(len(content), begin + choices.below(9))
        match choices.below(5):
            case 0:
                between = choices.take(1)
            case 1:
                between = b""
            case 2:
                between = choices.of(FRAGMENTS) + content[begin:end]
            case 3:
                between = choices.of(FRAGMENTS)
            case _:
                between = content[begin:end] * 2
        content = content[:begin] + between + content[end:]
    return content


def check(decisions: bytes) -> None:
    choices = Choices(decisions)
    match choices.below(8):
        case 0:
            content = choices.take(N_BYTES)
        case 1:
            content = b"".join(choices.of(FRAGMENTS) for _ in range(choices.below(24)))
        case 2 | 3 | 4:
            content = msgpack.packb(some_parts(choices))
        case 5:
            message = some_message(choices)
            content = encode(message)
            assert encode(decode(content)) == content
        case _:
            content = spoiled(choices, encode(some_message(choices)))
    assert_message_or_refused(content)


def test_any_bytes_are_the_message_that_stands_there_or_refused() -> None:
    on_some(check, DECISIONS, n=600)


@a_million
def test_bytes_are_a_message_or_refused_a_million_times(round_: int) -> None:
    on_a_share(check, round_, DECISIONS)
