"""Values of files that anybody may have written: of the type and range that is asked for, or a ValueError says so."""

import dataclasses
import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# Above every size there is, and small enough that products of a few fit where kernels count.
MOST_NBYTES = 1 << 50
MOST_OF_A_SIZE = (1 << 31) - 1
_BREAKS = ("Cc", "Cs", "Zl", "Zp")  # control characters, half letters, and ends of lines
_SHOWN = 80  # characters of a value that an error repeats


def shown(value: object) -> str:
    """A value as an error tells of it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def reason_of(error: Exception) -> str:
    """What an error says; of a KeyError, in words."""
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


def in_one_line(text: str) -> str:
    """A name that a line can show: what would break it is written as Python does."""
    letters = (
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in _BREAKS else letter
        for letter in text
    )
    return "".join(letters)


def whole_number(value: object, what: str, least: int, most: int) -> int:
    """
    Raises:
        ValueError: no integer, or not from `least` to `most`; true and false are none.
    """
    if type(value) is not int or not least <= value <= most:
        wanted = f"a whole number from {least} to {most}" if least < most else str(least)
        raise ValueError(f"{what} is {shown(value)}, not {wanted}")
    return value


def number(value: object, what: str, least: float, most: float) -> float:
    """
    Raises:
        ValueError: no number, or not from `least` to `most`; NaN is not, and true and false are none.
    """
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        raise ValueError(f"{what} is {shown(value)}, not a number from {least:g} to {most:g}")
    return float(value)  # type: ignore[arg-type]


def mapping(value: object, what: str) -> Mapping[str, Any]:
    """
    Raises:
        ValueError: no JSON object.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, not a JSON object")
    return value


def record(kind: type[T], value: object, what: str) -> T:
    """A dataclass of a JSON object's fields, whose values are still to be checked.

    Raises:
        ValueError: no JSON object, or one of other fields.
    """
    content = mapping(value, what)
    known = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if missing := [name for name, default in known.items() if default is dataclasses.MISSING and name not in content]:
        raise ValueError(f"{what} has no {', '.join(missing)}")
    if unknown := [name for name in content if name not in known]:
        raise ValueError(f"{what} has {shown(unknown[0])}, which is not known")
    return kind(**content)


def listing(value: object, what: str) -> list[Any]:
    """
    Raises:
        ValueError: no JSON array.
    """
    if not isinstance(value, list):
        raise ValueError(f"{what} is {shown(value)}, not a JSON array")
    return value


def truth(value: object, what: str) -> bool:
    """
    Raises:
        ValueError: neither true nor false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{what} is {shown(value)}, not true or false")
    return value


def checksum(value: object, what: str) -> str:
    """
    Raises:
        ValueError: not an xxh3-64 as `FileEntry` has it.
    """
    if not isinstance(value, str) or len(value) != 16 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{what} is {shown(value)}, not 16 hexadecimal digits")
    return value
