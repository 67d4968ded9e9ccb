"""JSON of every kind, read off bytes: the numbers and texts on which readers trip, and what is made of them."""

import struct
from collections.abc import Sequence
from typing import Any

from choices import Choices

WHOLE = [1, 0, 2, 3, 4, 7, 8, 16, -1, 100, 255, 4096, 10**9, 2**31 - 1, 2**31, 2**50, 2**60, 2**63, 2**64, 10**300]
ODD = [
    1.0,
    0.0,
    0.5,
    -0.5,
    2.0,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    False,
    None,
    "",
    "1",
    "\ud800",
    "x" * 5000,
]
_DEEPEST = 3


def some_json(choices: Choices, texts: Sequence[str], depth: int = 0) -> Any:
    """
    Args:
        texts: that mean something where this will stand.
    """
    match choices.below(16 if depth < _DEEPEST else 12):
        case 0 | 1 | 2:
            return choices.of(WHOLE)
        case 3 | 4 | 5:
            return choices.of(ODD)
        case 6 | 7 | 8:
            return choices.of(texts)
        case 9:
            return struct.unpack("<d", choices.take(8).ljust(8, b"\0"))[0]
        case 10:
            return int.from_bytes(choices.take(3), "little", signed=True)
        case 11:
            return choices.take(choices.below(9)).decode("latin-1")
        case 12 | 13:
            return [some_json(choices, texts, depth + 1) for _ in range(choices.below(5))]
    return {choices.of(texts): some_json(choices, texts, depth + 1) for _ in range(choices.below(4))}
