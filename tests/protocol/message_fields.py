"""What travels of each message, as the messages themselves declare it."""

import dataclasses
from typing import Any, get_args, get_type_hints

from sparseflow.protocol.messages import Message

ALL: tuple[type[Any], ...] = get_args(Message)

NO_INT = [None, True, False, -1, -(2**63), 1.0, 2.0**64, "1", b"1", [], [1], {}]
OF_OTHER_TYPE: dict[Any, list[Any]] = {
    int: NO_INT,
    float: [None, True, 1, "1.0", b"", float("nan"), [], {}],
    bool: [None, 0, 1, 1.0, "true", b"", [], {}],
    str: [None, True, 0, 1.0, b"name", [], {}],
    bytes: [None, False, 0, 1.0, "abcd", [1, 2], {}],
    list[int]: [None, True, 3, 1.0, "12", b"12", {}, *([1, value] for value in NO_INT)],
    dict[str, Any]: [None, True, 1, 1.0, "{}", b"", [], [["a", 1]], {b"a": 1}],
    list[dict[str, Any]]: [None, True, 1, 1.0, "", b"", {}, {"name": 1}, [1], [{}, []], [{}, None]],
}


def fields_of(cls: type[Any]) -> dict[str, Any]:
    """Name -> type of the fields that travel."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
