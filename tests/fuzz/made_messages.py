"""Messages and other values, made of choices."""

import struct
from collections.abc import Callable
from typing import Any

from choices import Choices
from message_fields import ALL, fields_of

MOST_INT = 2**64 - 1
MOST_DEPTH = 4
EDGES = [0, 1, 127, 128, 255, 256, 2**16 - 1, 2**16, 2**32 - 1, 2**32, 2**63 - 1, 2**63, MOST_INT]
FLOATS = [0.0, -0.0, 1.5, 1e-320, 1.8e308, float("inf"), float("-inf"), float("nan")]
LETTERS = "az09 /\0\n\x7fé\ud7ff€\uffff😀"
FIELDS = {cls: list(fields_of(cls).values()) for cls in ALL}


def some_int(choices: Choices) -> int:
    return choices.number(8) if choices.one_in(2) else choices.of(EDGES)


def some_float(choices: Choices) -> float:
    """Any, those that are no numbers too."""
    if choices.one_in(2):
        return choices.of(FLOATS)
    return float(struct.unpack("<d", choices.take(8).ljust(8, b"\0"))[0])


def some_text(choices: Choices) -> str:
    return "".join(choices.of(LETTERS) for _ in range(choices.below(8)))


def some_bytes(choices: Choices) -> bytes:
    return choices.take(choices.below(20))


def some_dict(choices: Choices, depth: int = 0) -> dict[str, Any]:
    return {some_text(choices): some_value(choices, depth + 1) for _ in range(choices.below(4))}


def some_list(choices: Choices, depth: int = 0) -> list[Any]:
    return [some_value(choices, depth + 1) for _ in range(choices.below(4))]


def some_value(choices: Choices, depth: int = 0) -> Any:
    """Whatever msgpack has a form for, but no extensions."""
    match choices.below(10 if depth < MOST_DEPTH else 8):
        case 0:
            return None
        case 1:
            return choices.one_in(2)
        case 2 | 3:
            return some_int(choices)
        case 4:
            return -choices.number(7)
        case 5:
            return some_float(choices)
        case 6:
            return some_text(choices)
        case 7:
            return some_bytes(choices)
        case 8:
            return some_list(choices, depth)
        case _:
            return some_dict(choices, depth)


def some_finite(choices: Choices) -> float:
    value = some_float(choices)
    return value if abs(value) <= 1e300 else 1.0


OF_HINT: dict[Any, Callable[[Choices], Any]] = {
    int: some_int,
    float: some_finite,
    bool: lambda choices: choices.one_in(2),
    str: some_text,
    bytes: some_bytes,
    list[int]: lambda choices: [some_int(choices) for _ in range(choices.below(5))],
    dict[str, Any]: some_dict,
    list[dict[str, Any]]: lambda choices: [some_dict(choices) for _ in range(choices.below(3))],
}


def some_message(choices: Choices) -> Any:
    """Of any kind, with right fields."""
    cls = choices.of(ALL)
    return cls(*(OF_HINT[hint](choices) for hint in FIELDS[cls]))
