"""Sizes as people write and read them."""

from sparseflow.errors import BadRequest

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes, from a number or from a text such as `6GiB`, `1.5GiB`, `512MiB`.

    Raises:
        BadRequest: anything else.
    """
    number, unit = (text[:-3], text[-3:]) if isinstance(text, str) else (text, "")
    try:
        nbytes = int(float(number) * _UNITS[unit]) if unit else int(number)
    except (ValueError, KeyError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise BadRequest(f"memory {text!r}: write a size above 0 with its unit, such as 6GiB or 512MiB, or auto")
    return nbytes


def format_size(nbytes: int) -> str:
    """Two decimals at most and the unit that fits, as `parse_size` reads them."""
    value, unit = nbytes / 1024, "KiB"
    for larger in list(_UNITS)[1:]:
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.2f}".rstrip("0").rstrip(".") + unit
