"""Sizes as people write and read them."""

import re

from sparseflow.errors import BadRequest

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE_FORMS = "6GiB or 6G (2^30), 6GB (10^9), 512M, or bytes"
"""For help: the forms that `parse_size` reads."""
_FORM = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<prefix>[kmgt])(?P<rest>i?b)?", re.IGNORECASE | re.ASCII)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str | int, what: str = "memory") -> int:
    """Bytes, from a number or from a text such as `6GiB`, `1.5GiB`, `512M`, `6GB`, `6442450944`.

    `GB` is 10^9, `GiB` 2^30, and so is `G` alone; upper and lower case are the same.

    Args:
        what: it is the size of, for the error.

    Raises:
        BadRequest: anything else.
    """
    try:
        nbytes = _nbytes(text.strip()) if isinstance(text, str) else int(text)
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise BadRequest(
            f"{what} {text!r}: write a size above 0 with its unit, such as {SIZE_FORMS}; or auto, where that is allowed"
        )
    return nbytes


def _nbytes(text: str) -> int:
    found = _FORM.fullmatch(text)
    if found is None:
        return int(text) if text.isdecimal() and text.isascii() else 0
    is_decimal = (found["rest"] or "").lower() == "b"
    unit = (1000 if is_decimal else 1024) ** _POWERS[found["prefix"].lower()]
    return int(float(found["number"]) * unit)


def format_size(nbytes: int) -> str:
    """Two decimals at most and the unit that fits, as `parse_size` reads them."""
    value, unit = nbytes / 1024, "KiB"
    for larger in list(_UNITS)[1:]:
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.2f}".rstrip("0").rstrip(".") + unit
